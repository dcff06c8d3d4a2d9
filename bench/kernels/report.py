"""Every Triton and CUDA kernel compiled for sm_75 to sm_120, and its machine code.

The loops of the CPU ops are reported for each level of instruction sets. It needs no GPU, and no
CPU that has the levels.

    python -m bench.kernels.report [--only TEXT] [--cpu | --all] [--markdown] [--csv PATH]
        [--cpu-csv PATH]

The exit status is 1 when a kernel spills, uses local memory, fits on no multiprocessor, lost wide
accesses that `bench.kernels.cases` declares, moves 8-bit codes byte by byte, or multiplies by other
units than declared. It is 1, too, when the loops of a CPU op compute with scalars or with narrower
vectors than the level has, leave sums on the stack from one iteration to the next, or fuse
multiply-adds where they must not.
Without nvcc or a C++ compiler for an architecture, a row says so.

- ``regs``: registers a thread. ``shared``: bytes a block, static + dynamic.
- ``spills``: loads and stores of local memory in the code. ``local``: bytes of stack and local
  memory a thread.
- ``blocks``: those that fit on a multiprocessor, by registers / shared memory / threads. The
  smallest counts. ``occupancy``: their warps, of all that the multiprocessor holds. It is a bound,
  not a measurement. `occupancy` says how it is counted.
- ``loads``, ``stores``: 128-bit accesses to global memory in the code of one thread, found and,
  after the slash, declared. ``copies``: those past the registers into shared memory, 128-bit and,
  after the plus, narrower.
- ``in flight``: KiB that the resident threads of a multiprocessor ask for when each has issued
  every 128-bit load and copy of its code once: 16 bytes x (loads + copies) x resident threads.
  Narrow and gathered accesses are not in it, so it is 0 for a kernel that has no others. A copy
  pipeline counts with all of its stages.

The rows of the CPU are the functions of the tables in csrc/cpu/levels.h, counted in their main
loops (`bench.kernels.cpu`).

- ``vectors``: bits of the widest vectors, and after the slash those that are needed.
- ``multiply-adds``: fused, or a multiplication and an addition apart.
- ``scalar``: instructions on one float, or that move one lane.
- ``stack``: loads and, after the plus, stores of whole vectors. Constants are among the loads.
  ``carried``: vectors that one iteration leaves there for the next.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from bench.common import results
from bench.kernels import cpu
from bench.kernels.compile import SYSTEM_SHARED, Compiled, no_nvcc, nvcc, survey

COLUMNS = (
    "kernel",
    "target",
    "regs",
    "shared",
    "spills",
    "local",
    "blocks",
    "occupancy",
    "loads",
    "stores",
    "copies",
    "tensor cores",
    "in flight",
    "verdict",
)


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks of one multiprocessor share.

    Source: CUDA C++ Programming Guide, compute capabilities; cuda_occupancy.h.
    """

    shared: int  # bytes, with those that the system takes of each block
    registers: int = 65536
    partitions: int = 4  # each has its part of the registers
    warps: int = 64
    blocks: int = 32
    system_shared: int = SYSTEM_SHARED  # bytes a block
    shared_unit: int = 128  # bytes
    register_unit: int = 256  # registers a warp


MULTIPROCESSORS = {
    75: Multiprocessor(shared=64 * 1024, warps=32, blocks=16, system_shared=0, shared_unit=256),  # T4, RTX 20
    80: Multiprocessor(shared=164 * 1024),  # A100
    86: Multiprocessor(shared=100 * 1024, warps=48, blocks=16),  # A10, RTX 30
    89: Multiprocessor(shared=100 * 1024, warps=48, blocks=24),  # L4, RTX 40
    90: Multiprocessor(shared=228 * 1024),  # H100, H200
    100: Multiprocessor(shared=228 * 1024),  # B200
    120: Multiprocessor(shared=100 * 1024, warps=48, blocks=24),  # RTX 50, RTX PRO 6000
}


@dataclass(frozen=True)
class Occupancy:
    """Blocks that fit on a multiprocessor by each resource, and by all."""

    by_registers: int
    by_shared: int
    by_threads: int
    threads: int  # a block
    warps: int  # that the multiprocessor holds

    @property
    def blocks(self) -> int:
        return min(self.by_registers, self.by_shared, self.by_threads)

    @property
    def share(self) -> float:
        """Resident warps over those that the multiprocessor holds."""
        return self.blocks * -(-self.threads // 32) / self.warps


def occupancy(target: int, threads: int, registers: int, shared: int) -> Occupancy:
    """How many blocks fit on a multiprocessor.

    A block has ``threads`` threads with ``registers`` each, and ``shared`` bytes. A warp takes
    registers in units of 256 from one of four partitions. A block takes shared memory in units, and
    from sm_80 on 1 KiB more for the system. `MULTIPROCESSORS` has these units, and the blocks and
    warps that can be resident. KeyError for a target without limits.
    """
    unit = MULTIPROCESSORS[target]
    warps = -(-threads // 32)
    warp_registers = -(-registers * 32 // unit.register_unit) * unit.register_unit
    fitting_warps = unit.partitions * (unit.registers // unit.partitions // max(warp_registers, unit.register_unit))
    block_shared = -(-(shared + unit.system_shared) // unit.shared_unit) * unit.shared_unit
    by_shared = unit.shared // block_shared if block_shared else unit.blocks
    return Occupancy(fitting_warps // warps, by_shared, min(unit.blocks, unit.warps // warps), threads, unit.warps)


def occupancy_of(record: Compiled) -> Occupancy:
    return occupancy(record.target, record.threads, record.registers, record.static_shared + record.dynamic_shared)


def bytes_in_flight(record: Compiled) -> int:
    """Bytes a multiprocessor, as the module's text defines them."""
    return 16 * (record.wide_loads + record.wide_copies) * occupancy_of(record).blocks * record.threads


def faults(record: Compiled) -> list[str]:
    """What a kernel does that it must not."""
    checks = {
        "spills": record.spills > 0,
        "local memory": record.stack_bytes + record.local_bytes > 0,
        "fits on no multiprocessor": occupancy_of(record).blocks == 0,
        "lost wide loads": record.wide_loads < record.needed_loads,
        "lost wide stores": record.wide_stores < record.needed_stores,
        "codes move byte by byte": record.admitted_bytes is not None and record.single_bytes > record.admitted_bytes,
        "lost wide copies": record.needs_wide_copies and (record.narrow_copies > 0 or record.wide_copies == 0),
        "tensor cores unused": record.needs_tensor_cores and not record.tensor_cores,
    }
    return [name for name, broken in checks.items() if broken]


def line(record: Compiled) -> dict[str, str]:
    """A row of the printed table."""
    fit = occupancy_of(record)
    return {
        "kernel": record.kernel if record.language == "triton" else f"{record.kernel} (CUDA)",
        "target": f"sm_{record.target}",
        "regs": str(record.registers),
        "shared": f"{record.static_shared} + {record.dynamic_shared}",
        "spills": str(record.spills),
        "local": str(record.stack_bytes + record.local_bytes),
        "blocks": f"{fit.by_registers}/{fit.by_shared}/{fit.by_threads}",
        "occupancy": f"{100 * fit.share:.0f} %",
        "loads": f"{record.wide_loads}/{record.needed_loads}",
        "stores": f"{record.wide_stores}/{record.needed_stores}",
        "copies": f"{record.wide_copies} + {record.narrow_copies}",
        "tensor cores": record.tensor_cores,
        "in flight": f"{bytes_in_flight(record) / 1024:.0f} KiB",
        "verdict": ", ".join(faults(record)).upper() or "ok",
    }


def csv_row(record: Compiled, compiler: str, commit: str) -> dict:
    """All counts, and where they come from."""
    fit = occupancy_of(record)
    return asdict(record) | {
        "blocks_by_registers": fit.by_registers,
        "blocks_by_shared": fit.by_shared,
        "blocks_by_threads": fit.by_threads,
        "occupancy": round(fit.share, 4),
        "bytes_in_flight": bytes_in_flight(record),
        "verdict": ", ".join(faults(record)) or "ok",
        "compiler": compiler,
        "commit": commit,
    }


def nvcc_version() -> str:
    compiler = nvcc()
    if compiler is None:
        return ""
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {text.split('release ')[1].split(',')[0]}"


def rows_kept(path: Path, levels: Sequence[str]) -> list[dict]:
    """The rows of a CSV at levels that this machine cannot compile for. They have their commit."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["level"] in levels]


def show(rows: Sequence[dict[str, str]], columns: Sequence[str], markdown: bool) -> None:
    if not markdown:
        results.show(rows, columns)
        return
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(row.get(column, "") for column in columns) + " |")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report.

    The status is 1 when a kernel has a fault, 2 when one does not compile.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name contains TEXT")
    parser.add_argument("--cpu", action="store_true", help="only the loops of the CPU ops")
    parser.add_argument("--all", action="store_true", help="every Triton variant, for fewer targets; no CUDA, no CPU")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write all counts to this file, too")
    parser.add_argument("--cpu-csv", type=Path, metavar="PATH", help="and those of the CPU to this one")
    arguments = parser.parse_args(argv)
    try:
        records = [] if arguments.cpu else survey(arguments.only, "all" if arguments.all else "report")
        loops = [] if arguments.all else cpu.survey(arguments.only)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    table = [line(record) for record in records]
    if no_nvcc() and not arguments.cpu and not arguments.all:
        table.append({"kernel": no_nvcc(), "verdict": "not compiled"})
    cpu_table = [cpu.line(one) for one in loops]
    absent = [reason for architecture in cpu.LEVELS if (reason := cpu.missing(architecture))]
    cpu_table += [{"function": reason, "verdict": "not compiled"} for reason in absent if not arguments.all]
    for rows, columns in ((table, COLUMNS), (cpu_table, cpu.COLUMNS)):
        if rows:
            show(rows, columns, arguments.markdown)
    if arguments.cpu_csv:
        commit = results.commit()
        missing = [level for name, levels in cpu.LEVELS.items() if cpu.missing(name) for level in levels]
        kept = rows_kept(arguments.cpu_csv, missing)
        results.write_csv(arguments.cpu_csv, [cpu.csv_row(one, commit) for one in loops] + kept)
    if arguments.csv:
        compilers = {"triton": f"triton {metadata.version('triton')}", "cuda": nvcc_version()}
        commit = results.commit()
        results.write_csv(arguments.csv, [csv_row(record, compilers[record.language], commit) for record in records])
    wrong = [
        f"{record.kernel}, sm_{record.target}: {', '.join(faults(record))}" for record in records if faults(record)
    ]
    wrong += [f"{one.function}, {one.level}: {', '.join(cpu.faults(one))}" for one in loops if cpu.faults(one)]
    print("\n".join(wrong) or f"{len(records) + len(loops)} compilations, no faults", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
