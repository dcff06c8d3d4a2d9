"""Other optimizers on the ``values`` of packed layers, such as torch.optim.SGD.

They know nothing of the layer's weight. So two hooks run around every optimizer's step. Before the
step, values follow a weight that was changed. After it, the weight follows the values. LiftAdamW
writes both by itself.

torch offers such hooks for a whole process only. So they are installed as late as possible: when a
gradient reaches values that no LiftAdamW holds. They go when a LiftAdamW has taken all such values.
A process that trains with LiftAdamW alone never runs them.

Not followed are

- a second optimizer on values that a LiftAdamW holds (once it is deleted, they are followed again);
- values whose ``grad`` is set by hand, from `torch.autograd.grad` for instance, when no backward
  pass has reached them before.

Call `PackedLinear.scatter` after such a step.

A refresh raises when another optimizer trains the values: its moments would belong to other
entries.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from . import trainable
from .weight_version import warn_of_changed

_watches: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # values -> handle of `_on_gradient`, None once removed
_owners: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # values -> token of the last LiftAdamW that took them
_holders: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> the last LiftAdamW that took it, weakly
_followed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # its keys: values with a gradient and no LiftAdamW
_installed: list[RemovableHandle] = []  # of the hooks of the process


def watch(values: Tensor) -> None:
    """Install the hooks of the process once a gradient reaches these ``values``.

    A second call for the same values does nothing, so those that are claimed stay so.
    """
    if values in _watches:
        return
    required = values.requires_grad
    values.requires_grad_(True)  # torch hooks no frozen tensor, but keeps the hook of one that is frozen later.
    _watches[values] = values.register_post_accumulate_grad_hook(_on_gradient)
    values.requires_grad_(required)


def claim(parameters: Iterable[Tensor], optimizer: Optimizer | None = None) -> None:
    """Note that ``optimizer``, a LiftAdamW, holds these parameters.

    Those that are the ``values`` of a packed layer are watched no longer, until it is deleted.
    """
    parameters = list(parameters)
    if optimizer is not None:
        for parameter in parameters:
            _holders[parameter] = weakref.ref(optimizer)
    token, taken = object(), [parameter for parameter in parameters if trainable.layers_of(parameter)]
    for parameter in taken:
        _stop_watching(parameter)
        _followed.pop(parameter, None)
        _owners[parameter] = token
    if optimizer is not None and taken:
        weakref.finalize(optimizer, _release, token).atexit = False
    if not _followed:
        while _installed:
            _installed.pop().remove()


def holder_of(parameter: Tensor) -> Optimizer | None:
    """The last LiftAdamW that took this parameter."""
    held = _holders.get(parameter)
    return None if held is None else held()


def _release(token: object) -> None:
    """Watch the values again that a LiftAdamW held, unless another one has taken them since."""
    for values in [values for values, owner in _owners.items() if owner is token]:
        del _owners[values], _watches[values]
        if trainable.layers_of(values):
            watch(values)
            if values.grad is not None:
                _on_gradient(values)


def _on_gradient(values: Tensor) -> None:
    _stop_watching(values)
    _followed[values] = None
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_before))
        _installed.append(register_optimizer_step_post_hook(_after))


def _stop_watching(values: Tensor) -> None:
    handle = _watches.get(values)
    if handle is not None:
        handle.remove()
    _watches[values] = None


def _layers(optimizer: Optimizer) -> Iterator[Any]:
    """One layer of every ``values`` that an optimizer other than LiftAdamW holds."""
    if getattr(optimizer, "writes_weights", False):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield from trainable.layers_of(parameter)[:1]


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for layer in _layers(optimizer):
        layer.store_values()
    changed = [layer.lift_name or "a layer" for layer in _layers(optimizer) if layer.follow_weight()]
    warn_of_changed(changed, "the values of packed layers follow them")


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for layer in _layers(optimizer):
        if layer.values.grad is not None:
            layer.scatter()
            for sharer in trainable.layers_of(layer.values):
                sharer.stepped_by = type(optimizer).__name__
