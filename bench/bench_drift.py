"""Refreshes that were skipped: predicted against true overlap, and what skipping does to the job.

``overlap`` trains SmolLM2-135M on word problems with LiftAdamW's ``refresh_drift``, once for each
learning rate, which is constant after a warm-up. Whenever masks are due, every mask is also made
exactly from the weights of that moment. Of all matrices the rows hold the true share of changed
entries, the predicted one, quantiles over matrices of predicted minus true, the worst prediction
that was too low, the share of predictions that were, how many refreshes were skipped, and the
lowest true overlap of a mask that was kept. Rates are those that the optimizer had then. The last
row of a learning rate has ``refreshed_share``: how often a mask was refreshed in 100 steps.

``job`` runs ``python -m lift_kernels finetune`` with its defaults and without skipping
(``--refresh-drift 0``), once for each seed. Its rows hold losses, answers and refreshes, and what
skipping changed in the run of the same seed.

    python -m bench.bench_drift [--part overlap job] [--lr 1e-4 3e-4 1e-3] [--bound 0.03]
        [--steps 75] [--interval 25] [--seeds 0 1 2] [--eval-problems 300] [--out DIR]
        (--dry-run: a tiny Llama, and no job; seconds)

Parts that are not run keep their rows in the file.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.bench_finetune import finetune
from bench.common import results, training_methods
from lift_kernels import LiftAdamW, pack_gradients
from lift_kernels.finetune import data, evaluation, model_io, prompts
from lift_kernels.finetune.config import REFRESH_DRIFT, Settings
from lift_kernels.masks.principal import MaskRequest, principal_masks
from lift_kernels.nn.trainable import trainable_of
from lift_kernels.optim import drift

RANK, WARMUP, BATCH = 64, 0.03, 8
SHOWN = {
    "overlap": ["lr", "step", "skipped", "matrices", "true", "predicted", "error_q05", "worst", "too_low", "lowest"],
    "job": ["variant", "seed", "refreshed", "skipped", "loss_after", "loss_change", "exact_after", "status"],
}
Loss = Callable[[nn.Module], Tensor]


def word_problem_losses(tokenizer: Any, steps: int, seed: int = 0) -> Iterator[Loss]:
    """Losses of the batches of the default job, a random order of its sequences."""
    settings = Settings(steps=steps, batch_size=BATCH, seed=seed, device="cpu")
    prepared = data.prepare_data(settings, tokenizer)
    sequences, size = prepared.sequences, prepared.rows
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, size * steps, size):
        chosen = [sequences[order[i % len(order)]] for i in range(start, start + size)]
        batch = prompts.collate(chosen, tokenizer.pad_token_id)

        def loss(model: nn.Module, batch: dict[str, Tensor] = batch) -> Tensor:
            total, count = evaluation.answer_loss(model, batch)
            return total / count

        yield loss


def random_losses(vocabulary: int, steps: int) -> Iterator[Loss]:
    """Losses of random tokens."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(vocabulary, (2, 16), generator=generator)
        yield lambda model, ids=ids: model(input_ids=ids, labels=ids).loss


def matrices_of(optimizer: LiftAdamW) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """The parameter of each matrix and its weight, by name."""
    group = optimizer.param_groups[0]
    return {name: (p, trainable_of(p).matrix.detach()) for name, p in zip(group["param_names"], group["params"])}


def masks_of(optimizer: LiftAdamW) -> dict[str, Tensor]:
    """Copies of the index lists, by name."""
    return {name: optimizer.state[p]["indices"].clone() for name, (p, _) in matrices_of(optimizer).items()}


def exact_masks(optimizer: LiftAdamW, rank: int) -> dict[str, Tensor]:
    """Exact masks of the present weights, by name."""
    requests = [
        MaskRequest(weight, rank, optimizer.state[p]["indices"].numel(), name)
        for name, (p, weight) in matrices_of(optimizer).items()
    ]
    return {request.name: m.indices for request, m in zip(requests, principal_masks(requests, method="gram"))}


def drift_row(report: Any, old: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Any]:
    """The columns of one refresh.

    Args:
        report: of the refresh, in which every matrix has a prediction.
        old: masks before it.
        exact: masks that all matrices would have got.
    """
    predicted = {matrix.name: 1 - matrix.predicted for matrix in (*report.matrices, *report.skipped)}
    true = {name: 1 - np.isin(old[name], exact[name]).mean() for name in predicted}
    entries = np.array([len(old[name]) for name in predicted])
    p, t = (np.array([shares[name] for name in predicted]) for shares in (predicted, true))
    kept = [1 - true[matrix.name] for matrix in report.skipped]
    quantiles = {f"error_q{round(100 * q):02}": float(np.quantile(p - t, q)) for q in (0.05, 0.5, 0.95)}
    shares = {
        "true": float(np.average(t, weights=entries)),
        "predicted": float(np.average(p, weights=entries)),
        **quantiles,
        "worst": float((p - t).min()),
        "too_low": float((p < t).mean()),
        "lowest": float(min(kept)) if kept else "",
        "mean_kept": float(np.mean(kept)) if kept else "",
    }
    digits = {name: share if share == "" else round(share, 5) for name, share in shares.items()}
    return {"matrices": len(predicted), "skipped": len(report.skipped), **digits}


def overlap_rows(model: nn.Module, losses: Iterator[Loss], lr: float, bound: float, options: Any) -> list[dict]:
    """One row for each time that masks were due."""
    rank = min(RANK, min(min(p.shape) for p in model.parameters() if p.dim() == 2))
    groups = pack_gradients(model, rank=rank, density=0.05, freeze_rest=True)
    optimizer = LiftAdamW(
        groups,
        lr=lr,
        betas=(0.9, 0.95),
        rank=rank,
        refresh_interval=options.interval,
        refresh_drift=bound,
        max_grad_norm=1.0,
        warm_start=None,
    )
    optimizer.refresh()
    warmup, table = max(1, round(WARMUP * options.steps)), []
    for step, loss in enumerate(losses, 1):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, step / warmup)
        report, old = optimizer.last_refresh, masks_of(optimizer) if step % options.interval == 0 else {}
        value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.last_refresh is not report:
            labels = {"op": "overlap", "lr": lr, "bound": bound, "interval": options.interval, "step": step}
            row = labels | drift_row(optimizer.last_refresh, old, exact_masks(optimizer, rank))
            table.append(row | {"loss": round(float(value.detach()), 4)})
            results.show(table[-1:], SHOWN["overlap"])
    if table:
        renewed = sum(row["matrices"] - row["skipped"] for row in table) / table[0]["matrices"]
        table[-1]["refreshed_share"] = round(100 * renewed / options.steps, 4)
    return table


def overlaps(options: argparse.Namespace) -> list[dict]:
    """The rows of all learning rates."""
    table = []
    for lr in options.lr:
        torch.manual_seed(0)
        if options.dry_run:
            config = training_methods.llama_config(*training_methods.TINY)
            model = training_methods.random_model(config, torch.float32, "cpu")
            losses = random_losses(config.vocab_size, options.steps)
        else:
            model, tokenizer = model_io.load_model(model_io.find_model(None), torch.float32)
            losses = word_problem_losses(tokenizer, options.steps)
        table += overlap_rows(model, losses, lr, options.bound, options)
    return table


def jobs(options: argparse.Namespace, run: Callable[..., Path] = finetune) -> list[dict]:
    """Two rows for each seed: without skipping and with it."""
    table = []
    for seed in options.seeds:
        always: dict[str, Any] = {}
        for variant, bound in (("always", 0.0), ("skipping", options.bound)):
            row: dict[str, Any] = {"op": "job", "variant": variant, "seed": seed, "bound": bound}
            given = ["--seed", str(seed), "--refresh-drift", str(bound), "--eval-problems", str(options.eval_problems)]
            try:
                with tempfile.TemporaryDirectory() as folder:
                    report = json.loads((run("lift", Path(folder), given) / "report.json").read_text())
                row |= job_row(report)
                always = always or row
                row["loss_change"] = round(row["loss_after"] - always["loss_after"], 5)
                row["status"] = "ok"
            except (RuntimeError, OSError) as error:
                row["status"] = f"refused: {error}"
            table.append(row)
            results.show(table[-1:], SHOWN["job"])
    return table


def job_row(report: dict[str, Any]) -> dict[str, Any]:
    """The columns of a finished run."""
    return {
        "refreshed": report["refreshes.matrices"],
        "skipped": report["refreshes.skipped"],
        "mean_kept": report["refreshes.skipped_overlap"],
        "loss_before": report["heldout_loss.before"],
        "loss_after": report["heldout_loss.after"],
        "neutral_after": report["neutral_loss.after"],
        "exact_after": report["exact_match.after"],
        "exact_low": report["exact_match.after_low"],
        "exact_high": report["exact_match.after_high"],
        "state_bytes": report["optimizer_state_bytes.measured"],
        "train_s": round(report["seconds.train"], 1),
        "step_s": round(report["seconds.step"], 4),
        "refresh_s": round(report["seconds.refreshes"], 3),
        "steps": report["settings.steps"],
    }


def rows_of_other_parts(path: Path, parts: Sequence[str]) -> list[dict]:
    """The rows of a file that belong to none of ``parts``."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(file) if row["op"] not in parts]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=["overlap", "job"], default=["overlap", "job"])
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--bound", type=float, default=REFRESH_DRIFT)
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--interval", type=int, default=25)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--eval-problems", type=int, default=300)
    parser.add_argument("--threads", type=int, help="of torch, for part overlap")
    results.add_output_options(parser)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.dry_run:
        options.part, options.lr, options.steps, options.interval = ["overlap"], [1e-3], 6, 3
    folder = results.output_folder(options)
    table = rows_of_other_parts(folder / "drift.csv", options.part) if folder else []
    constants = {"typical_rate": drift.TYPICAL_RATE, "margin": drift.MARGIN}
    if "overlap" in options.part:
        table += [row | constants | results.environment() for row in overlaps(options)]
    if "job" in options.part:
        table += [row | results.environment() for row in jobs(options)]
    if folder:
        results.write_csv(folder / "drift.csv", table)
    return results.exit_status(table)


if __name__ == "__main__":
    raise SystemExit(main())
