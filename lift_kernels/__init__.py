"""Fused kernels for LIFT fine-tuning, which trains only the principal weights of a model."""

from typing import TYPE_CHECKING, Any

from .masks import principal_indices
from .nn import LiftLinear, lift_linear, lift_param_groups, pack_gradients, unpack
from .ops import (
    arena_migrate_,
    packed_gather,
    packed_l2_norm,
    packed_migrate,
    packed_scatter_,
    packed_weight_grad,
    sparse_adamw_,
)
from .ops.dispatch import Backend, backends
from .optim import LiftAdamW, PackedState, trained_entries_hook

if TYPE_CHECKING:
    from .delta import apply_delta, delta_info, revert_delta, save_delta, switch_delta
    from .planning import plan_memory

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "LiftAdamW",
    "LiftLinear",
    "PackedState",
    "apply_delta",
    "arena_migrate_",
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
    "plan_memory",
    "principal_indices",
    "revert_delta",
    "save_delta",
    "sparse_adamw_",
    "switch_delta",
    "trained_entries_hook",
    "unpack",
]

_LATER = dict.fromkeys(("apply_delta", "delta_info", "revert_delta", "save_delta", "switch_delta"), "delta")
_LATER |= {"plan_memory": "planning"}


def __getattr__(name: str) -> Any:
    """Load `lift_kernels.delta` or `planning` at its first use. Imports are faster without them."""
    if name in _LATER or name in _LATER.values():
        from importlib import import_module

        package = import_module(f".{_LATER.get(name, name)}", __name__)
        return getattr(package, name) if name in _LATER else package
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
