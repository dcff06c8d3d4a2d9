"""State in host memory beside weights on a GPU: what lies where, and which steps wait.

Most tests run on fake CUDA tensors (`bench.common.fake_cuda`). On a GPU a run is compared with one
on the CPU, to the bit.
"""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from helpers.bits import BF16, FP32
from helpers.optimizers import assert_same, make_weights, set_gradients, snapshot
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.common.fake_cuda import FakeCuda
from lift_kernels import LiftAdamW, pack_gradients
from lift_kernels.masks.selection import largest_indices
from lift_kernels.optim import staging
from lift_kernels.optim.staging import chunks_of

pytestmark = pytest.mark.slow
MATRICES, SHAPE, DENSITY = 6, (256, 192), 0.1
K = round(DENSITY * 256 * 192)
CHUNK = 1 << 12
FORMS = {
    "matrix": {},
    "matrix, split": {"master": "split"},
    "matrix, 8bit": {"state_dtype": "8bit", "master": None, "rounding": "stochastic", "bias_correction": "per_entry"},
    "packed": {},
    "packed, 8bit": {"state_dtype": "8bit"},
    "packed, bf16 gradients": {"state_dtype": "8bit", "master": "split"},
}


@pytest.fixture(scope="module")
def cuda():
    with FakeCuda() as cuda:
        yield cuda


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(staging, "CHUNK", CHUNK)


def ready_lists(weight, k):
    """Fake index lists hold no numbers, so any one is ready-made."""
    return torch.empty(k, dtype=torch.int32, device=weight.device)


def trained(form, dtype=BF16, **options):
    """A model and its optimizer after a step, without gradients."""
    make = dict(bias=False, device="cuda", dtype=dtype)
    model = nn.Sequential(*(nn.utils.skip_init(nn.Linear, SHAPE[1], SHAPE[0], **make) for _ in range(MATRICES)))
    if form.startswith("packed"):
        grad_dtype = BF16 if "bf16" in form else FP32
        groups = pack_gradients(model, ".*", selection=ready_lists, density=DENSITY, grad_dtype=grad_dtype)
    else:
        groups = [{"params": list(model.named_parameters()), "density": DENSITY}]
    optimizer = LiftAdamW(
        groups, refresh_interval=None, selection=ready_lists, offload="cpu", **{**FORMS[form], **options}
    )
    step(optimizer)
    optimizer.zero_grad()
    return model, optimizer


def give_gradients(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.empty(p.shape, dtype=p.dtype, device=p.device)


def step(optimizer):
    give_gradients(optimizer)
    optimizer.step()


def bytes_on_device(model):
    """Of all storages that are alive, but for weights."""
    gc.collect()
    alive = [x for x in gc.get_objects() if issubclass(type(x), FakeTensor) and x.device.type == "cuda"]
    weights = {p.untyped_storage()._cdata for name, p in model.named_parameters() if name.endswith("weight")}
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in alive}
    return sum(size for key, size in storages.items() if key not in weights)


class LargestMade(TorchDispatchMode):
    """Entries of the largest device tensor whose storage an op makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == "cuda" and x.untyped_storage()._cdata not in given:
                self.entries = max(self.entries, x.numel())
        return out


@pytest.mark.parametrize("form", FORMS)
def test_only_index_lists_stay_on_the_device(form, cuda):
    before = bytes_on_device(nn.Module())
    model, optimizer = trained(form)
    weights = sum(layer.weight.untyped_storage().nbytes() for layer in model)
    assert bytes_on_device(model) - before <= 4.05 * MATRICES * K
    assert weights == 2 * MATRICES * SHAPE[0] * SHAPE[1]
    for entry in optimizer.state.values():
        places = {key: value.device.type for key, value in entry.items()}
        assert places.pop("indices") == "cuda" and set(places.values()) == {"cpu"}
    if form.startswith("packed"):
        assert all(layer.values.untyped_storage().nbytes() <= 4 and layer.values.shape == (K,) for layer in model)
        give_gradients(optimizer)
        assert bytes_on_device(model) - before <= (6.05 if "bf16" in form else 8.05) * MATRICES * K
    optimizer.refresh(drop_gradients=True)
    assert bytes_on_device(model) - before <= 4.05 * MATRICES * K


@pytest.mark.parametrize("form", FORMS)
def test_a_step_makes_nothing_on_the_device_that_is_longer_than_a_chunk(form, cuda):
    _, optimizer = trained(form)
    give_gradients(optimizer)
    with LargestMade() as made:
        optimizer.step()
    assert 0 < made.entries <= CHUNK < MATRICES * K


@pytest.mark.parametrize("form", FORMS)
def test_a_step_waits_once_for_each_chunk(form, cuda):
    _, optimizer = trained(form)
    step(optimizer)
    give_gradients(optimizer)
    with cuda.recording() as events:
        optimizer.step()
    arena = next(iter(optimizer._table.arenas.values()))
    chunks = chunks_of(arena.offsets, arena.counts)
    parts = sum(len(chunk) for chunk in chunks)
    assert len(chunks) == 8
    assert [event.what for event in events.waits] == ["Event.synchronize"] * len(chunks), events.report()
    kernels = [event.what for event in events.launches]
    gathers = (not form.startswith("packed")) + (FORMS[form].get("master", "fp32") != "fp32")
    assert kernels.count("_packed_gather_kernel") == gathers * parts
    assert kernels.count("_packed_scatter_kernel") == parts
    assert kernels.count("aten._to_copy.default cpu to cuda") == len(chunks)
    assert "_sparse_adamw_kernel" not in kernels


@pytest.mark.parametrize("scaled", [False, True])
def test_a_factor_and_a_flag_are_read_together(scaled, cuda, monkeypatch):
    _, optimizer = trained("matrix", max_grad_norm=1.0)
    if scaled:
        monkeypatch.setattr(optimizer, "grad_scale", torch.ones((), device="cuda"), raising=False)
        monkeypatch.setattr(optimizer, "found_inf", torch.zeros((), device="cuda"), raising=False)
    give_gradients(optimizer)
    with cuda.recording() as events:
        optimizer.step()
    waits = [event.what for event in events.waits]
    assert waits == ["aten._to_copy.default cuda to cpu"] + ["Event.synchronize"] * 8, events.report()


class RecordedStream:
    """A stream that writes down who waits for what."""

    def __init__(self, name, log):
        self.name, self.log, self.events = name, log, 0

    def record_event(self):
        name = f"{self.name} {self.events}"
        self.events += 1
        self.log.append(name)
        return SimpleNamespace(name=name, synchronize=lambda: self.log.append(f"host waits for {name}"))

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event.name}")

    def wait_stream(self, stream):
        self.log.append(f"{self.name} waits for {stream.name}")


def test_who_waits_for_what(cuda, monkeypatch):
    """Memory is filled again once its values have gone up. The current stream waits for all."""
    log = []
    names = iter(["down", "up"])
    present = RecordedStream("current", log)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: RecordedStream(next(names), log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: present)
    _, optimizer = trained("matrix", max_grad_norm=None)
    monkeypatch.setattr(staging, "CHUNK", 3 * CHUNK)  # three chunks
    del log[:]
    give_gradients(optimizer)
    optimizer.step()
    assert log == [
        "down waits for current",
        "down waits for up 6",  # of the step before, which had chunks 0 to 7
        "down 8",
        "down waits for up 7",
        "down 9",
        "host waits for down 8",
        "up 8",
        "down waits for up 8",
        "down 10",
        "host waits for down 9",
        "up 9",
        "host waits for down 10",
        "up 10",
        "current waits for up",
    ]


def test_bases_and_saved_states_lie_on_the_host(cuda):
    model = nn.Linear(600, 600, bias=False, device="cuda", dtype=BF16)
    optimizer = LiftAdamW(model.named_parameters(), rank=8, mask_method="chebyshev", offload="cpu")
    step(optimizer)
    (entry,) = optimizer.state.values()
    assert entry["basis"].device.type == "cpu" and entry["basis"].numel() > 0
    optimizer.zero_grad()
    optimizer.refresh()
    saved = optimizer.state_dict()
    saved["state"][0]["indices"] = torch.arange(len(entry["indices"]), dtype=torch.int32)  # Fake ones hold no numbers.
    optimizer.load_state_dict(saved)
    step(optimizer)
    (entry,) = optimizer.state.values()
    assert [key for key, value in entry.items() if value.device.type == "cuda"] == ["indices"]


@pytest.mark.parametrize("form", FORMS)
def test_a_refresh_sends_old_places_and_weights_of_masters(form, cuda):
    _, optimizer = trained(form)
    optimizer.state_dict()
    with cuda.recording() as events:
        optimizer.refresh()
    events = events.outside("masks/").inside("optim/offload.py")
    masters = FORMS[form].get("master", "fp32") == "fp32"
    assert len(events.waits) == (2 if masters else 1) * MATRICES, events.report()


# ---- on a GPU ------------------------------------------------------------------------------------


def from_magnitudes(weight, k):
    return largest_indices(weight.cpu().abs(), k).to(weight.device)


@pytest.mark.gpu
@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit"}, {"master": None, "bias_correction": "per_entry"}])
def test_a_run_on_a_gpu_is_that_on_the_cpu(options, dtype, busy):
    """A busy stream lets copies and steps that do not wait for each other go wrong."""
    runs = []
    for device in ("cpu", "cuda"):
        weights = make_weights(((256, 192), (64, 33), (512, 128)), dtype, device)
        optimizer = LiftAdamW(
            weights, lr=0.01, density=0.3, refresh_interval=3, selection=from_magnitudes, offload="cpu", **options
        )
        for number in range(8):
            if busy and device == "cuda":
                torch.cuda._sleep(20_000_000)
            set_gradients(weights, number)
            optimizer.step()
        if device == "cuda":
            assert all(value.is_pinned() for value in optimizer.state[weights[0]].values() if not value.is_cuda)
        runs.append({key: x.cpu() if isinstance(x, torch.Tensor) else x for key, x in snapshot(optimizer).items()})
    assert_same(runs[1], runs[0])


@pytest.mark.gpu
def test_memory_of_a_gpu():
    weights = make_weights(((2048, 2048),) * 4, BF16, "cuda")
    optimizer = LiftAdamW(weights, density=0.1, selection=from_magnitudes, refresh_interval=None, offload="cpu")
    set_gradients(weights, 0)
    optimizer.step()
    optimizer.zero_grad()
    torch.cuda.synchronize()
    entries = 4 * round(0.1 * 2048 * 2048)
    held = torch.cuda.memory_allocated() - sum(w.untyped_storage().nbytes() for w in weights)
    assert held <= 4.2 * entries
