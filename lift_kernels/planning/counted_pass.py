"""What a forward and a backward pass take, counted on a model without numbers.

The code of the model runs on fake tensors, and every storage counts while it is alive
(`live_storages`). A long model is counted twice, with two and with three periods of its layers: a
period is what repeats, such as one layer of a Llama, or five layers with a window and one without.
Memory grows linearly with the layers at two times, which the peak is the larger one of:

- *top*: until the gradient has left the last period. All activations are there, and the gradients
  of the last period and the head.
- *bottom*: while the gradient goes through the first period. All gradients are there, and the
  activations of one period.

In between activations are freed and gradients come, both linearly. So

    peak(layers) = max(top, bottom), each a + b x layers.

Without checkpointing a layer keeps all that its backward pass reads. With it a layer keeps its
input, and one layer at a time is computed again. Loss and logits are in a.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .conversions import Kind, add_lora, convert
from .live_storages import LiveStorages
from .model_shapes import ModelShapes, fake_tensors

LEAST, MOST = 2, 3
"""Periods that are counted. Longer models follow from both."""


@dataclass(frozen=True)
class PassBytes:
    """Bytes of a forward and a backward pass, beside the model's weights.

    Attributes:
        added: what the form of training adds to the model: values, index lists, adapters.
        gradients: of all trained weights, after the backward pass.
        activations: the most that activations take at once, with what ops leave for a moment.
        together: the most that activations and gradients take at once. It is less than their sum,
            because activations go while gradients come.
        halved: ``together`` with gradients of half the bytes.
    """

    added: int
    gradients: int
    activations: int
    together: int
    halved: int


@dataclass(frozen=True)
class _Count:
    """The count of a model with some of the layers: peaks by share of the gradients."""

    added: int
    gradients: int
    top: dict[float, int]
    bottom: dict[float, int]


@dataclass(frozen=True)
class _Options:
    """Arguments of `count_pass`."""

    kind: Kind
    batch: int
    seq: int
    checkpointing: bool
    passes: int
    padded: bool
    autocast: bool
    device: str


def count_pass(
    shapes: ModelShapes,
    kind: Kind,
    *,
    batch: int,
    seq: int,
    checkpointing: bool = False,
    passes: int = 1,
    padded: bool = False,
    autocast: bool = False,
    device: str = "cuda",
) -> PassBytes:
    """Count a pass over a batch of sequences.

    Args:
        shapes: the model.
        kind: what is trained.
        batch, seq: sequences, and tokens of each.
        checkpointing: whether layers keep their inputs alone.
        passes: backward passes of a step; after the first one gradients are there from the start.
        padded: whether sequences are padded, so that attention gets a mask.
        autocast: whether the forward pass runs in bf16 where the operations allow it.
        device: "cuda" counts the dense gradient that a packed layer makes within its op on a GPU.

    Raises:
        UserError: for a model that cannot be run so.
    """
    layers = decoder_layers(shapes.model)
    start, period = repetition([_signature(layer) for layer in layers])
    repeats, rest = divmod(len(layers) - start, period)
    lengths = [start + n * period + rest for n in (LEAST, MOST)]
    if repeats <= MOST or sum(lengths) > len(layers):
        lengths = [len(layers)]
    options = _Options(kind, batch, seq, checkpointing, min(passes, 2), padded, autocast, device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names that transformers and peft are about to change
            counts = [_count(shapes, options, length, (start + period, rest + period)) for length in lengths]
    except UserError:
        raise
    except Exception as error:  # whatever the code of an unknown architecture raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{type(shapes.model).__name__} cannot be run without numbers ({reason}), so its activations cannot be "
            "counted; train it for a step and look at the peak of the device"
        ) from error
    return _extrapolated(counts, repeats)


def _extrapolated(counts: Sequence[_Count], repeats: int) -> PassBytes:
    """Return the bytes of a model whose period repeats so often."""

    def at(value: Callable[[_Count], int]) -> int:
        values = [value(count) for count in counts]
        return values[-1] + (repeats - MOST) * (values[-1] - values[0]) if len(values) > 1 else values[0]

    def peak(share: float) -> int:
        return max(at(lambda count: count.top[share]), at(lambda count: count.bottom[share]))

    return PassBytes(at(lambda c: c.added), at(lambda c: c.gradients), peak(0.0), peak(1.0), peak(0.5))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of a model's layers: of its lists the one with the most weights.

    Lists within the layers, such as those of experts, have fewer.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return nn.ModuleList()
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


def repetition(kinds: Sequence[Any]) -> tuple[int, int]:
    """Return after how many layers a model repeats itself, and the length of what it repeats."""
    for total in range(1, len(kinds) + 1):
        for start in range(total):
            period = total - start
            if all(kinds[i] == kinds[i + period] for i in range(start, len(kinds) - period)):
                return start, period
    return 0, 1


def _signature(layer: nn.Module) -> str:
    """Return what tells kinds of layers apart: shapes, classes and plain options."""
    parts: list[Any] = [(name, tuple(p.shape)) for name, p in layer.named_parameters()]
    for module in layer.modules():
        options = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (int, float, str, type(None))) and not ("idx" in key or key.startswith("layer_"))
        }
        parts.append((type(module).__name__, options, getattr(module, "layer_type", None)))
    return repr(parts)


def _first_layers(shapes: ModelShapes, length: int) -> nn.Module:
    """Return a copy of a model with its first layers alone."""
    layers = decoder_layers(shapes.model)
    memo: dict[int, Any] = {}
    memo[id(layers)] = nn.ModuleList([copy.deepcopy(layer, memo) for layer in layers[:length]])
    return copy.deepcopy(shapes.model, memo)


def _count(shapes: ModelShapes, options: _Options, length: int, marks: tuple[int, int]) -> _Count:
    """Count the model with its first layers. ``marks``: `_Phases.follow`."""
    model = _first_layers(shapes, length)
    weights = _bytes(model)
    layers = decoder_layers(model)
    model.train()
    if options.checkpointing:
        _recompute_activations(model)
    scratch = {torch.ops.lift_kernels.packed_weight_grad.default: _dense_product} if options.device == "cuda" else {}
    live = LiveStorages(scratch)
    if options.kind == "lora":
        model = add_lora(model, shapes)
    with fake_tensors():
        model, trained, held = convert(model, options.kind, shapes)
        live.hold([*model.parameters(), *model.buffers(), *held])
        static = live.alive
        for p in trained:
            p.register_post_accumulate_grad_hook(lambda p: live.mark_gradient(_gradient(p)))
        phases = _Phases(live)
        with live:
            for number in range(options.passes):
                if number == options.passes - 1:
                    phases.follow(layers, marks)
                    live.restart_peaks()
                _run(model, options)
        bottom = live.restart_peaks()
        top = phases.top or bottom
        gradients = live.gradients
    less_static = [{share: peak - static for share, peak in peaks.items()} for peaks in (top, bottom)]
    return _Count(static - weights, gradients, *less_static)


def _bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _gradient(p: Any) -> Tensor:
    """Return the gradient of a parameter, which a hook may have packed."""
    return p.grad if p.grad is not None else p.lift_grad


def _dense_product(grad_output: Tensor, inputs: Tensor, indices: Tensor, **_: Any) -> int:
    """Return the bytes of the dense gradient that `packed_weight_grad` makes on a GPU."""
    return grad_output.shape[1] * inputs.shape[1] * inputs.itemsize


def _recompute_activations(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"{type(model).__name__} keeps its activations; it has no checkpointing") from error


def _run(model: Any, options: _Options) -> None:
    """Run a forward and a backward pass; the loss is that of transformers, over all tokens."""
    ids = torch.zeros(options.batch, options.seq, dtype=torch.long)
    mask = torch.ones(options.batch, 1, options.seq, options.seq, dtype=torch.bool) if options.padded else None
    given = {} if mask is None else {"attention_mask": mask}
    with torch.autocast("cpu", torch.bfloat16, enabled=options.autocast):
        loss = model(input_ids=ids, labels=ids, **given, use_cache=False).loss
    loss.backward()


class _Phases:
    """Tells the top of a backward pass from its bottom.

    Attributes:
        top: the peaks until the gradient has left the last period; None before.
    """

    def __init__(self, live: LiveStorages) -> None:
        self.live = live
        self.top: dict[float, int] | None = None

    def follow(self, layers: nn.ModuleList, marks: tuple[int, int]) -> None:
        """Watch the next pass.

        Args:
            layers: those of the model.
            marks: layers of the first period and before it, and of the last period and after it.
        """
        first, last = marks
        if first < len(layers) and last < len(layers):
            self._at_gradient(layers[len(layers) - last], self._end_top)
            self._at_gradient(layers[first], self.live.restart_peaks)

    def _end_top(self) -> None:
        self.top = self.live.restart_peaks()

    def _at_gradient(self, layer: nn.Module, call: Callable[[], object]) -> None:
        """Call something once, when the gradient of a layer's input is there."""

        def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
            handle.remove()  # recomputed layers run again
            found = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad), None)
            if found is not None:
                found.register_hook(lambda gradient: call() and None)

        handle = layer.register_forward_pre_hook(before, with_kwargs=True)
