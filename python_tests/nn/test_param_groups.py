"""lift_param_groups: linear layers, tied weights, heads, embeddings and rules on names."""

from __future__ import annotations

import pytest
import torch
from helpers.optimizers import set_gradients
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lift_kernels import LiftAdamW, lift_param_groups, principal_indices

LINEAR = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def make_llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=2, n_head=2))


def names(groups):
    assert len(groups) == 1 and groups[0]["lift"] is True
    return [name for name, _ in groups[0]["params"]]


@pytest.mark.parametrize("tied", [False, True])
def test_llama_leaves_out_embeddings_head_and_norms(tied):
    model = make_llama(tied)
    groups = lift_param_groups(model)
    assert names(groups) == [f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in LINEAR]
    own = dict(model.named_parameters())
    assert all(weight is own[name] for name, weight in groups[0]["params"])
    assert all(p.requires_grad for p in model.parameters()), "nothing is frozen unless asked"


def test_gpt2_conv1d():
    """Conv1D holds its weight as (in, out).

    The mask is the transposed mask of the linear layer it stands for.
    """
    model = make_gpt2()
    groups = lift_param_groups(model)
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names(groups) == [f"transformer.h.{i}.{layer}.weight" for i in (0, 1) for layer in layers]
    weight = dict(groups[0]["params"])["transformer.h.0.mlp.c_fc.weight"]
    assert weight.shape == (16, 64)
    mask = torch.zeros(16 * 64, dtype=torch.bool)
    mask[principal_indices(weight, 4, 100).long()] = True
    linear = torch.zeros(64 * 16, dtype=torch.bool)
    linear[principal_indices(weight.detach().T.contiguous(), 4, 100).long()] = True
    assert torch.equal(mask.view(16, 64), linear.view(64, 16).T)


@pytest.mark.parametrize("make", [make_gpt2, lambda: make_llama(True), lambda: make_llama(False)])
def test_freeze_rest_and_train(make):
    """This is the paper's recipe: the optimizer takes the groups as they are.

    A step moves principal weights alone.
    """
    model = make()
    groups = lift_param_groups(model, freeze_rest=True)
    chosen = dict(groups[0]["params"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(chosen)
    optimizer = LiftAdamW(groups, lr=0.01, rank=4, density=0.1)
    assert optimizer.param_groups[0]["param_names"] == list(chosen)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    assert all((p.grad is not None) == (name in chosen) for name, p in model.named_parameters())
    optimizer.step()
    for name, p in model.named_parameters():
        moved = (p.detach() != before[name]).flatten()
        k = round(0.1 * p.numel()) if name in chosen else 0
        assert moved.sum() <= k and (moved.sum() >= 0.9 * k), name  # a zero gradient moves nothing
        if k:
            allowed = torch.zeros_like(moved)
            allowed[principal_indices(before[name], 4, k).long()] = True
            assert not (moved & ~allowed).any()


def test_include_and_exclude():
    model = make_llama(False)
    attention = names(lift_param_groups(model, include=r"self_attn\.[qk]_proj"))
    assert attention == [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qk"]
    rest = names(lift_param_groups(model, exclude=r"self_attn\.[qk]_proj"))
    assert sorted(attention + rest) == sorted(names(lift_param_groups(model))) and not set(attention) & set(rest)
    assert names(lift_param_groups(model, include=r"layers\.1\.mlp", exclude="attn")) == [
        f"model.layers.1.{name}.weight" for name in LINEAR[4:]
    ]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"include": "mlp", "exclude": "down"}, r"mlp\.down_proj\.weight matches both include='mlp' and exclude="),
        ({"include": "lm_head"}, "no linear weight of LlamaForCausalLM is left with include='lm_head', exclude=None"),
        ({"exclude": "model"}, "no linear weight of LlamaForCausalLM is left with include=None, exclude='model'"),
    ],
)
def test_rules_that_cannot_work(rules, message):
    """Nothing is frozen if the rules are refused."""
    model = make_llama(False)
    with pytest.raises(ValueError, match=message):
        lift_param_groups(model, **rules, freeze_rest=True)
    assert all(p.requires_grad for p in model.parameters())


class Shared(nn.Module):
    """Two layers share a weight, one is tied to an embedding, one to the head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.first, self.second, self.third = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.to_table, self.lm_head = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.tied_to_head = nn.Linear(8, 12, bias=False)
        self.second.weight = self.first.weight
        self.to_table.weight = self.table.weight
        self.tied_to_head.weight = self.lm_head.weight


def test_shared_and_tied_weights():
    model = Shared()
    groups = lift_param_groups(model, freeze_rest=True)
    assert names(groups) == ["first.weight", "third.weight"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["first.weight", "third.weight"]
    optimizer = LiftAdamW(groups, lr=0.1, rank=2)
    set_gradients([model.first.weight], 0)
    optimizer.step()
    assert torch.equal(model.second.weight, model.first.weight)


def test_a_lone_linear_layer():
    layer = nn.Linear(6, 5)
    groups = lift_param_groups(layer, freeze_rest=True)
    assert names(groups) == ["weight"] and groups[0]["params"][0][1] is layer.weight and not layer.bias.requires_grad


def test_the_groups_leave_room_for_options_and_for_dense_ones():
    """Options are added to the group; norms in another group are trained densely."""
    model = make_llama(False)
    group = lift_param_groups(model)[0] | {"density": 0.2, "rank": 3}
    matrices = dict(group["params"])  # the optimizer keeps names and parameters in two lists
    norms = [(name, p) for name, p in model.named_parameters() if "norm" in name]
    optimizer = LiftAdamW([group, {"params": norms, "lr": 1e-2}], lr=1e-3)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    for name, p in matrices.items():
        assert optimizer.state[p]["indices"].numel() == round(0.2 * p.numel()), name
    for _, p in norms:
        expected = 1e-2 * p.grad.abs() / (p.grad.abs() + 1e-8)
        torch.testing.assert_close((p.detach() - 1).abs(), expected, rtol=1e-4, atol=0)
