"""Delta files that were changed, cut or forged, and full disks.

The files are refused, and none is left half-written.
"""

from __future__ import annotations

import json
import random
import resource

import pytest
import torch
from helpers.bits import bits
from helpers.files import alter, reseal, save
from helpers.small_models import Small, assert_equal_models, tuned
from safetensors.torch import load_file, save_file

from lift_kernels import apply_delta, revert_delta, save_delta, switch_delta
from lift_kernels.checkpoint.safetensors_file import TensorFile
from lift_kernels.delta.model_weights import fingerprint
from lift_kernels.errors import FileError


def forged(header, data, name="first.weight", part="indices", at=-1, value=1200):
    """A file with an index outside the matrix and a correct checksum."""
    start, end = header[f"{name}:{part}"]["data_offsets"]
    place = range(start, end, 4)[at]
    data[place : place + 4] = value.to_bytes(4, "little", signed=True)


FORGERIES = {
    "index behind the end": lambda h, d: forged(h, d),
    "index far behind the end": lambda h, d: forged(h, d, value=2**31 - 1),
    "negative index": lambda h, d: forged(h, d, at=0, value=-1),
    "unsorted": lambda h, d: forged(h, d, at=1, value=0),
    "shape too large": lambda h, d: h["__metadata__"].update(shapes=json.dumps({"first.weight": [2**40, 2**40]})),
    "smaller shape": lambda h, d: h["__metadata__"].update(
        shapes=h["__metadata__"]["shapes"].replace("30, 40", "3, 4")
    ),
    "other shape": lambda h, d: h["__metadata__"].update(
        shapes=h["__metadata__"]["shapes"].replace("30, 40", "40, 30")
    ),
    "negative shape": lambda h, d: h["__metadata__"].update(
        shapes=h["__metadata__"]["shapes"].replace("30, 40", "-30, -40")
    ),
    "no shapes": lambda h, d: h["__metadata__"].update(shapes="[]"),
    "deep JSON": lambda h, d: h["__metadata__"].update(settings="[" * 100000),
    "no hashes": lambda h, d: h["__metadata__"].pop("hashes"),
    "unknown tensor": lambda h, d: h.update({f"x:{p}": h.pop(f"first.weight:{p}") for p in ("indices", "old", "new")}),
    "indices of another dtype": lambda h, d: h["first.weight:indices"].update(dtype="F32"),
    "values of another dtype": lambda h, d: [h[f"first.weight:{p}"].update(dtype="F16") for p in ("old", "new")],
    "no forms": lambda h, d: h["__metadata__"].update(unchanged="[]"),
    "a form without a dtype": lambda h, d: h["__metadata__"].update(unchanged='{"x": [[3]]}'),
    "a form of a malformed shape": lambda h, d: h["__metadata__"].update(unchanged='{"x": ["torch.float32", ["3"]]}'),
    "another kind": lambda h, d: h["__metadata__"].update(format="lift_kernels.checkpoint"),
    "a newer version": lambda h, d: h["__metadata__"].update(version="2"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_files_with_a_right_checksum_are_refused(tmp_path, forgery):
    save_delta(tuned(1), Small(), tmp_path / "a")
    reseal(tmp_path / "a", lambda header, data: None)
    copy = Small()
    apply_delta(copy, tmp_path / "a")
    assert_equal_models(copy, tuned(1))  # without a change the forged file loads
    reseal(tmp_path / "a", FORGERIES[forgery])
    copy = Small()
    with pytest.raises(FileError):
        apply_delta(copy, tmp_path / "a")
    assert_equal_models(copy, Small())


@pytest.mark.parametrize("forgery", ["index behind the end", "unsorted"])
def test_a_forged_delta_is_refused_before_a_switch_reverts_the_other(tmp_path, forgery):
    for seed in (1, 2):
        save_delta(tuned(seed), Small(), tmp_path / str(seed))
    reseal(tmp_path / "2", FORGERIES[forgery])
    model = tuned(1)
    with pytest.raises(FileError, match="the file is damaged: make it again"):
        switch_delta(model, tmp_path / "1", tmp_path / "2")
    assert_equal_models(model, tuned(1))


def leaves(tree, place=()):
    """The positions of all values in nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place, *(leaf for key, value in items for leaf in leaves(value, (*place, key)))][(0 if place else 1) :]


def test_three_hundred_forged_headers_are_refused_or_change_only_what_they_list(tmp_path):
    """A random value of the header, the metadata or the data is replaced.

    The checksum is correct.
    """
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
        else:  # the change touched no tensor, such as a byte of padding
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
    """A limit on file sizes stands in for a full disk: the kernel refuses to let a file grow."""
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


def test_a_model_or_settings_of_another_kind_are_named(tmp_path):
    with pytest.raises(TypeError, match="the base must be a module, a state dict, a model directory or .*, got list"):
        save_delta(tuned(1), [Small()], tmp_path / "a")
    with pytest.raises(TypeError, match="settings must hold JSON values: Object of type Small is not .*; give text"):
        save_delta(tuned(1), Small(), tmp_path / "a", {"model": Small()})
    assert not (tmp_path / "a").exists()
