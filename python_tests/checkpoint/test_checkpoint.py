"""Checkpoint files: bit-equal contents, refused damage, and an old file that survives a crash.

Nested containers come back to the bit, and random generators continue. A damaged file is refused.
"""

from __future__ import annotations

import random
import resource

import numpy as np
import pytest
import torch
from helpers.bits import BF16, bits
from helpers.files import alter, reseal
from hypothesis import given
from hypothesis import strategies as st

from lift_kernels.checkpoint.training_state import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from lift_kernels.errors import FileError

STATE = {
    "step": 3,
    "lr": 0.1,
    "inf": float("inf"),
    "name": 'ü\n"',
    "none": None,
    "on": True,
    "betas": (0.9, [0.95, ()]),
    "state": {0: {"exp_avg": torch.arange(3.0), "dtype": torch.bfloat16}, 1: {}},
    "0": torch.tensor(2.5, dtype=BF16),
    "empty": torch.zeros(0, 3),
    "index": torch.tensor([65537], dtype=torch.int32),
    "flag": torch.tensor([True, False]),
    "transposed": torch.arange(6).reshape(2, 3).T,
}


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        equal = a.dtype == b.dtype and a.shape == b.shape
        return equal and torch.equal(bits(a) if a.is_floating_point() else a, bits(b) if b.is_floating_point() else b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a and b != b)


def test_nests_come_back_to_the_bit(tmp_path):
    save_checkpoint(tmp_path / "a", STATE)
    assert same(load_checkpoint(tmp_path / "a"), STATE)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
nests = st.recursive(
    plain,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@given(nests)
def test_any_plain_nest_comes_back(tmp_path_factory, nest):
    path = tmp_path_factory.getbasetemp() / "nest"
    save_checkpoint(path, nest)
    assert same(load_checkpoint(path), nest)


@pytest.mark.parametrize("value", [{1.5: 0}, {"a": object()}, [np.zeros(3)], {"f": len}, {"s": {1, 2}}])
def test_other_types_are_refused_and_the_old_file_stays(tmp_path, value):
    (tmp_path / "a").write_text("precious")
    with pytest.raises(TypeError, match="state"):
        save_checkpoint(tmp_path / "a", value)
    assert (tmp_path / "a").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_random_numbers_go_on(tmp_path):
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    random.gauss(0, 1), np.random.randn(3), torch.randn(3)
    save_checkpoint(tmp_path / "a", rng_state())

    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.randn(5).tolist(),
            torch.randn(5).tolist(),
            torch.randperm(9).tolist(),
        )

    expected = draw()
    torch.manual_seed(7), random.seed(8), np.random.seed(9)
    assert draw() != expected
    set_rng_state(load_checkpoint(tmp_path / "a"))
    assert draw() == expected


def test_two_hundred_altered_checkpoints_are_refused_or_load_exactly(tmp_path):
    save_checkpoint(tmp_path / "a", STATE)
    raw, rng, refused = (tmp_path / "a").read_bytes(), random.Random(0), 0
    for _ in range(200):
        (tmp_path / "a").write_bytes(altered := alter(raw, rng))
        try:
            loaded = load_checkpoint(tmp_path / "a")
        except FileError as error:
            refused += 1
            assert "\n" not in str(error) and str(tmp_path / "a") in str(error)
        else:
            assert altered == raw and same(loaded, STATE)
    assert refused > 180


@pytest.mark.parametrize(
    "tree",
    [
        "[" * 100000,
        '{"tensor": "none"}',
        '{"tensor": 3}',
        '{"dict": 3}',
        '{"dict": [[1.5, 2]]}',
        '{"dtype": "nn"}',
        '{"dtype": 4}',
        '{"pickle": "x"}',
        "{}",
        "{",
        '{"tuple": null}',
    ],
)
def test_forged_trees_are_refused(tmp_path, tree):
    save_checkpoint(tmp_path / "a", STATE)
    reseal(tmp_path / "a", lambda header, data: header["__metadata__"].update(tree=tree))
    with pytest.raises(FileError):
        load_checkpoint(tmp_path / "a")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "a", STATE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(FileError, match="cannot write"):
            save_checkpoint(tmp_path / "a", {"w": torch.zeros(100000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(load_checkpoint(tmp_path / "a"), STATE) and len(list(tmp_path.iterdir())) == 1
