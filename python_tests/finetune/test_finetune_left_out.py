"""Experts follow --include and --exclude, and options that a method has no use for are named."""

import pytest
from helpers.architectures import save_architecture
from transformers import AutoModelForCausalLM

from lift_kernels.cli import main
from lift_kernels.errors import UserError
from lift_kernels.finetune.config import METHODS, USED_BY, Settings
from lift_kernels.finetune.data import prepare_data
from lift_kernels.finetune.methods import prepare
from lift_kernels.finetune.run import run
from lift_kernels.finetune.timing import Clock

EXPERTS = {f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")}
ATTENTION = {f"model.layers.{i}.self_attn.{name}_proj.weight" for i in (0, 1) for name in "qkvo"}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return save_architecture("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.mark.parametrize("gradients", ["packed", "dense"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "q_proj"}, {n for n in ATTENTION if "q_proj" in n}),
        ({"include": "q_proj|experts"}, {n for n in ATTENTION if "q_proj" in n} | EXPERTS),
        ({"include": "experts.down_proj"}, {n for n in EXPERTS if "down" in n}),
        ({"exclude": "experts"}, ATTENTION),
        ({"exclude": r"layers\.0"}, {n for n in ATTENTION | EXPERTS if "layers.1" in n}),
        ({"include": "q_proj", "extra": r"layers\.0.*down_proj"}, None),
    ],
)
def test_experts_follow_include_and_exclude(mixtral, tokenizer, settings, options, expected, gradients):
    options = settings(model=str(mixtral), gradients=gradients, **options)
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    ready = prepare(model, tokenizer, options, prepare_data(options, tokenizer), Clock(model.device), None)
    names = {id(p): name for name, p in model.named_parameters()}
    if expected is None:  # extra names further weights, whatever include says
        expected = {n for n in ATTENTION if "q_proj" in n} | {"model.layers.0.mlp.experts.down_proj"}
    assert {names[id(p)] for p in ready.covered} == expected
    [experts] = [kind for kind in ready.kinds if kind.kind == "experts.gate_up_proj"]
    left_out = not {n for n in EXPERTS if "gate_up" in n} <= expected
    by_extra = options.extra is not None
    remedy = "--extra REGEX trains them" if by_extra else "change --include, --exclude"
    assert experts.remedy == (remedy if left_out else "")


def test_excluding_everything_is_refused_by_the_option_that_was_given(mixtral, settings):
    with pytest.raises(UserError, match=r"^no linear weight of MixtralForCausalLM is left .* exclude='layers'; change"):
        run(settings(model=str(mixtral), exclude="layers"))


@pytest.mark.parametrize(
    ("method", "idle"),
    [
        ("lift", ""),
        ("magnitude", "--rank, --refresh-drift"),
        ("random", "--rank, --refresh-interval, --refresh-drift"),
        ("shira", "--gradients, --rank, --refresh-interval, --refresh-drift"),
        ("lora", "--gradients, --density, --rank, --budget-rank, --refresh-interval, --refresh-drift"),
    ],
)
def test_options_that_a_method_has_no_use_for_are_named(capsys, monkeypatch, method, idle):
    monkeypatch.setattr("lift_kernels.finetune.run", lambda settings, resumed: None)
    given = "--density 0.1 --budget-rank 2 --rank 8 --refresh-interval 5 --refresh-drift 0.1 --gradients dense --seed 1"
    assert main(["finetune", "--method", method, *given.split()]) == 0
    said = capsys.readouterr().out
    assert said.splitlines() == ([f"method {method} has no use for {idle}"] if idle else [])


def test_the_table_of_used_options_names_options_and_methods():
    assert USED_BY.keys() < vars(Settings()).keys()
    assert all(set(methods) < set(METHODS) for methods in USED_BY.values())
