"""ffpretrain.objectives."""
