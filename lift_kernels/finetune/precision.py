"""The precision of forward passes, the same in training, measuring and timing."""

from __future__ import annotations

import torch

from .config import Settings


def autocast(settings: Settings, device: torch.device) -> torch.autocast:
    """Return a context for forward passes: bfloat16 with ``settings.autocast``, else no change."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast)
