"""Layers and parameters with packed gradients."""

from .functional import lift_linear
from .linear import LiftConv1D, LiftLinear, PackedLinear
from .packing import pack_gradients, unpack
from .param_groups import lift_param_groups

__all__ = [
    "LiftConv1D",
    "LiftLinear",
    "PackedLinear",
    "lift_linear",
    "lift_param_groups",
    "pack_gradients",
    "unpack",
]
