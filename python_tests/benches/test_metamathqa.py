"""bench/metamathqa: LIFT in PEFT's comparison, on a tiny model and a stand-in of their modules."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from helpers import comparison
from helpers.tiny_llama import save_tiny
from transformers import AutoModelForCausalLM

from bench.metamathqa.__main__ import EXPERIMENTS, main
from bench.metamathqa.entry import MODULES, lift_optimizer
from lift_kernels import LiftAdamW, apply_delta, delta_info

STEPS = 60
OPTIONS = {"lr": 5e-3, "density": 0.1, "rank": 8, "refresh_interval": 20, "seed": 3}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with the stand-in; what an entry changes in this process is undone."""
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(torch.optim, "LiftAdamW", None, raising=False)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = save_tiny(tmp_path / "model", dtype="bfloat16")
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    comparison.write(
        tmp_path / "peft",
        model_id=str(model),
        batch_size=3,
        max_steps=STEPS,
        grad_norm_clip=1.0,
        optimizer_type="AdamW",
        optimizer_kwargs={"lr": 1e-3},
        query_template="Question: {query} Think step by step.\nAnswer:",
    )
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


def experiment(folder, **options):
    directory = folder / "experiments" / "lift" / "tiny"
    directory.mkdir(parents=True)
    parameters = {"optimizer_type": "LiftAdamW", "optimizer_kwargs": options}
    (directory / "training_params.json").write_text(json.dumps(parameters))
    return directory


def result_of(folder):
    return json.loads((folder / "peft" / comparison.FOLDER / "results" / "lift--tiny.json").read_text())


def run(folder, directory):
    return main(["--peft", str(folder / "peft"), "--delta", str(folder / "tiny.delta"), str(directory)])


def test_an_entry_is_trained_and_written_in_their_form(checkout, capsys):
    assert run(checkout, experiment(checkout, **OPTIONS)) == 0
    result = result_of(checkout)
    assert result["run_info"]["experiment_name"] == "lift/tiny"
    assert result["run_info"]["train_config"]["optimizer_type"] == "LiftAdamW"
    described = result["run_info"]["peft_config"]
    assert described["peft_type"] == "LIFT" and described.items() >= OPTIONS.items()
    info = result["train_info"]
    plain = AutoModelForCausalLM.from_pretrained(checkout / "model")
    layers = [m.weight for m in plain.model.modules() if isinstance(m, torch.nn.Linear)]
    assert info["num_trainable_params"] == sum(round(0.1 * w.numel()) for w in layers)
    assert info["num_total_params"] == plain.num_parameters()
    assert info["status"] == "success" and 0 <= info["metrics"][-1]["test accuracy"] <= 1
    losses = json.loads(capsys.readouterr().err.partition("losses: ")[2].partition("\n")[0])
    assert len(losses) == STEPS and losses[-1] < 0.8 * losses[0]


def test_the_checkpoint_is_a_delta_of_what_was_trained(checkout, capsys):
    run(checkout, experiment(checkout, **OPTIONS))
    info = delta_info(checkout / "tiny.delta")
    trained = result_of(checkout)["train_info"]
    assert trained["file_size"] == (checkout / "tiny.delta").stat().st_size
    # Each refresh may bring further entries in, and bf16 may round a change away.
    assert 0.5 * trained["num_trainable_params"] < info.entries < 3 * trained["num_trainable_params"]
    assert f"{info.entries:,} entries changed" in capsys.readouterr().err
    tuned, plain = (AutoModelForCausalLM.from_pretrained(checkout / "model", dtype=torch.bfloat16) for _ in range(2))
    apply_delta(tuned, checkout / "tiny.delta")
    changed = {n for (n, p), q in zip(tuned.named_parameters(), plain.parameters()) if not torch.equal(p, q)}
    assert changed == {n for n, p in plain.named_parameters() if p.dim() == 2 and "proj" in n}


def test_the_optimizer_of_an_experiment_is_one_with_packed_gradients(checkout):
    model = AutoModelForCausalLM.from_pretrained(checkout / "model", dtype=torch.bfloat16)
    optimizer = lift_optimizer(
        model, lr=0.1, include=r"\.(q|v)_proj\.weight$", budget_rank=2, rank=4, refresh_interval=None, weight_decay=0.1
    )
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == [f"model.layers.{i}.self_attn.{x}_proj.values" for i in range(2) for x in "qv"]
    sizes = [p.numel() for group in optimizer.param_groups for p in group["params"]]
    assert isinstance(optimizer, LiftAdamW) and sizes == [2 * (32 + 32), 2 * (16 + 32)] * 2
    group = optimizer.param_groups[0]
    assert (group["lr"], group["budget_rank"], group["rank"], group["weight_decay"]) == (0.1, 2, 4, 0.1)
    assert group["refresh_interval"] is None


def test_the_experiments_have_the_numbers_of_entries_that_they_say():
    """Llama-3.2-3B: 28 layers, q 3072 x 3072, v 1024 x 3072; SHiRA with r = 32 has 9,175,040."""
    for name, principal in (("qv-rank32", True), ("qv-rank32-random", False), ("density0.05", True)):
        text = (EXPERIMENTS / f"llama-3.2-3B-{name}" / "training_params.json").read_text()
        parameters = json.loads(text)
        options = parameters["optimizer_kwargs"]
        assert parameters["optimizer_type"] == "LiftAdamW"
        assert (options.get("selection", "principal") == "principal") == principal
        if "budget_rank" in options:
            assert 28 * options["budget_rank"] * (3072 + 3072 + 1024 + 3072) == 9_175_040
        model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(64, 64), "o_proj": torch.nn.Linear(64, 64)})
        options = {key: value for key, value in options.items() if key != "include"} | {"budget_rank": None}
        assert isinstance(lift_optimizer(torch.nn.Sequential(model), **options), LiftAdamW)


def test_a_run_that_their_loop_gave_up_fails(checkout):
    directory = experiment(checkout, **OPTIONS, betas=[0.9, 0.999])
    (checkout / "peft" / comparison.FOLDER / "data.py").write_text(
        "SAMPLES = []\n\ndef get_train_samples(tokenizer, query_template):\n    return [[1, 2, 'x']]\n"
    )
    assert run(checkout, directory) == 1
    assert result_of(checkout)["train_info"]["status"] == "canceled"


def test_what_is_missing_is_said_in_one_line(checkout, capsys):
    directory = experiment(checkout, **OPTIONS)

    def error(*argv):
        assert main([str(a) for a in argv]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "no training_params.json in nowhere; give a directory that has one, or one of llama-3.2-3B-" in error(
        "--peft", checkout / "peft", "nowhere"
    )
    assert "utils.py is missing; give --peft a checkout" in error("--peft", checkout / "model", directory)
    folder = checkout / "peft" / comparison.FOLDER
    text = (folder / "run.py").read_text()
    (folder / "run.py").write_text(text.replace("get_file_size", "file_size_of"))
    (folder / "utils.py").write_text((folder / "utils.py").read_text().replace("get_file_size", "file_size_of"))
    assert "run.py has no get_file_size; check out commit" in error("--peft", checkout / "peft", directory)
    (folder / "utils.py").write_text('raise RuntimeError("CUDA is not available")\n')
    assert "utils.py: CUDA is not available; see bench/metamathqa/README.md" in error(
        "--peft", checkout / "peft", directory
    )
