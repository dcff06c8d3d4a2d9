"""Delta files: exact to the bit both ways, small, refused for another base, and never half-written."""

from __future__ import annotations

import json
import random
import resource

import pytest
import torch
from file_helpers import Small, alter, assert_equal_models, reseal, save, tuned
from helpers import BF16, FP16, FP32, bits
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lift_kernels import LiftAdamW, apply_delta, delta_info, lift_param_groups, revert_delta, save_delta, switch_delta
from lift_kernels.__main__ import main
from lift_kernels.files import FileError, TensorFile
from lift_kernels.weights import fingerprint


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
    """Also an entry that went to -0.0, which equals what it was; sorted int32 positions, and stock safetensors reads it."""
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
    """An int32 index, an old and a new value are 8; header and metadata come on top."""
    torch.manual_seed(0)
    base = {f"layers.{i}.self_attn.q_proj.weight": torch.randn(256, 256).to(BF16) for i in range(4)}
    model = {name: torch.where(torch.rand(w.shape) < 0.05, w * 1.5, w) for name, w in base.items()}
    info = save_delta(model, base, tmp_path / "a.delta")
    assert info.entries > 12000
    assert 8 * info.entries < info.file_bytes == (tmp_path / "a.delta").stat().st_size <= 10 * info.entries


def test_a_whole_run_with_refreshes_is_in_the_delta(tmp_path):
    """Entries that left the mask at a refresh changed too."""
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
    """A delta applied between two steps is seen by the optimizer, whose old masters do not undo it."""
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
    """Shards are patched one by one; configuration is copied, other forms of the weights are not."""
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
    with pytest.raises(FileError, match="exists already"):
        apply_delta(folder, tmp_path / "a", tmp_path / "out")


def test_another_base_is_refused_and_unchanged(tmp_path):
    save_delta(tuned(1), Small(), tmp_path / "a")
    for other in (tuned(2), tuned(1)):  # a foreign model, and one that has the delta already
        before = fingerprint(other)
        with pytest.raises(FileError, match="made for another base"):
            apply_delta(other, tmp_path / "a")
        assert fingerprint(other) == before
    model = Small()
    with pytest.raises(FileError, match="not what was applied"):
        revert_delta(model, tmp_path / "a")
    save_delta(tuned(4), tuned(3), tmp_path / "b")
    apply_delta(model, tmp_path / "a")
    with pytest.raises(FileError, match="different bases"):
        switch_delta(model, tmp_path / "a", tmp_path / "b")
    assert_equal_models(model, tuned(1))


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: state.pop("second.bias"), "lacks"),
    (lambda state: state.update(more=torch.zeros(2)), "lacks"),
    (lambda state: state.update({"second.bias": torch.zeros(21, dtype=BF16)}), "second.bias is"),
    (lambda state: state.update({"second.bias": torch.zeros(20)}), "one dtype"),
    (lambda state: state["second.bias"].fill_(float("nan")), "second.bias: 20 non-finite weights"),
])  # fmt: skip
def test_models_of_another_form_and_nan_are_refused(tmp_path, change, message):
    state = {name: p.detach().clone() for name, p in tuned(1).named_parameters()}
    change(state)
    (tmp_path / "a").write_text("precious")
    with pytest.raises(ValueError, match=message):
        save_delta(state, Small(), tmp_path / "a")
    assert (tmp_path / "a").read_text() == "precious" and [p.name for p in tmp_path.iterdir()] == ["a"]


def forged(header, data, name="first.weight", part="indices", at=-1, value=1200):
    """An index outside the matrix, under a right checksum."""
    start, end = header[f"{name}:{part}"]["data_offsets"]
    place = range(start, end, 4)[at]
    data[place : place + 4] = value.to_bytes(4, "little", signed=True)


FORGERIES = {
    "index behind the end": lambda h, d: forged(h, d),
    "index far behind the end": lambda h, d: forged(h, d, value=2**31 - 1),
    "negative index": lambda h, d: forged(h, d, at=0, value=-1),
    "unsorted": lambda h, d: forged(h, d, at=1, value=0),
    "shape too large": lambda h, d: h["__metadata__"].update(shapes=json.dumps({"first.weight": [2**40, 2**40]})),
    "smaller shape": lambda h, d: h["__metadata__"].update(shapes=h["__metadata__"]["shapes"].replace("30, 40", "3, 4")),
    "other shape": lambda h, d: h["__metadata__"].update(shapes=h["__metadata__"]["shapes"].replace("30, 40", "40, 30")),
    "negative shape": lambda h, d: h["__metadata__"].update(shapes=h["__metadata__"]["shapes"].replace("30, 40", "-30, -40")),
    "no shapes": lambda h, d: h["__metadata__"].update(shapes="[]"),
    "deep JSON": lambda h, d: h["__metadata__"].update(settings="[" * 100000),
    "no hashes": lambda h, d: h["__metadata__"].pop("hashes"),
    "unknown tensor": lambda h, d: h.update({f"x:{p}": h.pop(f"first.weight:{p}") for p in ("indices", "old", "new")}),
    "indices of another dtype": lambda h, d: h["first.weight:indices"].update(dtype="F32"),
    "values of another dtype": lambda h, d: [h[f"first.weight:{p}"].update(dtype="F16") for p in ("old", "new")],
    "another kind": lambda h, d: h["__metadata__"].update(format="lift_kernels.checkpoint"),
    "a newer version": lambda h, d: h["__metadata__"].update(version="2"),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_files_with_a_right_checksum_are_refused(tmp_path, forgery):
    save_delta(tuned(1), Small(), tmp_path / "a")
    reseal(tmp_path / "a", lambda header, data: None)
    copy = Small()
    apply_delta(copy, tmp_path / "a")
    assert_equal_models(copy, tuned(1))  # the forger's tool itself makes files that load
    reseal(tmp_path / "a", FORGERIES[forgery])
    copy = Small()
    with pytest.raises(FileError):
        apply_delta(copy, tmp_path / "a")
    assert_equal_models(copy, Small())


def leaves(tree, place=()):
    """Places of all values in a nest of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place, *(leaf for key, value in items for leaf in leaves(value, (*place, key)))][(0 if place else 1) :]


def test_three_hundred_forged_headers_are_refused_or_change_only_what_they_list(tmp_path):
    """A random value of header or metadata is replaced, a random number of the data too, under a right checksum."""
    save_delta(tuned(1), Small(), tmp_path / "a")
    raw, rng, outcomes = (tmp_path / "a").read_bytes(), random.Random(3), []
    junk = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, "", "F64", "U8", [], {}, [[]], "30", [30], [0, 0]]

    def forge(header, data):
        metadata = header["__metadata__"]
        shapes = json.loads(metadata["shapes"])
        tree = {"header": header, "shapes": shapes}
        *way, last = rng.choice(leaves(tree))
        for key in way:
            tree = tree[key]
        if way or last != "header":
            tree[last] = rng.choice(junk)
        if isinstance(header.get("__metadata__"), dict) and "shapes" in metadata:
            metadata["shapes"] = json.dumps(shapes)
        start = 4 * rng.randrange(len(data) // 4)
        data[start : start + 4] = rng.choice([0, 1, 1199, 1200, 2**31 - 1, 2**32 - 1]).to_bytes(4, "little")
        if not isinstance(header.get("__metadata__"), dict):
            header["__metadata__"] = metadata

    for _ in range(300):
        (tmp_path / "b").write_bytes(raw)
        reseal(tmp_path / "b", forge)
        copy = Small()
        try:
            apply_delta(copy, tmp_path / "b")
        except FileError:
            outcomes.append("refused")
            assert_equal_models(copy, Small())
        else:
            outcomes.append("applied")
            listed = load_file(tmp_path / "b")
            for (name, p), q in zip(copy.named_parameters(), Small().parameters(), strict=True):
                changed = (bits(p.detach()) != bits(q.detach())).flatten().nonzero().flatten().int()
                assert torch.isin(changed, listed[f"{name}:indices"]).all()
    assert outcomes.count("refused") > 250


def test_eight_hundred_altered_deltas_are_refused_or_load_exactly(tmp_path):
    save_delta(tuned(1), Small(), tmp_path / "a")
    raw, rng = (tmp_path / "a").read_bytes(), random.Random(0)
    path, copy, refused = tmp_path / "b", Small(), 0
    for _ in range(800):
        altered = alter(raw, rng)
        path.write_bytes(altered)
        try:
            apply_delta(copy, path)
        except FileError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 400
            assert_equal_models(copy, Small())
        else:
            assert altered == raw
            assert_equal_models(copy, tuned(1))
            revert_delta(copy, path)
    assert refused > 750


def test_altered_base_files_are_refused_or_load_exactly(tmp_path):
    base = save(Small(), tmp_path / "base.safetensors")
    save_delta(tuned(1), base, tmp_path / "a")
    raw, rng = base.read_bytes(), random.Random(1)
    out = tmp_path / "out.safetensors"
    for _ in range(200):
        base.write_bytes(altered := alter(raw, rng))
        try:
            apply_delta(base, tmp_path / "a", out)
        except FileError as error:
            assert "\n" not in str(error) and not out.exists()
        else:  # what does not touch a tensor, as a byte of padding
            assert fingerprint(out) == fingerprint(tuned(1))
            out.unlink()
        assert base.read_bytes() == altered
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base.safetensors"]


def test_headers_are_bounded_before_anything_is_allocated(tmp_path):
    for length, size in ((2**63, 100), (10**9, 100), (93, 100), (0, 100), (5, 7)):
        (tmp_path / "a").write_bytes(length.to_bytes(8, "little")[: min(8, size)] + b" " * (size - 8))
        with pytest.raises(FileError, match=f"{tmp_path}/a "):
            TensorFile(tmp_path / "a")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """The kernel refuses to let any file grow beyond a limit, as a full disk would."""
    save_delta(tuned(1), Small(), tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    state = {"w": torch.zeros(200000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(FileError, match="cannot write .* a file that was there is unchanged"):
            save_delta({"w": torch.ones(200000)}, state, tmp_path / "a")
        save_file({"w": torch.zeros(10)}, tmp_path / "small.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a").read_bytes() == before
    base = tmp_path / "base.safetensors"
    save_file(state, base)
    save_delta({"w": torch.ones(200000)}, state, tmp_path / "b")
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(FileError, match="cannot write"):
            apply_delta(base, tmp_path / "b", tmp_path / "out.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "base.safetensors", "small.safetensors"]


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
    assert code == 0 and "bytes an entry" in out and "rank 4" in out and fingerprint(base)[:16] in out
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
        (("info", base), "no delta file"),
        (("apply", "--base", tmp_path / "other.safetensors", tmp_path / "a", tmp_path / "out"), "another base"),
        (("apply", "--base", base, tmp_path / "a", model), "exists already"),
        (("apply", "--base", base, tmp_path / "a", tmp_path / "no" / "out"), "choose another place"),
        (("make", tmp_path / "none", tmp_path / "b", "--base", base), "cannot read"),
        (("make", tmp_path / "weights.bin", tmp_path / "b", "--base", base), "pickled weights"),
        (("make", tmp_path / "junk", tmp_path / "b", "--base", base), "claims a header of"),
        (("make", model, tmp_path / "no" / "b", "--base", base), "choose another place"),
    ]:  # fmt: skip
        code, _, errors = command(capsys, *arguments)
        assert code == 2 and len(errors) == 1 and message in errors[0], (arguments, errors)
    assert not (tmp_path / "out").exists() and not (tmp_path / "b").exists()
