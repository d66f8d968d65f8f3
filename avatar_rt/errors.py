"""The errors a user of avatar_rt can see. Each message is one sentence built from values."""


class AvatarError(Exception):
    """Base of every error that avatar_rt raises on purpose; the command line exits with 2 on it."""


class InputError(AvatarError, ValueError):
    """What the caller gave is wrong: a shape, a file, an option. Says what was got and what was expected."""


class UnsupportedError(AvatarError, RuntimeError):
    """The call is right but nothing here can run it. Lists every implementation with its reason."""


class ArtifactError(AvatarError, RuntimeError):
    """A weight file, cache or engine does not fit this build. Names the command that remakes it."""


class RankError(AvatarError, RuntimeError):
    """Another process of a run over several ranks has ended or stopped answering. What was written so far is whole."""
