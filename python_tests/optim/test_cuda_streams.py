"""Steps and ops on streams of their own. On the CPU, where there are none, the same without them.

Each stream is kept busy first. A launch on another stream than the present one would run too soon,
and read what is not written yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from helpers.bits import BF16, FP32
from helpers.optimizers import assert_same, make_weights, set_gradients, snapshot

from lift_kernels import LiftAdamW, ops
from lift_kernels.ops import dispatch

BUSY = 100_000_000  # cycles, about 60 ms
OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "rank": 4, "density": 0.1, "refresh_interval": 3}
on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


class Streams:
    """New streams of a device."""

    def __init__(self, device: str, count: int) -> None:
        self._streams = [torch.cuda.Stream() if device == "cuda" else None for _ in range(count)]
        for stream in filter(None, self._streams):
            stream.wait_stream(torch.cuda.current_stream())

    @contextlib.contextmanager
    def on(self, number: int, *, after: int | None = None, busy: bool = True) -> Iterator[None]:
        """What is launched here goes to a stream, behind what stream ``after`` has to do."""
        stream = self._streams[number]
        if stream is None:
            yield
            return
        if after is not None:
            stream.wait_stream(self._streams[after])
        with torch.cuda.stream(stream):
            if busy:
                torch.cuda._sleep(BUSY)
            yield

    def join(self) -> None:
        for stream in filter(None, self._streams):
            torch.cuda.current_stream().wait_stream(stream)


def made(device, dtype, shapes=((24, 40), (33, 17), (40,)), **options):
    weights = make_weights(shapes, dtype, device)
    return weights, LiftAdamW(weights, **OPTIONS | options)


def train(run, numbers) -> None:
    weights, optimizer = run
    for number in numbers:
        set_gradients(weights, number)
        optimizer.step()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "bias_correction": "per_entry"}])
@on_both
def test_steps_on_a_side_stream_are_those_on_the_default_one(device, options, dtype):
    """With refreshes. Half of the steps run on one side stream, half on another."""
    expected, run = made(device, dtype, **options), made(device, dtype, **options)
    train(expected, range(8))
    streams = Streams(device, 2)
    for number in range(8):
        first = number % 2
        with streams.on(first, after=1 - first):
            train(run, [number])
    streams.join()
    assert_same(snapshot(run[1]), snapshot(expected[1]))


@on_both
def test_a_table_made_on_one_stream_is_used_on_another(device):
    """Two optimizers with the same segments share a table, which a busy stream uploads."""
    shapes = ((37, 53), (29, 31))  # of no other test, so that no table is there
    options = {"bias_correction": "per_entry", "betas": (0.83, 0.91)}
    train(made(device, FP32, ((31, 41),), bias_correction="per_entry"), [0])  # compiles what is launched below
    runs = [made(device, FP32, shapes, **options) for _ in range(3)]
    for weights, optimizer in runs:
        optimizer.refresh()  # the first masks, for which the host waits
        set_gradients(weights, 0)
    streams = Streams(device, 2)
    with streams.on(0):
        runs[0][1].step()
    with streams.on(1, busy=False):
        runs[1][1].step()
    streams.join()
    runs[2][1].step()
    for run in runs[:2]:
        assert_same(snapshot(run[1]), snapshot(runs[2][1]))


def gather(backend, device, ready):
    source, index = torch.zeros(50, 40, device=device), torch.arange(0, 2000, 3, dtype=torch.int32, device=device)
    with ready():
        source.fill_(2.0)
        return ops.packed_gather(source, index, backend=backend), torch.full((667,), 2.0)


def scatter(backend, device, ready):
    dest, index = torch.zeros(2000, device=device), torch.arange(2000, dtype=torch.int32, device=device)
    values = torch.zeros(2000, device=device)
    with ready():
        values.fill_(3.0)
        ops.packed_scatter_(dest, index, values, backend=backend)
        return dest, torch.full((2000,), 3.0)


def migrate(backend, device, ready):
    old, values = torch.arange(900, dtype=torch.int32, device=device), torch.zeros(900, device=device)
    with ready():
        values.fill_(4.0)
        found = ops.packed_migrate(values, old, old + 450, fill=7, backend=backend)
        return found, torch.tensor([4.0, 7.0]).repeat_interleave(450)


def orthonormal(backend, device, ready):
    block = torch.zeros(1, 64, 4, device=device)
    with ready():
        block.diagonal(dim1=1, dim2=2).fill_(5.0)
        status = ops.cholesky_qr_(block, backend=backend)
        return torch.cat([block.flatten(), status.float()]), torch.cat([torch.eye(64, 4).flatten(), torch.zeros(1)])


def list_of_bits(backend, device, ready):
    bitmaps, counts = torch.zeros(1, 4, 1, dtype=torch.int32, device=device), torch.zeros(1, 2, device=device).int()
    candidates = torch.zeros(1, 8, dtype=torch.int64, device=device)
    with ready():
        bitmaps.fill_(1)  # the first column, and then the candidate at position 5
        counts.copy_(torch.tensor([[4, 1]], dtype=torch.int32), non_blocking=True)
        candidates.fill_((1 << 32) + 2**31 - 1 - 5)
        indices, _, status = ops.bitmap_to_indices(bitmaps, candidates, counts, 3, 5, backend=backend)
        return torch.cat([indices[0], status]), torch.tensor([0, 3, 5, 6, 9, 0]).int()


CALLS = {
    "packed_gather": gather,
    "packed_scatter_": scatter,
    "packed_migrate": migrate,
    "cholesky_qr_": orthonormal,
    "bitmap_to_indices": list_of_bits,
}


def cases():
    for op in CALLS:
        yield pytest.param(op, None, "cpu", id=f"{op}-cpu")
        for name in dispatch.OPS[op]:
            if name in ("triton", "native-cuda"):
                yield pytest.param(op, name, "cuda", id=f"{op}-{name}-on-gpu", marks=pytest.mark.gpu)


@pytest.mark.parametrize("op, name, device", list(cases()))
def test_an_op_runs_on_the_present_stream(op, name, device):
    """It reads what was written on the same stream, behind other work."""
    CALLS[op](name, device, contextlib.nullcontext)  # compiles the kernel
    streams = Streams(device, 1)
    found, expected = CALLS[op](name, device, lambda: streams.on(0))
    streams.join()
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)
