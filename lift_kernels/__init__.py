"""lift_kernels: fused kernels for LIFT fine-tuning, which trains only the principal weights of a model."""

from .delta import apply_delta, delta_info, revert_delta, save_delta, switch_delta
from .dispatch import Backend, backends
from .masks import principal_indices
from .ops import packed_gather, packed_l2_norm, packed_migrate, packed_scatter_, sparse_adamw_
from .optimizer import LiftAdamW
from .packed import PackedState
from .param_groups import lift_param_groups

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "LiftAdamW",
    "PackedState",
    "apply_delta",
    "backends",
    "delta_info",
    "lift_param_groups",
    "packed_gather",
    "packed_l2_norm",
    "packed_migrate",
    "packed_scatter_",
    "principal_indices",
    "revert_delta",
    "save_delta",
    "sparse_adamw_",
    "switch_delta",
]
