"""Several ranks: what a step and a refresh send, who makes which masks, and what sharing gains.

``--ranks`` processes of this machine are connected by gloo. Each has cores // ranks threads, at
least one. The column ``threads`` says how many a row had. Ranks of one machine share its cores
and caches, so the seconds say nothing about ranks on machines of their own.

- ``step``: the last of three steps under DistributedDataParallel, counted by rank. The model has
  the form of SmolLM2-135M with fewer layers and random weights, for bytes depend on shapes alone.
  The same matrices are trained in every row, by LIFT at 5 % density. ``bytes_sent`` are those that
  the rank gives to all-reduces. ``share_of_dense`` is their share of what dense DDP gives. Where
  plain DDP reduces, torch's ``allreduce_hook`` stands for its compiled code, with the same buckets.
  DDP also broadcasts buffers before each forward pass, which are not counted.
- ``refresh``: all matrices of SmolLM2-135M, cold and then warm, counted by rank. In between every
  trained entry moves by about 3 %. ``share_of_work`` is a rank's part of the predicted cost of all
  masks. The bytes are those of broadcasts (index lists, bases, thresholds) and of pickled
  descriptions, of which each gather is two collectives. The plans that ranks compare before go
  through the store and are not counted.
- ``seconds``: of these refreshes, the slowest rank's, and ``cpu_s``, those that its busiest rank's
  threads ran. The variants take turns in the same processes, in a new random order each round. A
  process that works alone is rank 0 while others wait. ``times_*`` is the median over the rounds of
  another variant's seconds over the row's. Above 1 the row is faster.

Refusal. Ranks must have equal weights and index lists after the steps. After each refresh they must
have the lists of one process with as many threads. Otherwise the row has a status and no figures,
and the exit status is 1.

    python -m bench.bench_distributed [--ranks 2] [--runs 3] [--dry-run] [--out DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import pickle
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from bench.common import matrices, results, training_methods
from bench.common.training_methods import DENSITY, MATRIX, METHODS, PACKED
from lift_kernels import LiftAdamW, trained_entries_hook
from lift_kernels.masks import selection
from lift_kernels.masks.costs import mask_cost

COLUMNS = "op set variant start rank threads collectives elements bytes_sent bytes_received share_of_dense".split()
COLUMNS += "masks share_of_work median_s cpu_s times_each_all status".split()
Shape = tuple[int, int, int, int]
SHAPE = (576, 1536, 2, 256)  # hidden size, that of the MLP, layers, vocabulary
FORMS = {"fp32": torch.float32, "bf16": torch.bfloat16}
DENSE, HOOKED = "dense gradients of the same matrices", f"{MATRIX}, trained_entries_hook"
STEPS = 3  # DDP arranges its buckets anew in the second one.
STARTS = ("cold", "warm")
ALL_CORES, ALONE = "1 process, all cores", "1 process, threads of a rank"
EACH, SHARED = "each rank makes all masks", "each rank makes a part"
VARIANTS = (ALL_CORES, ALONE, EACH, SHARED)


def lift(name: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: METHODS[name](model, refresh_interval=None, process_group=dist.group.WORLD)


MODES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    DENSE: training_methods.full_linear,
    MATRIX: lift(MATRIX),
    HOOKED: lift(MATRIX),
    PACKED: lift(PACKED),
}


@dataclass
class Counts:
    """What a rank gave to collectives and got from others, and the masks that it made."""

    collectives: int = 0
    elements: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    masks: int = 0
    work: float = 0.0


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count what goes through `torch.distributed`, and the masks made by this rank."""
    counts, here = Counts(), dist.get_rank()
    reduce, send, gather, make = dist.all_reduce, dist.broadcast, dist.all_gather_object, selection._masks

    def all_reduce(tensor: Tensor, *rest: Any, **more: Any) -> Any:
        counts.collectives += 1
        counts.elements += tensor.numel()
        counts.bytes_sent += tensor.nbytes
        return reduce(tensor, *rest, **more)

    def broadcast(tensor: Tensor, src: int, **more: Any) -> Any:
        counts.collectives += 1
        counts.bytes_sent += tensor.nbytes * (src == here)
        counts.bytes_received += tensor.nbytes * (src != here)
        return send(tensor, src, **more)

    def all_gather_object(every: list[Any], own: Any, **more: Any) -> None:
        gather(every, own, **more)
        sizes = [len(pickle.dumps(of_rank)) for of_rank in every]
        counts.collectives += 2  # sizes, then what is pickled
        counts.bytes_sent += sizes[here]
        counts.bytes_received += sum(sizes) - sizes[here]

    def masks(parts: Sequence[Any], *rest: Any, **more: Any) -> Any:
        counts.masks += len(parts)
        counts.work += sum(mask_cost(p.matrix.shape, p.rank, warm=p.kept.get("basis") is not None) for p in parts)
        return make(parts, *rest, **more)

    with contextlib.ExitStack() as stack:
        for replaced in (all_reduce, broadcast, all_gather_object):
            stack.enter_context(mock.patch.object(dist, replaced.__name__, replaced))
        stack.enter_context(mock.patch.object(selection, "_masks", masks))
        yield counts


def digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def lists(optimizer: torch.optim.Optimizer) -> str:
    return digest(entry["indices"] for entry in optimizer.state.values() if "indices" in entry)


def steps(shape: Shape) -> list[dict]:
    """The counts of a step of this rank in every mode, and digests of what it leaves."""
    found = []
    for form, dtype in FORMS.items():
        for mode, build in MODES.items():
            model = training_methods.random_model(training_methods.llama_config(*shape), dtype, "cpu")
            optimizer = build(model)
            parallel = DistributedDataParallel(model)
            parallel.register_comm_hook(
                *((optimizer, trained_entries_hook) if mode == HOOKED else (None, allreduce_hook))
            )
            tokens = torch.randint(shape[-1], (1, 8), generator=torch.Generator().manual_seed(dist.get_rank()))
            for _ in range(STEPS):
                with counting() as counts:
                    parallel(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            kept = {"weights": digest(model.state_dict().values()), "index lists": lists(optimizer)}
            found.append({"form": form, "variant": mode, "digests": kept, **asdict(counts)})
    return found


def refreshes(path: Path, runs: int, threads: int) -> list[dict]:
    """Counts, seconds and digests of this rank for each refresh of each round."""
    order, found = random.Random(0), []  # the same order on every rank
    for run in range(runs):
        for variant in order.sample(VARIANTS, len(VARIANTS)):
            dist.barrier()
            if dist.get_rank() == 0 or variant in (EACH, SHARED):
                torch.set_num_threads(os.cpu_count() or 1 if variant == ALL_CORES else threads)
                found += [{"run": run, "variant": variant} | row for row in cold_and_warm(variant, path)]
    return found


def cold_and_warm(variant: str, path: Path) -> Iterator[dict]:
    """Two refreshes of the same matrices, whose trained entries move in between."""
    weights = [nn.Parameter(weight.clone()) for weight in torch.load(path, mmap=True)]
    group = dist.group.WORLD if variant == SHARED else "independent"
    optimizer = LiftAdamW(weights, density=DENSITY, process_group=group)
    for start in STARTS:
        if variant in (EACH, SHARED):
            dist.barrier()
        with counting() as counts:
            began, busy = time.perf_counter(), time.process_time()
            optimizer.refresh()
            took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - busy}
        yield {"start": start, "lists": lists(optimizer), **took, **asdict(counts)}
        generator = torch.Generator().manual_seed(0)
        for weight in weights:
            chosen = optimizer.state[weight]["indices"].long()
            weight.data.view(-1)[chosen] *= 1 + 0.03 * torch.randn(len(chosen), generator=generator)


def work(rank: int, ranks: int, threads: int, runs: int, shape: Shape, folder: Path) -> None:
    """What a process does. It leaves its report in the folder."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    report = {"steps": steps(shape), "refreshes": refreshes(folder / "weights.pt", runs, threads)}
    torch.save(report, folder / f"{rank}.pt")
    dist.destroy_process_group()


def reports(ranks: int, threads: int, runs: int, shape: Shape, weights: Sequence[Tensor]) -> list[dict]:
    """What the processes have found, by rank."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(list(weights), folder / "weights.pt")
        torch.multiprocessing.spawn(work, (ranks, threads, runs, shape, folder), nprocs=ranks)
        return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def step_rows(found: Sequence[dict], shape: Shape) -> Iterator[dict]:
    dense = {of_one["form"]: of_one["bytes_sent"] for of_one in found[0]["steps"] if of_one["variant"] == DENSE}
    for same in zip(*(report["steps"] for report in found)):  # the same mode on every rank
        first = same[0]
        differing = [what for what in first["digests"] if len({r["digests"][what] for r in same}) > 1]
        said = {"op": "step", "set": f"{shape[2]} layers of {shape[0]}, {first['form']}", "variant": first["variant"]}
        for rank, of_rank in enumerate(same):
            if differing:
                yield said | {"rank": rank, "status": f"refused, ranks have different {differing[0]}"}
                continue
            row = {key: of_rank[key] for key in ("collectives", "elements", "bytes_sent")}
            row["share_of_dense"] = round(row["bytes_sent"] / dense[first["form"]], 4)
            yield said | {"rank": rank, **row, "status": "ok"}


def refresh_rows(found: Sequence[dict], label: str) -> Iterator[dict]:
    """What each rank did in the first round, and the seconds of all rounds."""
    refreshed = [dict(of_one, rank=rank) for rank, report in enumerate(found) for of_one in report["refreshes"]]

    def chosen(start: str, variant: str) -> list[dict]:
        return [of_one for of_one in refreshed if (of_one["start"], of_one["variant"]) == (start, variant)]

    for start in STARTS:
        right = chosen(start, ALONE)[0]["lists"]
        status, seconds = {}, {}
        for variant in VARIANTS:
            # Another number of threads may round otherwise, and so choose another entry.
            wrong = [r["rank"] for r in chosen(start, variant) if r["lists"] != right and variant != ALL_CORES]
            status[variant] = f"refused, rank {wrong[0]} has other index lists than one process" if wrong else "ok"
            seconds[variant] = largest(chosen(start, variant), "seconds")
        first = [of_one for of_one in chosen(start, SHARED) if of_one["run"] == 0]
        total = sum(of_one["work"] for of_one in first)
        for of_one in first:
            row = {"op": "refresh", "set": label, "variant": SHARED, "start": start, "rank": of_one["rank"]}
            if status[SHARED] == "ok":
                row |= {key: of_one[key] for key in ("collectives", "bytes_sent", "bytes_received", "masks")}
                row["share_of_work"] = round(of_one["work"] / total, 4)
            yield row | {"status": status[SHARED]}
        for variant, taken in seconds.items():
            row = {"op": "seconds", "set": label, "variant": variant, "start": start}
            row["processes"] = len(found) if variant in (EACH, SHARED) else 1
            if status[variant] == "ok":
                cpu = np.median(largest(chosen(start, variant), "cpu_seconds"))
                row |= {"median_s": three_digits(np.median(taken)), "cpu_s": three_digits(cpu), "runs": len(taken)}
                bases = {"all_cores": ALL_CORES, "one_process": ALONE, "each_all": EACH}
                row |= {f"times_{key}": three_digits(np.median(seconds[b] / taken)) for key, b in bases.items()}
            yield row | {"status": status[variant]}


def largest(refreshed: Sequence[dict], key: str) -> np.ndarray:
    """The largest value of all ranks in each round."""
    runs = sorted({of_one["run"] for of_one in refreshed})
    return np.array([max(of_one[key] for of_one in refreshed if of_one["run"] == run) for run in runs])


def three_digits(x: float) -> float:
    return float(f"{x:.3g}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--runs", type=int, default=3, help="rounds of refreshes (default: 3)")
    results.add_output_options(parser)
    given = parser.parse_args(argv)
    cores = os.cpu_count() or 1
    threads = max(1, cores // given.ranks)
    if given.dry_run:
        shape, label = training_methods.TINY, "random matrices"
        sizes = [(64, 48), *[(96, 160), (160, 96), (64, 48)] * 4]
        weights = [torch.randn(size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]
    else:
        shape, label, weights = SHAPE, "SmolLM2-135M", matrices.model_weights(None)
    found = reports(given.ranks, threads, given.runs, shape, weights)
    table = [*step_rows(found, shape), *refresh_rows(found, f"{label}, {len(weights)} matrices")]
    origin = results.environment() | {"ranks": given.ranks}
    table = [r | origin | {"threads": cores if r["variant"] == ALL_CORES else threads} for r in table]
    results.show(table, COLUMNS)
    if folder := results.output_folder(given):
        results.write_csv(folder / "distributed.csv", table)
    return results.exit_status(table)


if __name__ == "__main__":
    raise SystemExit(main())
