"""The command `plan` and `plan_memory`: folders, GGUF files, what fits, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers.gguf import write_gguf
from helpers.planned_models import config_of

import lift_kernels
from lift_kernels.cli import main
from lift_kernels.errors import UserError
from lift_kernels.planning import plan, plan_memory
from lift_kernels.planning.counted_pass import PassBytes
from lift_kernels.planning.forms import FORMS, SHARDED
from lift_kernels.planning.model_shapes import read_config
from lift_kernels.planning.plan import bytes_of, usable
from lift_kernels.planning.plan_text import gpu_for, refusal

MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that holds a configuration and nothing else."""
    path = tmp_path_factory.mktemp("llama")
    config_of("llama").save_pretrained(path)
    assert [file.name for file in path.iterdir()] == ["config.json"]
    return path


@pytest.fixture
def counted(monkeypatch):
    """Passes that take 900 MiB without checkpointing and 100 MiB with it; gradients by kind."""

    def count(shapes, kind, *, checkpointing, **options):
        gradients = {"full": 2 * shapes.parameters, "packed": 4 * shapes.entries}.get(kind, 1000)
        activations = (100 if checkpointing else 900) * MIB
        return PassBytes(2 * gradients, gradients, activations, activations + gradients, activations + gradients // 2)

    monkeypatch.setattr(plan, "count_pass", count)


@pytest.mark.slow
def test_a_plan_of_a_folder(folder, capsys):
    """The whole way, with passes that are really counted."""
    assert main(["plan", str(folder), "--gpu-memory", "24GiB", "--seq", "64"]) == 0
    said = capsys.readouterr().out
    shapes = plan.model_shapes(str(folder))
    assert f"{shapes.parameters:,} weights in bfloat16; LIFT trains {shapes.entries:,} entries" in said
    assert all(form.name in said for form in FORMS) and "sharded" not in said
    assert f"python -m lift_kernels finetune --model {folder} --data my.jsonl" in said
    assert "not measured" in said and "a + b x layers" in said


def test_json_has_the_numbers_of_the_function(folder, capsys, counted):
    assert main(["plan", str(folder), "--gpu-memory", "24GiB", "--json", "--gpus", "2", "--batch", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = plan_memory(str(folder), gpu_memory="24GiB", gpus=2, batch=3)
    assert found == json.loads(json.dumps(expected.as_dict()))
    assert (found["gpus"], found["batch"], found["seq"], found["gpu_memory"]) == (2, 3, 2048, 24 * 2**30)
    assert [row["form"] for row in found["rows"]] == [form.name for form in (*FORMS, *SHARDED)]
    row = next(row for row in found["rows"] if row["form"] == "LIFT")
    kept = sum(row[part] for part in ("weights", "values", "indices", "moments", "masters", "bases"))
    assert row["total"] == kept + 900 * MIB + 2 * row["gradients"]  # averages have buffers
    assert row["total"] - row["total_checkpointed"] == 800 * MIB


def test_a_plan_of_a_gguf_file(tmp_path, counted):
    write_gguf(tmp_path / "tiny.gguf")
    for name in (tmp_path, tmp_path / "tiny.gguf"):
        found = plan_memory(str(name))
        assert found.parameters > 10_000 and found.rows[0].weights >= 2 * found.parameters
    assert found.rows[0].fits == "" and found.best.form == "LIFT"


def test_what_fits_and_what_comes_nearest(folder, counted):
    """The first form that fits is named; where none does, the nearest one with its bytes."""
    shapes = plan.model_shapes(str(folder))
    rich = plan_memory(str(folder), gpu_memory="3GiB")
    assert rich.best.form == "LIFT" and rich.best.fits == "yes" and refusal(rich) is None
    assert usable(3 * 2**30) > rich.best.total > usable(3 * 2**29)
    saving = plan_memory(str(folder), gpu_memory="1.5GiB")
    assert saving.best.fits == "with checkpointing" and saving.best.command.count("--checkpointing") == 1
    poor = plan_memory(str(folder), gpu_memory="1GiB")
    assert poor.best is None and all(row.fits == "no" for row in poor.rows)
    near = min(poor.rows, key=lambda row: row.least)
    assert near.form == poor.smallest.form
    needed = gpu_for(near.least)
    assert usable(needed * 2**30) >= near.least > usable((needed - 1) * 2**30)
    assert refusal(poor) == (
        f"{folder} does not fit into 1.00 GiB, of which a plan fills {usable(2**30) / 2**30:.2f}; the nearest form is "
        f"{near.form} with checkpointing, {near.least / 2**30:.2f} GiB, for a GPU of {needed} GiB or more"
    )
    assert shapes.name == str(folder)


def test_where_lift_does_not_fit_another_form_is_named(folder, counted, monkeypatch):
    monkeypatch.setattr(plan, "usable", lambda memory: memory)
    found = plan_memory(str(folder))
    lora = next(row for row in found.rows if row.form.startswith("LoRA"))
    assert lora.least < min(row.least for row in found.rows if row.lift)
    tight = plan_memory(str(folder), gpu_memory=lora.least)
    assert tight.best.form == lora.form and "no form of LIFT fits at these numbers" in str(tight)
    assert "--method lora" in str(tight)


def test_sharded_forms_are_said_not_to_run(folder, counted):
    found = plan_memory(str(folder), gpus=8)
    rows = [row for row in found.rows if row.form.endswith("sharded")]
    assert len(rows) == len(SHARDED) and not any(row.runs for row in rows)
    assert {row.command for row in rows} == {"computed; sharded weights are not supported yet"}
    assert "torchrun --nproc-per-node 8 -m lift_kernels finetune" in found.best.command


def test_split_masters_are_for_bf16(folder, counted):
    names = {row.form for row in plan_memory(str(folder), dtype=torch.float32).rows}
    assert names == {form.name for form in FORMS if form.master != "split"}


def refused(capsys, *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_bad_input_is_one_line(folder, tmp_path, capsys, counted):
    assert "neither an existing directory or file nor a hub id" in refused(capsys, "/no/such/model")
    assert "is not a GGUF file" in refused(capsys, str(folder / "config.json"))
    assert "has no config.json and 0 GGUF files" in refused(capsys, str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert f"cannot read the configuration of {tmp_path}" in refused(capsys, str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    assert "no causal language model" in refused(capsys, str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}')
    assert "is quantized" in refused(capsys, str(tmp_path))
    assert "24 is no size of memory" in refused(capsys, str(folder), "--gpu-memory", "24")
    assert "gpus is 0" in refused(capsys, str(folder), "--gpus", "0")
    assert "unknown dtype 'int8'" in refused(capsys, str(folder), "--dtype", "int8")
    assert "warm_start is 'disk'" in refused(capsys, str(folder), "--warm-start", "disk")
    assert "density must be in (0, 1], got 2.0" in refused(capsys, str(folder), "--density", "2")
    assert "does not fit into 1.00 GiB" in refused(capsys, str(folder), "--gpu-memory", "1GiB")


def test_a_name_on_the_hub_that_cannot_be_read(monkeypatch):
    import transformers

    def offline(name, **options):
        raise OSError("We couldn't connect to 'https://huggingface.co'. More words")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(UserError, match="owner/name: We couldn't connect .*so check the name and the network"):
        read_config("owner/name")


@pytest.mark.parametrize(
    "text, expected",
    [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("1.5 GiB", 3 * 2**29), ("500MiB", 500 * 2**20), (123, 123)],
)
def test_sizes(text, expected):
    assert bytes_of(text) == expected


@pytest.mark.parametrize("text", ["24", "", "GiB", "0GiB", "-1GiB", "24 gib", 0])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="no size of memory"):
        bytes_of(text)


def test_the_package_imports_without_planning():
    assert lift_kernels.plan_memory is plan_memory and "plan_memory" in dir(lift_kernels)
    code = "import sys, lift_kernels; assert 'lift_kernels.planning' not in sys.modules; lift_kernels.plan_memory; "
    code += "assert 'lift_kernels.planning' in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
