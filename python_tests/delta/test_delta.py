"""Delta files: small, exact to the bit both ways, refused for another base, never half-written."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.bits import BF16, FP16, FP32, bits
from helpers.files import save
from helpers.small_models import Small, assert_equal_models, tuned
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lift_kernels import LiftAdamW, apply_delta, delta_info, lift_param_groups, revert_delta, save_delta, switch_delta
from lift_kernels.cli import main
from lift_kernels.delta.model_weights import fingerprint
from lift_kernels.errors import FileError


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_apply_and_revert_are_exact_in_memory_and_in_files(tmp_path, dtype):
    base, model = save(Small(dtype), tmp_path / "base.safetensors"), tuned(1, dtype)
    info = save_delta(model, base, tmp_path / "a.delta", {"rank": 4})
    expected = save(model, tmp_path / "tuned.safetensors")
    copy = Small(dtype)
    apply_delta(copy, tmp_path / "a.delta")
    assert_equal_models(copy, model)
    assert copy.head.weight is copy.first.weight
    revert_delta(copy, tmp_path / "a.delta")
    assert_equal_models(copy, Small(dtype))
    apply_delta(base, tmp_path / "a.delta", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == expected.read_bytes()
    revert_delta(tmp_path / "b.safetensors", tmp_path / "a.delta", tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == base.read_bytes()
    assert info.settings == {"rank": 4} and info == delta_info(tmp_path / "a.delta")


def test_a_delta_holds_the_entries_that_changed_and_nothing_else(tmp_path):
    """An entry that went from 0.0 to -0.0 counts as changed, although the numbers are equal.

    Positions are sorted int32 numbers. Stock safetensors reads the file.
    """
    base, model = Small(), tuned(2)
    with torch.no_grad():
        base.second.bias[3], model.second.bias[3] = 0.0, -0.0
    info = save_delta(model, base, tmp_path / "a.delta")
    before, after = dict(base.named_parameters()), dict(model.named_parameters())
    with safe_open(tmp_path / "a.delta", "pt") as file:
        for name, p in before.items():
            different = (bits(p.detach().flatten()) != bits(after[name].detach().flatten())).nonzero().flatten()
            indices = file.get_tensor(f"{name}:indices")
            assert indices.dtype == torch.int32 and torch.equal(indices, different.int()), name
            for part, source in (("old", before), ("new", after)):
                values = source[name].detach().flatten()[different]
                assert torch.equal(bits(file.get_tensor(f"{name}:{part}")), bits(values)), name
    assert 3 in info_indices(tmp_path / "a.delta", "second.bias")
    assert info.counts == {n: len(info_indices(tmp_path / "a.delta", n)) for n in before}
    assert (info.base, info.result) == (fingerprint(base), fingerprint(model))


def info_indices(path, name):
    return load_file(path)[f"{name}:indices"].tolist()


def test_size_is_at_most_ten_bytes_an_entry_in_bf16(tmp_path):
    """An int32 index and two bf16 values take 8 bytes; header and metadata take the rest."""
    torch.manual_seed(0)
    base = {f"layers.{i}.self_attn.q_proj.weight": torch.randn(256, 256).to(BF16) for i in range(4)}
    model = {name: torch.where(torch.rand(w.shape) < 0.05, w * 1.5, w) for name, w in base.items()}
    info = save_delta(model, base, tmp_path / "a.delta")
    assert info.entries > 12000
    assert 8 * info.entries < info.file_bytes == (tmp_path / "a.delta").stat().st_size <= 10 * info.entries


def test_a_whole_run_with_refreshes_is_in_the_delta(tmp_path):
    """Entries that left the mask at a refresh have changed too."""
    model = Small()
    optimizer = LiftAdamW(lift_param_groups(model), lr=0.05, rank=2, density=0.1, refresh_interval=2)
    for step in range(6):
        torch.manual_seed(step)
        for p in (model.first.weight, model.second.weight):
            p.grad = torch.randn(p.shape).to(BF16)
        optimizer.step()
    info = save_delta(model, Small(), tmp_path / "a.delta")
    assert info.counts["first.weight"] > optimizer.state[model.first.weight]["indices"].numel() == 120
    copy = Small()
    apply_delta(copy, tmp_path / "a.delta")
    assert_equal_models(copy, model)
    revert_delta(model, tmp_path / "a.delta")
    assert_equal_models(model, Small())


def test_switching_between_deltas_is_exact(tmp_path):
    models = {name: tuned(seed) for seed, name in enumerate("abc")}
    for name, model in models.items():
        save_delta(model, Small(), tmp_path / name)
    copy = Small()
    apply_delta(copy, tmp_path / "a")
    now = "a"
    for wanted in "bcabaccb":
        if wanted != now:
            switch_delta(copy, tmp_path / now, tmp_path / wanted)
            now = wanted
        assert_equal_models(copy, models[now])
    save(models["b"], tmp_path / "b.safetensors")
    switch_delta(tmp_path / "b.safetensors", tmp_path / "b", tmp_path / "c", tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == save(models["c"], tmp_path / "d.safetensors").read_bytes()


def test_masters_follow_an_applied_delta(tmp_path):
    """The optimizer notices a delta that is applied between two steps.

    Its old masters do not undo the delta.
    """
    save_delta(tuned(1), Small(), tmp_path / "a")
    model = Small()
    optimizer = LiftAdamW(lift_param_groups(model), lr=0.0, rank=2, density=0.5)
    for _ in range(2):
        for p in (model.first.weight, model.second.weight):
            p.grad = torch.ones_like(p)
        optimizer.step()
        if fingerprint(model) == fingerprint(Small()):
            apply_delta(model, tmp_path / "a")
    assert_equal_models(model, tuned(1))


def test_shards_and_foreign_files_of_a_directory(tmp_path):
    """Shards are patched one by one.

    Configuration files are copied. Weights in other formats are not.
    """
    base, model = Small(), tuned(3)
    folder = tmp_path / "base"
    folder.mkdir()
    names = [name for name, _ in base.named_parameters()]
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(names)}}
    for i, (name, p) in enumerate(base.named_parameters()):
        save_file({name: p.detach()}, folder / f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    for stale in ("pytorch_model.bin", "other.safetensors", "model.gguf"):
        (folder / stale).write_text("old weights")
    save_delta(model, folder, tmp_path / "a")
    assert fingerprint(folder) == fingerprint(base)
    apply_delta(folder, tmp_path / "a", tmp_path / "out")
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == sorted(["config.json", "model.safetensors.index.json", *index["weight_map"].values()])
    assert fingerprint(tmp_path / "out") == fingerprint(model)
    assert fingerprint(folder) == fingerprint(base)
    with pytest.raises(FileError, match="already exists"):
        apply_delta(folder, tmp_path / "a", tmp_path / "out")


def test_another_base_is_refused_and_unchanged(tmp_path):
    save_delta(tuned(1), Small(), tmp_path / "a")
    for other, message in ((tuned(2), "made for another base"), (tuned(1), "is already applied")):
        before = fingerprint(other)
        with pytest.raises(FileError, match=message):
            apply_delta(other, tmp_path / "a")
        assert fingerprint(other) == before
    model = Small()
    with pytest.raises(FileError, match="is not applied to the model"):
        revert_delta(model, tmp_path / "a")
    with pytest.raises(FileError, match="not what was applied"):
        revert_delta(tuned(2), tmp_path / "a")
    save_delta(tuned(4), tuned(3), tmp_path / "b")
    apply_delta(model, tmp_path / "a")
    with pytest.raises(FileError, match="different bases"):
        switch_delta(model, tmp_path / "a", tmp_path / "b")
    assert_equal_models(model, tuned(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("second.bias"), "lacks"),
        (lambda state: state.update(more=torch.zeros(2)), "lacks"),
        (lambda state: state.update({"second.bias": torch.zeros(21, dtype=BF16)}), "second.bias is"),
        (lambda state: state.update({"second.bias": torch.zeros(20)}), "one dtype"),
        (lambda state: state["second.bias"].fill_(float("nan")), "second.bias: 20 non-finite weights"),
    ],
)
def test_models_of_another_form_and_nan_are_refused(tmp_path, change, message):
    state = {name: p.detach().clone() for name, p in tuned(1).named_parameters()}
    change(state)
    (tmp_path / "a").write_text("precious")
    with pytest.raises(ValueError, match=message):
        save_delta(state, Small(), tmp_path / "a")
    assert (tmp_path / "a").read_text() == "precious" and [p.name for p in tmp_path.iterdir()] == ["a"]


def command(capsys, *arguments) -> tuple[int, str, list[str]]:
    code = main(["delta", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, [line for line in captured.err.splitlines() if line.startswith("error: ")]


def test_command_line_makes_applies_reverts_and_describes(tmp_path, capsys):
    base = save(Small(), tmp_path / "base.safetensors")
    (tmp_path / "run").mkdir()
    model = save(tuned(1), tmp_path / "run" / "model.safetensors")
    (tmp_path / "report.json").write_text(json.dumps({"settings.rank": 4, "settings.data": None, "entries": 3}))
    code, out, _ = command(capsys, "make", tmp_path / "run", tmp_path / "a", "--base", base)
    assert code == 0 and "entries changed in 3 tensors" in out
    code, out, _ = command(capsys, "info", tmp_path / "a")
    assert code == 0 and "bytes per entry" in out and "rank 4" in out and fingerprint(base)[:16] in out
    assert command(capsys, "apply", "--base", base, tmp_path / "a", tmp_path / "b.safetensors")[0] == 0
    assert (tmp_path / "b.safetensors").read_bytes() == model.read_bytes()
    assert command(capsys, "revert", tmp_path / "b.safetensors", tmp_path / "a", tmp_path / "c.safetensors")[0] == 0
    assert (tmp_path / "c.safetensors").read_bytes() == base.read_bytes()


def test_command_line_refuses_in_one_line(tmp_path, capsys):
    base, model = save(Small(), tmp_path / "base.safetensors"), save(tuned(1), tmp_path / "new.safetensors")
    save_delta(model, base, tmp_path / "a")
    (tmp_path / "junk").write_bytes(b"junk" * 100)
    (tmp_path / "cut").write_bytes((tmp_path / "a").read_bytes()[:-3])
    (tmp_path / "weights.bin").touch()
    save(tuned(2), tmp_path / "other.safetensors")
    for arguments, message in [
        (("info", tmp_path / "none"), "check the path"),
        (("info", tmp_path), "Is a directory"),
        (("info", tmp_path / "junk"), "claims a header of"),
        (("info", tmp_path / "cut"), "bytes and has"),
        (("info", base), "not a delta file"),
        (("apply", "--base", tmp_path / "other.safetensors", tmp_path / "a", tmp_path / "out"), "another base"),
        (("apply", "--base", base, tmp_path / "a", model), "already exists"),
        (("apply", "--base", base, tmp_path / "a", tmp_path / "no" / "out"), "choose another place"),
        (("make", tmp_path / "none", tmp_path / "b", "--base", base), "cannot read"),
        (("make", tmp_path / "weights.bin", tmp_path / "b", "--base", base), "pickled weights"),
        (("make", tmp_path / "junk", tmp_path / "b", "--base", base), "claims a header of"),
        (("make", model, tmp_path / "no" / "b", "--base", base), "choose another place"),
    ]:
        code, _, errors = command(capsys, *arguments)
        assert code == 2 and len(errors) == 1 and message in errors[0], (arguments, errors)
    assert not (tmp_path / "out").exists() and not (tmp_path / "b").exists()
