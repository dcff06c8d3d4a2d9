"""Small training problems for LiftAdamW.

Here are also snapshots of all it owns, and the ways to interrupt and continue a run.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from helpers.bits import bits
from torch import Tensor, nn

from lift_kernels import LiftAdamW

SHAPES = ((24, 40), (33, 17))
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, "rank": 4, "density": 0.1}


def make_weights(
    shapes: Sequence[tuple] = SHAPES, dtype: torch.dtype = torch.float32, device="cpu"
) -> list[nn.Parameter]:
    """Random parameters, the same at every call."""
    generator = torch.Generator().manual_seed(11)
    return [nn.Parameter((0.1 * torch.randn(s, generator=generator)).to(device, dtype)) for s in shapes]


def set_gradients(weights: Iterable[Tensor], step: int) -> None:
    """Gradients that depend on the step number alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    for w in weights:
        w.grad = torch.randn(w.shape, generator=generator).to(w.device, w.dtype)


def train(
    optimizer: torch.optim.Optimizer, steps: Iterable[int], after: Callable[[int], None] = lambda step: None
) -> None:
    """Take steps with the gradients of these numbers and call ``after`` after each."""
    for step in steps:
        set_gradients((p for group in optimizer.param_groups for p in group["params"]), step)
        optimizer.step()
        after(step)


def index_sets(optimizer: LiftAdamW) -> list[Tensor]:
    """Copies of the index lists of all matrices, in order."""
    entries = (optimizer.state[p] for group in optimizer.param_groups for p in group["params"])
    return [entry["indices"].clone() for entry in entries if "indices" in entry]


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """Copies of everything that a failing call must not change.

    These are the bits of weights and state, and the options of the groups.
    """
    taken: dict[str, object] = {"groups": len(optimizer.param_groups)}
    for number, group in enumerate(optimizer.param_groups):
        taken |= {f"{key} of group {number}": copy.deepcopy(value) for key, value in group.items() if key != "params"}
        for i, p in enumerate(group["params"]):
            tensors = {"weight": p.detach(), **optimizer.state.get(p, {})}
            taken |= {f"{key} of parameter {number}.{i}": bits(value).clone() for key, value in tensors.items()}
    return taken


def assert_same(actual: dict[str, object], expected: dict[str, object]) -> None:
    """Check that two snapshots are equal, tensors to the bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(actual[name], value) if isinstance(value, Tensor) else actual[name] == value
        assert same, f"{name} differs"


def assert_refused(optimizer, error, message, call):
    """Check that ``call`` raises this and changes neither weights, state nor groups."""
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        call()
    assert_same(snapshot(optimizer), before)


def by_deepcopy(optimizer: LiftAdamW, weights: list[Tensor]) -> tuple[LiftAdamW, list[Tensor]]:
    return copy.deepcopy((optimizer, weights))


def by_pickle(optimizer: LiftAdamW, weights: list[Tensor]) -> tuple[LiftAdamW, list[Tensor]]:
    return pickle.loads(pickle.dumps((optimizer, weights)))


def by_state_dict(optimizer: LiftAdamW, weights: list[Tensor]) -> tuple[LiftAdamW, list[Tensor]]:
    """Send weights and state through a file into a new optimizer with other options.

    The file is read with weights_only=True.
    """
    file = io.BytesIO()
    torch.save({"weights": [w.detach() for w in weights], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = [nn.Parameter(w) for w in saved["weights"]]
    at = {id(w): new for w, new in zip(weights, fresh)}
    groups = [
        {"params": [at[id(p)] for p in group["params"]], "lift": group["lift"]} for group in optimizer.param_groups
    ]
    copied = LiftAdamW(
        groups, lr=1.0, backend=optimizer.backend, seed=optimizer.seed, max_grad_norm=optimizer.max_grad_norm
    )
    copied.load_state_dict(saved["optimizer"])
    return copied, fresh


INTERRUPTIONS = [by_deepcopy, by_pickle, by_state_dict]
