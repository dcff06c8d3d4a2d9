"""Training runs with packed and with dense gradients."""

from __future__ import annotations

import torch
from helpers.bits import FP32, bits
from helpers.small_models import ThreeLinears

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients

MASK = {"rank": 4, "density": 0.1}
ADAMW = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}


def batch(step, dtype=FP32, rows=12):
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(50 + step)).to(dtype)


def loss_of(model, step, rows=12):
    return model(batch(step, next(model.parameters()).dtype, rows)).float().square().mean()


def packed_setup(backend="reference", dtype=FP32, model=None, mask=None, **options):
    model = model or ThreeLinears(dtype)
    groups = pack_gradients(model, backend=backend, freeze_rest=True, **(mask or MASK))
    return model, LiftAdamW(groups, backend=backend, **ADAMW | options)


def dense_setup(backend="reference", dtype=FP32, model=None, mask=None, **options):
    model = model or ThreeLinears(dtype)
    groups = lift_param_groups(model, freeze_rest=True)
    return model, LiftAdamW(groups, backend=backend, **ADAMW | (mask or MASK) | options)


def train(model, optimizer, steps, micro=1, scaler=None):
    for step in steps:
        for part in range(micro):
            loss = loss_of(model, 10 * step + part) / micro
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()


def weights(model):
    return {name: bits(value).clone() for name, value in model.state_dict().items()}
