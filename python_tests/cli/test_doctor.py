"""The doctor reports what works, what does not and what to do.

It fails if the default backend is broken.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
from types import SimpleNamespace

import pytest
import torch

import lift_kernels
from lift_kernels import ops
from lift_kernels.cli import doctor, main, selfcheck
from lift_kernels.ops import cpu_levels, dispatch
from lift_kernels.ops.triton import targets


def report(capsys) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit code, and (state, text) by subject."""
    code = main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    parsed = [(line[:6].strip(), *line[7:].split(": ", 1)) for line in lines]
    return code, {subject: (state, text) for state, subject, text in parsed}


@pytest.fixture
def no_subprocess(monkeypatch):
    monkeypatch.setattr(
        doctor, "_triton_interpreter", lambda reason: doctor.Line(selfcheck.OK, "triton", "not run here")
    )


@pytest.mark.native
def test_a_sound_machine(capsys):
    code, lines = report(capsys)
    assert code == 0
    level = lift_kernels.backends()["native-cpu"].reason.removeprefix("compiled C++ for the CPU, ")
    assert lines["native-cpu"] == ("OK", f"8 ops agree with the reference on cpu tensors ({level})")
    assert level.startswith(dispatch.cpu_level())
    assert lines["reference"][0] == "OK" and torch.__version__ in lines["machine"][1]
    assert lines["triton"][0] == "OK" and lines["triton"][1].startswith("9 ops agree with the reference")
    assert lines["default on cpu"] == ("OK", "native-cpu is used; three steps of LiftAdamW agree with the reference")
    assert lines["package transformers"] == ("OK", importlib.metadata.version("transformers"))
    if not torch.cuda.is_available():
        assert lines["GPU"][0] == "--" and "no CUDA device" in lines["GPU"][1]


@pytest.mark.parametrize("capability, slow", [((7, 5), True), ((8, 9), False), ((12, 0), False)])
def test_what_a_gpu_lacks_is_said(monkeypatch, capability, slow):
    """A card without tensor cores for bf16 and TF32 gets a line of its own."""
    name, (major, minor) = "A Card", capability
    found = SimpleNamespace(name=name, major=major, minor=minor, total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    targets._target.cache_clear()
    lines = [str(line) for line in doctor._machine()[1:]]
    targets._target.cache_clear()
    assert lines[0].startswith(f"OK     GPU: {name}, sm_{major}{minor}, 16 GiB, CUDA ")
    assert len(lines) == 1 + slow
    assert not slow or lines[1].startswith(
        f"--     GPU: {name}: it has no tensor cores for bf16 and TF32: every op works"
    )


@pytest.mark.native
@pytest.mark.parametrize("op", dispatch.ops_of("native-cpu"))
def test_a_wrong_default_backend_is_found(monkeypatch, capsys, no_subprocess, op):
    """One op of the native backend returns one wrong entry, or raises."""
    original = getattr(ops, op)
    for wrong in ("value", "error"):

        def broken(first, *args, backend=None, wrong=wrong, **options):
            result = original(first, *args, backend=backend, **options)
            if backend == "native-cpu":
                if wrong == "error":
                    raise RuntimeError("illegal\ninstruction")
                if result is None:
                    target = first[0] if op == "sparse_adamw_" else first
                else:
                    target = result[0] if isinstance(result, tuple) else result
                target.view(-1)[-1] += 1
            return result

        with monkeypatch.context() as patch:
            patch.setattr(ops, op, broken)
            code, lines = report(capsys)
        assert code == 1
        assert lines["native-cpu"][0] == lines["default on cpu"][0] == "BROKEN"
        found = f"{op} is off by" if wrong == "value" else f"{op} raised RuntimeError: illegal instruction"
        assert found in lines["native-cpu"][1]
        assert "pip install --no-build-isolation ." in lines["default on cpu"][1]
        assert lines["reference"][0] == "OK"


@pytest.mark.native
def test_a_wrong_level_is_said_with_the_choices(monkeypatch, capsys):
    """The report goes on to its end, and the command fails."""
    monkeypatch.setattr(cpu_levels, "asked", lambda: "fast")
    dispatch._default.cache_clear()
    try:
        code, lines = report(capsys)
    finally:
        dispatch._default.cache_clear()
    wrong = f"LIFT_CPU_LEVEL=fast names no level of this CPU; choose one of {', '.join(cpu_levels.levels())}, or leave "
    assert code == 1 and lines["native-cpu"] == ("BROKEN", f"{wrong}it unset for the highest")
    assert lines["default on cpu"] == ("BROKEN", f"no op runs: {wrong}it unset for the highest")
    assert lines["reference"][0] == lines["triton"][0] == "OK" and "package triton" in lines


@pytest.mark.native
def test_a_level_that_came_too_late_is_said(monkeypatch, capsys, no_subprocess):
    monkeypatch.setenv("LIFT_CPU_LEVEL", "v2" if cpu_levels.asked() != "v2" else "v3")
    code, lines = report(capsys)
    assert code == 0 and f"({dispatch.cpu_level()}; LIFT_CPU_LEVEL=v" in lines["native-cpu"][1]
    assert "came too late, after the library was loaded" in lines["native-cpu"][1]


def test_a_missing_extension_is_said_with_its_remedy(monkeypatch, capsys, no_subprocess):
    monkeypatch.setattr(
        dispatch, "_load_native", lambda: "the compiled extension is missing; install with a C++ compiler"
    )
    dispatch._default.cache_clear()
    dispatch._warn_once.cache_clear()
    try:
        code, lines = report(capsys)
    finally:
        dispatch._default.cache_clear()
    assert code == 0 and lines["native-cpu"] == ("--", "the compiled extension is missing; install with a C++ compiler")
    assert lines["default on cpu"][0] == "OK" and "reference is used, which is slow" in lines["default on cpu"][1]


def test_a_missing_package_is_said_with_its_remedy(monkeypatch, capsys, no_subprocess):
    monkeypatch.setitem(doctor.EXTRAS, "no-such-package", "nothing")
    code, lines = report(capsys)
    assert code == 0 and lines["package no-such-package"] == (
        "--",
        "not installed (for nothing); pip install no-such-package",
    )


@pytest.mark.parametrize(
    "triton, numpy, checked",
    [
        ("3.6.0", "2.4.6", False),
        ("3.6.0", "2.5rc1", False),
        ("3.6.0", "2.3.5", True),
        ("3.7.1", "2.4.6", True),
        ("3.7.dev0", "2.4.6", True),
    ],
)
def test_a_numpy_too_new_for_the_interpreter_is_said_with_its_remedy(monkeypatch, triton, numpy, checked):
    """That is no fault of the kernels. They are not checked then, and nothing is broken."""
    ran = []

    def run(command, **options):
        ran.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(importlib.metadata, "version", {"triton": triton, "numpy": numpy}.__getitem__)
    monkeypatch.setattr(subprocess, "run", run)
    line = doctor._triton_interpreter("torch sees no CUDA device; more")
    assert bool(ran) == checked and line.state == ("OK" if checked else "--") and not line.fatal
    if not checked:
        assert line.text == (
            "torch sees no CUDA device; not checked in Triton's interpreter, which in Triton 3.6 needs NumPy below "
            "2.4: pip install 'numpy<2.4'"
        )
