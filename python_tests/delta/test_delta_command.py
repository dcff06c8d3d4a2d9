"""The command line where base and fine-tuned model are stored with other names or dtypes."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.architectures import save_architecture
from helpers.bits import BF16, FP32, bits
from helpers.tiny_llama import LAYERS, make_tokenizer, save_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lift_kernels import apply_delta, delta_info
from lift_kernels.cli import main


def run(capsys, *arguments) -> tuple[int, str, str]:
    """The exit code, standard output, and the error line."""
    code = main(["delta", *map(str, arguments)])
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (code != 0)
    return code, captured.out, "".join(errors)


def rewrite(folder, change) -> None:
    """Let ``change`` turn the tensors of a saved model into those of another tool."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def train(base, folder, dtype):
    """Save what transformers makes of the base in a dtype, with some matrices changed."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "c_proj.weight")):
                p[1, :3] += 0.5
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def assert_loads_as(folder, model):
    """Check that transformers loads the same parameters as those of a model, to the bit."""
    again = AutoModelForCausalLM.from_pretrained(folder)
    for (name, p), (_, q) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(bits(p.detach()), bits(q.detach())), name


def gpt2(folder):
    """As on the hub: names without ``transformer.``, and the causal masks as buffers."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_positions=16, n_embd=16, n_layer=2, n_head=2, eos_token_id=0, bos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    mask = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    rewrite(folder, lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()} | mask)


def in_bf16(folder):
    save_tiny(folder)
    rewrite(folder, lambda tensors: {name: tensor.to(BF16) for name, tensor in tensors.items()})


def tied_twice_in_bf16(folder):
    """A tied head that is stored twice, and in another dtype than the run's."""
    save_tiny(folder, tie_word_embeddings=True)
    rewrite(
        folder,
        lambda tensors: (
            {name: t.to(BF16) for name, t in tensors.items()}
            | {"lm_head.weight": tensors["model.embed_tokens.weight"].to(BF16)}
        ),
    )


def mixed(folder):
    """Norms in fp32 and matrices in bf16; transformers loads all in the run's dtype."""
    save_tiny(folder)
    rewrite(folder, lambda tensors: {name: t.to(FP32 if t.dim() == 1 else BF16) for name, t in tensors.items()})


@pytest.mark.parametrize(
    ("write", "dtype", "reason"),
    [
        (gpt2, FP32, "the names differ by the prefix 'transformer.'"),
        (gpt2, BF16, "the names differ by the prefix 'transformer.'"),
        (in_bf16, FP32, f"the dtypes differ in {3 + 9 * LAYERS} of {3 + 9 * LAYERS} tensors"),
        (in_bf16, torch.float16, "the dtypes differ in"),
        (tied_twice_in_bf16, FP32, "the dtypes differ in"),
        (mixed, BF16, f"the dtypes differ in {1 + 2 * LAYERS} of {3 + 9 * LAYERS} tensors"),
    ],
)
def test_a_base_that_is_stored_in_another_way_is_loaded_first(tmp_path, capsys, write, dtype, reason):
    """The command says why, and leaves nothing behind."""
    write(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = train(tmp_path / "base", tmp_path / "model", dtype)
    code, out, _ = run(capsys, "make", tmp_path / "model", tmp_path / "a", "--base", tmp_path / "base")
    assert code == 0 and f"{tmp_path / 'base'} is loaded with transformers in {dtype}, because {reason}" in out
    info = delta_info(tmp_path / "a")
    assert set(info.dtypes.values()) == {dtype} and set(info.counts.values()) == {3}
    code, out, _ = run(capsys, "apply", "--base", tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert code == 0 and f"because {reason.partition(' in ')[0]}" in out
    assert_loads_as(tmp_path / "out", model)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == info.forms.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "model", "out"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    apply_delta(loaded, tmp_path / "a")  # the README's lines, with the dtype of the run
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


def experts(folder):
    save_architecture("qwen2_moe", folder)


def tied_twice(folder):
    save_tiny(folder, tie_word_embeddings=True)
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})


@pytest.mark.parametrize("write", [experts, tied_twice])
def test_a_base_of_the_same_names_and_dtypes_is_read_as_it_is(tmp_path, capsys, write):
    """So it needs no tokenizer, and a second name of a tied tensor stays."""
    write(tmp_path / "base")
    model = train(tmp_path / "base", tmp_path / "model", FP32)
    for path in (tmp_path / "base").glob("tokenizer*"):
        path.unlink()
    code, out, _ = run(capsys, "make", tmp_path / "model", tmp_path / "a", "--base", tmp_path / "base")
    assert code == 0 and "loaded" not in out
    code, out, _ = run(capsys, "apply", "--base", tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert code == 0 and "loaded" not in out
    stored, base = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
    assert stored.keys() == base.keys()
    assert_loads_as(tmp_path / "out", model)


def test_what_does_not_fit_after_loading_is_said_of_the_base(tmp_path, capsys):
    """No message names the temporary directory."""
    in_bf16(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    train(tmp_path / "base", tmp_path / "model", FP32)
    other = tmp_path / "other"
    in_bf16(other)
    rewrite(other, lambda tensors: tensors | {"model.norm.weight": torch.full((32,), 2.0, dtype=BF16)})
    make_tokenizer().save_pretrained(other)
    assert run(capsys, "make", tmp_path / "model", tmp_path / "a", "--base", tmp_path / "base")[0] == 0
    code, _, error = run(capsys, "apply", "--base", other, tmp_path / "a", tmp_path / "out")
    assert code == 2 and "a tensor that the delta does not change holds other values in the base" in error
    assert f"{other} (safetensors)" in error and "/.out." not in error
    larger = save_tiny(tmp_path / "larger", hidden_size=64)
    code, out, error = run(capsys, "apply", "--base", larger, tmp_path / "a", tmp_path / "out")
    assert code == 2 and "the shapes differ in" in error and "loaded" not in out  # loading would not help
    code, _, error = run(capsys, "apply", "--base", tmp_path / "base", tmp_path / "a", tmp_path / "none" / "out")
    assert code == 2 and f"cannot save the base beside {tmp_path / 'none' / 'out'}" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "larger", "model", "other"]


def test_a_base_without_configuration_cannot_be_loaded_and_the_names_are_said(tmp_path, capsys):
    gpt2(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    train(tmp_path / "base", tmp_path / "model", FP32)
    (tmp_path / "base" / "config.json").unlink()
    for base in (tmp_path / "base", tmp_path / "base" / "model.safetensors"):
        code, _, error = run(capsys, "make", tmp_path / "model", tmp_path / "a", "--base", base)
        assert code == 2 and "by the prefix 'transformer.'" in error


def test_a_missing_package_is_named_with_a_command_that_works(capsys, monkeypatch):
    """No index has lift_kernels itself."""

    def lacks(*arguments):
        raise ModuleNotFoundError("No module named 'peft.tuners'", name="peft.tuners")

    monkeypatch.setattr("lift_kernels.delta.delta_info", lacks)
    code, _, error = run(capsys, "info", "a.delta")
    assert code == 2 and "the package peft is missing; run `pip install peft`" in error
    assert "`pip install --no-build-isolation '.[finetune]'` in a clone" in error


def test_settings_of_a_run_come_from_its_report(tmp_path, capsys):
    save_tiny(tmp_path / "base")
    train(tmp_path / "base", tmp_path / "run" / "model", FP32)
    report = {"settings.data": "naïve.jsonl", "entries": 3}
    (tmp_path / "run" / "report.json").write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")
    code, out, _ = run(capsys, "make", tmp_path / "run" / "model", tmp_path / "a", "--base", tmp_path / "base")
    assert code == 0 and "data naïve.jsonl" in out and delta_info(tmp_path / "a").settings == {"data": "naïve.jsonl"}
