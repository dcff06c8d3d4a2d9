"""The new user's path in the README is run as it stands there; deltas of the main job, whatever
form its base has.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from helpers import BF16, bits
from safetensors.torch import load_file
from test_finetune import write_gguf
from tiny_llama import save_tiny
from transformers import AutoModelForCausalLM

from lift_kernels import delta_info
from lift_kernels.cli import main
from lift_kernels.finetune import word_problems

ROOT = Path(__file__).parents[1]


def blocks(heading: str) -> list[str]:
    """The code blocks below a heading of the README."""
    section = re.search(rf"^## {heading}\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert section is not None
    return re.findall(r"^```\w+\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)


def write_jsonl(path: Path, count: int = 40) -> None:
    rows = [{"question": p.question, "answer": p.answer} for p in word_problems.generate(count, "train", seed=9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_new_users_path(tmp_path, monkeypatch, capsys):
    """Every line, in an empty directory with the user's own model and data; pip only plans the
    installation.
    """
    shell, python = blocks("From your data to a small file")
    save_tiny(tmp_path / "my-model")
    write_jsonl(tmp_path / "my.jsonl")
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in shell.splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["pip", "install"]:
            words = [ROOT.as_posix() if word.startswith(".") else word for word in words[2:]]
            command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "-q", *words]
            subprocess.run(command, check=True, capture_output=True)
        elif words:
            assert words[:3] == ["python", "-m", "lift_kernels"], line
            assert main(words[3:]) == 0, line
        ran += words[:1]
    assert ran.count("python") == 5
    assert "entries changed" in capsys.readouterr().out
    names: dict = {}
    exec(python, names)  # noqa: S102  the README's own lines
    expected = AutoModelForCausalLM.from_pretrained("runs/mine/model")
    tuned = AutoModelForCausalLM.from_pretrained("tuned")
    for (name, p), (_, q), (_, r) in zip(
        names["model"].named_parameters(), expected.named_parameters(), tuned.named_parameters()
    ):
        assert torch.equal(bits(p.detach()), bits(q.detach())) and torch.equal(q, r), name
    info = delta_info("mine.delta")
    assert info.settings["method"] == "lift" and 0 < info.entries < 0.2 * sum(p.numel() for p in expected.parameters())


def finetune_and_delta(tmp_path, model: Path, *options: str):
    """Train a few steps, make a delta against the model as it was given, and apply it; all by the
    command line.
    """
    arguments = [
        "--model",
        str(model),
        "--output",
        str(tmp_path / "runs"),
        "--name",
        "a",
        "--device",
        "cpu",
        "--steps",
        "3",
        "--eval-problems",
        "2",
        "--rank",
        "4",
        *options,
    ]
    assert main(["finetune", *arguments]) == 0
    assert main(["delta", "make", str(tmp_path / "runs/a/model"), str(tmp_path / "delta"), "--base", str(model)]) == 0
    assert main(["delta", "apply", "--base", str(model), str(tmp_path / "delta"), str(tmp_path / "tuned")]) == 0
    trained, applied = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "runs/a/model", tmp_path / "tuned")
    )
    assert trained.keys() == applied.keys()
    assert all(torch.equal(bits(trained[name]), bits(applied[name])) for name in trained)
    assert main(["delta", "revert", str(tmp_path / "tuned"), str(tmp_path / "delta"), str(tmp_path / "base")]) == 0
    info = delta_info(tmp_path / "delta")
    assert info.settings["steps"] == 3 and info.entries > 100
    return load_file(tmp_path / "base" / "model.safetensors"), info


def test_a_delta_against_a_gguf_file(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    base, info = finetune_and_delta(tmp_path, tmp_path / "tiny.gguf")
    assert all(w.dtype == torch.float32 for w in base.values())
    assert (
        main(
            ["delta", "apply", "--base", str(tmp_path / "tiny.gguf"), str(tmp_path / "delta"), str(tmp_path / "tuned")]
        )
        == 2
    )


def test_a_delta_against_a_bf16_base_that_was_trained_in_fp32(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "model")).to(BF16)
    model.save_pretrained(tmp_path / "model")
    base, info = finetune_and_delta(tmp_path, tmp_path / "model")
    assert set(info.dtypes.values()) == {torch.float32}
    assert all(torch.equal(w, model.state_dict()[name].float()) for name, w in base.items())


def test_a_delta_of_a_bf16_run_takes_at_most_ten_bytes_an_entry(tmp_path):
    model = save_tiny(tmp_path / "model", hidden_size=128, intermediate_size=256)
    AutoModelForCausalLM.from_pretrained(model).to(BF16).save_pretrained(model)
    _, info = finetune_and_delta(tmp_path, model, "--dtype", "bfloat16", "--density", "0.1", "--refresh-interval", "2")
    assert set(info.dtypes.values()) == {BF16}
    assert 8 * info.entries < info.file_bytes <= 10 * info.entries
