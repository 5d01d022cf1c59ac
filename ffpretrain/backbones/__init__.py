"""ffpretrain.backbones."""
