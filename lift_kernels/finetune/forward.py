"""How the forward pass of a model is called, and what it does, whatever its architecture.

Architectures take different arguments, some read padding as input, and some read the weights of
layers that they never call. All of it is asked of the model itself: its signature, and one short
text that it reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import UserError
from ..nn.weight_kinds import is_linear

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""By dtype: how far logits may lie apart, relative to the largest, and still count as the same."""
LEAK = 0.02
"""Largest effect of packed samples on each other, as a share of that of samples that are seen. It
is above the rounding of experts in bfloat16, which sort tokens; layers of attention have none.
"""
PROBE = 16  # tokens of the short text, and of its padding

_forms: WeakIdKeyDictionary = WeakIdKeyDictionary()  # model -> its Form


@dataclass(frozen=True)
class Form:
    """How a model is called.

    Attributes:
        arguments: names of the arguments of its forward pass.
        padding: whether masked tokens in front of a text change nothing. Some recurrent models
            read them as input.
    """

    arguments: frozenset[str]
    padding: bool = True

    def accepted(self, **arguments: Any) -> dict[str, Any]:
        """Return the arguments that the model takes."""
        return {name: value for name, value in arguments.items() if name in self.arguments}

    @property
    def cache(self) -> str | None:
        """The model's name for its cache argument, or None without one."""
        # transformers is renaming the argument, so that both names have to work.
        return next((name for name in ("cache", "past_key_values") if name in self.arguments), None)


def base_of(model: Any) -> Any:
    """Return the model inside wrappers of DDP and peft, which hide its signature."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def form_of(model: Any) -> Form:
    """Return how a model is called. It is asked once.

    Raises:
        UserError: for a model that does not predict the next token of a text.
    """
    base = base_of(model)
    if base not in _forms:
        _forms[base] = _ask(base)
    return _forms[base]


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Return the position of each token from an attention mask (rows, tokens); 0 for padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def logits_at(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, columns: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Return logits (rows, columns, vocabulary) of a batch that is padded on the left.

    The head runs only on those columns, where the model allows that.

    Args:
        model: a causal language model.
        ids: token ids, (rows, tokens).
        mask: attention mask, (rows, tokens).
        columns: positions in the batch, int64.
        positions: position of each token in its sample, (rows, tokens), where rows hold several
            samples that do not see each other. The model gets no mask then (`check_packing`).
    """
    return _logits(model, form_of(model), ids, mask, columns, positions)


def _logits(
    model: Any,
    form: Form,
    ids: torch.Tensor,
    mask: torch.Tensor,
    columns: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    seen = {"attention_mask": mask, "position_ids": positions_of(mask)}
    seen = seen if positions is None else {"position_ids": positions}
    logits = model(input_ids=ids, **form.accepted(**seen, logits_to_keep=columns, use_cache=False)).logits
    return logits if "logits_to_keep" in form.arguments else logits[:, columns]


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Refuse a model that does not keep packed samples apart by positions that begin again.

    Raises:
        UserError: when logits of a text depend on another text in front of it.
    """
    base, form = base_of(model), form_of(model)
    apart = "position_ids" in form.arguments
    if apart:
        with _mode(base, training=False), explained(base):
            apart = _keeps_apart(base, form)
    if not apart:
        raise UserError(f"{type(base).__name__} does not keep packed samples apart; leave out --packing")


def _keeps_apart(model: Any, form: Form) -> bool:
    """Return whether positions that begin again hide the text in front, and change nothing else."""
    text = _text(model)
    columns = torch.arange(PROBE, device=model.device)
    again = torch.cat([columns, columns])[None]
    alone = _logits(model, form, text, torch.ones_like(text), columns)
    packed, joined = [], []
    for front in (text.flip(1), text[:, :1].expand_as(text)):
        both = torch.cat([front, text], 1)
        whole = torch.ones_like(both)
        packed.append(_logits(model, form, both, whole, columns + PROBE, again))
        joined.append(_logits(model, form, both, whole, columns + PROBE))
    leak, effect = ((first - second).abs().max() for first, second in (packed, joined))
    return _close(packed[0], alone) and bool(leak <= LEAK * effect)


@torch.no_grad()
def bypassed_layers(model: Any) -> list[str]:
    """Return the names of linear layers that a training pass never calls.

    Mamba's code reads the weights of such layers itself, so a packed layer would get no gradient.
    """
    layers = {name: m for name, m in model.named_modules() if is_linear(m)}
    called: set[str] = set()
    handles = [m.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, m in layers.items()]
    text = _text(model)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with _mode(model, training=True), torch.random.fork_rng(devices), explained(model):  # dropout draws numbers
            logits_at(model, text, torch.ones_like(text), torch.arange(1, device=model.device))
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in layers if name not in called]


@contextmanager
def explained(model: Any) -> Iterator[None]:
    """Turn whatever the code of an unknown architecture raises into one line."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"{type(base_of(model)).__name__} cannot be run as a causal language model ({type(error).__name__}); give "
            "another model, or train this one with LiftAdamW in a loop of your own"
        ) from error


@contextmanager
def _mode(model: Any, training: bool) -> Iterator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def _text(model: Any) -> torch.Tensor:
    """Return the short text: ids (1, PROBE)."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.arange(PROBE, device=model.device)[None] % vocabulary


@torch.no_grad()
def _ask(model: Any) -> Form:
    """Run a short text with another last token, and with padding, and compare the logits."""
    form = Form(frozenset(inspect.signature(model.forward).parameters))
    with explained(model), _mode(model, training=False):
        text = _text(model)
        ones, columns = torch.ones_like(text), torch.arange(PROBE, device=model.device)
        alone = _logits(model, form, text, ones, columns)
        changed = _logits(model, form, torch.cat([text[:, :-1], text[:, :1]], 1), ones, columns)
        mask = torch.cat([torch.zeros_like(text), ones], 1)
        padded = _logits(model, form, torch.cat([text.flip(1), text], 1), mask, columns + PROBE)
        padding = _close(padded, alone)
        causal = _close(changed[:, :-1], alone[:, :-1])
    if not causal and alone.isfinite().all():
        raise UserError(
            f"{type(model).__name__} sees later tokens, so it cannot be trained to predict them; give a causal "
            "language model"
        )
    return Form(form.arguments, padding)


def _close(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether logits are the same up to rounding."""
    return bool((logits - expected).abs().max() <= TOLERANCE[expected.dtype] * expected.abs().max())
