"""`bench.kernels.report`: no faults in the kernels, faults in wrong ones, arithmetic.

A wrong kernel spills or lost its wide loads.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys

import pytest

from bench import ROOT
from bench.kernels import compile as kernel_compile
from bench.kernels import report as kernel_report
from bench.kernels.cases import CASES, CUDA_LAUNCHES, TARGETS, TESTED, Launch
from bench.kernels.compile import Compiled

pytestmark = pytest.mark.slow

# 64 values alive at once, and a stream of floats read one at a time where it could be four.
WRONG_CUDA = """
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float* in, float* out) {
  float x[64];
  for (int i = 0; i < 64; ++i) x[i] = in[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < 64; ++j) x[j] = x[j] * x[i] + x[(i + j) % 64];
  for (int i = 0; i < 64; ++i) out[i * 1024 + threadIdx.x] = x[i];
}
__global__ void wide_kernel(const float4* in, float4* out) { out[threadIdx.x] = in[threadIdx.x]; }
__global__ void narrow_kernel(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x]; }
__global__ void undeclared_kernel(const float* in, float* out) {
  __shared__ float values[512];
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[511 - threadIdx.x];
}
"""


def record(**changes) -> Compiled:
    """A kernel without a fault."""
    fields = dict.fromkeys(
        ("static_shared", "dynamic_shared", "stack_bytes", "local_bytes", "spills", "narrow_copies"), 0
    )
    fields |= dict.fromkeys(("wide_loads", "needed_loads", "wide_stores", "needed_stores"), 2)
    fields |= {"kernel": "k", "language": "triton", "target": 80, "threads": 128, "registers": 32, "wide_copies": 1}
    fields |= {"needs_wide_copies": True, "tensor_cores": "2 HMMA.16816.F32", "needs_tensor_cores": True}
    return Compiled(**(fields | changes))


def compile_in_process(case, target) -> Compiled:
    """One case, in a process that has Triton's compiler and not its interpreter."""
    program = (
        "import dataclasses, json, pickle, sys; from bench.kernels.compile import compile_case; "
        "print(json.dumps(dataclasses.asdict(compile_case(*pickle.load(sys.stdin.buffer)))))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    work = pickle.dumps((case, target))
    done = subprocess.run([sys.executable, "-c", program], input=work, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return Compiled(**json.loads(done.stdout))


def report(monkeypatch, records, *arguments) -> int:
    monkeypatch.setattr(kernel_report, "survey", lambda only, scope: list(records))
    monkeypatch.setattr(kernel_report.cpu, "survey", lambda only: [])
    monkeypatch.setattr(kernel_report.cpu, "missing", lambda architecture: "")
    return kernel_report.main(arguments)


def test_the_kernels_as_they_are(kernels, monkeypatch, capsys, tmp_path):
    """No faults, every case and every tested target; CSV and Markdown hold each compilation."""
    assert report(monkeypatch, kernels, "--csv", str(tmp_path / "kernels.csv"), "--markdown") == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| (?!---)", line)]
    with (tmp_path / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    missing = kernel_compile.no_nvcc()
    assert len(rows) == len(kernels) and len(shown) == 1 + len(kernels) + bool(missing)
    triton = {(row["kernel"], int(row["target"])) for row in rows if row["language"] == "triton"}
    assert triton == {(case.name, target) for case in CASES for target in case.targets(tested=True)}
    assert all(row["verdict"] == "ok" and row["compiler"] and float(row["occupancy"]) > 0 for row in rows)
    assert all(re.fullmatch(r"\d+ (H|HG|UTCH)MMA[\w.]*", row["tensor_cores"]) for row in rows if row["tensor_cores"])


def test_every_cuda_kernel_is_in_the_report(kernels):
    """All sources of setup.py, for all tested targets; no entry of the table is of a kernel that is
    gone.
    """
    cuda = {(record.kernel, record.target) for record in kernels if record.language == "cuda"}
    if kernel_compile.nvcc() is None:
        assert not cuda
        return
    source = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu*"))
    names = set(re.findall(r"__global__[^(;]*?(?:__launch_bounds__\([^)]*\)[^(;]*?)?(\w+)\(", source))
    assert names == {name.split("<")[0] for name, _ in cuda}
    assert {target for _, target in cuda} == set(TESTED)
    assert all(entry in {name for name, _ in cuda} | names for entry in CUDA_LAUNCHES)


def test_where_nvcc_is_missing_a_row_says_so(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert report(monkeypatch, [record()]) == 0
    out = capsys.readouterr().out
    assert "nvcc is not in CUDA_HOME (/nowhere): " in out and "csrc/cuda/packed_ops.cu" in out


def test_a_triton_kernel_that_spills(monkeypatch, capsys):
    case = dataclasses.replace(CASES[0], name="short of registers", options={"maxnreg": 24})
    bad = compile_in_process(case, 90)
    assert bad.registers <= 24 and bad.spills > 0 and bad.stack_bytes > 0
    assert kernel_report.faults(bad) == ["spills", "local memory"]
    assert report(monkeypatch, [record(), bad]) == 1
    assert "short of registers, sm_90: spills, local memory" in capsys.readouterr().err


def test_a_triton_kernel_that_lost_its_wide_loads(monkeypatch, capsys):
    """The variant for unaligned segments, declared as the one for aligned ones."""
    unaligned = next(case for case in CASES if "unaligned" in case.name)
    bad = compile_in_process(dataclasses.replace(unaligned, loads=("int32", "fp32"), stores=("fp32",)), 80)
    assert (bad.wide_loads, bad.needed_loads, bad.wide_stores, bad.needed_stores) == (0, 4, 0, 2)
    assert report(monkeypatch, [bad]) == 1
    assert "lost wide loads, lost wide stores" in capsys.readouterr().err


def test_cuda_kernels_that_are_wrong(tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text(WRONG_CUDA)
    if kernel_compile.nvcc() is None:
        with pytest.raises(RuntimeError, match="nvcc is not"):
            kernel_compile.compile_cuda(source, 90)
        return
    launches = dict.fromkeys(
        ("wide_kernel", "narrow_kernel"), Launch(threads=512, dynamic_shared=96, wide_loads=1, wide_stores=1)
    )
    found = {r.kernel: r for r in kernel_compile.compile_cuda(source, 90, launches)}
    assert kernel_report.faults(found["spilling_kernel"]) == ["spills", "local memory"]
    assert kernel_report.faults(found["wide_kernel"]) == []
    assert kernel_report.faults(found["narrow_kernel"]) == ["lost wide loads", "lost wide stores"]
    wide, undeclared = found["wide_kernel"], found["undeclared_kernel"]
    assert (wide.threads, wide.static_shared, wide.dynamic_shared, wide.wide_loads, wide.wide_stores) == (
        512,
        0,
        96,
        1,
        1,
    )
    assert (undeclared.threads, undeclared.static_shared, kernel_report.faults(undeclared)) == (256, 2048, [])
    source.write_text("not C++")
    with pytest.raises(RuntimeError, match="wrong.cu"):
        kernel_compile.compile_cuda(source, 90)


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"stack_bytes": 8}, "local memory"),
        ({"local_bytes": 8}, "local memory"),
        ({"wide_loads": 1}, "lost wide loads"),
        ({"narrow_copies": 1}, "lost wide copies"),
        ({"wide_copies": 0}, "lost wide copies"),
        ({"tensor_cores": ""}, "tensor cores unused"),
        ({"single_bytes": 9, "admitted_bytes": 8}, "codes move byte by byte"),
        ({"dynamic_shared": 163 * 1024 + 1}, "fits on no multiprocessor"),
    ],
)
def test_faults(changes, fault):
    assert kernel_report.faults(record()) == []
    assert kernel_report.faults(record(**changes)) == [fault]


@pytest.mark.parametrize(
    "target, threads, registers, shared, expected",
    [
        # 32 registers: 1024 a warp, 16 warps in each of 4 partitions, 64 in all: 16 blocks of 4.
        # 164 KiB over 1 KiB a block.
        (80, 128, 32, 0, (16, 164, 16)),
        # 33 registers: 1056 a warp, rounded up to 1280; 12 warps in each partition, 48 in all.
        (80, 128, 33, 0, (12, 164, 16)),
        # 72 registers: 2304 a warp; 7 in each partition, 28 in all: 3 blocks of 8. 9 KiB a block:
        # 228 / 9.
        (90, 256, 72, 8192, (3, 25, 8)),
        # 255 registers: 8160, rounded up to 8192; 2 in each partition. 100 KiB + 1 KiB a block.
        (100, 256, 255, 100 * 1024, (1, 2, 8)),
        # One warp a block: 32 blocks are the limit, not 64 warps. 16 bytes and 1 KiB: 1152 bytes in
        # units of 128.
        (80, 32, 16, 16, (128, 145, 32)),
        # All the shared memory that a block may have; a byte more fits no more. 1024 threads: 32
        # warps.
        (90, 1024, 32, 227 * 1024, (2, 1, 2)),
        (90, 1024, 32, 227 * 1024 + 1, (2, 0, 2)),
        # 32 warps. The system takes no shared memory: 64 KiB for one block, in units of 256 bytes.
        (75, 256, 64, 64 * 1024, (4, 1, 4)),
        (75, 128, 32, 4097, (16, 15, 8)),
        (75, 32, 32, 0, (64, 16, 16)),  # without shared memory only the blocks are limited
        # 48 warps; 16 blocks at most on sm_86, 24 on sm_89 and sm_120. 99 KiB for one block.
        (86, 32, 32, 0, (64, 100, 16)),
        (89, 32, 32, 0, (64, 100, 24)),
        (120, 256, 128, 48 * 1024, (2, 2, 6)),
        (120, 256, 32, 99 * 1024, (8, 1, 6)),
        (86, 256, 32, 99 * 1024 + 1, (8, 0, 6)),
    ],
)
def test_occupancy(target, threads, registers, shared, expected):
    fit = kernel_report.occupancy(target, threads, registers, shared)
    assert (fit.by_registers, fit.by_shared, fit.by_threads) == expected
    assert fit.blocks == min(expected)
    assert fit.share == min(expected) * (threads // 32) / {75: 32, 86: 48, 89: 48, 120: 48}.get(target, 64)


def test_every_target_has_limits():
    assert set(kernel_report.MULTIPROCESSORS) == set(TARGETS)


def test_bytes_in_flight():
    """16 bytes for each of 2 loads and 1 copy, 16 blocks of 128 threads."""
    assert kernel_report.bytes_in_flight(record()) == 16 * 3 * 16 * 128


def test_the_command(tmp_path):
    """As a process, on one kernel, even where the interpreter is asked for."""
    command = [sys.executable, "-m", "bench.kernels.report", "--only", "set_bits", "--csv", str(tmp_path / "k.csv")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^set_bits +sm_(\d+) .* ok *$", done.stdout, re.MULTILINE) == list(map(str, TARGETS))
