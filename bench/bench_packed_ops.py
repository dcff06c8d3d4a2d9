"""The packed ops on the CPU against plain PyTorch, which is the reference.

The ops are packed_gather, packed_scatter_, packed_migrate, packed_l2_norm and arena_migrate_. There
is one 4096 x 11008 matrix with a random 5 % mask clustered by rows. Migrations go to a list that
shares about 95 % with the old one. arena_migrate_ moves list, moments, masters and births, there
and back. It is also compared with one packed_migrate for each of them. Each op is first checked
against the reference. A wrong one has a row without a time, and the exit status is 1.

Bytes of the roofline: distinct 64-byte lines of the matrix (gather and norm read them, scatter
reads and writes them), 4 an entry of each index list, and packed values read or written. For
arena_migrate_ that is each arena once, and the lines of entering weights do not count.

    python -m bench.bench_packed_ops [--runs 20] [--tuned] [--out DIR]
        (--dry-run: a tiny matrix, no files without --out)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import plots
from bench.common import results, timing, tuned
from bench.common.arenas import Arena, clustered_indices, neighbour
from bench.common.timing import Candidate
from lift_kernels import ops

Op = Callable[[str | None], Tensor]  # backend -> result


def cases(m: int, n: int, dtype: torch.dtype) -> list[tuple[str, Op, float]]:
    """Name, call and bytes of each op."""
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    index = clustered_indices(m, n, 0.05, seed=0)
    arena, new = Arena.of([index]), neighbour(index, m * n)
    k, width, lines = len(index), dtype.itemsize, Arena.of([index]).line_bytes(dtype.itemsize)
    values = ops.packed_gather(matrix, index)
    dest = matrix.clone()

    def norm(backend: str | None) -> Tensor:
        return ops.packed_l2_norm([matrix], arena.indices, arena.offsets, arena.counts, backend=backend)

    result: list[tuple[str, Op, float]] = [
        ("packed_gather", lambda b: ops.packed_gather(matrix, index, backend=b), lines + k * (4 + width)),
        ("packed_scatter_", lambda b: ops.packed_scatter_(dest, index, values, backend=b), 2 * lines + k * (4 + width)),
        ("packed_l2_norm", norm, lines + 4 * k),
    ]
    if dtype != torch.float16:
        move: Op = lambda b: ops.packed_migrate(values, index, new, backend=b)  # noqa: E731
        result.append(("packed_migrate", move, (k + len(new)) * (4 + width)))
    return result


class Refresh:
    """One matrix whose arenas go to a new list and back, call by call."""

    def __init__(self, matrix: Tensor, old: Tensor, new: Tensor):
        self.matrix, self.lists, self.at = matrix, (old, new), 0
        room = max(len(old), len(new))
        self.indices = torch.zeros(room, dtype=torch.int32)
        self.indices[: len(old)] = old
        self.state = [torch.arange(float(room)) + i for i in range(3)]
        self.births = torch.arange(room, dtype=torch.int32)

    def _turn(self) -> tuple[int, Tensor]:
        count, self.at = len(self.lists[self.at]), 1 - self.at
        return count, self.lists[self.at]

    def together(self, backend: str | None) -> None:
        count, new = self._turn()
        arenas = self.indices, [0], [count], *self.state[:2], torch.ones(1)
        ops.arena_migrate_([self.matrix], [new], *arenas, master=self.state[2], births=self.births, backend=backend)

    def one_by_one(self, backend: str | None) -> None:
        count, new = self._turn()
        old, entries = self.indices[:count], ops.packed_gather(self.matrix, new, dtype=torch.float32)
        born = torch.ones(len(new), dtype=torch.int32)
        for arena, fill in zip([*self.state, self.births], (None, None, entries, born)):
            moved = ops.packed_migrate(arena[:count], old, new, fill_values=fill, backend=backend)
            arena[: len(new)] = moved
        self.indices[: len(new)] = new

    def moved(self) -> float:
        """Bytes of both lists and of one way of all arenas."""
        old, new = map(len, self.lists)
        return 4.0 * (old + 2 * new + 4 * (old + new))


def refresh_rows(m: int, n: int, dtype: torch.dtype, runs: int, mib: int) -> list[dict]:
    """Rows of arena_migrate_: plain PyTorch, one packed_migrate for each arena, and the op."""
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    index = clustered_indices(m, n, 0.05, seed=0)
    lists = index, neighbour(index, m * n)
    labels = {"op": "arena_migrate_", "set": f"{m}x{n}, {str(dtype).removeprefix('torch.')}"}
    cases = [Refresh(matrix, *lists) for _ in range(3)]
    for case, backend in zip(cases, ("reference", None)):
        case.together(backend)
    found = [[case.indices, *case.state, case.births] for case in cases[:2]]
    if problem := timing.difference(*found):
        return [labels | {"variant": "arena_migrate_", "status": f"refused, it is wrong: {problem}"}]
    candidates = [
        Candidate("arena_migrate_, plain PyTorch", lambda: cases[0].together("reference")),
        Candidate("arena_migrate_, packed_migrate for each arena", lambda: cases[2].one_by_one(None)),
        Candidate("arena_migrate_", lambda: cases[1].together(None), cases[1].moved()),
    ]
    times, bandwidth = timing.time_interleaved_with_copy(candidates, runs, mib=mib)
    rows = results.rows(candidates, times, candidates[0].name, bandwidth, **labels)
    return [row | {"status": "ok"} for row in rows]


def compare(m: int, n: int, dtype: torch.dtype, runs: int, mib: int = 256) -> list[dict]:
    """Two rows per op, plain PyTorch first. A wrong op has one row that says why."""
    table: list[dict] = []
    for name, op, moved in cases(m, n, dtype):
        labels = {"op": name, "set": f"{m}x{n}, {str(dtype).removeprefix('torch.')}"}
        if problem := timing.difference([op("reference").clone()], [op(None).clone()]):
            table.append(labels | {"variant": name, "status": f"refused, it is wrong: {problem}"})
            continue
        candidates = [
            Candidate(f"{name}, plain PyTorch", lambda op=op: op("reference")),
            Candidate(name, lambda op=op: op(None), moved),
        ]
        times, bandwidth = timing.time_interleaved_with_copy(candidates, runs, mib=mib)
        table += [
            row | {"status": "ok"} for row in results.rows(candidates, times, candidates[0].name, bandwidth, **labels)
        ]
    table += refresh_rows(m, n, dtype, runs, mib)
    results.show(
        table, ["set", "variant", "median_ms", "q25_ms", "q75_ms", "ratio", "floor_ms", "share_of_floor", "status"]
    )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="interleaved rounds")
    tuned.add_option(parser)
    results.add_output_options(parser)
    arguments = parser.parse_args(argv)
    m, n, runs, mib = (96, 128, 2, 8) if arguments.dry_run else (4096, 11008, arguments.runs, 256)
    table = [
        row | results.environment()
        for dtype in (torch.float32, torch.bfloat16)
        for row in compare(m, n, dtype, runs, mib)
    ]
    if arguments.tuned:
        table += tuned.rows_again("bench.bench_packed_ops", "packed_ops.csv", argv)
    if folder := results.output_folder(arguments):
        results.write_csv(folder / "packed_ops.csv", table)
        plots.draw("packed_ops", folder)
    return results.exit_status(table)


if __name__ == "__main__":
    raise SystemExit(main())
