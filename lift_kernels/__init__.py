"""Fused kernels for LIFT fine-tuning, which trains only the principal weights of a model."""

from .delta import apply_delta, delta_info, revert_delta, save_delta, switch_delta
from .masks import principal_indices
from .nn import LiftLinear, lift_linear, lift_param_groups, pack_gradients, unpack
from .ops import packed_gather, packed_l2_norm, packed_migrate, packed_scatter_, packed_weight_grad, sparse_adamw_
from .ops.dispatch import Backend, backends
from .optim import LiftAdamW, PackedState

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "LiftAdamW",
    "LiftLinear",
    "PackedState",
    "apply_delta",
    "backends",
    "delta_info",
    "lift_linear",
    "lift_param_groups",
    "pack_gradients",
    "packed_gather",
    "packed_l2_norm",
    "packed_migrate",
    "packed_scatter_",
    "packed_weight_grad",
    "principal_indices",
    "revert_delta",
    "save_delta",
    "sparse_adamw_",
    "switch_delta",
    "unpack",
]
