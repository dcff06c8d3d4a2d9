"""The code blocks of the documents run as written, and their links and figures are right.

Here are also deltas of fine-tuning runs, for every form of the base.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.bits import BF16, bits
from helpers.gguf import write_gguf
from helpers.tiny_llama import save_tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lift_kernels import delta_info
from lift_kernels.cli import build_parser, main
from lift_kernels.finetune import word_problems

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "bench/README.md",
    "docs/architecture.md",
    "docs/guide.md",
    "docs/numerics.md",
]


def blocks(document: str) -> list[tuple[str, str]]:
    """Language and text of the code blocks of a document, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def run_line(line: str) -> None:
    """Run a line of a shell block.

    pip only plans the installation. For make, the target must exist and the options must parse.
    """
    words = shlex.split(line, comments=True)
    if words[:2] == ["pip", "install"]:
        words = [ROOT.as_posix() if word.startswith(".") else word for word in words[2:]]
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "-q", *words]
        subprocess.run(command, check=True, capture_output=True)
    elif words[:1] == ["make"]:
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        for options in words[2:]:
            build_parser().parse_args([words[1], *shlex.split(options.removeprefix("ARGS="))])
    elif words:
        assert words[:3] == ["python", "-m", "lift_kernels"], line
        assert main(words[3:]) == 0, line


def run_blocks(document: str) -> dict:
    """Run all shell and Python blocks of a document, and return the names that these define."""
    names: dict = {"__name__": document}
    for language, text in blocks(document):
        if language == "sh":
            for line in text.splitlines():
                run_line(line)
        elif language == "python":
            exec(compile(text, document, "exec"), names)  # noqa: S102  the document's own lines
    return names


def write_jsonl(path: Path, count: int = 40) -> None:
    rows = [{"question": p.question, "answer": p.answer} for p in word_problems.generate(count, "train", seed=9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_the_new_users_path(tmp_path, monkeypatch, capsys):
    """Every code block of the README runs in an empty folder with the user's own model and data."""
    save_tiny(tmp_path / "my-model")
    write_jsonl(tmp_path / "my.jsonl")
    monkeypatch.chdir(tmp_path)
    names = run_blocks("README.md")
    assert "entries changed" in capsys.readouterr().out
    expected = AutoModelForCausalLM.from_pretrained("runs/mine/model")
    tuned = AutoModelForCausalLM.from_pretrained("tuned")
    for (name, p), (_, q), (_, r) in zip(
        names["model"].named_parameters(), expected.named_parameters(), tuned.named_parameters()
    ):
        assert torch.equal(bits(p.detach()), bits(q.detach())) and torch.equal(q, r), name
    info = delta_info("mine.delta")
    assert info.settings["method"] == "lift" and 0 < info.entries < 0.2 * sum(p.numel() for p in expected.parameters())
    assert any("lift_density" in row for row in names["trainer"].state.log_history)


def test_the_guide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks("docs/guide.md")


def test_blocks_are_in_languages_that_are_run():
    counts = {document: Counter(language for language, _ in blocks(document)) for document in DOCUMENTS}
    assert counts["README.md"].keys() == {"sh", "python", "bibtex"} and counts["README.md"]["python"] == 4
    assert counts["docs/guide.md"].keys() == {"python"}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 12 * 1024


def test_links_lead_somewhere():
    """Checked are files, and headings in them by GitHub's rule."""
    for document in DOCUMENTS:
        for link in re.findall(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)", (ROOT / document).read_text()):
            path, _, heading = link.partition("#")
            if path.startswith("http"):
                continue
            target = (ROOT / document).parent / path if path else ROOT / document
            assert target.exists(), f"{document}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
                assert heading in slugs, f"{document}: {link}"


def test_the_readmes_size_of_a_delta():
    """It is in no table. It comes from the CSV of the default job."""
    with (ROOT / "bench/results/amd-epyc-2-cores/main_job.csv").open(newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    text = " ".join((ROOT / "README.md").read_text().split())
    delta, model = (float(rows["lift"][key]) / 2**20 for key in ("delta_bytes", "model_bytes"))
    assert f"delta takes {delta:.0f} MiB, its model {model:.0f} MiB" in text


def test_the_readmes_figures_of_a_card():
    with (ROOT / "bench/results/nvidia-h200/gpu_time.csv").open(newline="") as file:
        timed = [row for row in csv.DictReader(file) if row["stage"] in ("step LLaMA-2-7B", "refresh", "training 7B")]
    rows = {row["variant"]: row for row in timed}
    text = " ".join((ROOT / "README.md").read_text().split())
    ours = [f"{kind} gradients, fp32 moments and master" for kind in ("dense bf16", "packed fp32")]
    dense, packed = (float(rows[name]["median_ms"]) for name in ours)
    assert f"{dense:.2f} ms from dense and {packed:.2f} ms from packed gradients" in text
    for state, suffix in (("bf16", ""), ("fp32", ", against fp32 AdamW")):
        ratios = [f"{float(rows[name + suffix]['ratio']):.1f}" for name in ours]
        assert all(rows[name + suffix]["baseline"] == f"AdamW fused, {state}" for name in ours)
        assert f"{' and '.join(ratios)} x {'fused AdamW ' if state == 'bf16' else ''}with {state} state" in text
    warm, cold = (float(rows[f"{start}, all matrices"]["median_ms"]) / 1e3 for start in ("warm", "cold"))
    assert f"All its masks take {warm:.2f} s warm and {cold:.2f} s cold" in text
    packed, full = rows["LIFT, packed mode"], rows["full fine-tuning, AdamW fused"]
    assert packed["baseline"] == full["variant"]
    speed, peaks = float(packed["ratio"]), [float(row["peak_gb"]) for row in (packed, full)]
    assert f"{speed:.2f} x as fast as full fine-tuning, in {peaks[0]:.1f} GB and not {peaks[1]:.1f}" in text


def test_the_parts_of_a_refresh_on_a_card():
    """Sums of the profile, and what the counted launches predict."""
    results, measured = ROOT / "bench/results", Counter()
    with (results / "nvidia-h200/refresh_profile.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            measured[row["part"]] += float(row["ms"])
    with (results / "computed/refresh_cost.csv").open(newline="") as file:
        kind = {"model": "LLaMA-2-7B, 224 matrices", "weights": "bf16", "products": "bf16", "way": "cuda ops"}
        rows = [row for row in csv.DictReader(file) if kind.items() <= row.items()]
    predicted = {row["part"]: float(row["predicted_ms"]) for row in rows}
    text = (ROOT / "bench/README.md").read_text()
    assert len(measured) == 5
    for part, ms in measured.items():
        assert f"| {part} | {ms:.0f} ms | {predicted[part]:.0f} ms |" in text


def finetune_and_delta(tmp_path, model: Path, *options: str):
    """Train a few steps, make a delta against the given model and apply it, by the command line."""
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
