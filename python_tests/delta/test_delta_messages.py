"""What a delta says about a model that it does not fit: names, shapes, dtypes or contents."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from helpers.architectures import save_architecture
from helpers.bits import BF16, FP32
from helpers.files import forget_unchanged, save
from helpers.small_models import Small, assert_equal_models, tuned
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from lift_kernels import LiftAdamW, apply_delta, pack_gradients, revert_delta, save_delta, switch_delta, unpack
from lift_kernels.errors import FileError
from lift_kernels.integrations.peft import import_shira


def state(seed: int = 0, dtype: torch.dtype = FP32, prefix: str = "") -> dict[str, torch.Tensor]:
    """Weights with the names of two GPT-2 layers, some of whose entries depend on the seed."""
    torch.manual_seed(0)
    names = ("h.0.mlp.weight", "h.0.ln.weight", "h.1.mlp.weight", "h.1.ln.weight")
    out = {prefix + name: torch.randn(6, 5) if "mlp" in name else torch.randn(5) for name in names}
    if seed:
        for name in (f"{prefix}h.0.mlp.weight", f"{prefix}h.1.mlp.weight"):
            out[name][seed % 6] += seed
    return {name: tensor.to(dtype) for name, tensor in out.items()}


class Bag(nn.Module):
    """A module whose state dict has the given names."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *args, **kwargs):
        return self.tensors


def message(call, *arguments, error=FileError) -> str:
    with pytest.raises(error) as raised:
        call(*arguments)
    text = str(raised.value)
    assert "\n" not in text
    return text


def made(tmp_path, prefix: str = "", dtype: torch.dtype = FP32):
    save_delta(state(1, dtype, prefix), state(0, dtype, prefix), tmp_path / "a.delta")
    return tmp_path / "a.delta"


FOREIGN = {
    "transformer.": ("by the prefix 'transformer.'", "with the class that was fine-tuned"),
    "model.language_model.": ("by the prefix 'model.language_model.'", "with the class that was fine-tuned"),
    "module.": ("by the wrapper's 'module.'", "model.module"),
    "_orig_mod.": ("by the wrapper's '_orig_mod.'", "model._orig_mod"),
    "base_model.model.": ("by an adapter of peft", "before peft wraps the model"),
}


@pytest.mark.parametrize("prefix", FOREIGN)
def test_a_prefix_of_names_is_said_with_its_way_out(tmp_path, prefix):
    """Wherever it is: in the delta or in the model, in memory or in files."""
    detail, remedy = FOREIGN[prefix]
    for own, other in (("", prefix), (prefix, "")):
        path = made(tmp_path, own)
        text = message(apply_delta, Bag(state(0, FP32, other)), path)
        assert detail in text and remedy in text
        assert f"has 4 tensors that the model lacks, the first {own}h.0.ln.weight, and 4 the other way round" in text
        save_file(state(0, FP32, other), tmp_path / "m.safetensors")
        text = message(apply_delta, tmp_path / "m.safetensors", path, tmp_path / "out")
        assert detail in text and "the first " + own in text
        assert "fingerprint" not in text and not (tmp_path / "out").exists()
        text = message(save_delta, state(1, FP32, own), tmp_path / "m.safetensors", tmp_path / "b.delta")
        assert detail in text and f"the model has 4 tensors that {tmp_path / 'm.safetensors'} lacks" in text
        assert not (tmp_path / "b.delta").exists()


def test_the_way_out_of_a_prefix_for_files_is_the_command(tmp_path):
    save_file(state(), tmp_path / "base.safetensors")
    text = message(save_delta, state(1, FP32, "transformer."), tmp_path / "base.safetensors", tmp_path / "a")
    assert "`python -m lift_kernels delta make MODEL DELTA --base BASE`" in text
    path = made(tmp_path, "transformer.")
    text = message(apply_delta, tmp_path / "base.safetensors", path, tmp_path / "out")
    assert "`python -m lift_kernels delta apply --base BASE DELTA OUTPUT`" in text
    text = message(revert_delta, tmp_path / "base.safetensors", path, tmp_path / "out")
    assert text.endswith("; save the model with the class that was fine-tuned")


def test_real_wrappers_are_named(tmp_path):
    save_delta(tuned(1), Small(), tmp_path / "a")
    compiled = torch.compile(Small())
    assert "wrapper's '_orig_mod.'" in message(apply_delta, compiled, tmp_path / "a")
    apply_delta(compiled._orig_mod, tmp_path / "a")
    assert_equal_models(compiled._orig_mod, tuned(1))
    inside = Small()
    inside.second = torch.compile(inside.second)  # the wrapper is in the middle of the names
    assert "wrapper's '_orig_mod.'" in message(apply_delta, inside, tmp_path / "a")
    assert "wrapper's 'module.'" in message(save_delta, nn.DataParallel(tuned(1)), Small(), tmp_path / "b")


def test_stacked_experts_of_another_block_are_said_with_the_way_out(tmp_path):
    """Mixtral's block of experts has one name in memory and another one in checkpoints."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=32, num_key_value_heads=1, num_local_experts=2))
    model.save_pretrained(tmp_path / "base")
    tuned_model = copy.deepcopy(model)
    with torch.no_grad():
        tuned_model.model.layers[0].mlp.experts.down_proj[1, :3] += 1
    save_delta(tuned_model, model, tmp_path / "memory.delta")
    text = message(apply_delta, tmp_path / "base", tmp_path / "memory.delta", tmp_path / "out")
    assert text.startswith("the names differ where experts are stacked: ") and ".block_sparse_moe.experts.0." in text
    assert "load the model with from_pretrained and apply the delta to it" in text


def test_stacked_experts_are_said_with_the_way_out(tmp_path):
    """transformers stacks experts in memory and stores them one by one."""
    save_architecture("qwen2_moe", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[1, :3] += 1
    model.save_pretrained(tmp_path / "tuned")
    save_delta(tmp_path / "tuned", tmp_path / "base", tmp_path / "files.delta")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    text = message(apply_delta, fresh, tmp_path / "files.delta")
    assert "experts.0.down_proj.weight, and 4 the other way round" in text
    assert "stacks experts in memory" in text and "apply_delta(folder, delta, output), and load the output" in text
    apply_delta(tmp_path / "base", tmp_path / "files.delta", tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))

    save_delta(model, fresh, tmp_path / "memory.delta")
    text = message(apply_delta, tmp_path / "base", tmp_path / "memory.delta", tmp_path / "out")
    assert "load the model with from_pretrained and apply the delta to it" in text
    apply_delta(fresh, tmp_path / "memory.delta")
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), model.parameters(), strict=True))
    text = message(save_delta, model, tmp_path / "base", tmp_path / "mixed.delta")
    assert "save the model with save_pretrained and give both directories" in text


def test_tensors_of_a_quantized_model_are_named(tmp_path):
    """bitsandbytes, GPTQ and fp8 each keep scales beside their weights."""
    path = made(tmp_path)
    for name in ("h.0.mlp.weight.absmax", "h.0.mlp.qweight", "h.0.mlp.weight_scale_inv"):
        text = message(apply_delta, Bag(state() | {name: torch.ones(3)}), path)
        assert f"the model has one tensor that the model of {path} lacks, the first {name}" in text
        assert "without quantization" in text


def test_names_come_before_shapes_and_shapes_before_dtypes(tmp_path):
    path, other = made(tmp_path), state(0, BF16)
    other["h.0.ln.weight"] = torch.zeros(7, dtype=BF16)
    other["new"] = torch.arange(3)
    assert message(apply_delta, Bag(other), path).startswith("the names differ: the model has one tensor")
    del other["new"]
    text = message(apply_delta, Bag(other), path)
    assert text.startswith("the shapes differ in 1 of 4 tensors: h.0.ln.weight is (5,) in the model of ")
    assert " and (7,) in the model; " in text
    other["h.0.ln.weight"] = torch.zeros(5, dtype=BF16)
    text = message(apply_delta, Bag(other), path)
    assert text.startswith("the dtypes differ in 4 of 4 tensors: h.0.ln.weight is torch.float32 in the model of ")
    other = {name: tensor.float() for name, tensor in other.items()}
    assert "fit, but h.0.mlp.weight holds other values" in message(apply_delta, Bag(other), path)


@pytest.mark.parametrize(("made_in", "met"), [(FP32, BF16), (BF16, FP32), (FP32, torch.float16)])
def test_dtypes_are_said_with_the_one_to_load(tmp_path, made_in, met):
    path = made(tmp_path, dtype=made_in)
    text = message(apply_delta, Bag(state(0, met)), path)
    assert f"{made_in} in the model of {path} and {met} in the model" in text
    assert f"from_pretrained(..., dtype={made_in})" in text
    save_file(state(0, met), tmp_path / "m.safetensors")
    text = message(apply_delta, tmp_path / "m.safetensors", path, tmp_path / "out")
    assert f"save the model in {made_in}" in text and "delta apply --base BASE DELTA OUTPUT`" in text
    text = message(revert_delta, tmp_path / "m.safetensors", path, tmp_path / "out")
    assert text.endswith(f"; give the model in {made_in}, as it was fine-tuned")  # no command makes it of a base
    text = message(save_delta, state(1, made_in), tmp_path / "m.safetensors", tmp_path / "b")
    assert f"is {made_in} in the model and {met} in {tmp_path}" in text
    assert "save both in one dtype, as `python -m lift_kernels delta make" in text


def test_the_dtype_of_a_counter_is_no_dtype_to_load_a_model_in(tmp_path):
    old, new = state(), state(1)
    old["steps"] = new["steps"] = torch.tensor(3)
    save_delta(new, old, tmp_path / "a")
    text = message(apply_delta, Bag(state() | {"steps": torch.tensor(3, dtype=torch.int32)}), tmp_path / "a")
    assert "steps is torch.int64 in" in text and "and torch.int32 in the model" in text
    assert "from_pretrained" not in text and "the model that the delta was made for" in text


def test_contents_are_compared_last_and_the_tensor_is_named(tmp_path):
    path = made(tmp_path)
    changed, unchanged = state(), state()
    changed["h.1.mlp.weight"][1, 0] += 1  # an entry that the delta changes
    unchanged["h.1.ln.weight"][0] += 1
    for call, model in (
        (apply_delta, changed),
        (revert_delta, state(1) | {"h.1.mlp.weight": state()["h.1.mlp.weight"]}),
    ):
        text = message(call, Bag(model), path)
        assert "names, shapes and dtypes fit, but h.1.mlp.weight holds other values in the model" in text
    text = message(apply_delta, Bag(unchanged), path)
    assert "fit, but a tensor that the delta does not change holds other values" in text
    assert "made for another base" in text and "another name" not in text
    forget_unchanged(path)
    assert "does not change holds other values, or has another name" in message(apply_delta, Bag(unchanged), path)


def test_a_delta_of_version_0_1_still_compares_the_names_that_it_has(tmp_path):
    path = forget_unchanged(made(tmp_path))
    assert "by the prefix 'transformer.'" in message(apply_delta, Bag(state(0, FP32, "transformer.")), path)
    assert "the dtypes differ in 2 of 2 tensors" in message(apply_delta, Bag(state(0, BF16)), path)
    model = Bag(state())
    apply_delta(model, path)
    assert all(torch.equal(model.tensors[name], tensor) for name, tensor in state(1).items())


def test_a_switch_says_how_the_bases_differ(tmp_path):
    paths = {}
    for key, prefix, dtype in (("a", "", FP32), ("b", "transformer.", FP32), ("c", "", BF16)):
        save_delta(state(1, dtype, prefix), state(0, dtype, prefix), paths.setdefault(key, tmp_path / key))
    save_delta(state(2), state(1), tmp_path / "d")
    model = Bag(state(1))
    for key, part in (("b", "by the prefix"), ("c", "the dtypes differ"), ("d", "different bases of the same names")):
        text = message(switch_delta, model, tmp_path / "a", tmp_path / key)
        assert part in text and text.endswith("choose deltas of one base")
    assert all(torch.equal(model.tensors[name], tensor) for name, tensor in state(1).items())


def test_ties_that_the_delta_does_not_keep_are_said(tmp_path):
    """The base stores two equal matrices, training changes one of them, and the model ties them."""
    base = {"embed.weight": torch.ones(4, 3), "head.weight": torch.ones(4, 3)}
    save_delta(base | {"head.weight": torch.full((4, 3), 2.0)}, base, tmp_path / "a")
    shared = torch.ones(4, 3)
    text = message(apply_delta, Bag({"embed.weight": shared, "head.weight": shared}), tmp_path / "a")
    assert "the model ties head.weight to embed.weight" in text and "tie_word_embeddings=False" in text
    assert torch.equal(shared, torch.ones(4, 3))


def test_models_without_plain_values_are_refused(tmp_path):
    with torch.device("meta"):
        meta = Small()
    assert "first.weight of the model is a meta tensor" in message(save_delta, meta, Small(), tmp_path / "a")
    sparse = {"w": torch.eye(3).to_sparse()}
    assert "w of the base is a Tensor of layout torch.sparse_coo" in message(
        save_delta, {"w": torch.eye(3)}, sparse, tmp_path / "a"
    )
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    text = message(save_delta, {"w": nested}, {"w": nested}, tmp_path / "a")
    assert "w of the model is a NestedTensor" in text and "without sharding, quantization" in text


def test_arguments_of_the_wrong_kind_are_refused_before_the_delta_is_read(tmp_path):
    missing = tmp_path / "none.delta"
    assert "not a dict; load a state dict into its module first" in message(
        apply_delta, state(), missing, error=TypeError
    )
    assert "a module is changed in place; leave it out" in message(
        apply_delta, Small(), missing, tmp_path, error=ValueError
    )
    assert "is not changed in place; give an output" in message(apply_delta, tmp_path, missing)
    base = save(Small(), tmp_path / "base.safetensors")
    text = message(apply_delta, Small(), base)
    assert (
        "is not a delta file" in text
        and "give one that save_delta or `python -m lift_kernels delta make` wrote" in text
    )


def test_a_packed_model_takes_a_delta_and_trains_on_from_it(tmp_path):
    """Its masters follow, as after any write from outside."""
    torch.manual_seed(0)
    base, packed, plain = (nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8)).to(BF16) for _ in range(3))
    packed.load_state_dict(base.state_dict())
    plain.load_state_dict(base.state_dict())
    with torch.no_grad():
        plain[0].weight[:, ::3] += 1
    save_delta(plain, base, tmp_path / "a")
    optimizer = LiftAdamW(pack_gradients(packed, density=0.2, rank=4, freeze_rest=True), lr=0.0, rank=4, density=0.2)
    for _ in range(2):
        packed(torch.ones(2, 16, dtype=BF16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if torch.equal(packed[0].weight, base[0].weight):
            apply_delta(packed, tmp_path / "a")
            assert torch.equal(packed[0].weight, plain[0].weight)
    unpack(packed)
    assert_equal_models(packed, plain)
    revert_delta(packed, tmp_path / "a")
    assert_equal_models(packed, base)


def test_a_shira_adapter_names_what_its_base_lacks(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(b'\xef\xbb\xbf{"peft_type": "SHIRA", "r": 1}')  # a byte-order mark
    stem = "base_model.model.transformer.h.0.mlp"
    parts = {"shira_indices": torch.tensor([[0], [0]]), "shira_weight": torch.ones(1)}
    save_file({f"{stem}.{key}": part for key, part in parts.items()}, folder / "adapter_model.safetensors")
    info = import_shira(folder, state(0, FP32, "transformer."), tmp_path / "a")
    assert info.counts == {"transformer.h.0.mlp.weight": 1}
    text = message(import_shira, folder, state(), tmp_path / "b")
    assert "by the prefix 'transformer.'" in text and "the class that the adapter was trained on" in text
    save_file({f"{stem}.lora_A.weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    assert "which is no part of a SHiRA adapter" in message(import_shira, folder, state(), tmp_path / "b")
    text = message(save_delta, folder, state(), tmp_path / "b")
    assert "by an adapter of peft" in text and re.search(r"merge_and_unload.*import_shira", text)
