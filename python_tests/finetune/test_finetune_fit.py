"""`finetune --fit`: options with which a run fits, chosen before weights are loaded."""

from __future__ import annotations

import json

import pytest
from helpers.finetune_runs import make_runs_cheap, refused

from lift_kernels.cli import main
from lift_kernels.errors import UserError
from lift_kernels.finetune import fit
from lift_kernels.finetune.config import Settings
from lift_kernels.finetune.fit import fitted
from lift_kernels.planning.counted_pass import PassBytes

MIB = 2**20


@pytest.fixture
def counted(monkeypatch):
    """Activations of 64 bytes for each token, with checkpointing of 16, half in bf16; no state."""
    seen = []

    def count(shapes, kind, *, batch, seq, checkpointing, passes, **options):
        seen.append((kind, batch, seq, checkpointing, passes, options))
        size = batch * seq * (16 if checkpointing else 64) * shapes.dtype.itemsize // 4 * 1024
        return PassBytes(0, 0, size, size, size)

    monkeypatch.setattr(fit, "count_pass", count)
    monkeypatch.setattr(
        fit, "total_of", lambda form, shapes, counted, **options: type("Total", (), {"peak": counted.together})
    )
    return seen


@pytest.mark.parametrize(
    "memory, expected",
    [
        (256, ("float32", False, 1)),
        (255, ("float32", False, 2)),
        (64, ("float32", False, 4)),
        (63, ("float32", False, 8)),
        (16, ("float32", True, 4)),
        (8, ("float32", True, 8)),
        (4, ("bfloat16", True, 8)),
    ],
)
def test_what_changes_no_result_comes_first(tiny, counted, memory, expected):
    """More passes, then checkpointing, then bf16. 8 samples of 512 tokens take 256 MiB."""
    settings = Settings(model=str(tiny), shots=0, device="cpu")
    chosen, line = fitted(settings, (), f"{memory}MiB")
    assert (chosen.dtype, chosen.checkpointing, chosen.accumulation) == expected
    assert line.startswith(f"fit: {expected[0]}, {'' if expected[1] else 'no '}checkpointing, ")
    assert ("it would take 0.25 GiB" in line) == (memory != 256)
    assert counted[0] == ("packed", 8, 512, False, 1, {"padded": True, "autocast": False, "device": "cpu"})


def test_given_options_are_kept(tiny, counted):
    settings = Settings(model=str(tiny), shots=0, device="cpu", checkpointing=True, accumulation=2, dtype="bfloat16")
    chosen, _ = fitted(settings, ("checkpointing", "accumulation", "dtype"), "16MiB")
    assert chosen == settings and len(counted) == 1
    with pytest.raises(UserError, match="the nearest is bfloat16, checkpointing, 2 passes a step, 0.02 GiB; lower"):
        fitted(settings, ("checkpointing", "accumulation", "dtype"), "15MiB")
    chosen, _ = fitted(Settings(model=str(tiny), shots=0, device="cpu", autocast=True), ("autocast",), "8MiB")
    assert chosen.dtype == "float32"
    with pytest.raises(UserError, match="the nearest is float32"):
        fitted(Settings(model=str(tiny), shots=0, device="cpu", autocast=True), ("autocast",), "7MiB")


def test_joined_samples_share_a_sequence(tiny, counted):
    """With worked examples 8 samples make 2 sequences, which 2 passes can share."""
    chosen, _ = fitted(Settings(model=str(tiny), device="cpu"), (), "64MiB")
    assert (chosen.accumulation, chosen.checkpointing) == (1, True)
    assert {(batch, seq) for _, batch, seq, *_ in counted} == {(2, 2048), (1, 2048)}


def test_ranks_share_the_batch(tiny, counted, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    chosen, _ = fitted(Settings(model=str(tiny), shots=0, device="cpu", parallel="ddp"), (), "32MiB")
    assert chosen.accumulation == 2 and [batch for _, batch, *_ in counted] == [2, 1]


@pytest.mark.parametrize("method, kind", [("full", "full"), ("lora", "lora"), ("shira", "shira"), ("random", "packed")])
def test_methods(tiny, counted, method, kind):
    fitted(Settings(model=str(tiny), method=method, device="cpu"), (), "1GiB")
    assert counted[0][0] == kind
    assert fit._kind(Settings(gradients="dense")) == "dense"


@pytest.mark.slow
def test_the_chosen_settings_are_those_of_the_run(tiny, tmp_path, monkeypatch, capsys):
    """Counted really. `--resume` needs no new choice."""
    make_runs_cheap(monkeypatch.setattr)
    options = f"--model {tiny} --device cpu --output {tmp_path} --name run --steps 2 --eval-problems 2 --rank 4"
    assert main(["finetune", *options.split(), "--max-length", "300", "--batch-size", "4", "--fit", "4GiB"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("fit: float32, no checkpointing, one pass a step: at most 0.")
    saved = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (saved["dtype"], saved["checkpointing"], saved["accumulation"]) == ("float32", False, 1)
    assert "fit" not in saved


def test_what_cannot_be_chosen_is_refused(tiny, tmp_path, capsys, counted):
    line = refused(capsys, "--model", str(tiny), "--shots", "0", "--fit", "1MiB")
    assert line == (
        f"error: {tiny} does not fit into 0.00 GiB, of which training may fill 0.00; the nearest is bfloat16, "
        "checkpointing, 8 passes a step, 0.00 GiB; lower --max-length, --batch-size or --density, leave out options "
        "that you gave, or see `python -m lift_kernels plan`"
    )
    assert "24 is no size of memory" in refused(capsys, "--model", str(tiny), "--fit", "24")
    assert main(["finetune", "--resume", str(tmp_path), "--fit", "24GiB"]) == 2
    assert "leave out fit" in capsys.readouterr().err
