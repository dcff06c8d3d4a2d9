"""What each fine-tuning method trains, and what the command says and reports of it."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.architectures import save_architecture
from helpers.finetune_runs import make_runs_cheap
from transformers import AutoModelForCausalLM

from lift_kernels.cli.finetune import METHODS as HELP
from lift_kernels.errors import UserError
from lift_kernels.finetune.adapters import shira_rank
from lift_kernels.finetune.config import FIXED, LEARNING_RATES, METHODS, SPARSE, Settings
from lift_kernels.finetune.data import prepare_data
from lift_kernels.finetune.evaluation import answer_loss
from lift_kernels.finetune.methods import prepare
from lift_kernels.finetune.prompts import collate
from lift_kernels.finetune.run import run
from lift_kernels.finetune.timing import Clock
from lift_kernels.masks.block_selections import principal_blocks, principal_runs, random_runs
from lift_kernels.masks.selection import largest_indices, off_principal_mask

DENSITY = 0.1


@pytest.fixture(autouse=True)
def cheap_runs(monkeypatch):
    make_runs_cheap(monkeypatch.setattr)


@pytest.fixture(scope="module")
def prepared(tiny, tokenizer, settings):
    """A function that prepares the tiny model for a method, and returns model, result and data."""

    def make(**changes):
        options = settings(density=DENSITY, **changes)
        model = AutoModelForCausalLM.from_pretrained(tiny)
        data = prepare_data(options, tokenizer)
        return prepare(model, tokenizer, options, data, Clock(model.device), None), data

    return make


def indices(ready) -> dict[str, torch.Tensor]:
    """The index lists of a LiftAdamW, by the name of the weight."""
    found = {}
    for group in ready.optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"]):
            layer = ready.model.get_submodule(name.rpartition(".")[0])
            mask = getattr(layer, "indices", None)
            found[name.replace("values", "weight")] = ready.optimizer.state[p]["indices"] if mask is None else mask
    return found


def test_every_method_has_a_rate_and_a_phrase_in_the_help():
    assert METHODS == tuple(LEARNING_RATES) == tuple(HELP)
    assert set(FIXED) < set(SPARSE) < set(METHODS)
    assert {m: Settings(method=m).method for m in METHODS} == dict(zip(METHODS, METHODS))


@pytest.mark.parametrize("gradients", ["packed", "dense"])
@pytest.mark.parametrize("method", ["magnitude", "off_principal", "blocks", "runs", "random_runs"])
def test_methods_choose_the_entries_of_their_selection(prepared, tiny, method, gradients):
    select = {
        "magnitude": lambda w, k, number: largest_indices(w.abs(), k),
        "off_principal": lambda w, k, number: off_principal_mask(w, 8, k, "w").indices,
        "blocks": lambda w, k, number: principal_blocks(8)(w, k),
        "runs": lambda w, k, number: principal_runs(8)(w, k),
        "random_runs": lambda w, k, number: random_runs(7)(w, k, number=number),
    }[method]
    ready, _ = prepared(method=method, gradients=gradients, seed=7)
    plain, found = AutoModelForCausalLM.from_pretrained(tiny), indices(ready)
    assert len(found) == 14
    for number, (name, mask) in enumerate(found.items()):
        weight = plain.get_parameter(name).detach()
        assert torch.equal(mask, select(weight, round(DENSITY * weight.numel()), number)), name


@pytest.mark.parametrize(("gradients", "accumulation"), [("packed", 1), ("packed", 2), ("dense", 1)])
def test_method_gradient_chooses_by_the_mean_loss_of_the_first_four_batches(
    prepared, tiny, tokenizer, gradients, accumulation
):
    ready, data = prepared(method="gradient", gradients=gradients, accumulation=accumulation, steps=6)
    assert all(p.grad is None for p in ready.model.parameters())
    assert all(group["refresh_interval"] is None for group in ready.optimizer.param_groups)
    plain = AutoModelForCausalLM.from_pretrained(tiny)
    losses = [answer_loss(plain, collate([s], tokenizer.pad_token_id)) for s in data.sequences[: 4 * data.rows]]
    assert len(losses) == 8 < len(data.sequences)
    (sum(loss for loss, _ in losses) / sum(count for _, count in losses)).backward()
    for name, mask in indices(ready).items():
        gradient = plain.get_parameter(name).grad
        expected = largest_indices(gradient.abs(), mask.numel())
        least = gradient.abs().flatten()[expected.long()].min()
        assert gradient.abs().flatten()[mask.long()].min() > least * (1 - 1e-4), name  # up to rounding
        assert len(set(mask.tolist()) & set(expected.tolist())) >= mask.numel() - 1, name


@pytest.mark.parametrize("method", ["magnitude", "gradient", "random_runs"])
def test_sparse_methods_learn_and_change_their_entries_alone(settings, tiny, method):
    report = run(settings(method=method, name=method, steps=4, density=DENSITY, refresh_interval=2))
    assert report["heldout_loss.after"] < report["heldout_loss.before"] - 0.03
    assert report["refreshes"] == (1 if method in FIXED else 3)
    before = dict(AutoModelForCausalLM.from_pretrained(tiny).named_parameters())
    after = AutoModelForCausalLM.from_pretrained(Path(report["settings.output"]) / method / "model")
    for name, p in after.named_parameters():
        share = (p != before[name]).float().mean().item()
        most = 1.01 * DENSITY * (1 if method in FIXED else 1.5)  # a refresh adds entries
        assert (0.9 * DENSITY < share < most) if "proj" in name else share == 0, name


def test_shira_is_merged_into_the_saved_model(settings, tiny):
    report = run(settings(method="shira", name="shira", steps=3, density=DENSITY))
    r = 2  # of all matrices together: 0.1 x 18432 entries / 1024 rows and columns, rounded
    before = dict(AutoModelForCausalLM.from_pretrained(tiny).named_parameters())
    folder = Path(report["settings.output"]) / "shira" / "model"
    after = AutoModelForCausalLM.from_pretrained(folder)
    assert not list(folder.glob("adapter*"))
    assert report["entries"] == sum(r * sum(p.shape) for n, p in before.items() if "proj" in n) == 2048
    for name, p in after.named_parameters():
        changed = int((p != before[name]).sum())
        assert 0.95 * r * sum(p.shape) <= changed <= r * sum(p.shape) if "proj" in name else changed == 0, name
    assert report["heldout_loss.after"] < report["heldout_loss.before"] - 0.03


def test_the_rank_of_shira_comes_from_all_matrices_together():
    settings = Settings(method="shira", density=0.05)
    assert shira_rank([(100, 100)], settings) == round(0.05 * 100 * 100 / 200)
    assert shira_rank([(576, 576), (192, 576), (1536, 576)], settings) == round(0.05 * 576 * 2304 / (2304 + 3 * 576))
    assert shira_rank([(10, 10)], Settings(method="shira", density=0.001)) == 1
    assert shira_rank([(100, 100)], Settings(method="shira", budget_rank=7)) == 7
    with pytest.raises(UserError, match="with r = 59, and one of 10 x 50 has fewer; lower --density"):
        shira_rank([(10, 50), (2000, 2000)], Settings(method="shira", density=0.06))


def trained_names(ready) -> set[str]:
    """The names of the weights that a prepared model trains, in whole or in part."""
    plain = {name.replace(".base_layer", "").removeprefix("base_model.model."): p for name, p in weights(ready)}
    return {name for name, p in plain.items() if any(p is covered for covered in ready.covered)}


def weights(ready):
    return list(ready.model.named_parameters())


@pytest.mark.parametrize("method", ["lift", "gradient", "lora", "shira", "full"])
def test_include_and_exclude_choose_what_is_trained(prepared, capsys, method):
    names = {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"}
    rest = r"layers\.1|k_proj|v_proj|o_proj|gate|down|embed|head|norm"
    for options in ({"include": r"layers\.0\..*(q|up)_proj"}, {"exclude": rest}):
        ready, _ = prepared(method=method, **options)
        assert trained_names(ready) == names
        learning = {name for name, p in weights(ready) if p.requires_grad}
        assert all("layers.0" in name and re.search("q_proj|up_proj", name) for name in learning)
        assert len(learning) == (4 if method == "lora" else 2)
        kinds = {kind.kind: kind for kind in ready.kinds}
        assert (kinds["up_proj"].trained_matrices, kinds["up_proj"].matrices, kinds["k_proj"].trained) == (1, 2, 0)
        assert kinds["up_proj"].remedy == kinds["k_proj"].remedy == "change --include, --exclude"
        assert ready.share == pytest.approx((32 * 32 + 64 * 32) / 18432)
    assert ("training 3,072 of 35,104 weights" in capsys.readouterr().out) == (method == "full")


def test_extra_trains_further_matrices(prepared):
    ready, _ = prepared(extra="embed_tokens", include="q_proj")
    qs = {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert trained_names(ready) == qs | {"model.embed_tokens.weight"}


def test_the_run_says_and_reports_what_is_trained_by_kind_of_layer(settings, capsys):
    report = run(settings(name="kinds", steps=1, density=DENSITY))
    rows = {row["kind"]: row for row in report["trained.by_kind"]}
    assert list(rows) == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("embeddings and head", "norms and other vectors"),
    ]
    assert rows["k_proj"] == {
        "kind": "k_proj",
        "matrices": 2,
        "trained_matrices": 2,
        "weights": 1024,
        "trained": 102,
        "share": 102 / 1024,
        "remedy": "",
    }
    assert rows["embeddings and head"]["remedy"] == "--extra REGEX trains them"
    assert rows["norms and other vectors"]["remedy"] == "--method full trains them"
    assert sum(row["trained"] for row in rows.values()) == report["entries"]
    assert sum(row["weights"] for row in rows.values()) == 35104
    said = capsys.readouterr().out.splitlines()
    start = said.index(next(line for line in said if line.startswith("training 9.99 % of 14 matrices")))
    assert said[start + 1].split() == ["matrices", "weights", "trained", "share", "left", "out"]
    assert said[start + 3].split() == ["k_proj", "2", "1,024", "102", "9.96%"]
    json.dumps(report["trained.by_kind"])


def test_layers_of_one_name_are_told_apart_by_their_place_and_experts_are_named(tmp_path, tokenizer):
    """c_proj of GPT-2 is in its attention and in its MLP. Mixtral's experts are stacks."""
    for name, expected in (
        ("gpt2", ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "embeddings and head", "biases"]),
        ("mixtral", ["experts.gate_up_proj", "experts.down_proj"]),
    ):
        folder = save_architecture(name, tmp_path / name)
        options = Settings(model=str(folder), device="cpu", eval_problems=2, steps=1)
        model = AutoModelForCausalLM.from_pretrained(folder)
        ready = prepare(model, tokenizer, options, prepare_data(options, tokenizer), Clock(model.device), None)
        kinds = {kind.kind: kind for kind in ready.kinds}
        assert set(expected) <= set(kinds), kinds
        if name == "mixtral":
            assert kinds["experts.down_proj"].matrices == kinds["experts.down_proj"].trained_matrices == 2 * 4


MAMBA = [
    ({"include": "in_proj|dt_proj"}, {"in_proj", "dt_proj"}),
    ({"include": "in_proj"}, {"in_proj"}),
    ({"exclude": "out_proj|x_proj"}, {"in_proj", "dt_proj"}),
    ({"exclude": "dt_proj"}, {"in_proj", "out_proj", "x_proj"}),
]


def test_layers_that_a_model_never_calls_follow_include_and_exclude(settings, tmp_path, tokenizer, capsys):
    """Mamba reads the weights of dt_proj by itself, so their gradients stay dense."""
    folder = save_architecture("mamba", tmp_path / "mamba")

    def prepared(**changes):
        options, model = settings(**changes), AutoModelForCausalLM.from_pretrained(folder)
        return prepare(model, tokenizer, options, prepare_data(options, tokenizer), Clock(model.device), None)

    for changes, expected in MAMBA:
        assert {kind.kind for kind in prepared(**changes).kinds if kind.trained} == expected, changes
        assert ("never calls them" in capsys.readouterr().out) == ("dt_proj" in expected)
    for changes in ({"include": "dt_proj"}, {"method": "gradient"}):
        with pytest.raises(UserError, match="take --gradients dense"):
            prepared(**changes)
        prepared(gradients="dense", **changes)
