"""ffpretrain.zoo."""
