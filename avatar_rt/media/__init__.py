"""Files, codecs and faces. Import the module that is needed: ``reader``, ``writer``, ``audio``, ``face``, ``sheet``."""
