"""Native evaluation on CPUs: the network's energies and forces written out in C++, built where it runs."""

from ffpretrain.md.native.build import NativeUnavailable
from ffpretrain.md.native.many import NativeMany
from ffpretrain.md.native.path import NativeNetwork, NativePath, StructurePairs

__all__ = ["NativeMany", "NativeNetwork", "NativePath", "NativeUnavailable", "StructurePairs"]
