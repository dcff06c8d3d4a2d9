"""What `lift_param_groups` leaves out: counted and said once a kind, with the option for it."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.optimizers import set_gradients
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    CLIPConfig,
    CLIPForImageClassification,
    GptOssConfig,
    GptOssForCausalLM,
    HubertConfig,
    HubertForCTC,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients
from lift_kernels.nn.param_groups import stacked_weights

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
MOE = SIZES | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


def names(group):
    return [name for name, _ in group["params"]]


def said(caplog, action):
    """What ``action`` returns, and the warnings that it logs."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lift_kernels"):
        result = action()
    return result, [record.getMessage() for record in caplog.records]


def llama(cls=LlamaForCausalLM, **options):
    torch.manual_seed(0)
    return cls(LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, **options))


def test_nothing_is_said_where_all_linear_layers_are_taken(caplog):
    _, messages = said(caplog, lambda: lift_param_groups(llama(), freeze_rest=True))
    assert messages == []


def test_stacked_experts_are_counted_and_extra_takes_them(caplog):
    """With ``freeze_rest`` most of the model would not be trained."""
    model = MixtralForCausalLM(MixtralConfig(**MOE))
    (group,), messages = said(caplog, lambda: lift_param_groups(model))
    experts = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    assert list(stacked_weights(model)) == experts
    own = sum(p.numel() for _, p in group["params"])
    stacked = sum(p.numel() for p in stacked_weights(model).values())
    share = round(100 * stacked / (own + stacked + model.model.layers[0].mlp.gate.weight.numel()))
    assert messages == [
        f"2 stacks of matrices, such as experts, {share} % of the model's matrices, are left out, for example "
        f"{experts[0]}; extra='experts.' trains them"
    ]
    (taken,), messages = said(caplog, lambda: lift_param_groups(model, extra="experts.", freeze_rest=True))
    assert names(taken) == [*names(group), *experts] and messages == []
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(names(taken))
    optimizer = LiftAdamW([taken], lr=0.1, rank=3, density=0.1)
    before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    set_gradients(stacked_weights(model).values(), 0)
    optimizer.step()
    moved = (model.model.layers[0].mlp.experts.down_proj != before).flatten(1).sum(1)
    assert moved.tolist() == [round(0.1 * 32 * 48)] * 4, "each expert has a mask of its own"


def test_experts_of_packed_gradients_are_said_too(caplog):
    _, messages = said(caplog, lambda: pack_gradients(MixtralForCausalLM(MixtralConfig(**MOE)), rank=3))
    assert len(messages) == 1 and "extra='experts.' trains them" in messages[0]


def test_biases_of_experts_are_no_matrices():
    """gpt-oss keeps a bias for each expert, (experts, n)."""
    model = GptOssForCausalLM(GptOssConfig(**MOE, head_dim=8))
    (group,) = lift_param_groups(model, extra="experts")
    assert [name for name in names(group) if "experts" in name] == list(stacked_weights(model))
    assert any(name.endswith("experts.down_proj_bias") for name, _ in model.named_parameters())


def test_exclude_leaves_experts_out_without_a_word(caplog):
    model = MixtralForCausalLM(MixtralConfig(**MOE))
    (group,), messages = said(caplog, lambda: lift_param_groups(model, exclude="experts"))
    assert messages == [] and not any("experts" in name for name in names(group))
    (group,) = lift_param_groups(model, extra="experts", exclude="down_proj")
    assert [name for name in names(group) if "experts" in name] == ["model.layers.0.mlp.experts.gate_up_proj"]


def test_rules_that_leave_only_experts_name_extra():
    model = MixtralForCausalLM(MixtralConfig(**MOE))
    message = "no linear weight of MixtralForCausalLM is left with include='experts', exclude=None; extra=.* takes "
    with pytest.raises(ValueError, match=f"{message}model.layers.0.mlp.experts.gate_up_proj, "):
        lift_param_groups(model, include="experts")


@pytest.mark.parametrize(
    ("model", "rules", "remedy"),
    [
        (nn.Sequential(nn.Linear(4, 4)), {"include": "attn"}, r"change these rules; the linear weights are 0\.weight"),
        (nn.Sequential(nn.Embedding(8, 4)), {}, r"LIFT has nothing to train there; use torch\.optim\.AdamW"),
        (
            nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8))),
            {},
            r"torch\.nn\.utils\.parametrize\.remove_parametrizations",
        ),
        (nn.MultiheadAttention(4, 2), {"exclude": "out_proj"}, "extra='in_proj_weight' takes in_proj_weight"),
    ],
)
def test_a_model_of_which_nothing_is_left_gets_its_own_way_out(model, rules, remedy):
    with pytest.raises(ValueError, match=f"no linear weight of .* is left with include=.*; {remedy}"):
        lift_param_groups(model, **rules)


def test_extra_that_matches_nothing_blames_the_right_option():
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    taken = r"extra='in_proj' matches no further matrix of Sequential; exclude='in_' takes 1\.in_proj_weight away"
    with pytest.raises(ValueError, match=taken):
        lift_param_groups(model, extra="in_proj", exclude="in_")
    with pytest.raises(ValueError, match="matches no further matrix of Sequential; leave out extra="):
        lift_param_groups(model[:1], extra="experts")


def test_matrices_of_other_layers(caplog):
    """nn.MultiheadAttention holds q, k and v as a parameter of its own."""
    model = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    (group,), messages = said(caplog, lambda: lift_param_groups(model))
    assert names(group) == ["self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    share = round(100 * 48 * 16 / (48 * 16 + 16 * 16 + 2 * 24 * 16))
    assert messages == [
        f"1 matrices outside linear layers, {share} % of the model's matrices, are left out, for example "
        "self_attn.in_proj_weight; extra='self_attn.in_proj_weight' trains them"
    ]
    (taken,), messages = said(caplog, lambda: lift_param_groups(model, extra="in_proj_weight"))
    assert names(taken) == [*names(group), "self_attn.in_proj_weight"] and messages == []


def test_recurrent_layers(caplog):
    model = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 12))
    (group,), messages = said(caplog, lambda: lift_param_groups(model))
    assert names(group) == ["0.weight"]
    assert len(messages) == 1 and "extra='weight_hh_l0|weight_ih_l0' trains them" in messages[0]


@pytest.mark.parametrize(
    "reparametrize",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "pruning"],
)
def test_computed_weights(caplog, reparametrize):
    """Their ``weight`` is no parameter: a change of it would be lost."""
    model = nn.Sequential(nn.Linear(8, 8), reparametrize(nn.Linear(8, 8)))
    (group,), messages = said(caplog, lambda: lift_param_groups(model))
    assert names(group) == ["0.weight"]
    assert len(messages) == 1 and "50 % of the model's matrices, are left out" in messages[0]
    assert "remove_parametrizations makes the layers plain" in messages[0] and "prune.remove" in messages[0]
    pack_gradients(model, rank=2)
    model(torch.randn(2, 8)).sum().backward()


def test_convolutions(caplog):
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(16, 8))
    (group,), messages = said(caplog, lambda: lift_param_groups(model))
    assert names(group) == ["2.weight"] and len(messages) == 1
    assert "1 weights of convolutions, 60 % of the model's matrices, are left out, for example 0.weight" in messages[0]
    assert "add them in a group with lift=False" in messages[0]


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_adapters_are_no_matrices_of_the_model(caplog, task):
    """LoRA's B is all zero at first. The layers that peft wraps are taken."""
    from peft import LoraConfig, get_peft_model

    model = llama() if task is None else llama(LlamaForSequenceClassification)
    plain = names(lift_param_groups(llama())[0])
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task))
    (group,), messages = said(caplog, lambda: lift_param_groups(model))
    assert [n.removeprefix("base_model.model.").replace("base_layer.", "") for n in names(group)] == plain
    assert len(messages) == 1 and "weights of adapters are left out, for example" in messages[0]
    assert "merge_and_unload() them first" in messages[0]


@pytest.mark.parametrize("encoder", [False, True])
def test_virtual_tokens_are_adapters(caplog, encoder):
    """Theirs are an embedding table and linear layers, which nothing has trained yet."""
    from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model

    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    config = PromptEncoderConfig(**options, encoder_hidden_size=16) if encoder else PromptTuningConfig(**options)
    plain = names(lift_param_groups(llama())[0])
    model = get_peft_model(llama(), config)
    (group,), messages = said(caplog, lambda: lift_param_groups(model))
    assert [n.removeprefix("base_model.") for n in names(group)] == plain
    assert len(messages) == 1 and messages[0].startswith(f"{7 if encoder else 1} weights of adapters are left out")


def test_adapters_in_a_layer_of_its_own():
    """loralib keeps A and B beside the weight, in a subclass of nn.Linear."""
    layer = nn.Linear(8, 8)
    layer.lora_A, layer.lora_B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(8, 2))
    assert names(lift_param_groups(nn.Sequential(layer))[0]) == ["0.weight"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_task_head_is_trained_densely(caplog, packed):
    """Nothing pretrained is in it, so 5 % of it is not what its user wants."""
    model = llama(LlamaForSequenceClassification, num_labels=2)
    make = pack_gradients if packed else lift_param_groups
    (group, head), messages = said(caplog, lambda: make(model, freeze_rest=True))
    assert names(head) == ["score.weight"] and head["lift"] is False and len(group["params"]) == 7
    assert (
        len(messages) == 1
        and messages[0].startswith("score.weight: outside the pretrained model, ")
        and "densely" in messages[0]
    )
    assert model.score.weight.requires_grad and not model.model.embed_tokens.weight.requires_grad
    optimizer = LiftAdamW([group, head], lr=0.1, rank=64)
    before = model.score.weight.detach().clone()
    model(input_ids=torch.arange(1, 9)[None], labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    assert (model.score.weight != before).all()


def test_rules_decide_about_a_task_head():
    model = BertForTokenClassification(BertConfig(**SIZES, num_labels=3))
    assert names(lift_param_groups(model)[1]) == ["classifier.weight", "classifier.bias"]
    assert len(lift_param_groups(model, exclude="classifier", freeze_rest=True)) == 1
    assert not model.classifier.weight.requires_grad
    group, head = lift_param_groups(model, include="query|classifier")
    assert [name.split(".")[-2] for name in names(group)] == ["query", "classifier"]
    assert names(head) == ["classifier.bias"]


def test_the_rest_of_a_language_models_head_is_pretrained():
    """BERT transforms states before it predicts words. This layer is a matrix as all others."""
    (group,) = lift_param_groups(BertForMaskedLM(BertConfig(**SIZES)))
    assert names(group)[-1] == "cls.predictions.transform.dense.weight"


def test_heads_inside_wrappers():
    """Such as DDP and torch.compile, which hide transformers' accessors."""
    model = nn.Sequential(llama(tie_word_embeddings=False))
    model[0].lm_head, model[0].out = nn.Identity(), model[0].lm_head
    model[0].get_output_embeddings = lambda: model[0].out
    assert not any("out" in name.split(".") for name in names(lift_param_groups(model)[0]))


def test_a_weight_that_a_linear_layer_and_another_module_hold():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.Linear(8, 6)
            self.matrix = layer.weight
            self.layer = layer

    assert names(lift_param_groups(Both())[0]) == ["layer.weight"]


def test_a_lazy_layer_is_named():
    with pytest.raises(ValueError, match=r"1\.weight is not initialized; run the model once"):
        lift_param_groups(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3)))


def test_weights_on_meta_are_refused_by_name():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 6))
    groups = lift_param_groups(model)
    for action in (lambda: pack_gradients(model), lambda: LiftAdamW(groups)):
        with pytest.raises(ValueError, match=r"0\.weight: the weight is on the meta device .* load the weights first"):
            action()
    assert type(model[0]) is nn.Linear


def test_one_rank_serves_small_layers_too():
    """A gate with one output among larger layers: its approximation of rank 1 is the gate."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 1), nn.Linear(1, 7))
    for make in (lambda: lift_param_groups(model), lambda: pack_gradients(model, rank=9, density=0.25)):
        of_one = LiftAdamW(make(), lr=0.1, rank=9, density=0.25)
        of_one.refresh()
        gate = list(of_one.state.values())[1]["indices"]
        assert gate.tolist() == sorted(model[1].weight[0].abs().topk(4).indices.tolist())


def test_a_new_head_for_ctc_is_trained_densely(caplog):
    """It is called lm_head, and no embedding is beside it."""
    model = HubertForCTC(
        HubertConfig(**SIZES, conv_dim=(8,), conv_stride=(2,), conv_kernel=(3,), num_conv_pos_embedding_groups=4)
    )
    (group, head), messages = said(caplog, lambda: lift_param_groups(model, freeze_rest=True))
    assert names(head) == ["lm_head.weight", "lm_head.bias"] and not any("lm_head" in name for name in names(group))
    assert messages[-1].startswith("lm_head.weight, lm_head.bias: outside the pretrained model, ")
    assert model.lm_head.weight.requires_grad


def test_a_classifier_beside_pretrained_parts_is_a_task_head():
    """Its model has no base_model of its own."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = CLIPForImageClassification(
        CLIPConfig(vision_config=vision | {"image_size": 8, "patch_size": 4}, num_labels=3)
    )
    group, head = lift_param_groups(model, freeze_rest=True)
    assert names(head) == ["classifier.weight", "classifier.bias"] and len(group["params"]) == 6
    assert model.classifier.bias.requires_grad


def test_a_convolution_of_the_name_of_a_linear_layer(caplog):
    class Conv1D(nn.Conv1d):
        pass

    model = nn.Sequential(Conv1D(8, 8, 3), nn.Flatten(), nn.Linear(16, 8))
    (group,), messages = said(caplog, lambda: pack_gradients(model, rank=2))
    assert names(group) == ["2.values"] and "1 weights of convolutions" in messages[0]
