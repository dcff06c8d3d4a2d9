"""Ten steps of SmolLM2-135M with packed and with dense gradients: the same bits in fp32, whatever the way to the gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import bits

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients
from lift_kernels.finetune import modelio

STEPS = 10
CASES = {  # options of the optimizer, micro-batches, checkpointing
    "plain": ({}, 1, False),
    "4 micro-batches": ({}, 4, False),
    "clipped": ({"max_grad_norm": 0.1}, 1, False),
    "checkpointed": ({}, 1, True),
}


@pytest.fixture(scope="module")
def smollm2():
    """The model, and the principal masks of its linear layers."""
    model, _ = modelio.load_model(modelio.find_model(None), torch.float32)
    optimizer = LiftAdamW(lift_param_groups(model, freeze_rest=True), rank=32)
    optimizer.refresh()
    return model, [optimizer.state[p]["indices"].clone() for p in optimizer.param_groups[0]["params"]]


def trained(smollm2, backend, packed, options, micro, checkpointing):
    """The model after `STEPS` steps on short random texts."""
    model, masks = copy.deepcopy(smollm2[0]), iter(smollm2[1])
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
@pytest.mark.parametrize("options, micro, checkpointing", CASES.values(), ids=CASES)
def test_smollm2_trains_to_the_same_bits_on_the_reference_path(smollm2, options, micro, checkpointing):
    mine = trained(smollm2, "reference", True, options, micro, checkpointing)
    theirs = trained(smollm2, "reference", False, options, micro, checkpointing)
    assert list(mine) == list(theirs)
    moved = 0
    start = smollm2[0].state_dict()
    for name, value in mine.items():
        assert torch.equal(bits(value), bits(theirs[name])), name
        moved += int((value != start[name]).sum())
    assert 0.95 * 5.3e6 < moved < 5.4e6


@pytest.mark.slow
@pytest.mark.native
def test_smollm2_trains_to_the_same_weights_natively(smollm2):
    """Its largest weight is one panel, so the product is torch's own; the step adds no error to that."""
    mine = trained(smollm2, "native-cpu", True, {}, 1, False)
    theirs = trained(smollm2, "native-cpu", False, {}, 1, False)
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=2 * torch.finfo(torch.float32).eps * value.abs().max().item())
