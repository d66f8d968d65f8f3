"""nn.Modules: tensors in, tensors out, calling only ``avatar_rt.ops``.

Dimension letters, used as name suffixes: B batch, F pixel frames, T latent frames, H W latent size, G generated
rows, R reference rows, L either, N heads, D head dim, C channels, S a context's length, A speech-feature width,
M motion-token width. H is never heads, N is never frames.
"""
