"""Delta files: the entries of a fine-tuned model that differ from its base."""

from .apply import apply_delta, revert_delta, switch_delta
from .format import DeltaInfo, delta_info
from .save import save_delta

__all__ = ["DeltaInfo", "apply_delta", "delta_info", "revert_delta", "save_delta", "switch_delta"]
