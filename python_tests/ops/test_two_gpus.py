"""Ops and the optimizer on two GPUs of one process; on the CPU the same on one device twice.

With a single GPU these tests are skipped.
"""

from __future__ import annotations

import pytest
import torch
from helpers.bits import BF16, FP32
from helpers.optimizers import assert_same, make_weights, set_gradients, snapshot

from lift_kernels import LiftAdamW, ops
from lift_kernels.ops import dispatch

TWO = ("cuda:0", "cuda:1")


@pytest.fixture(autouse=True)
def two_gpus(request):
    """Skip a test on GPUs where there is one, and put the present device back."""
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):
        yield


def cases():
    for op in CALLS:
        yield pytest.param(op, None, "cpu", "cpu", id=f"{op}-cpu")
        for name in dispatch.OPS[op]:
            if name in ("triton", "native-cuda"):
                for present, other in (TWO, TWO[::-1], ("cuda:1", "cuda:1")):
                    label = f"{op}-{name}-{other}-while-{present}"
                    yield pytest.param(op, name, present, other, id=label, marks=pytest.mark.gpu)


def positions(count, numel, seed=0):
    return torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[:count].sort().values.int()


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gather(backend, device):
    return [ops.packed_gather(normal(37, 41).to(device), positions(500, 1517).to(device), backend=backend)]


def scatter(backend, device):
    dest = torch.zeros(37, 41).to(device)
    ops.packed_scatter_(dest, positions(500, 1517).to(device), normal(500).to(device), backend=backend)
    return [dest]


def migrate(backend, device):
    lists = (positions(count, 1517, seed).to(device) for count, seed in ((500, 0), (600, 2)))
    return [ops.packed_migrate(normal(500).to(device), *lists, fill=3, backend=backend)]


def sketch(backend, device):
    return [ops.gaussian_sketch(2, 40, 9, seed=3, device=device, backend=backend)]


def orthonormal(backend, device):
    block, other = normal(2, 60, 12).to(device), normal(2, 7, 12, seed=2).to(device)
    return [ops.cholesky_qr_(block, other, rounds=2, backend=backend), block, other]


def recurrence(backend, device):
    blocks = [normal(2, 60, 12, seed=seed).to(device) for seed in range(3)]
    raised, status = ops.chebyshev_step_(*blocks, torch.ones(2, device=device), backend=backend)
    return [raised, status, blocks[1]]


def norm(backend, device):
    index = positions(500, 1517).to(device)
    return [ops.packed_l2_norm([normal(37, 41).to(device)], index, [0], [500], backend=backend)]


def selection(backend, device):
    left, right = normal(60, 3).mul(4).round().to(device), normal(70, 3, seed=2).mul(4).round().to(device)
    return list(ops.lowrank_topk(left, right, 300, backend=backend))


CALLS = {
    "packed_gather": gather,
    "packed_scatter_": scatter,
    "packed_migrate": migrate,
    "packed_l2_norm": norm,
    "lowrank_topk": selection,
    "gaussian_sketch_": sketch,
    "cholesky_qr_": orthonormal,
    "chebyshev_step_": recurrence,
}


@pytest.mark.parametrize("op, name, present, other", list(cases()))
def test_an_op_runs_where_its_tensors_are(op, name, present, other):
    """Whatever the present device is, which stays."""
    if present != "cpu":
        torch.cuda.set_device(present)
    found = CALLS[op](name, other)
    if present != "cpu":
        assert torch.cuda.current_device() == torch.device(present).index
        torch.empty(1, device="cuda").fill_(1.0)  # torch itself still uses it
        assert torch.cuda.current_device() == torch.device(present).index
    for tensor, expected in zip(found, CALLS[op]("reference", "cpu")):
        assert tensor.device == torch.device(other)
        torch.testing.assert_close(tensor.cpu(), expected, rtol=1e-4, atol=1e-4)


def trained(devices, options, dtype):
    """Four matrices and a vector, spread over the devices, after steps with refreshes."""
    weights = make_weights(((24, 40), (33, 17), (40, 24), (17, 33), (40,)), dtype)
    weights = [torch.nn.Parameter(w.detach().to(devices[i % len(devices)])) for i, w in enumerate(weights)]
    optimizer = LiftAdamW(weights, lr=0.01, rank=4, density=0.1, refresh_interval=3, **options)
    for number in range(7):
        set_gradients(weights, number)
        optimizer.step()
    return weights, optimizer


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("options", [{}, {"bias_correction": "per_entry"}, {"max_grad_norm": 0.5}])
@pytest.mark.parametrize("devices", [("cpu", "cpu"), pytest.param(TWO, marks=pytest.mark.gpu)])
def test_a_model_on_two_devices_has_an_arena_on_each(devices, options, dtype):
    """It is trained to the same bits as on one device, but for a norm that is summed in parts."""
    weights, optimizer = trained(devices, options, dtype)
    _, expected = trained(devices[:1], options, dtype)
    for w in weights[:4]:
        assert {t.device for t in optimizer.state[w].values()} == {w.device}
    assert len(optimizer._table.arenas) == len(set(devices))
    found, right = snapshot(optimizer), snapshot(expected)
    if "max_grad_norm" not in options:
        assert_same({k: on_host(v) for k, v in found.items()}, {k: on_host(v) for k, v in right.items()})
    else:
        assert abs(float(optimizer.grad_norm) / float(expected.grad_norm) - 1) < 1e-5
        torch.testing.assert_close(weights[0].detach(), expected.param_groups[0]["params"][0].detach())


def on_host(value):
    return value.cpu() if isinstance(value, torch.Tensor) else value
