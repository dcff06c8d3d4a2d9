"""Ahead-of-time compilation of the Triton kernels for AMD. It needs no GPU.

    python -m bench.kernels.amd [TARGET]

Every case is compiled to a code object by the assembler and linker in triton's wheel. The table
says what it holds. Nobody has run these kernels.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from triton.backends.compiler import GPUTarget

from bench import ROOT
from bench.common import results
from bench.kernels.cases import CASES, Case
from bench.kernels.compile import compile_for, count_matches

TARGET = "gfx942"
"""MI300."""
LOCAL_MEMORY = 64 * 1024
"""Bytes that a workgroup can have of AMD's shared memory."""
COLUMNS = ("kernel", "target", "regs", "shared", "spills", "scratch", "matrix cores")


@dataclass(frozen=True)
class CompiledForAmd:
    """What a kernel compiled to.

    ``registers`` are vector registers. ``spills`` are registers of either kind in ``scratch``
    bytes of memory. ``products`` are the instructions of the matrix cores.
    """

    kernel: str
    target: str
    registers: int
    spills: int
    scratch: int  # bytes a thread
    shared: int  # bytes a workgroup
    products: str
    code_bytes: int


def compile_for_amd(case: Case, target: str) -> CompiledForAmd:
    """Compile a case for a target such as gfx942."""
    compiled = compile_for(case, GPUTarget("hip", target, 64))
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        (value,) = re.findall(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE)
        return int(value)

    return CompiledForAmd(
        kernel=case.name,
        target=target,
        registers=field("vgpr_count"),
        spills=field("vgpr_spill_count") + field("sgpr_spill_count"),
        scratch=field("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        products=count_matches(r"\bv_s?mfma_\w+", text),
        code_bytes=len(compiled.asm["hsaco"]),
    )


def survey(target: str = TARGET) -> list[CompiledForAmd]:
    """Every Triton case, compiled in a process without Triton's interpreter.

    RuntimeError with the compiler's message when one does not compile.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "bench.kernels.amd", target, "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"compiling the kernels for {target} failed:\n{done.stderr}")
    return [CompiledForAmd(**json.loads(line)) for line in done.stdout.splitlines()]


def main(arguments: Sequence[str]) -> None:
    """Print the table, or with ``--json`` one record a line."""
    target = next((text for text in arguments if not text.startswith("-")), TARGET)
    records = [compile_for_amd(case, target) for case in CASES]
    if "--json" in arguments:
        for record in records:
            print(json.dumps(asdict(record)))
        return
    rows = [
        dict(zip(COLUMNS, map(str, (r.kernel, r.target, r.registers, r.shared, r.spills, r.scratch, r.products))))
        for r in records
    ]
    results.show(rows, COLUMNS)


if __name__ == "__main__":
    main(sys.argv[1:])
