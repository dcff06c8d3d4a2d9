"""lift_kernels: fused kernels for LIFT fine-tuning, which trains only the principal weights of a
model.
"""

from .delta import apply_delta, delta_info, revert_delta, save_delta, switch_delta
from .dispatch import Backend, backends
from .linear import LiftLinear, lift_linear
from .masks import principal_indices
from .ops import packed_gather, packed_l2_norm, packed_migrate, packed_scatter_, packed_weight_grad, sparse_adamw_
from .optimizer import LiftAdamW
from .packed import PackedState
from .packing import pack_gradients, unpack
from .param_groups import lift_param_groups

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "LiftAdamW",
    "LiftLinear",
    "PackedState",
    "apply_delta",
    "backends",
    "lift_linear",
    "delta_info",
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
    "unpack",
    "switch_delta",
]
