"""Forms of training: bytes of an entry, totals by hand, and the commands that run them."""

from __future__ import annotations

import shlex
from dataclasses import fields

import pytest
import torch
from helpers.planned_models import config_of

from lift_kernels.cli import build_parser
from lift_kernels.finetune.config import Settings
from lift_kernels.masks.costs import block_width
from lift_kernels.planning.commands import Run, command_of
from lift_kernels.planning.counted_pass import PassBytes
from lift_kernels.planning.forms import FINETUNE_OPTIONS, FORMS, SHARDED, TRANSFERS, kept
from lift_kernels.planning.model_shapes import Matrix, model_shapes
from lift_kernels.planning.totals import mask_scratch, total_of

FORM = {form.name: form for form in (*FORMS, *SHARDED)}
RUN = Run("my model", "bfloat16", 2, 512, 4, 1, {}, None)


@pytest.fixture(scope="module")
def shapes():
    return model_shapes(config_of("llama"))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("LIFT", 20),
        ("LIFT, bf16 moments", 16),
        ("LIFT, 8-bit moments", 14.25),
        ("LIFT, 8-bit, split, bf16 grads", 10.25),
        ("LIFT, offloaded state", 8),
        ("LIFT, dense gradients", 16),
        ("LIFT, dense, bf16 state", 8),
    ],
)
def test_bytes_of_an_entry(shapes, name, expected):
    """Packed gradients count; segments of an arena are padded to 64 entries."""
    form, entries = FORM[name], sum(m.padded for m in shapes.matrices)
    assert all(m.padded % 64 == 0 and 0 <= m.padded - m.k < 64 for m in shapes.matrices)
    gradient = {"float32": 4, "bfloat16": 2}[form.grad_dtype] if form.kind == "packed" else 0
    found = kept(form, shapes, 8 * shapes.entries, 4 * shapes.entries, None)
    assert found.device / entries + gradient == pytest.approx(expected, rel=1e-6)
    assert found.host / entries == (12 if form.offload else 0)


def test_bytes_of_other_forms(shapes):
    n = shapes.parameters
    assert kept(FORM["full, AdamW"], shapes, 0, 2 * n, None).device == 4 * n  # moments in bf16
    assert kept(FORM["full, fp32 state and masters"], shapes, 0, 2 * n, None).device == 12 * n
    assert kept(FORM["full, 8-bit AdamW"], shapes, 0, 2 * n, None).device == pytest.approx(2.03125 * n)
    lora = kept(FORM["LoRA, rank 16"], shapes, 400, 400, None)
    assert (lora.values, lora.indices, lora.moments) == (400, 0, 800)
    shira = kept(FORM["SHiRA"], shapes, 1200, 400, None)
    assert (shira.values, shira.indices, shira.moments) == (400, 800, 800)


def test_fp32_weights_are_their_own_masters():
    whole = model_shapes(config_of("llama"), dtype=torch.float32)
    entries = sum(m.padded for m in whole.matrices)
    assert kept(FORM["LIFT, dense gradients"], whole, 0, 0, None).masters == 0
    assert kept(FORM["LIFT"], whole, 0, 0, None).values == 4 * entries


def test_experts_have_masters_in_place_of_values():
    shapes = model_shapes(config_of("mixture"))
    stacks = sum(m.padded for m in shapes.matrices if m.count > 1)
    linear = sum(m.padded for m in shapes.matrices if m.count == 1)
    found = kept(FORM["LIFT"], shapes, 0, 0, None)
    assert (found.values, found.masters) == (4 * linear, 4 * stacks) and min(linear, stacks) > 0


def test_bases_where_the_iteration_is_chosen(shapes):
    assert kept(FORM["LIFT"], shapes, 0, 0, "device").bases == 0  # sides of 256 are factored exactly
    wide = model_shapes(config_of("llama"), rank=16)
    object.__setattr__(wide, "matrices", (Matrix("w", torch.Size([4096, 14336]), 3, 64, 1000),))
    size = 3 * 2 * 4096 * block_width((4096, 14336), 64, warm=True)
    assert size == 3 * 2 * 4096 * 96
    on_device, on_host, nowhere = (kept(FORM["LIFT"], wide, 0, 0, where) for where in ("device", "cpu", None))
    assert (on_device.bases, on_device.host) == (size, 0)
    assert (on_host.bases, on_host.host) == (0, size)
    assert (nowhere.bases, nowhere.host) == (0, 0)


def test_the_peak_by_hand(shapes):
    """Activations and gradients, or the scratch of masks, whichever is more.

    A refresh drops packed gradients first. Dense ones stay.
    """
    counted = PassBytes(8 * shapes.entries, 4 * shapes.entries, 10**9, 10**9 + 5, 10**9 + 3)
    form = FORM["LIFT"]
    total = total_of(form, shapes, counted)
    assert total.peak == shapes.weight_bytes + total.kept.device + 10**9 + 5
    small = PassBytes(8 * shapes.entries, 4 * shapes.entries, 1, 4 * shapes.entries + 1, 2)
    scratch = mask_scratch(shapes, "cuda")
    assert total_of(form, shapes, small).peak == total.peak - 10**9 - 5 + scratch
    dense = total_of(FORM["LIFT, dense gradients"], shapes, small)
    assert dense.peak == shapes.weight_bytes + dense.kept.device + 4 * shapes.entries + scratch
    assert 0 < scratch - mask_scratch(shapes, "cuda", 2**20) < scratch, "a small GPU makes fewer masks together"
    assert total_of(form, shapes, small, refreshes=False).peak == total.peak - 10**9 - 4 + 4 * shapes.entries
    lean = FORM["LIFT, 8-bit, split, bf16 grads"]
    least = total_of(lean, shapes, counted)
    assert least.gradients == 2 * shapes.entries
    assert least.peak == shapes.weight_bytes + least.kept.device + 10**9 + 3
    away = total_of(FORM["LIFT, offloaded state"], shapes, counted)
    assert away.peak == shapes.weight_bytes + away.kept.device + TRANSFERS + 10**9 + 5
    replicas = total_of(form, shapes, counted, gpus=4)
    assert replicas.peak == total.peak + 4 * shapes.entries  # buffers of averages


def test_a_sharded_form_divides_what_it_keeps(shapes):
    counted = PassBytes(0, 8000, 10**6, 10**6, 10**6)
    whole, parts = FORM["LIFT, dense gradients"], FORM["LIFT, dense gradients, sharded"]
    one, four = total_of(whole, shapes, counted), total_of(parts, shapes, counted, gpus=4)
    assert (four.weights, four.gradients, four.kept.moments) == (
        one.weights // 4,
        one.gradients // 4,
        one.kept.moments // 4,
    )
    layer = sum(p.nbytes for p in shapes.model.model.layers[0].parameters())
    root = sum(p.nbytes for p in shapes.model.parameters()) - 7 * layer
    assert four.scratch == root + 3 * layer


def test_options_of_finetune_are_known():
    """Who gives the command an option of these forms adds it to FINETUNE_OPTIONS."""
    options = {name for form in FORMS for name in form.options}
    assert options == {"state_dtype", "master", "grad_dtype", "offload"}
    assert FINETUNE_OPTIONS == options & {field.name for field in fields(Settings)}


@pytest.mark.parametrize("form", [form for form in FORMS if form.finetune], ids=lambda form: form.name)
@pytest.mark.parametrize("gpus", [1, 2])
def test_commands_of_finetune_parse(form, gpus):
    run = Run("my model", "bfloat16", 2, 512, 4, gpus, {"density": 0.1, "rank": 32}, None)
    words = shlex.split(command_of(form, run, checkpointing=True))
    given = vars(build_parser().parse_args(words[words.index("lift_kernels") + 1 :]))
    assert (given["model"], given["batch_size"], given["accumulation"]) == ("my model", 8 * gpus, 4)
    assert (given["max_length"], given["checkpointing"], given["dtype"]) == (512, True, "bfloat16")
    assert given["parallel"] == ("ddp" if gpus > 1 else None)
    assert (given["density"], given["rank"]) == ((0.1, 32) if form.lift else (None, None))
    method = given["method"] or "lift"
    assert method == {"dense": "lift", "packed": "lift"}.get(form.kind, form.kind)
    assert given["gradients"] == ("dense" if form.kind == "dense" else None)


def test_other_commands():
    assert "not supported yet" in command_of(FORM["LIFT, dense gradients, sharded"], RUN, False)
    based = Run("m", "bfloat16", 1, 512, 1, 1, {}, "cpu")
    assert command_of(FORM["LIFT, offloaded, bf16 grads"], based, True) == (
        "LiftAdamW(pack_gradients(model, freeze_rest=True, grad_dtype=torch.bfloat16), offload='cpu', "
        "warm_start='cpu'); with gradient checkpointing"
    )
    line = command_of(FORM["LIFT, 8-bit, split, bf16 grads"], RUN, False)
    assert line.endswith(" --state-dtype 8bit --master split --grad-dtype bfloat16")
    based = Run("m", "bfloat16", 1, 512, 1, 1, {"rank": 32}, "cpu")
    assert command_of(FORM["LIFT"], based, False) == (
        "LiftAdamW(pack_gradients(model, freeze_rest=True), rank=32, warm_start='cpu')"
    )
