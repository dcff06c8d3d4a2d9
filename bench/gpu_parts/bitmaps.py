"""bitmap_to_indices alone, on two matrices.

Their bracket, 2 % about the k-th magnitude, holds it. Bytes of the roofline, per matrix: bitmap
copied and read (3 m n / 8), candidates read (8 each), list written (4 k). Checked: all results
equal the reference's.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.gpu_parts.models import DENSITY, LLAMA_2_7B
from bench.gpu_parts.runner import Run
from lift_kernels import ops


def arguments(magnitude: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """What a pass over non-negative ``magnitude`` (m, n) hands over for the k largest, twice.

    These are bits, candidates, counts, n, k.
    """
    m, n = magnitude.shape
    threshold = magnitude.view(-1).topk(k).values[-1]
    above = magnitude > threshold * 1.02
    bits = torch.nn.functional.pad(above.int(), (0, -n % 32)).unflatten(1, (-1, 32))
    words = (bits << torch.arange(32, device=magnitude.device, dtype=torch.int32)).sum(2, dtype=torch.int32)
    place = ((magnitude >= threshold * 0.98) & ~above).view(-1).nonzero().view(-1)
    noted = (magnitude.view(-1)[place].view(torch.int32).long() << 32) + (2**31 - 1 - place)
    counts = torch.tensor([[int(above.sum()), len(place)]] * 2, dtype=torch.int32, device=magnitude.device)
    return words.expand(2, -1, -1).contiguous(), noted.expand(2, -1).contiguous(), counts, n, k


def work(run: Run) -> None:
    model = LLAMA_2_7B.on(run.device)
    m, n = model.layer[-1]
    k, generator = round(DENSITY * m * n), torch.Generator(run.device).manual_seed(0)
    given = [
        arguments(torch.randn(m, n, generator=generator, device=run.device).abs_(), k)
        for _ in range(run.sets(3.0 * m * n / 4))
    ]
    expected = ops.bitmap_to_indices(*given[0], backend="reference")
    moved = 2.0 * (3 * m * n / 8 + 8 * given[0][1].shape[1] + 4 * k)
    for backend in ("reference",) if run.dry else ("native-cuda", "triton"):

        def problem(backend=backend) -> str:
            found = ops.bitmap_to_indices(*given[0], backend=backend)
            return "" if all(map(torch.equal, found, expected)) else "results differ from the reference"

        calls = [partial(ops.bitmap_to_indices, *each, backend=backend) for each in given]
        run.time(
            f"bitmap_to_indices, {backend}",
            calls,
            problem=run.problem(problem),
            moved=moved,
            waits=run.dry,
            backend=backend,
            op="bitmap_to_indices",
            model=model.name,
            dtype="int32",
            shape=f"2 of {m} x {n}, k = {k}",
        )
