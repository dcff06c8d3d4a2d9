"""Checkpoints as other tools write them: tied tensors stored twice, links, shards, infinities."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch
from helpers.bits import BF16, FP32, bits
from helpers.files import save
from helpers.small_models import Small, assert_equal_models, tuned
from safetensors.torch import load_file, save_file
from torch import nn

from lift_kernels import apply_delta, delta_info, revert_delta, save_delta, switch_delta
from lift_kernels.delta.model_weights import fingerprint
from lift_kernels.errors import FileError

INDEX = "model.safetensors.index.json"


def weights(seed: int = 0, *aliases: str, dtype: torch.dtype = FP32) -> dict[str, torch.Tensor]:
    """An embedding, two layers of one shape, and further names of the embedding."""
    torch.manual_seed(0)
    out = {"embed": torch.randn(7, 4), "layers.0": torch.randn(4, 4), "layers.1": torch.randn(4, 4)}
    if seed:
        out["embed"][seed] += 1
        out["layers.0"][0] += seed
    return {name: tensor.to(dtype) for name, tensor in (out | {a: out["embed"].clone() for a in aliases}).items()}


def stored(path, tensors):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return path


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


ALIASES = {
    "the base alone has the alias": (("head",), ()),
    "the model alone has the alias": ((), ("head",)),
    "three aliases in the base": (("decoder.embed", "encoder.embed", "head"), ()),
    "another alias on each side": (("decoder.embed",), ("head",)),
}


@pytest.mark.parametrize("case", ALIASES)
def test_a_tied_tensor_may_be_stored_twice_on_either_side(tmp_path, case):
    """The alias gets the same change, on files and back. Fingerprints agree without and with it."""
    in_base, in_model = ALIASES[case]
    base, model = stored(tmp_path / "base", weights(0, *in_base)), stored(tmp_path / "model", weights(1, *in_model))
    info = save_delta(model, base, tmp_path / "a")
    assert (info.base, info.result) == (fingerprint(weights()), fingerprint(weights(1)))
    assert info.counts == {"embed": 4, "layers.0": 4} and info.unchanged == {"layers.1": (FP32, (4, 4))}
    for i, aliases in enumerate((in_base, in_model, ())):  # the delta fits every way of storing the base
        folder = stored(tmp_path / f"m{i}", weights(0, *aliases))
        apply_delta(folder, tmp_path / "a", tmp_path / f"applied{i}")
        assert_same(load_file(tmp_path / f"applied{i}" / "model.safetensors"), weights(1, *aliases))
        revert_delta(tmp_path / f"applied{i}", tmp_path / "a", tmp_path / f"reverted{i}")
        assert_same(load_file(tmp_path / f"reverted{i}" / "model.safetensors"), weights(0, *aliases))


class Tied(nn.Module):
    """A module of `weights` whose head is its embedding; ``first`` is first in its state dict."""

    def __init__(self, first: str = "embed") -> None:
        super().__init__()
        values = weights()
        self.order = sorted(["embed", "head"], key=lambda name: name != first)
        shared = nn.Parameter(values["embed"])
        for name in self.order:
            self.register_parameter(name, shared)
        self.layers = nn.ParameterList([values["layers.0"], values["layers.1"]])


@pytest.mark.parametrize("first", ["embed", "head"])
@pytest.mark.parametrize("names", [("embed",), ("head",), ("embed", "head")])
def test_a_module_that_ties_fits_files_under_either_name(tmp_path, first, names):
    """The delta is made of files or of a module and files, and applied to both."""

    def under(seed):
        values = weights(seed)
        shared = values.pop("embed")
        return values | {name: shared.clone() for name in names}

    base = stored(tmp_path / "base", under(0))
    save_delta(stored(tmp_path / "model", under(1)), base, tmp_path / "a")
    module = Tied(first)
    apply_delta(module, tmp_path / "a")
    assert module.head is module.embed and torch.equal(module.embed, weights(1)["embed"])
    assert torch.equal(module.layers[0], weights(1)["layers.0"])
    save_delta(module, base, tmp_path / "b")
    apply_delta(base, tmp_path / "b", tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), under(1))
    revert_delta(module, tmp_path / "a")
    assert torch.equal(module.embed, weights()["embed"])
    save_delta(tmp_path / "model", module, tmp_path / "c")
    apply_delta(base, tmp_path / "c", tmp_path / "again")
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), under(1))


def test_an_alias_goes_along_with_a_switch(tmp_path):
    for seed in (1, 2):
        save_delta(weights(seed), weights(), tmp_path / f"{seed}.delta")
    folder = stored(tmp_path / "base", weights(1, "head"))
    switch_delta(folder, tmp_path / "1.delta", tmp_path / "2.delta", tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), weights(2, "head"))


def test_a_tensor_that_repeats_none_is_no_alias(tmp_path):
    """Nor is one that repeats two tensors which change differently, or one of another dtype."""
    save_delta(weights(1), weights(), tmp_path / "a")
    other = weights(0, "head")
    other["head"][0, 0] += 1
    cast = weights() | {"head": weights()["embed"].view(torch.int32)}
    for model in (other, cast):
        folder = stored(tmp_path / str(model["head"].dtype), model)
        with pytest.raises(FileError, match="has one tensor that .* lacks, the first head"):
            apply_delta(folder, tmp_path / "a", tmp_path / "out")
        with pytest.raises(FileError, match="has one tensor that the model lacks, the first head"):
            save_delta(weights(1), folder, tmp_path / "b")
    twins = {name: torch.ones(3) for name in ("one", "two")}
    folder = stored(tmp_path / "twins", twins | {"three": torch.ones(3)})
    for one, two in ((1.0, 0.0), (5.0, 0.0)):  # at other entries, and to other values
        changed = {"one": torch.full((3,), one), "two": torch.full((3,), two)}
        save_delta(changed, twins, tmp_path / "c")
        with pytest.raises(FileError, match="the first three"):
            apply_delta(folder, tmp_path / "c", tmp_path / "out")
        with pytest.raises(FileError, match="the first three"):
            save_delta(changed, folder, tmp_path / "d")
    same = {name: torch.zeros(3) for name in twins}
    save_delta(same, folder, tmp_path / "e")  # both change alike, so it does not matter which one is meant
    apply_delta(folder, tmp_path / "e", tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), same | {"three": torch.zeros(3)})


def test_only_what_changed_must_be_finite(tmp_path):
    """Masks of infinities and a NaN that was there before are carried along."""
    extra = {
        "mask": torch.full((3, 3), float("-inf")).triu(1),
        "padding": torch.tensor([1.0, float("nan")], dtype=BF16),
        "half": torch.tensor(float("inf"), dtype=torch.float16),
    }
    info = save_delta(weights(1) | extra, weights() | extra, tmp_path / "a")
    assert info.counts == {"embed": 4, "layers.0": 4}
    base = stored(tmp_path / "base", weights() | extra)
    apply_delta(base, tmp_path / "a", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(bits(found[name]), bits(tensor)) for name, tensor in extra.items())
    beside = weights() | {"layers.1": torch.full((4, 4), float("inf"))}  # unchanged entries of a tensor that changed
    changed = beside | {"layers.1": beside["layers.1"].clone()}
    changed["layers.1"][1, 2] = 3.0
    assert save_delta(changed, beside, tmp_path / "b").counts == {"layers.1": 1}
    for dtype in (FP32, torch.float64, torch.float8_e5m2, torch.float8_e4m3fn):
        old, new = torch.ones(2, 3).to(dtype), torch.ones(2, 3)
        new[1, 1:] = torch.tensor([float("nan"), 2.0])
        with pytest.raises(
            ValueError, match="w: 1 non-finite weights among those that changed, the first at flat index 4"
        ):
            save_delta({"w": new.to(dtype)}, {"w": old}, tmp_path / "c")


def cached(tmp_path, tensors):
    """A directory as in the cache of the Hugging Face hub: links into a folder of blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1f2e"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    names = list(tensors)
    files = {f"model-{i}.safetensors": {name: tensors[name]} for i, name in enumerate(names)}
    for i, (file, content) in enumerate(files.items()):
        save_file(content, blobs / f"aa{i}")
        (snapshot / file).symlink_to(f"../../blobs/aa{i}")
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(names)}}
    for blob, (file, text) in enumerate({INDEX: json.dumps(index), "config.json": "{}"}.items()):
        (blobs / f"bb{blob}").write_text(text)
        (snapshot / file).symlink_to(f"../../blobs/bb{blob}")
    return snapshot


def test_links_of_a_hub_cache_become_files(tmp_path):
    base = cached(tmp_path, weights())
    before = {path.name: path.read_bytes() for path in (tmp_path / "blobs").iterdir()}
    for path in (tmp_path / "blobs").iterdir():
        path.chmod(0o444)  # a cache that several users share
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "template.txt").write_text("text")
    (base / "templates").symlink_to("../../extra")
    (base / "old-weights.safetensors").symlink_to("../../blobs/aa0")  # the same blob under another name
    (base / ".git").mkdir()
    (base / ".git" / "object").write_text("a copy of the weights")
    save_delta(weights(1), base, tmp_path / "a")
    apply_delta(base, tmp_path / "a", tmp_path / "out")
    assert fingerprint(tmp_path / "out") == fingerprint(weights(1))
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*"))
    shards = [f"model-{i}.safetensors" for i in range(3)]
    assert written == sorted(["config.json", INDEX, *shards, "templates", "templates/template.txt"])
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_symlink() and path.stat().st_mode & stat.S_IWUSR
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "blobs").iterdir()}


def test_a_single_file_may_be_a_link(tmp_path):
    save(Small(), tmp_path / "blob")
    (tmp_path / "base.safetensors").symlink_to("blob")
    save_delta(tuned(1), tmp_path / "base.safetensors", tmp_path / "a")
    apply_delta(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").is_symlink()
    assert fingerprint(tmp_path / "out.safetensors") == fingerprint(tuned(1))
    assert fingerprint(tmp_path / "blob") == fingerprint(Small())


def test_links_that_lead_nowhere_are_named(tmp_path):
    base = stored(tmp_path / "base", weights())
    save_delta(weights(1), base, tmp_path / "a")
    (base / "merges.txt").symlink_to("../blobs/gone")
    with pytest.raises(
        FileError, match="cannot read .*/merges.txt: No such file or directory; fetch it again or remove"
    ):
        apply_delta(base, tmp_path / "a", tmp_path / "out")
    (base / "merges.txt").unlink()
    (base / "up").symlink_to("..")
    with pytest.raises(FileError, match="/up is a link to a directory that holds it; remove the link"):
        apply_delta(base, tmp_path / "a", tmp_path / "out")
    (base / "up").unlink()
    os.rename(base / "model.safetensors", tmp_path / "moved")
    (base / "model.safetensors").symlink_to("../gone")
    with pytest.raises(FileError, match="model.safetensors: .*; it is a link to a missing file: fetch it again"):
        apply_delta(base, tmp_path / "a", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "moved"]


def sharded(folder, shards: dict[str, dict[str, torch.Tensor]], index: dict | None = None, mark: str = ""):
    for file, tensors in shards.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / file)
    weight_map = index or {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(mark + json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def split(tensors):
    return {
        "a.safetensors": {"embed": tensors["embed"]},
        "b.safetensors": {n: tensors[n] for n in ("layers.0", "layers.1")},
    }


@pytest.mark.parametrize(
    ("shards", "index", "mark"),
    [
        (split, {"embed": "a.safetensors", "layers.0": "b.safetensors"}, ""),  # layers.1 is not listed
        (split, {"embed": "b.safetensors", "layers.0": "a.safetensors"}, ""),  # listed in the wrong file
        (split, None, "\ufeff"),  # a byte-order mark
        (lambda t: {f"weights/{file}": shard for file, shard in split(t).items()}, None, ""),  # in a sub-folder
    ],
)
def test_shards_are_read_as_transformers_does(tmp_path, shards, index, mark):
    """All tensors of the files that the index lists count."""
    base = sharded(tmp_path / "base", shards(weights()), index, mark)
    save_delta(weights(1), base, tmp_path / "a")
    apply_delta(base, tmp_path / "a", tmp_path / "out")
    assert fingerprint(tmp_path / "out") == fingerprint(weights(1))
    for file, tensors in shards(weights(1)).items():
        assert_same(load_file(tmp_path / "out" / file), tensors)
    assert (tmp_path / "out" / INDEX).read_bytes() == (base / INDEX).read_bytes()


def test_a_single_file_beside_shards_is_what_transformers_loads(tmp_path):
    """The shards and their index would be outdated beside the changed file."""
    base = sharded(tmp_path / "base", split(weights(2)))
    save_file(weights(), base / "model.safetensors")
    (base / "pytorch_model.bin.index.json").write_text("{}")
    save_delta(weights(1), base, tmp_path / "a")
    apply_delta(base, tmp_path / "a", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), weights(1))


def test_what_is_wrong_with_shards_is_said(tmp_path):
    save_file(weights(), tmp_path / "outside.safetensors")
    cases = {
        "names files outside its directory": {"embed": "../outside.safetensors"},
        "outside its directory": {"embed": str(tmp_path / "outside.safetensors")},
        r"names c.safetensors, which is missing \(1 of 2 files\); fetch": {
            "x": "c.safetensors",
            "y": "a.safetensors",
        },
        "layers.0 is in .*a2.safetensors and in .*b.safetensors": {"x": "a2.safetensors", "y": "b.safetensors"},
    }
    for i, (text, index) in enumerate(cases.items()):
        base = sharded(tmp_path / f"base{i}", split(weights()) | {"a2.safetensors": {"layers.0": torch.ones(1)}}, index)
        with pytest.raises(FileError, match=text):
            save_delta(weights(1), base, tmp_path / "a")
    (base / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(FileError, match="names no files"):
        save_delta(weights(1), base, tmp_path / "a")
    (base / INDEX).unlink()
    with pytest.raises(FileError, match="holds 3 .*, no model.safetensors and no .*json; give one of the files"):
        save_delta(weights(1), base, tmp_path / "a")


def test_files_of_other_kinds_are_named(tmp_path):
    """A pointer of Git LFS is what a clone without LFS holds in place of weights."""
    contents = {
        "pointer.safetensors": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "run `git lfs pull`",
        ),
        "model.gguf": (b"GGUF" + bytes(99), "is a GGUF file; load it with transformers"),
        "renamed.safetensors": (b"PK\x03\x04" + bytes(99), "holds pickled weights"),
    }
    for name, (content, text) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileError, match=text):
            save_delta(weights(1), tmp_path / name, tmp_path / "a")
    with pytest.raises(FileError, match="cannot read owner/name: no such .*; check the path, and download"):
        save_delta(weights(1), "owner/name", tmp_path / "a")
    for name in ("model.gguf", "pytorch_model.bin"):
        folder = tmp_path / f"only-{name}"
        folder.mkdir()
        (folder / name).touch()
        with pytest.raises(FileError, match=f"no .*safetensors files, but {name}; load the model with transformers"):
            save_delta(weights(1), folder, tmp_path / "a")


def test_a_delta_says_which_tensors_did_not_change(tmp_path):
    save_delta(tuned(1), Small(), tmp_path / "a")
    assert delta_info(tmp_path / "a").unchanged == {}
    model = Small()
    with torch.no_grad():
        model.second.bias += 1
    info = save_delta(model, Small(), tmp_path / "b")
    assert info.unchanged == {"first.weight": (BF16, (30, 40)), "second.weight": (BF16, (20, 30))}
    copy = Small()
    apply_delta(copy, tmp_path / "b")
    assert_equal_models(copy, model)
