"""Native code: how it is built, and what training uses; dynamics have theirs in ``ffpretrain.md.native``."""
