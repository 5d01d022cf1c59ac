"""ffpretrain.testing."""
