"""Fine-tuning of other architectures than Llama through the command line, with their deltas.

``make architectures`` runs all of `helpers.architectures` and prints a table.
"""

import json
import logging

import pytest
import torch
from helpers.architecture_runs import DENSITY, Outcome, fine_tune
from helpers.architectures import save_architecture
from helpers.bits import bits
from helpers.finetune_runs import assert_same_end, make_runs_cheap, make_settings
from helpers.interrupted_runs import interrupted
from transformers import AutoModelForCausalLM

from lift_kernels.cli import main
from lift_kernels.finetune.run import run
from lift_kernels.nn.weight_kinds import LINEAR, STACK, weights_of

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def cheap_runs(monkeypatch):
    make_runs_cheap(monkeypatch.setattr)


def trained_names(base) -> set[str]:
    """Names of the weights of linear layers and of the stacks."""
    return {w.name for w in weights_of(AutoModelForCausalLM.from_pretrained(base)) if w.kind in (LINEAR, STACK)}


def check_changes(outcome: Outcome, trained: set[str]) -> None:
    """Each trained matrix moved, in at most its entries, and everything else kept its bits."""
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (outcome.base, outcome.model))
    assert len(trained) > 0
    for name, p in before.named_parameters():
        changed = int((bits(p.detach()) != bits(after.get_parameter(name).detach())).sum())
        budget = p.shape[:-2].numel() * round(DENSITY * p.shape[-2:].numel()) if name in trained else 0
        assert min(1, budget) <= changed <= budget, f"{name}: {changed} entries changed, {budget} allowed"


EXPECTED = {
    "qwen2_moe": (29248 / (29248 + 2 * 4 * 32), "training 4.99 % of 32 matrices: 1,460 of 29,248 weights, 99.1 % of"),
    "gpt2": (1.0, "training 5 % of 8 matrices: 1,230 of 24,576 weights, 100.0 % of"),
    "mamba": (14848 / 16384, "training 5 % of 8 matrices: 742 of 14,848 weights, 90.6 % of"),
}
"""The share of the model's matrices, and what the command says of it."""


@pytest.mark.parametrize("gradients", ["packed", "dense"])
@pytest.mark.parametrize("name", EXPECTED)
def test_architectures_train_their_matrices_at_the_density_and_make_exact_deltas(tmp_path, name, gradients):
    """Two routers of Qwen2-MoE, and A_log and convolutions of Mamba, are not trained.

    Mamba reads the weights of two layers and never calls them. They are trained all the same.
    """
    base = save_architecture(name, tmp_path / "base")
    outcome = fine_tune(base, tmp_path, "--gradients", gradients)
    share, line = EXPECTED[name]
    assert outcome.share == pytest.approx(share)
    assert line in outcome.said
    assert outcome.delta == "same bits"
    check_changes(outcome, trained_names(base))
    never_called = "reads the weights of 2 linear layers and never calls them, for example backbone.layers.0.mixer.dt_"
    assert (never_called in outcome.said) == (name == "mamba" and gradients == "packed")
    report = json.loads((outcome.model.parent / "report.json").read_text())
    dense = (
        2 * 64 * 2 * 4 - 4 * 2 * 6 if name == "mamba" and gradients == "packed" else 0
    )  # Those two weights' gradients.
    expected = 4 * (report["entries"] if gradients == "packed" else report["covered_weights"]) + dense
    assert report["gradient_bytes.measured"] == expected


def test_packed_and_dense_gradients_train_the_same_experts(tmp_path):
    base = save_architecture("gpt_oss", tmp_path / "base")
    models = []
    for gradients in ("packed", "dense"):
        (tmp_path / gradients).mkdir()
        outcome = fine_tune(base, tmp_path / gradients, "--gradients", gradients)
        models.append(AutoModelForCausalLM.from_pretrained(outcome.model))
    before = AutoModelForCausalLM.from_pretrained(base)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
        if name.endswith("experts.down_proj"):
            moved = (a != before.get_parameter(name)).flatten(1).sum(1)
            assert (moved > 0).all() and (moved <= round(DENSITY * a[0].numel())).all()


@pytest.mark.parametrize(("extra", "weights"), [("", 6144), (r"mlp\.gate\.weight", 6400), ("experts|gate", 43264)])
def test_extra_names_the_further_weights(tmp_path, caplog, extra, weights):
    """Mixtral has 43,264 weights in matrices: 36,864 in experts and 256 in routers."""
    base = save_architecture("mixtral", tmp_path / "base")
    with caplog.at_level(logging.WARNING, "lift_kernels"):
        outcome = fine_tune(base, tmp_path, "--extra", extra)
    assert outcome.share == pytest.approx(weights / 43264)
    assert outcome.delta == "same bits"
    said = [record.getMessage() for record in caplog.records if record.name == "lift_kernels"]
    left_out = [line for line in said if "4 stacks of matrices" in line and "85 %" in line]
    assert len(left_out) == (weights < 36864), "said once, and only where the stacks are left out"


def test_a_stored_dtype_that_training_changes_is_said(tmp_path):
    base = save_architecture("gpt2", tmp_path / "base", torch.bfloat16)
    outcome = fine_tune(base, tmp_path)
    assert (
        "dtype: stored as bfloat16, trained and saved as float32; --dtype bfloat16 trains it as it is. To apply a "
        "delta of this run in Python, load the base with dtype=torch.float32" in outcome.said
    )
    assert outcome.delta == "same bits"
    (tmp_path / "again").mkdir()
    outcome = fine_tune(base, tmp_path / "again", "--dtype", "bfloat16")
    assert "dtype:" not in outcome.said and outcome.delta == "same bits"
    check_changes(outcome, trained_names(base))


def test_a_killed_run_of_a_mixture_of_experts_resumes_to_the_same_bits(tmp_path, monkeypatch):
    base = save_architecture("mixtral", tmp_path / "base")
    run(make_settings(base, tmp_path / "undisturbed"))
    interrupted(monkeypatch, make_settings(base, tmp_path), 4)
    assert main(["finetune", "--resume", str(tmp_path / "run")]) == 0
    assert_same_end(tmp_path / "run", tmp_path / "undisturbed" / "run")
