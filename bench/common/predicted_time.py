"""The time that counted launches would take on an H100. It is computed, not timed.

- A launch takes the longer one of two times: that of its bytes and that of its FLOPs, at the rates
  below. These are what copies and cuBLAS reach. Other kernels are slower.
- A launch starts when the host has submitted it, `LAUNCH` after the one before, and when the device
  is free. At a wait the host stands still until then. So launches after a wait come late where they
  are short. Work of the host between launches counts as nothing.
- Eigenproblems that are solved together take a latency and a part for each. With b of side n that
  is 2.36 ms (n / 256)^1.15 + 34 us b (n / 256)^3. The form is fitted to what `symmetric_eigen` took
  on an H100: 2.39 ms for one of 256, 3.44 ms for 32 of 256, 1.12 ms for 32 of 128 and 5.15 ms for
  one of 512 (bench/README.md). It is at most 7 % off there.

How far off is it? At commit 3e07857 an H100 took 320 ms for the masks of a warm refresh of
LLaMA-2-7B, a quarter of it for eigenproblems. The launches of that code are predicted to take
197 ms, 77 of them eigenproblems. So the rest took 2.0 times as long as predicted. At commit 9db6b77
an H200 took 143 ms, of which the device was busy for 131, where 88 are predicted. Most of the
difference is the selection, 46 ms and not 19: its kernel does not multiply as fast as cuBLAS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from bench.common.kernel_costs import Work
from bench.common.launch_cost import Step

MEMORY = 3.0e12  # bytes/s
BF16, TF32, FP32 = 790e12, 300e12, 50e12  # FLOP/s
LAUNCH = 5e-6  # seconds of the host


def predicted_seconds(steps: Iterable[Step]) -> Counter[str]:
    """Seconds by part. Their sum is the time from the first launch to the end of the last.

    A part gets the time of its launches, and that in which the device waits for them.
    """
    host = device = 0.0
    taken: Counter[str] = Counter()
    for part, work in steps:
        if work is None:
            host = max(host, device)
            continue
        host += LAUNCH
        end = max(host, device) + device_seconds(work)
        taken[part] += end - device
        device = end
    return taken


def device_seconds(work: Work) -> float:
    """Seconds of one launch on the device."""
    computing = work.bf16 / BF16 + work.tf32 / TF32 + work.fp32 / FP32
    return max(work.bytes / MEMORY, computing) + eigen_seconds(work.side, work.problems)


def eigen_seconds(side: int, problems: int) -> float:
    """Seconds of eigenproblems of one side, 128 to 512, that are solved together."""
    if problems == 0:
        return 0.0
    return 2.36e-3 * (side / 256) ** 1.15 + 34e-6 * problems * (side / 256) ** 3
