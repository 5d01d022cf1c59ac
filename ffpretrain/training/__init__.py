"""ffpretrain.training."""
