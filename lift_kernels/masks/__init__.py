"""Which entries of a matrix are trained."""

from .lowrank import LowRankFactors, low_rank_factors
from .principal import Mask, MaskRequest, principal_indices, principal_masks

__all__ = ["LowRankFactors", "Mask", "MaskRequest", "low_rank_factors", "principal_indices", "principal_masks"]
