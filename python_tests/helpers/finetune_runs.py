"""Short fine-tuning runs of a tiny model, and the check that two runs end alike."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import accelerate.utils.memory
import torch
from safetensors.torch import load_file

from lift_kernels.checkpoint import load_checkpoint
from lift_kernels.cli import main
from lift_kernels.finetune import neutral, report, run_dir
from lift_kernels.finetune.config import Settings
from lift_kernels.finetune.evaluation import sample_losses

STEPS, REFRESH = 8, 3
NEUTRAL_TOKENS = 1024


def make_runs_cheap(setattr=setattr) -> None:
    """Keep the last checkpoint, which holds all state at the end.

    Leave out what takes half of the time of a tiny run.
    """
    setattr(run_dir, "finish", lambda folder: None)
    setattr(neutral, "TOKENS", NEUTRAL_TOKENS)
    setattr(report, "plot_losses", lambda *args: None)
    setattr(accelerate.utils.memory, "gc", SimpleNamespace(collect=lambda: None))  # gc.collect stays


def make_settings(tiny, output, **changes) -> Settings:
    base = dict(
        model=str(tiny), output=str(output), device="cpu", eval_problems=2, steps=STEPS, rank=4, density=0.2, name="run"
    )
    return Settings(**(base | {"refresh_interval": REFRESH, "lr": 5e-3, "batch_size": 2, "save_steps": 1} | changes))


def refused(capsys, *arguments: str) -> str:
    """Run the command line, check that it refuses with one line, and return that line."""
    assert main(["finetune", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def mean_loss(model, tokenizer, examples, batch_size: int) -> float:
    """The mean cross-entropy of examples in nats per labelled token."""
    losses = sample_losses(model, tokenizer, examples, batch_size, "loss")
    return sum(total for total, _ in losses) / sum(count for _, count in losses)


def flat(tree, place="") -> dict:
    """The leaves of nested containers, by their path."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in flat(value, f"{place}/{key}").items()}
    return {place: tree}


def assert_same_end(actual: Path, expected: Path) -> None:
    """Check that two runs ended with the same bits.

    Compared are the saved model, losses, moments, masks, masters, schedule and random generators.
    """
    a, e = (load_file(folder / "model" / "model.safetensors") for folder in (actual, expected))
    assert a.keys() == e.keys() and all(torch.equal(a[n].view(torch.uint8), e[n].view(torch.uint8)) for n in e)
    a, e = (load_checkpoint(folder / run_dir.CHECKPOINT) for folder in (actual, expected))
    assert a["progress"]["losses"] == e["progress"]["losses"] and len(e["progress"]["losses"]) == e["step"]
    for key in ("model", "optimizer", "scheduler", "random", "step"):
        left, right = flat(a[key]), flat(e[key])
        assert left.keys() == right.keys()
        for place, value in right.items():
            same = torch.equal(left[place], value) if isinstance(value, torch.Tensor) else left[place] == value
            assert same, f"{key}{place} differs"
    assert (actual / "answers.jsonl").read_text() == (expected / "answers.jsonl").read_text()
    a, e = (json.loads((folder / run_dir.REPORT).read_text()) for folder in (actual, expected))
    changing = ("seconds", "settings.output", "settings.name")
    assert all(a[key] == value for key, value in e.items() if not key.startswith(changing))
