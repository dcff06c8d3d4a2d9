"""Other optimizers on the ``values`` of packed layers, such as torch.optim.SGD.

They know nothing of the layer's weight. So two hooks run around the step of every optimizer, from
the time when the first layer is packed. Before the step, values follow a weight that was changed.
After it, the weight follows the values. LiftAdamW writes both by itself.

A refresh raises when another optimizer trains the values: its moments would belong to other
entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import trainable

_installed = False


def install() -> None:
    """Add the hooks, once per process."""
    global _installed
    if not _installed:
        _installed = True
        register_optimizer_step_pre_hook(_before)
        register_optimizer_step_post_hook(_after)


def _layers(optimizer: Optimizer) -> Iterator[Any]:
    """One layer of every ``values`` that an optimizer other than LiftAdamW holds."""
    if getattr(optimizer, "writes_weights", False):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield from trainable.layers_of(parameter)[:1]


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for layer in _layers(optimizer):
        layer.follow_weight()


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for layer in _layers(optimizer):
        if layer.values.grad is not None:
            layer.scatter()
            for sharer in trainable.layers_of(layer.values):
                sharer.stepped_by = type(optimizer).__name__
