"""The optimizer: its state, its step and its refresh schedule."""

from .lift_adamw import LiftAdamW
from .refresh import MatrixRefresh, RefreshReport
from .state import PackedState

__all__ = ["LiftAdamW", "MatrixRefresh", "PackedState", "RefreshReport"]
