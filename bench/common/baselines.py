"""Other packages' optimizers as baselines: finding them, building them, and their state."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

BLOCK = 256
"""Entries that share a scale in bitsandbytes and torchao."""


def attribute(package: str, module: str, name: str) -> Callable:
    """A class or function of a baseline. ImportError says what to install."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"not installed ({error.name} is missing): pip install {package}") from None


def parameters(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[nn.Parameter]:
    """Parameters that share the weights and have these gradients."""
    result = [nn.Parameter(weight) for weight in weights]
    for parameter, grad in zip(result, grads):
        parameter.grad = grad
    return result


def tensors_within(value: object) -> Iterator[Tensor]:
    """The tensors within nested containers, tensor subclasses and plain objects.

    Parameters are left out: they are the weights themselves, as a group holds them.
    """
    if isinstance(value, nn.Parameter):
        return
    if isinstance(value, Tensor):
        if type(value) is not Tensor and hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from tensors_within(getattr(value, name))
        else:
            yield value
    elif isinstance(value, dict):
        yield from tensors_within(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_within(inner)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from tensors_within(vars(value))
