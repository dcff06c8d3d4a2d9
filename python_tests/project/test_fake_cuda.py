"""The recorder `bench.common.fake_cuda`, on programs whose waits and launches are known."""

from __future__ import annotations

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

import lift_kernels
from bench.common.fake_cuda import NOT_LAUNCHING, FakeCuda
from lift_kernels import ops
from lift_kernels.ops import dispatch, symmetric_eigen
from lift_kernels.ops.device_tables import DeviceTables, Table


@triton.jit
def _empty_kernel(x):
    pass


@torch.library.custom_op("fake_cuda_test::hidden_wait", mutates_args=())
def hidden_wait(x: torch.Tensor) -> torch.Tensor:
    """Its fake hides the wait."""
    return x + x.sum().item()


@hidden_wait.register_fake
def _(x):
    return torch.empty_like(x)


def waiting_synchronize(x):
    torch.cuda.synchronize()


def on_the_stream(x):
    torch.cuda.current_stream().synchronize()


def masked_assignment(x):
    x[x > 0] = x[0]


def filled_by_mask(x):
    x[x > 0] = 0.0


def into_the_host(x):
    torch.zeros(4).copy_(x)


# name: program, waits, launches
PROGRAMS = {
    "item": (lambda x: x[0].item(), 1, 0),
    "float": (lambda x: float(x[0]), 1, 0),
    "bool": (lambda x: bool(x[0]), 1, 0),
    "tolist": (lambda x: x.tolist(), 1, 1),
    "cpu": (lambda x: x.cpu(), 1, 1),
    "to the CPU without waiting": (lambda x: x.to("cpu", non_blocking=True), 0, 1),
    "copy_ into a CPU tensor": (into_the_host, 1, 1),
    "reads of what was copied": (lambda x: [number.item() for number in x.cpu()], 1, 1),
    "nonzero": (lambda x: x.nonzero(), 1, 1),
    "index by mask": (lambda x: x[x > 0], 1, 3),
    "assignment by mask": (masked_assignment, 1, 3),
    "fill by mask": (filled_by_mask, 0, 2),
    "masked_select": (lambda x: x.masked_select(x > 0), 1, 2),
    "equal": (lambda x: torch.equal(x, x + 1), 1, 2),
    "eigenproblems": (lambda x: torch.linalg.eigh(x.view(2, 2)), 1, 1),
    "synchronize": (waiting_synchronize, 1, 0),
    "stream": (on_the_stream, 1, 0),
    "upload": (lambda x: torch.ones(3).to(x.device), 1, 1),
    "upload without waiting": (lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True), 0, 1),
    "add": (lambda x: x + 1, 0, 1),
    "add_": (lambda x: x.add_(1), 0, 1),
    "zeros": (lambda x: torch.zeros(3, device="cuda"), 0, 1),
    "no element": (lambda x: torch.zeros(0, device="cuda") + 1, 0, 0),
    "view": (lambda x: x.view(2, 2).t()[0].detach()[1:].view(torch.int32), 0, 0),
    "reshape that copies": (lambda x: x.view(2, 2).t().reshape(-1), 0, 1),
    "empty": (lambda x: (torch.empty_like(x), x.new_empty(3)), 0, 0),
    "to without a change": (lambda x: x.to(x.device, torch.float32).contiguous(), 0, 0),
    "assignment of a slice": (lambda x: x.__setitem__(slice(0, 2), x[2:]), 0, 1),
    "host": (lambda x: (torch.ones(3) + 1).nonzero().tolist(), 0, 0),
    "Triton": (lambda x: _empty_kernel[(1,)](x), 0, 1),
    "custom op": (hidden_wait, 1, 2),
    "op of the package": (lambda x: ops.packed_gather(x, torch.empty(2, dtype=torch.int32, device="cuda")), 0, 1),
    "validated op": (
        lambda x: ops.packed_gather(x, torch.empty(2, dtype=torch.int32, device="cuda"), validate=True),
        1,
        7,
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_waits_and_launches(name):
    program, waits, launches = PROGRAMS[name]
    with FakeCuda() as cuda, torch.no_grad():
        x = torch.ones(4, device="cuda")
        with cuda.recording() as events:
            program(x)
        program(x)
    assert (len(events.waits), len(events.launches)) == (waits, launches), events.report()


def test_checks_of_values_pass():
    with FakeCuda():
        x = torch.ones(4, device="cuda")
        assert x.isfinite().all() and (x > 0).all().item() and not (x > 5).any()
        assert torch.stack([x.isfinite().all(), (x > 0).all()]).all() and not (~x.isfinite().all()).item()
        assert not (~(x > 0).all()).cpu() and (x > 0).all().cpu()
        assert x[0].item() == 0 and x.nonzero().numel() == 0 and x.sum().tolist() == 0


def test_numbers_are_at_most_any_limit_that_is_not_negative():
    with FakeCuda():
        x = torch.ones(4, device="cuda")
        assert (x <= 0.5).tolist() == [True] * 4 and (x <= 0).all() and not (x <= -1).any()
        assert (x <= 0.5)[1:].clone().tolist() == [True] * 3 and (x <= x).tolist() == [False] * 4


def test_the_backends_of_ops_can_be_named():
    with FakeCuda({"packed_gather": "native-cuda", "packed_l2_norm": "reference"}) as cuda:
        x, indices = torch.ones(4, device="cuda"), torch.empty(2, dtype=torch.int32, device="cuda")
        with cuda.recording() as events:
            ops.packed_gather(x, indices)
            ops.packed_gather(x, indices, backend="triton")
            ops.packed_scatter_(x, indices, x[:2])
        names = [dispatch.choose(None, x.device, op) for op in ("packed_gather", "packed_l2_norm", "packed_scatter_")]
    assert names == ["native-cuda", "reference", "triton"]
    kernels = ["lift_kernels_native.packed_gather.default", "_packed_gather_kernel", "_packed_scatter_kernel"]
    assert [event.what for event in events.launches] == kernels


def test_a_cuda_op_needs_the_extension(monkeypatch):
    monkeypatch.setattr(dispatch, "_load_native", lambda: "no extension")
    with pytest.raises(RuntimeError, match="no extension"):
        FakeCuda({"packed_gather": "native-cuda"})
    FakeCuda({"packed_gather": "triton"})


def test_the_batched_solver_of_cusolver_launches_and_waits(monkeypatch):
    monkeypatch.setattr(symmetric_eigen, "_slow_in_torch", lambda matrices: True)
    with FakeCuda() as cuda, cuda.recording() as events:
        values, vectors = symmetric_eigen.symmetric_eigen(torch.empty(3, 40, 40, device="cuda"))
    assert values.shape == (3, 40) and vectors.shape == (3, 40, 40)
    assert [event.what for event in events.launches] == [
        "aten.clone.default",
        "cusolverDnXsyevBatched",
        "aten.any.default",
    ]
    assert len(events.waits) == 1


def test_cpu_tensors_keep_their_numbers():
    with FakeCuda():
        indices = torch.tensor([0, 2], dtype=torch.int32)
        assert ops.packed_gather(torch.tensor([1.0, 2.0, 3.0]), indices).tolist() == [1.0, 3.0]


def test_events_know_the_files_they_came_from():
    with FakeCuda() as cuda, cuda.recording() as events:
        indices = torch.zeros(2, dtype=torch.int32, device="cuda")
        ops.packed_gather(torch.ones(4, device="cuda"), indices, validate=True)
    assert [event.frames for event in events.waits] == [("validation.py", "ops/packed_ops.py")]
    assert len(events.inside("ops/").waits) == 1 and not events.outside("ops/").waits
    kernels = [event.what for event in events.inside("ops/triton/").launches]
    assert kernels == ["_packed_gather_kernel"]
    assert events.report().startswith("1 waits, 9 launches\n")


def test_an_unknown_result_is_an_error():
    with FakeCuda(), pytest.raises(NotImplementedError, match="let fake_cuda know"):
        torch.ones(4, device="cuda").unique()


def native_scatter(x, host):
    positions = torch.empty(4, dtype=torch.int32, device="cuda")
    torch.ops.lift_kernels_native.packed_scatter_.default(x, positions, host)


def fused_step(x, host):
    """Of torch's AdamW, whose fake lets step counts on the CPU pass."""
    lists = [[x], [x], [x], [x], []]
    options = dict(lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False)
    torch._fused_adamw_(*lists, [host], **options)


# name: a launch with a CPU tensor, and what is launched
LAUNCHES_WITH_CPU_TENSORS = {
    "Triton": (lambda x, host: _empty_kernel[(1,)](host), "_empty_kernel"),
    "Triton by name": (lambda x, host: _empty_kernel[(1,)](x=host), "_empty_kernel"),
    "Triton, in a tuple": (lambda x, host: _empty_kernel[(1,)]((x, (host,))), "_empty_kernel"),
    "Triton, by a descriptor": (
        lambda x, host: _empty_kernel[(1,)](TensorDescriptor(host, [4], [1], [4])),
        "_empty_kernel",
    ),
    "fused step": (fused_step, "_fused_adamw_"),
    "private op": (native_scatter, "lift_kernels_native.packed_scatter_"),
}


@pytest.mark.parametrize("name", LAUNCHES_WITH_CPU_TENSORS)
def test_a_cpu_tensor_in_a_launch_is_an_error(name):
    program, launched = LAUNCHES_WITH_CPU_TENSORS[name]
    with FakeCuda() as cuda, cuda.recording() as events:
        x = torch.empty(4, device="cuda")
        with pytest.raises(ValueError, match=rf"{launched}.* is launched with a CPU tensor of shape \(4,\)"):
            program(x, torch.ones(4))
        assert not events.launches
        program(x, x)
    assert len(events.launches) == 1


def test_ops_of_torch_take_no_cpu_tensors_but_numbers():
    with FakeCuda():
        x = torch.empty(4, device="cuda")
        assert (x * torch.tensor(2.0)).is_cuda
        with pytest.raises(RuntimeError, match="device"):
            x + torch.ones(4)
        with pytest.raises(RuntimeError, match="device"):
            torch.stack([x, torch.ones(4)])


def test_addresses_are_those_of_storages():
    with FakeCuda():
        x, y = torch.empty(8, device="cuda"), torch.empty(8, device="cuda")
        assert x.data_ptr() == x.detach().data_ptr() != y.data_ptr() and x.data_ptr() % 16 == 0
        assert x[2:].data_ptr() == x.data_ptr() + 8


def test_nothing_stays_replaced(monkeypatch):
    tables = DeviceTables("numbers", 2, "none")
    monkeypatch.setattr(lift_kernels, "tables_of_a_test", tables, raising=False)
    device, table = torch.device("cpu"), Table(torch.ones(1), True)
    assert tables.get("before", device, lambda: table) is table
    names = ("current_stream", "synchronize", "is_current_stream_capturing", "_exchange_device")
    before = [
        symmetric_eigen._solver,
        dispatch.choose,
        torch.Tensor.pin_memory,
        triton.JITFunction.run,
        *(vars(torch.cuda)[n] for n in names),
    ]
    with FakeCuda():
        assert tables.get("inside", device, lambda: table._replace(aligned=False)).aligned is False
        assert dispatch.choose(None, torch.device("cuda"), "packed_gather") == "triton"
    after = [
        symmetric_eigen._solver,
        dispatch.choose,
        torch.Tensor.pin_memory,
        triton.JITFunction.run,
        *(vars(torch.cuda)[n] for n in names),
    ]
    assert after == before
    assert tables.get("before", device, list) is table and tables.get("inside", device, lambda: table) is table


def test_every_op_that_launches_nothing_exists():
    known = {name.partition("::")[2].split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert known >= NOT_LAUNCHING
