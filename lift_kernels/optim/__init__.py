"""The optimizer: its state, its step and its refresh schedule."""

from .ddp_hook import trained_entries_hook
from .lift_adamw import LiftAdamW
from .packed_state import PackedState
from .refresh import MatrixRefresh, RefreshReport

__all__ = ["LiftAdamW", "MatrixRefresh", "PackedState", "RefreshReport", "trained_entries_hook"]
