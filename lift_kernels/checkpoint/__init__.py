"""Training state on disk: one atomic, checksummed file without pickle."""

from .training_state import load_checkpoint, rng_state, save_checkpoint, set_rng_state

__all__ = ["load_checkpoint", "rng_state", "save_checkpoint", "set_rng_state"]
