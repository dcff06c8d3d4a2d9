"""Packed against dense weight gradients: memory, backward pass, and the next step.

The model is SmolLM2-135M (or ``--model``). Two models share their weights. In one the matrices of
the linear layers have dense gradients. In the other they have packed ones (`pack_gradients`, 5 %,
top of |W_r| with r = 64, or ``--random`` masks). All else is frozen in both. Packed gradients are
first compared with the dense ones. Wrong ones have a row without a time, nothing else is measured,
and the exit status is 1.

- memory: bytes allocated within one backward pass and still there at its end, which are the
  gradients, and the peak of all that was allocated within it. scratch: what the largest layer
  allocates beside its result, with the panel that the thread keeps. The profiler's record of
  torch's allocations counts them, and the panel is known by its size.
- backward: timed in turns with the dense model, in a new random order each round, each after an
  untimed forward pass. Shown is the median of the ratios within a round, and the interval that
  holds the true median with 95 % (order statistics).
- step: LiftAdamW from packed gradients, and the same + a hundredth of a refresh, against
  torch.optim.AdamW(fused=True) on the dense ones, timed likewise. The learning rate is 0, so that
  nothing drifts.

    python -m bench.bench_packed_weight_grad [--model DIR] [--batch 4] [--length 128] [--runs 20]
        [--random] [--no-files] [--out DIR]    (--dry-run: a tiny model, seconds)
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from bench.common import results, timing
from lift_kernels import LiftAdamW, lift_param_groups, ops, pack_gradients
from lift_kernels.nn.linear import PackedLinear

DENSITY, RANK = 0.05, 64
BETAS = (0.9, 0.95)
LIMIT_MEMORY, LIMIT_BACKWARD = 0.06, 1.03


def allocations(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes that ``run`` allocated and left behind, and the peak of what it allocated."""
    from torch._C._profiler import _EventType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()

    def events(nodes) -> Iterator:
        for node in nodes:
            if node.tag == _EventType.Allocation:
                yield node
            yield from events(node.children)

    tree = profile.profiler.kineto_results.experimental_event_tree()
    live: dict[int, int] = {}
    total = peak = 0
    for event in sorted(events(tree), key=lambda node: node.start_time_ns):
        pointer, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        total -= live.pop(pointer, 0)  # a block from before the run was not counted
        if size > 0:
            live[pointer] = size
            total += size
        peak = max(peak, total)
    return total, peak


class Tiny(nn.Module):
    """A language model of two linear layers, called as transformers' are."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=50)
        self.embedding, self.lm_head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
        self.up, self.down = nn.Linear(32, 96), nn.Linear(96, 32)

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        x = self.embedding(input_ids)
        logits = self.lm_head(x + self.down(torch.relu(self.up(x))))[:, :-1]
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))


def loaded(name: str | None) -> nn.Module:
    from lift_kernels.finetune import model_io

    return model_io.load_model(model_io.find_model(name), torch.float32)[0]


class Models:
    """The dense model and a packed one on the same weights, and one batch of random tokens."""

    def __init__(self, dense: nn.Module, batch: int, length: int, random: bool):
        self.dense = dense
        self.packed = copy.deepcopy(self.dense)
        for copied, original in zip(self.packed.parameters(), self.dense.parameters()):
            copied.data = original.data
        self.dense_groups = lift_param_groups(self.dense, freeze_rest=True)
        start = time.perf_counter()
        selection = "random" if random else "principal"
        rank = min(RANK, *(min(p.shape) for _, p in self.dense_groups[0]["params"]))
        self.groups = pack_gradients(self.packed, density=DENSITY, rank=rank, freeze_rest=True, selection=selection)
        self.packing = time.perf_counter() - start
        vocabulary = self.dense.config.vocab_size
        self.tokens = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
        self.weights = [p for _, p in self.dense_groups[0]["params"]]
        self.layers = [module for module in self.packed.modules() if isinstance(module, PackedLinear)]

    def loss(self, model: nn.Module) -> Tensor:
        return model(input_ids=self.tokens, labels=self.tokens).loss

    def backward(self, model: nn.Module) -> Callable[[], None]:
        """The backward pass of a new forward pass. Gradients are cleared."""
        model.zero_grad()
        return self.loss(model).backward

    def check(self) -> str:
        """What is wrong with the packed gradients, or an empty string."""
        for model in (self.dense, self.packed):
            self.backward(model)()
        expected = [w.grad.view(-1)[layer.indices.long()] for w, layer in zip(self.weights, self.layers)]
        return timing.difference(expected, [layer.values.grad for layer in self.layers])


def time_prepared(candidates: dict[str, Callable[[], Callable[[], object]]], runs: int) -> dict[str, np.ndarray]:
    """Seconds of each run, by candidate.

    Before each run the candidate is called, untimed, for what is timed. Rounds come in shuffled
    order, after one to warm up.
    """
    rng = np.random.default_rng(0)
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-1, runs):
        for i in rng.permutation(len(names)):
            run = candidates[names[i]]()
            start = time.perf_counter()
            run()
            if round_ >= 0:
                times[names[i]].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in times.items()}


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """The order statistics that hold the true median with a probability of at least 95 %.

    All values when there are few.
    """
    from math import comb

    ordered, n, tail, rank = np.sort(values), len(values), 0.0, 0
    while rank < (n - 1) // 2 and tail + comb(n, rank) / 2**n <= 0.025:
        tail += comb(n, rank) / 2**n
        rank += 1
    rank = max(rank - 1, 0)
    return float(ordered[rank]), float(ordered[n - 1 - rank])


def timing_rows(part: str, times: dict[str, np.ndarray], bandwidth: float) -> list[dict]:
    """One row per candidate.

    ``cost``: seconds over those of the first one in the same round, with its interval.
    """
    baseline = next(iter(times.values()))
    table = []
    for name, taken in times.items():
        low, high = median_interval(taken / baseline)
        cost = {"cost": float(np.median(taken / baseline)), "cost_low": low, "cost_high": high}
        row = results.row(name, taken, baseline, None, bandwidth) | {k: round(v, 4) for k, v in cost.items()}
        table.append({"part": part} | row)
    return table


def memory_rows(models: Models) -> list[dict]:
    """Gradient bytes of both models, against the limit."""
    table, dense_bytes = [], sum(w.nbytes for w in models.weights)
    for name, model in (("dense gradients", models.dense), ("packed gradients", models.packed)):
        kept, peak = allocations(models.backward(model))
        table.append(
            {
                "part": "memory",
                "variant": name,
                "kept_bytes": kept,
                "peak_bytes": peak,
                "share_of_dense": round(kept / dense_bytes, 5),
            }
        )
        model.zero_grad()
    layer = max(models.layers, key=lambda layer: layer.weight.numel())
    m, n = layer.weight.shape
    tokens = models.tokens.numel()
    grad_output, input = torch.randn(tokens, m), torch.randn(tokens, n)
    result: list[Tensor] = []
    kept, peak = allocations(lambda: result.append(ops.packed_weight_grad(grad_output, input, layer.indices)))
    # The thread keeps the panel outside torch's allocator, which counts the rest.
    panel = min(4 * m * n, max(4 * 2**20, 4 * n))
    table.append({"part": "memory", "variant": f"scratch of one layer, {m} x {n}", "peak_bytes": peak - kept + panel})
    return table


def step_rows(models: Models, runs: int, bandwidth: float) -> list[dict]:
    """The optimizers' steps on the gradients that are there."""
    for model in (models.dense, models.packed):
        models.backward(model)()
    fused = torch.optim.AdamW(models.weights, lr=0.0, betas=BETAS, weight_decay=0.0, fused=True)
    lift = LiftAdamW(models.groups, lr=0.0, betas=BETAS, refresh_interval=None)
    candidates = {"AdamW fused, dense gradients": lambda: fused.step, "LiftAdamW, packed gradients": lambda: lift.step}
    times = time_prepared(candidates, runs)
    start = time.perf_counter()
    lift.refresh(drop_gradients=True)
    refresh = time.perf_counter() - start
    times["LiftAdamW, packed gradients + refresh/100"] = times["LiftAdamW, packed gradients"] + refresh / 100
    return [row | {"refresh_s": round(refresh, 3)} for row in timing_rows("step", times, bandwidth)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory, GGUF file or hub id in place of the bundled SmolLM2-135M")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--runs", type=int, default=20, help="interleaved rounds")
    parser.add_argument("--random", action="store_true", help="random masks, which take no time to make")
    parser.add_argument("--no-files", action="store_true", help="print only")
    results.add_output_options(parser)
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    dense = Tiny() if arguments.dry_run else loaded(arguments.model)
    models = Models(dense, arguments.batch, arguments.length, arguments.random)
    if problem := models.check():
        table = [{"part": "backward", "variant": "packed gradients", "status": f"refused, it is wrong: {problem}"}]
        results.show(table, ["part", "variant", "status"])
    else:
        table = measured(models, 2 if arguments.dry_run else arguments.runs, 8 if arguments.dry_run else 256)
    labels = {"op": "packed_weight_grad", "set": f"{arguments.batch}x{arguments.length} tokens, fp32"}
    labels["masks"] = "random 5 %" if arguments.random else f"top 5 % of |W_r|, r = {RANK}"
    folder = None if arguments.no_files else results.output_folder(arguments)
    if folder:
        results.write_csv(folder / "packed_grad.csv", [labels | row | results.environment() for row in table])
    return results.exit_status(table)


def measured(models: Models, runs: int, mib: int) -> list[dict]:
    """The rows of all three parts."""
    bandwidth = timing.copy_bandwidth(mib=mib)
    table = memory_rows(models)
    results.show(table, ["part", "variant", "kept_bytes", "peak_bytes", "share_of_dense"])
    candidates = {
        "dense gradients": lambda: models.backward(models.dense),
        "packed gradients": lambda: models.backward(models.packed),
    }
    backward = timing_rows("backward", time_prepared(candidates, runs), bandwidth)
    backward += step_rows(models, runs, bandwidth)
    results.show(backward, ["part", "variant", "median_ms", "q25_ms", "q75_ms", "cost", "cost_low", "cost_high"])
    share, cost = table[1]["share_of_dense"], backward[1]["cost"]
    print(
        f"gradients: {share:.2%} of dense (limit {LIMIT_MEMORY:.0%} and one layer's scratch); "
        f"backward: {cost:.3f} x dense (limit {LIMIT_BACKWARD})"
    )
    return [row | {"status": "ok"} for row in table + backward]


if __name__ == "__main__":
    raise SystemExit(main())
