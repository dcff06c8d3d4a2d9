"""Which backends there are and why others are not.

Importing the package needs none of them.
"""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.processes import run_code

import lift_kernels
from lift_kernels import LiftAdamW
from lift_kernels.ops import dispatch

CPU = torch.device("cpu")
STEP = """
import torch, lift_kernels
w = torch.nn.Parameter(torch.randn(20, 30, generator=torch.Generator().manual_seed(0)))
before = w.detach().clone()
o = lift_kernels.LiftAdamW([w], lr=0.01, rank=4, density=0.1)
for _ in range(3):
    w.grad = torch.ones_like(w)
    o.step()
print("moved", int((w != before).sum()))
"""
WITHOUT = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)
sys.meta_path = [Without(finder) for finder in sys.meta_path]
"""
NO_EXTENSION = """
import lift_kernels.ops.dispatch as dispatch
dispatch.native_library = lambda: None
"""


@pytest.fixture
def no_native(monkeypatch, fresh):
    missing = dispatch.Backend(False, "the compiled extension is missing")
    monkeypatch.setattr(dispatch, "_native_cpu", lambda: missing)


def test_backends_say_what_is_usable_and_why():
    found = lift_kernels.backends()
    assert tuple(found) == ("native-cpu", "native-cuda", "triton", "reference")
    assert all(isinstance(b.usable, bool) and b.reason for b in found.values())
    assert found["reference"].usable
    if not torch.cuda.is_available():
        assert not found["native-cuda"].usable
        assert found["triton"].usable == dispatch.interpreting()


def test_import_loads_neither_triton_nor_the_extension():
    unwanted = {"triton", "transformers", "accelerate", "peft"}
    code = f"import sys, lift_kernels; print({unwanted} & set(sys.modules))"
    loads = "; from lift_kernels.ops import dispatch; print(dispatch._load_native.cache_info().misses)"
    assert run_code(code + loads).stdout.split() == ["set()", "0"]


@pytest.mark.parametrize("blocked", [("triton",), ("transformers", "accelerate", "peft", "safetensors", "gguf")])
def test_without_optional_packages(blocked):
    done = run_code(WITHOUT.format(blocked=blocked) + STEP + "print(lift_kernels.backends()['triton'])")
    assert done.stdout.startswith("moved 60")
    if blocked == ("triton",):
        assert "usable=False" in done.stdout and "triton is not installed; pip install triton" in done.stdout


def test_without_cuda():
    done = run_code(STEP + "print(lift_kernels.backends())", CUDA_VISIBLE_DEVICES="")
    assert done.stdout.startswith("moved 60") and "'triton': Backend(usable=False" in done.stdout


def test_without_the_extension():
    """The reference runs, and one warning says so and why."""
    done = run_code(NO_EXTENSION + STEP + "print(lift_kernels.backends()['native-cpu'])")
    assert done.stdout.startswith("moved 60") and "usable=False" in done.stdout
    assert "the compiled extension lift_kernels._C is missing" in done.stdout
    warnings = [line for line in done.stderr.splitlines() if "falling back" in line]
    assert len(warnings) == 1
    assert "slower reference backend for cpu tensors: native-cpu is unavailable (the compiled extension" in warnings[0]


def test_without_extension_triton_and_optional_packages():
    done = run_code(WITHOUT.format(blocked=("triton", "transformers", "accelerate", "peft")) + NO_EXTENSION + STEP)
    assert done.stdout.startswith("moved 60")


def test_a_damaged_extension_is_reported(tmp_path, monkeypatch):
    """A file that is not a library gives a reason, not an exception."""
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(dispatch, "native_library", lambda: broken)
    dispatch._load_native.cache_clear()
    try:
        found = lift_kernels.backends()["native-cpu"]
        assert not found.usable and found.reason.startswith(f"_C.abi3.so does not load under torch {torch.__version__}")
    finally:
        monkeypatch.undo()
        dispatch._load_native.cache_clear()


def test_the_slower_backend_is_said_once(no_native, caplog):
    for op in ("sparse_adamw_", "packed_gather", "sparse_adamw_"):
        assert dispatch.choose(None, CPU, op) == "reference"
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (
            logging.WARNING,
            "falling back to the slower reference backend for cpu tensors: native-cpu is unavailable "
            "(the compiled extension is missing)",
        )
    ]


@pytest.mark.native
def test_the_fastest_backend_is_taken_silently(fresh, caplog):
    assert dispatch.choose(None, CPU, "sparse_adamw_") == "native-cpu" and not caplog.records


def test_an_unknown_backend():
    message = "unknown backend 'cuda'; choose one of native-cpu, native-cuda, triton, reference"
    with pytest.raises(ValueError, match=message):
        dispatch.choose("cuda", CPU, "sparse_adamw_")
    weight = torch.nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match=message):
        LiftAdamW([weight], backend="cuda")
    with pytest.raises(ValueError, match=message):
        lift_kernels.packed_gather(weight.detach(), torch.tensor([1], dtype=torch.int32), backend="cuda")


def test_a_backend_that_cannot_serve(no_native, monkeypatch):
    with pytest.raises(
        RuntimeError, match=r"'native-cpu' cannot run packed_gather on cpu .* here: the compiled .* missing"
    ):
        dispatch.choose("native-cpu", CPU, "packed_gather")
    monkeypatch.setattr(dispatch, "_triton", lambda: dispatch.Backend(True, "Triton kernels on CUDA devices"))
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with pytest.raises(
        RuntimeError, match="'triton' cannot run packed_gather on cpu tensors here: it only runs on cuda tensors"
    ):
        dispatch.choose("triton", CPU, "packed_gather")
    with pytest.raises(
        RuntimeError,
        match="'native-cuda' cannot run .*: the op has native-cpu, triton, reference; choose one of",
    ):
        dispatch.choose("native-cuda", CPU, "sparse_adamw_")


def test_an_optimizer_with_a_backend_that_cannot_serve(no_native):
    """The error comes with the constructor, not in the middle of training."""
    with pytest.raises(RuntimeError, match="'native-cpu' cannot run sparse_adamw_ on cpu tensors here"):
        LiftAdamW([torch.nn.Parameter(torch.ones(4, 4))], rank=2, backend="native-cpu")
