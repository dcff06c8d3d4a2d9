"""Launches of backward passes, steps and refreshes get device tensors alone.

A step and a backward pass never wait for the device. The package runs on fake CUDA tensors
(`bench.common.fake_cuda`), which refuse a launch with a CPU tensor. The last tests break the
package on purpose, and check that this is noticed.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.common.fake_cuda import FakeCuda
from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients
from lift_kernels.nn.grad_hooks import hooked_parameters, pack_gradient
from lift_kernels.nn.linear import PackedLinear
from lift_kernels.ops import bias_correction, device_tables, dispatch
from lift_kernels.optim import lift_adamw as lift_adamw_module
from lift_kernels.optim.packed_state import PackedState

pytestmark = pytest.mark.slow
BF16, FP32 = torch.bfloat16, torch.float32
MASK = {"rank": 16, "density": 0.1}


NATIVE = dict.fromkeys(dispatch.ops_of("native-cuda"), "native-cuda")


@pytest.fixture(scope="module")
def cuda(request):
    """Triton kernels, or where a test says so the native CUDA ops, of which there are fewer."""
    with FakeCuda(getattr(request, "param", None)) as cuda:
        yield cuda


class Model(nn.Module):
    """Linear layers, and a stack of matrices, which gets a hook when the model is packed."""

    def __init__(self, dtype: torch.dtype, side: int) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(40, side), nn.LayerNorm(side), nn.Linear(side, 300)
        self.stack = nn.Parameter(torch.empty(3, 40, 24))
        self.to("cuda", dtype)


def make(mode: str, dtype: torch.dtype = BF16, side: int = 48, *, dense: bool = True, **options):
    """A model, and its optimizer, which trains the norm densely if ``dense``."""
    model = Model(dtype, side)
    convert = lift_param_groups if mode == "matrix" else pack_gradients
    groups = convert(model, extra="stack", **(MASK if mode == "packed" else {}))
    norm = [(f"norm.{name}", p) for name, p in model.norm.named_parameters()]
    groups += [{"params": norm, "lift": False}] if dense else []
    return model, LiftAdamW(groups, **MASK, refresh_interval=None, **options)


def backward(model: Model) -> None:
    """Gradients for all parameters; those of packed layers by their own backward passes.

    The engine of autograd does not run without a device.
    """
    model.zero_grad()
    for layer in (model.up, model.down):
        if isinstance(layer, PackedLinear):
            x = torch.empty(6, layer.in_features, device="cuda", dtype=layer.weight.dtype, requires_grad=True)
            y = layer(x)
            with torch.no_grad():
                layer.values.grad = y.grad_fn.apply(torch.empty_like(y))[1]
    for p in model.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.empty_like(p)
    for p in hooked_parameters(model):
        pack_gradient(p)


def kernels(events) -> set[str]:
    return {event.what for event in events.launches if event.what.endswith("_kernel")}


def steps_on_the_device(cuda: FakeCuda, model: Model, optimizer: LiftAdamW, scaler: bool = False) -> None:
    """Check the third backward pass and step of a run, which has found all of its tables."""
    for number in range(3):
        with cuda.recording() as events:
            backward(model)
        if scaler:  # what a GradScaler lets an optimizer know
            optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
        assert not (number == 2 and events.waits), events.report()
        with cuda.recording() as events:
            optimizer.step()
    assert "_sparse_adamw_kernel" in kernels(events), events.report()
    assert not events.waits, events.report()


# name: mode, dtype, options, whether a GradScaler is there
RUNS = {
    "matrices": ("matrix", BF16, {}, False),
    "fp32": ("matrix", FP32, {"weight_decay": 0.1}, False),
    "fp32, packed": ("packed", FP32, {}, False),
    "packed": ("packed", BF16, {}, False),
    "clipped": ("matrix", BF16, {"max_grad_norm": 1.0}, False),
    "clipped, packed": ("packed", BF16, {"max_grad_norm": 1.0}, False),
    "per entry": ("matrix", BF16, {"bias_correction": "per_entry"}, False),
    "per entry, packed": ("packed", FP32, {"bias_correction": "per_entry"}, False),
    "stochastic": ("matrix", BF16, {"master": None, "rounding": "stochastic"}, False),
    "bf16 moments": ("packed", BF16, {"state_dtype": BF16}, False),
    "scaler": ("matrix", FP32, {}, True),
    "scaler, clipped, packed": ("packed", FP32, {"max_grad_norm": 1.0}, True),
    "capturable": ("packed", BF16, {"capturable": True}, False),
}


@pytest.mark.parametrize("name", RUNS)
def test_launches_of_a_backward_pass_and_a_step(name, cuda):
    mode, dtype, options, scaler = RUNS[name]
    model, optimizer = make(mode, dtype, **options)
    steps_on_the_device(cuda, model, optimizer, scaler)
    assert [ref.name for ref in optimizer._table.hooked] == (["stack"] if mode == "packed" else [])


def test_launches_with_a_learning_rate_on_the_device(cuda):
    model, optimizer = make("matrix", capturable=True, dense=False)  # torch fakes no step with such an lr.
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(1e-3, device="cuda")
    steps_on_the_device(cuda, model, optimizer)


@pytest.mark.native
@pytest.mark.parametrize("cuda", [NATIVE], indirect=True, ids=["native-cuda"])
def test_launches_of_native_ops_in_a_refresh(cuda):
    model, optimizer = make("packed", side=600, mask_method="chebyshev", warm_start="cpu")
    with cuda.recording() as events:
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.refresh()
    found = {event.what.partition(".")[2].partition(".")[0] for event in events.launches if "native" in event.what}
    assert found >= {"packed_gather", "gram", "cholesky_inverse", "multiply_upper_", "bitmap_to_indices"}


@pytest.mark.parametrize("warm_start", ["device", "cpu"])
@pytest.mark.parametrize("mode", ["matrix", "packed"])
def test_launches_of_a_refresh_with_principal_masks(mode, warm_start, cuda):
    """Gram matrices and subspace iteration, whose bases may be kept on the host."""
    model, optimizer = make(mode, side=600, warm_start=warm_start)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    with cuda.recording() as events:
        optimizer.refresh()
    assert {"_lowrank_topk_kernel", "_bitmap_choose_kernel", "_arena_migrate_find_kernel"} <= kernels(events)
    steps_on_the_device(cuda, model, optimizer)


def test_launches_of_a_step_after_a_load_from_the_host(cuda):
    """A state dict lies in host memory, the steps of dense parameters too."""
    model, optimizer = make("matrix")
    steps_on_the_device(cuda, model, optimizer)
    saved = optimizer.state_dict()
    assert {t.device.type for entry in saved["state"].values() for t in entry.values()} == {"cpu"}
    for entry in saved["state"].values():  # What comes back from a fake device are zeros.
        entry["step"] = torch.tensor(3.0)
        if "indices" in entry:
            entry["indices"] = torch.arange(len(entry["indices"]), dtype=torch.int32)
    optimizer.load_state_dict(saved)
    steps_on_the_device(cuda, model, optimizer)


# What follows breaks the package, and checks that the tests above notice it.


def run(cuda: FakeCuda, name: str) -> None:
    mode, dtype, options, scaler = RUNS[name]
    steps_on_the_device(cuda, *make(mode, dtype, **options), scaler)


def test_a_number_read_in_the_step_is_noticed(cuda, monkeypatch):
    begin_step = PackedState.begin_step

    def waiting(arena, rows, found_inf=None):
        steps = begin_step(arena, rows, found_inf)
        assert steps[0].item() == 0
        return steps

    run(cuda, "matrices")
    monkeypatch.setattr(PackedState, "begin_step", waiting)
    with pytest.raises(AssertionError, match=r"1 wait +aten\._local_scalar_dense.* from optim/bucket\.py"):
        run(cuda, "matrices")


def test_a_table_built_anew_in_every_step_is_noticed(cuda, monkeypatch):
    """Also one that is uploaded from pageable memory, for which the host waits."""

    def pageable(tables, key, device, build):
        return build()._replace(data=build().data.to(device))

    run(cuda, "matrices")
    monkeypatch.setattr(device_tables.DeviceTables, "get", pageable)
    with pytest.raises(AssertionError, match=r"wait +aten\._to_copy.* cpu to cuda from ops/triton/launch_tables"):
        run(cuda, "matrices")


def host(function):
    """``function``, whose result lies on the CPU."""
    return lambda *args: torch.empty_like(function(*args), device="cpu")


# name: run, module, function whose result is left on the host
LEFT_ON_THE_HOST = {
    "scalars of the step": ("matrices", bias_correction, "adamw_scalars"),
    "corrections by age": ("per entry", bias_correction, "bias_table"),
    "keys of the noise": ("stochastic", bias_correction, "stochastic_keys"),
}


@pytest.mark.parametrize("name", LEFT_ON_THE_HOST)
def test_a_cpu_tensor_in_the_step_is_noticed(name, cuda, monkeypatch):
    broken, module, function = LEFT_ON_THE_HOST[name]
    run(cuda, broken)
    monkeypatch.setattr(module, function, host(getattr(module, function)))
    with pytest.raises(ValueError, match="_sparse_adamw_kernel is launched with a CPU tensor"):
        run(cuda, broken)


def test_a_list_on_the_host_is_noticed_in_a_backward_pass(cuda):
    model, optimizer = make("packed")
    steps_on_the_device(cuda, model, optimizer)
    model.stack.lift_indices = torch.zeros(len(model.stack.lift_indices), dtype=torch.int32)
    with pytest.raises(ValueError, match="cpu"):
        backward(model)


def test_step_counts_left_on_the_host_by_a_load_are_noticed(cuda, monkeypatch):
    monkeypatch.setattr(lift_adamw_module, "load_dense", torch_alone)
    with pytest.raises(ValueError, match=r"_fused_adamw_.* is launched with a CPU tensor of shape \(\)"):
        test_launches_of_a_step_after_a_load_from_the_host(cuda)


def torch_alone(optimizer, load, state_dict):
    """`load_dense` without what follows torch's own load."""
    dense = {i: entry for i, entry in state_dict["state"].items() if "indices" not in entry}
    load({**state_dict, "state": dense})
