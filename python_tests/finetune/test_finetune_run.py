"""Fine-tuning runs of a tiny model: what they train, measure and write."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.finetune_runs import mean_loss
from helpers.gguf import write_gguf
from helpers.word_problem_examples import encoded
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lift_kernels.finetune import evaluation, metrics, model_io, prompts, word_problems
from lift_kernels.finetune.run import run
from lift_kernels.masks import costs


@pytest.fixture(scope="module")
def lift_run(settings):
    """Report and folder of a whole run."""
    options = settings(name="lift")
    return run(options), Path(options.output) / "lift"


def heldout(tokenizer) -> list[prompts.Example]:
    """The held-out problems of the runs here, encoded."""
    problems = word_problems.generate(6, "heldout", seed=0)
    return [encoded(tokenizer, p) for p in problems]


def matrices(model) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if re.search(r"(proj)\.weight$", n)}


def test_finetune_keeps_no_bases(settings, monkeypatch):
    """Matrices count as wide enough for a warm start here.

    The state still has the size of a run without bases.
    """
    monkeypatch.setattr(costs, "SMALL_SIDE", 0)
    monkeypatch.setitem(costs._EIGH_FLOPS, "cpu", lambda n: 1e6 * n**3)
    monkeypatch.setattr(costs, "block_width", lambda shape, rank, warm=False: rank + 1)
    report = run(settings(name="bases", steps=6, eval_problems=2, refresh_drift=0))
    assert report["optimizer_state_bytes.measured"] < 16 * (report["entries"] + 65 * 14)


def test_finetune_learns_and_reports_what_it_did(lift_run, tiny):
    report, folder = lift_run
    original = AutoModelForCausalLM.from_pretrained(tiny)
    weights = matrices(original)
    assert report["heldout_loss.after"] < report["heldout_loss.before"] - 0.3
    assert report["entries"] == sum(round(0.2 * w.numel()) for w in weights.values())
    assert report["covered_weights"] == sum(w.numel() for w in weights.values())
    assert report["density"] == pytest.approx(0.2, abs=1e-3)
    assert report["optimizer_state_bytes.dense"] == 8 * report["covered_weights"]
    # Each entry has an int32 index, an fp32 value and two fp32 moments. Each matrix has padding
    # and up to 256 samples of its drift with a rate.
    assert (
        16 * report["entries"]
        <= report["optimizer_state_bytes.measured"]
        < 16 * (report["entries"] + 65 * len(weights)) + (4 * 256 + 8) * len(weights)
    )
    assert report["gradient_bytes.measured"] == 4 * report["entries"]
    assert report["gradient_bytes.dense"] == 4 * report["covered_weights"]
    assert report["extra_bytes.measured"] == report["optimizer_state_bytes.measured"] + 4 * report["entries"]
    assert 20 <= report["extra_bytes.an_entry"] == report["extra_bytes.measured"] / report["entries"]
    assert report["refreshes"] == 3  # the first mask, then after steps 5 and 10
    assert [row["step"] for row in report["refreshes.due"]] == [5, 10]
    assert report["refreshes.matrices"] + report["refreshes.skipped"] == 2 * len(weights)
    assert 0 < report["seconds.step"] < report["seconds.total"]
    assert 0 < report["seconds.forward_backward"] < report["seconds.train"] < report["seconds.total"]
    assert json.loads((folder / "report.json").read_text()) == report
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_finetune_reports_the_refreshes_that_it_skipped(settings, capsys):
    report = run(settings(name="skipping", lr=1e-3, refresh_drift=0.06, eval_problems=2))
    due = report["refreshes.due"]
    assert [row["step"] for row in due] == [5, 10] and due[0]["skipped"] == 14 == due[1]["skipped"]
    assert report["refreshes"] == 1 and report["refreshes.matrices"] == 0 and report["refreshes.skipped"] == 28
    assert 0.94 < due[1]["predicted_overlap"] < due[0]["predicted_overlap"] < 1
    assert report["refreshes.skipped_overlap"] == pytest.approx(sum(row["predicted_overlap"] for row in due) / 2)
    said = capsys.readouterr().out
    assert (
        f"refresh at step 5: 0 of 14 matrices, 14 skipped (predicted overlap {due[0]['predicted_overlap']:.4f})" in said
    )
    assert f"28 of 28 masks skipped, predicted overlap {report['refreshes.skipped_overlap']:.4f}" in said


def test_finetune_without_a_bound_refreshes_all(settings):
    report = run(settings(name="always", lr=1e-3, refresh_drift=0, eval_problems=2))
    assert report["refreshes"] == 3 and report["refreshes.matrices"] == 28 and report["refreshes.skipped"] == 0
    assert report["refreshes.skipped_overlap"] is None


def test_finetune_saved_model_reloads_and_gives_the_reported_losses(lift_run, tokenizer):
    report, folder = lift_run
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    examples = heldout(tokenizer)
    loss = mean_loss(model, AutoTokenizer.from_pretrained(folder / "model"), examples, 2)
    assert loss == pytest.approx(report["heldout_loss.after"], abs=1e-5)
    neutral = mean_loss(model, tokenizer, evaluation.neutral_examples(tokenizer), 1)
    assert neutral == pytest.approx(report["neutral_loss.after"], abs=1e-5)


def test_finetune_lift_changes_selected_entries_only(lift_run, tiny):
    before = dict(AutoModelForCausalLM.from_pretrained(tiny).named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(lift_run[1] / "model").named_parameters())
    for name in before:
        changed = (before[name] != after[name]).float().mean().item()
        if name in matrices(AutoModelForCausalLM.from_pretrained(tiny)):
            assert 0.15 < changed < 0.35, name  # a refresh adds entries
        else:
            assert changed == 0, name


def test_finetune_exact_match_follows_from_the_written_answers(lift_run):
    report, folder = lift_run
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == report["exact_match.problems"] == 6
    for when in ("before", "after"):
        right = sum(metrics.same_number(row[when], row["expected"]) for row in rows)
        assert report[f"exact_match.{when}"] == right / 6
        assert (report[f"exact_match.{when}_low"], report[f"exact_match.{when}_high"]) == metrics.wilson_interval(
            right, 6
        )


def test_finetune_is_reproducible(lift_run, settings):
    again = run(settings(name="again"))
    for key in ("heldout_loss.before", "heldout_loss.after", "neutral_loss.after", "exact_match.after"):
        assert again[key] == pytest.approx(lift_run[0][key], rel=1e-6), key


def test_finetune_dense_gradients_train_the_same_model(lift_run, settings):
    """Packed gradients are the default.

    The report shows the difference in memory, which is the only one.
    """
    packed, folder = lift_run
    dense = run(settings(gradients="dense", name="dense"))
    assert packed["settings.gradients"] == "packed"
    assert dense["gradient_bytes.measured"] == dense["gradient_bytes.dense"] == packed["gradient_bytes.dense"]
    samples = (4 * 256 + 8) * 14  # of the drift, at most
    assert 12 * dense["entries"] <= dense["optimizer_state_bytes.measured"] < 16 * dense["entries"] + samples
    ours = dict(AutoModelForCausalLM.from_pretrained(folder / "model").named_parameters())
    theirs = AutoModelForCausalLM.from_pretrained(folder.parent / "dense" / "model").named_parameters()
    for name, value in theirs:
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-4, msg=name)


def test_finetune_random_trains_as_many_entries_as_lift_but_others(lift_run, settings, tiny):
    report = run(settings(method="random", name="random", steps=2, refresh_interval=0))
    assert report["entries"] == lift_run[0]["entries"]
    assert report["refreshes"] == 1
    before = matrices(AutoModelForCausalLM.from_pretrained(tiny))
    after = matrices(AutoModelForCausalLM.from_pretrained(Path(report["settings.output"]) / "random" / "model"))
    changed = torch.cat([(before[n] != after[n]).flatten() for n in before])
    # A principal mask prefers large entries; a random mask does not.
    large = torch.cat([(w.abs() > w.abs().median()).flatten() for w in before.values()])
    assert changed.float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert changed[large].float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_finetune_full_trains_every_weight(settings, tiny):
    report = run(settings(method="full", name="full", steps=3, lr=1e-3))
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny).parameters())
    assert report["entries"] == report["covered_weights"] == total
    assert 8 * total <= report["optimizer_state_bytes.measured"] < 8 * total + 4096  # plus a step counter per parameter
    assert report["heldout_loss.after"] < report["heldout_loss.before"]
    assert report["refreshes"] == 0


def test_finetune_lora_is_merged_into_the_saved_model(settings, tokenizer):
    pytest.importorskip("peft")
    report = run(settings(method="lora", name="lora", steps=3))
    folder = Path(report["settings.output"]) / "lora" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, LlamaForCausalLM) and not list(folder.glob("adapter*"))
    examples = heldout(tokenizer)
    loss = mean_loss(model, tokenizer, examples, 6)
    assert loss == pytest.approx(report["heldout_loss.after"], abs=1e-4)
    assert loss < report["heldout_loss.before"]


def test_finetune_bfloat16_keeps_the_dtype(settings):
    report = run(settings(dtype="bfloat16", name="bf16", steps=2))
    model = AutoModelForCausalLM.from_pretrained(Path(report["settings.output"]) / "bf16" / "model")
    assert model.dtype == torch.bfloat16
    # Each entry has an fp32 master beside index and moments.
    assert report["optimizer_state_bytes.measured"] >= 16 * report["entries"]


def test_finetune_gguf_is_dequantized_trained_and_saved_as_safetensors(settings, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    report = run(settings(model=str(path), name="gguf", steps=2))
    assert report["model.description"] == "tiny.gguf, dequantized from GGUF"
    folder = Path(report["settings.output"]) / "gguf" / "model"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    source, _ = model_io.load_model(model_io.find_model(str(path)), torch.float32)
    changed = [n for n, p in source.named_parameters() if not torch.equal(p, model.state_dict()[n])]
    assert set(changed) == set(matrices(model))
    assert model.dtype == torch.float32
