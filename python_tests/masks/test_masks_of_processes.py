"""Masks are the same in every process on a machine, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PROGRAM = """
import sys, hashlib, torch
from bench.gpu_parts.masks import slow_spectrum
from lift_kernels.masks.principal import MaskRequest, principal_masks

device = sys.argv[1]
shape, rank = ((1024, 2816), 64) if device == "cuda" else ((280, 600), 8)
generator = torch.Generator(device).manual_seed(1)
for dtype in (torch.float32, torch.bfloat16):
    weights = [slow_spectrum(*shape, rank, generator).to(dtype) for _ in range(3)]
    requests = [MaskRequest(w, rank, w.numel() // 20) for w in weights]
    for mask in principal_masks(requests, method="chebyshev"):
        values = (mask.indices, mask.threshold.view(1).view(torch.int32), mask.basis.view(torch.int16))
        print(*(hashlib.sha256(v.cpu().numpy().tobytes()).hexdigest() for v in values))
"""


def printed(device: str) -> list[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", PROGRAM, device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_processes_make_the_same_masks(device):
    first, second = printed(device), printed(device)
    assert len(set(first)) == 6 and first == second
