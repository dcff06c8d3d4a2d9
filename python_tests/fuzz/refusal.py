"""Refusals: calls of the package that raise, and what they must say."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch

import lift_kernels

from .spoils import SPOILS

PACKAGE = str(Path(lift_kernels.__file__).parent)
TORCH_OPTIM = str(Path(torch.optim.__file__).parent)
ALLOWED = (
    r"unscale_ does not reach packed gradients",
    r"no linear weight of Model is left with include=.* exclude=",
    r"extra=.* matches no further",
)
"""What may be refused although nothing is spoiled."""


class Refused(Exception):
    """A call of the package was refused in its own words, and changed nothing."""


def check_refusal(error: Exception) -> None:
    """Assert that an exception is the package's own, or that of torch's optimizers."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    own = where.filename.startswith((PACKAGE, TORCH_OPTIM))
    kind = isinstance(error, (ValueError, TypeError, RuntimeError, IndexError))
    if not (own and kind):
        raise AssertionError(f"{type(error).__name__} from {where.filename}:{where.lineno}: {error}") from error


def check_words(message: str, spoil: str | None) -> None:
    """Assert that a refusal names what is wrong, or has a reason where nothing is."""
    words = SPOILS[spoil].says if spoil else ALLOWED
    missing = [word for word in words if not re.search(word, message)]
    if spoil:
        assert not missing, f"{spoil}: the refusal does not say {missing}: {message}"
    else:
        assert len(missing) < len(words), f"refused without a reason: {message}"
