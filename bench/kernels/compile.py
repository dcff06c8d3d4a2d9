"""Ahead-of-time compilation of the kernels, and what their machine code holds.

It needs no GPU. `survey` compiles in processes of their own, because TRITON_INTERPRET=1 replaces
the compiler when triton is imported. Everything is read from the machine code by the disassembler
in triton's wheel, so both kinds of kernels are counted alike.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from triton.backends.compiler import GPUTarget

from bench import ROOT
from bench.kernels import variants
from bench.kernels.cases import CASES, CUDA_LAUNCHES, TARGETS, TESTED, THREADS, Case, Launch
from lift_kernels.ops.triton.targets import has_tensor_cores

WORKERS = 2
SYSTEM_SHARED = 1024  # bytes that the system takes of each block from sm_80 on


@dataclass(frozen=True)
class Compiled:
    """What a kernel compiled to on a target.

    Wide accesses are 128-bit units in the machine code of one thread. A 256-bit access counts
    twice. The declaration of the kernel asks for the ``needed`` ones. Copies go to shared memory
    past the registers. ``spills`` counts loads and stores of local memory.
    """

    kernel: str
    language: str  # triton or cuda
    target: int
    threads: int  # a block
    registers: int  # a thread
    static_shared: int  # bytes a block
    dynamic_shared: int
    stack_bytes: int  # a thread
    local_bytes: int
    spills: int
    wide_loads: int
    needed_loads: int
    wide_stores: int
    needed_stores: int
    wide_copies: int
    narrow_copies: int
    needs_wide_copies: bool
    tensor_cores: str  # instructions of the tensor cores: how many, and which
    needs_tensor_cores: bool
    products: str = ""  # the same in PTX, which names the types; Triton only
    single_bytes: int = 0  # loads and stores of a byte from and to global memory
    admitted_bytes: int | None = None  # of these; None: any


def compile_for(case: Case, target: GPUTarget) -> Any:
    """What Triton compiles a case to, with the launcher's options for the target.

    It is done as the launcher would for tensors at multiples of 16 bytes.
    """
    import triton
    import triton.language as tl

    module, function = case.kernel.split(".")
    kernel = getattr(importlib.import_module(f"lift_kernels.ops.triton.{module}"), function)
    formats = {"fp32": tl.float32, "fp16": tl.float16, "i16": tl.int16}
    signature = {name: case.types.get(name, "constexpr") for name in kernel.arg_names}
    launch = case.by_target(target) if case.by_target else {}
    values = case.constants | launch
    constants, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name not in case.types:
            value = values.get(name)
            constants[(position,)] = formats.get(value, value) if isinstance(value, str) else value
        elif case.types[name].startswith("*") or name in case.multiples:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": THREADS // 32, "enable_fp_fusion": False} | case.options
    options |= {name: value for name, value in launch.items() if name not in kernel.arg_names}
    return triton.compile(source, target=target, options=options)


def compile_case(case: Case, target: int) -> Compiled:
    """Compile for one CUDA target, such as 80."""
    card = GPUTarget("cuda", target, 32)
    compiled = compile_for(case, card)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        (counts,) = _machine_code(file, target).values()
    return Compiled(
        kernel=case.name,
        language="triton",
        target=target,
        threads=32 * compiled.metadata.num_warps,
        dynamic_shared=compiled.metadata.shared,
        needed_loads=case.needed(case.loads),
        needed_stores=case.needed(case.stores),
        needs_wide_copies=case.wide_copies and target >= 80,
        needs_tensor_cores=case.tensor_cores and has_tensor_cores(card),
        admitted_bytes=case.single_bytes,
        products=count_matches(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*", compiled.asm["ptx"]),
        **counts,
    )


def compile_cuda(source: Path | str, target: int, launches: dict[str, Launch] = CUDA_LAUNCHES) -> list[Compiled]:
    """Every kernel of a CUDA source, with the flags of setup.py, for one target.

    RuntimeError with nvcc's message when it fails.
    """
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError(no_nvcc())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        command = [compiler, *build().NVCC_FLAGS, "-cubin", f"-arch=sm_{target}", str(source), "-o", str(file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        found = _machine_code(file, target)
    records = []
    for name, counts in zip(_demangled(list(found)), found.values()):
        launch = launches.get(name) or launches.get(name.split("<")[0]) or Launch()
        records.append(
            Compiled(
                kernel=name,
                language="cuda",
                target=target,
                threads=launch.threads,
                dynamic_shared=launch.dynamic_shared,
                needed_loads=launch.wide_loads,
                needed_stores=launch.wide_stores,
                needs_wide_copies=False,
                needs_tensor_cores=False,
                **counts,
            )
        )
    return records


def survey(only: str = "", scope: str = "report") -> list[Compiled]:
    """Every kernel whose name contains ``only``, on every target of a scope.

    CUDA kernels are left out where `nvcc` finds no compiler. RuntimeError with the compiler's
    message when one does not compile.

    Args:
        only: part of the names.
        scope: ``"report"``, ``"tested"`` for the targets that `make test` compiles for, or
            ``"all"`` for every Triton variant on the targets of `variants`.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))

    def worker(i: int) -> list[Compiled]:
        command = [sys.executable, "-m", "bench.kernels.compile", only, str(i), scope]
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
        if done.returncode != 0:
            raise RuntimeError(f"compiling the kernels failed:\n{done.stderr}")
        return [Compiled(**json.loads(line)) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(WORKERS) as pool:
        records = [record for share in pool.map(worker, range(WORKERS)) for record in share]
    order = {case.name: place for place, case in enumerate(variants.every_case())}
    return sorted(records, key=lambda r: (r.language != "triton", order.get(r.kernel, 0), r.kernel, r.target))


def nvcc() -> str | None:
    """The compiler, in CUDA_HOME or on PATH, as setup.py looks for it."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home) / "bin" / "nvcc") if home else "nvcc")


def no_nvcc() -> str:
    """Why no CUDA kernel was compiled. Empty where nvcc is present."""
    if nvcc() is not None:
        return ""
    place = (
        f"in CUDA_HOME ({os.environ['CUDA_HOME']})"
        if os.environ.get("CUDA_HOME")
        else "on PATH, and CUDA_HOME is not set"
    )
    return f"nvcc is not {place}: {', '.join(build().CUDA_SOURCES)} not compiled"


@functools.cache
def build() -> ModuleType:
    """setup.py, which knows the CUDA sources and the flags of nvcc."""
    spec = importlib.util.spec_from_file_location("lift_kernels_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _machine_code(cubin: Path, target: int) -> dict[str, dict]:
    """By mangled name, the fields of `Compiled` that the machine code holds."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage, sass = (
        subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
        for option in ("--dump-resource-usage", "--dump-sass")
    )
    code = dict(re.findall(r"^\s*Function : (\S+)\n(.*?)(?=^\s*Function : |\Z)", sass, re.MULTILINE | re.DOTALL))
    found = {}
    for name, line in re.findall(r"^ Function (\S+):\n(.*)$", usage, re.MULTILINE):
        resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        text = code[name]
        # From sm_90 on it is counted among a block's own.
        reserved = SYSTEM_SHARED if target >= 90 and resources["SHARED"] else 0
        copies = re.findall(r"\bLDGSTS[\w.]*", text)
        wide = sum(copy.endswith(".128") for copy in copies)
        found[name] = {
            "registers": resources["REG"],
            "static_shared": resources["SHARED"] - reserved,
            "stack_bytes": resources["STACK"],
            "local_bytes": resources["LOCAL"],
            "spills": len(re.findall(r"\b(?:LDL|STL)\b", text)),
            "single_bytes": len(re.findall(r"\b(?:LDG|STG)\.(?:\w+\.)*[US]8\b", text)),
            "wide_loads": _wide("LDG", text),
            "wide_stores": _wide("STG", text),
            "wide_copies": wide,
            "narrow_copies": len(copies) - wide,
            "tensor_cores": count_matches(r"(?<![\w.])[A-Z]*MMA\b[\w.]*", text),
        }
    return found


def _wide(access: str, sass: str) -> int:
    """128-bit units moved by the wide accesses to global memory."""
    return sum(int(bits) // 128 for bits in re.findall(rf"\b{access}\.(?:\w+\.)*?(128|256)\b", sass))


def count_matches(pattern: str, text: str) -> str:
    """What matches, as "6 HMMA.16816.F32, 2 ..."."""
    kinds = Counter(re.findall(pattern, text))
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _demangled(names: list[str]) -> list[str]:
    """C++ names with their template arguments, without parameters and namespaces.

    They stay as they are where no demangler is found.
    """
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return names
    lines = subprocess.run([tool, "-p", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"(?:\(anonymous namespace\)|\w+)::", "", line) for line in lines]


def _jobs(only: str, scope: str) -> Iterator[tuple[Case | str, int]]:
    """What is to be compiled: CUDA sources and Triton cases, each for each target."""
    if scope == "all":
        yield from (
            (case, target) for case in variants.every_case() if only in case.name for target in variants.TARGETS
        )
        return
    tested = scope == "tested"
    for source in build().CUDA_SOURCES if nvcc() is not None else []:
        yield from ((source, target) for target in (TESTED if tested else TARGETS))
    for case in CASES:
        if only in case.name:
            yield from ((case, target) for target in case.targets(tested))


def _main() -> None:
    """A worker of `survey`: its share of the jobs, one JSON record a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", help="part of the kernels' names")
    parser.add_argument("worker", type=int)
    parser.add_argument("scope")
    arguments = parser.parse_args()
    for work, target in list(_jobs(arguments.only, arguments.scope))[arguments.worker :: WORKERS]:
        records = compile_cuda(work, target) if isinstance(work, str) else [compile_case(work, target)]
        for record in records:
            if arguments.only in record.kernel:
                print(json.dumps(asdict(record)))


if __name__ == "__main__":
    _main()
