"""Ten steps of SmolLM2-135M with packed and with dense gradients give the same bits in fp32.

The variants run on its first six layers, because depth does not matter for them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.bits import bits

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients
from lift_kernels.finetune import model_io

STEPS = 10
CASES = {  # layers, options of the optimizer, micro-batches, checkpointing
    "plain": (30, {}, 1, False),
    "4 micro-batches": (6, {}, 4, False),
    "clipped": (6, {"max_grad_norm": 0.1}, 1, False),
    "checkpointed": (6, {}, 1, True),
}


@pytest.fixture(scope="module")
def models():
    """The model and the principal masks of its linear layers, by number of layers."""
    model, _ = model_io.load_model(model_io.find_model(None), torch.float32)
    optimizer = LiftAdamW(lift_param_groups(model, freeze_rest=True), rank=32)
    optimizer.refresh()
    masks = [optimizer.state[p]["indices"].clone() for p in optimizer.param_groups[0]["params"]]
    cut = copy.deepcopy(model)
    cut.model.layers = cut.model.layers[:6]
    return {30: (model, masks), 6: (cut, masks[: 6 * 7])}


def trained(start, backend, packed, options, micro, checkpointing):
    """The model after `STEPS` steps on short random texts."""
    model, masks = copy.deepcopy(start[0]), iter(start[1])
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    selection = {"selection": lambda weight, k: next(masks)}
    if packed:
        groups = pack_gradients(model, freeze_rest=True, backend=backend, **selection)
        optimizer = LiftAdamW(groups, lr=1e-3, backend=backend, **options)
    else:
        groups = lift_param_groups(model, freeze_rest=True)
        optimizer = LiftAdamW(groups, lr=1e-3, backend=backend, **selection, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        for _ in range(micro):
            tokens = torch.randint(model.config.vocab_size, (1, 24), generator=generator)
            (model(input_ids=tokens, labels=tokens).loss / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("layers, options, micro, checkpointing", CASES.values(), ids=CASES)
def test_smollm2_trains_to_the_same_bits_on_the_reference_path(models, layers, options, micro, checkpointing):
    mine = trained(models[layers], "reference", True, options, micro, checkpointing)
    theirs = trained(models[layers], "reference", False, options, micro, checkpointing)
    assert list(mine) == list(theirs)
    moved = 0
    start = models[layers][0].state_dict()
    for name, value in mine.items():
        assert torch.equal(bits(value), bits(theirs[name])), name
        moved += int((value != start[name]).sum())
    assert 0.95 * 5.3e6 < moved * 30 / layers < 5.4e6


@pytest.mark.slow
@pytest.mark.native
def test_smollm2_trains_to_the_same_weights_natively(models):
    """Its largest weight is one panel, so the product is torch's own.

    The step adds no further error.
    """
    mine = trained(models[30], "native-cpu", True, {}, 1, False)
    theirs = trained(models[30], "native-cpu", False, {}, 1, False)
    for name, value in mine.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=0, atol=2 * torch.finfo(torch.float32).eps * value.abs().max().item()
        )
