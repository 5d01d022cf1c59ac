"""ffpretrain.recipes."""
