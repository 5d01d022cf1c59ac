"""Native evaluation on CPUs: the network's energies and forces written out in C++, built where it runs."""

from ffpretrain.md.native.build import NativeUnavailable
from ffpretrain.md.native.path import NativeNetwork, NativePath

__all__ = ["NativeNetwork", "NativePath", "NativeUnavailable"]
