"""Bad input to `arena_migrate_` raises the right kind of error and changes nothing."""

from __future__ import annotations

import pytest
import torch
from helpers.bad_arguments import CHECKED, both_moments_half, meta, nothing, replaced, strided
from helpers.bits import assert_same_bits
from helpers.migrations import make_migration


def list_of(at, change):
    return replaced("new_indices", change, at)


def long_list(length):
    return lambda new: torch.arange(length, dtype=torch.int32, device=new.device)


def entry_set(tensors, at, position, value):
    def spoil(migration):
        getattr(migration, tensors)[at][position] = value

    return spoil


BAD_MIGRATIONS = {
    "weight of a wrong dtype": (replaced("weights", torch.Tensor.double, 1), {}, TypeError, "weight 1 .*float64"),
    "weights of two dtypes": (replaced("weights", torch.Tensor.half, 1), {}, TypeError, "weight 1 .*float16"),
    "weight not contiguous": (
        replaced("weights", lambda w: w.t().contiguous().t(), 1),
        {},
        ValueError,
        r"weight 1 must be contiguous.*\(1, 2\)",
    ),
    "weight sparse": (replaced("weights", torch.Tensor.to_sparse, 1), {}, ValueError, "weight 1 must be dense"),
    "weight elsewhere": (replaced("weights", meta, 1), {}, ValueError, "weight 1 is on meta, its list on"),
    "weight missing": (replaced("weights", lambda w: w[:-1]), {}, ValueError, "got 1 weights and 2 new_indices"),
    "list int64": (list_of(1, torch.Tensor.long), {}, TypeError, "new_indices 1 must be int32, got torch.int64"),
    "list strided": (list_of(1, strided), {}, ValueError, r"new_indices 1 must be a contiguous vector, got \(3,\)"),
    "list a matrix": (list_of(1, lambda t: t.view(1, 3)), {}, ValueError, r"new_indices 1 .*vector, got \(1, 3\)"),
    "list elsewhere": (list_of(1, meta), {}, ValueError, "new_indices 1 is on meta, indices on"),
    "list longer than the weight": (list_of(1, long_list(73)), {}, ValueError, "1 has 73 entries, its weight only 72"),
    "list past the arena": (list_of(0, long_list(129)), {}, IndexError, r"new_indices 0 \(128 \+ 129\) does not fit"),
    "old segment past the arena": (replaced("counts", lambda c: 999, 1), {}, IndexError, r"segment 1 \(64 \+ 999\)"),
    "offset negative": (replaced("offsets", lambda o: -1, 1), {}, IndexError, r"segment 1 \(-1 \+ 2\)"),
    "offset huge": (replaced("offsets", lambda o: 2**63 - 1, 1), {}, IndexError, "segment 1 .* does not fit"),
    "count negative": (replaced("counts", lambda c: -2, 1), {}, IndexError, r"segment 1 .*-2\)"),
    "offset missing": (replaced("offsets", lambda o: o[:-1]), {}, ValueError, "equally long, got 2, 1, 2"),
    "indices int64": (replaced("indices", torch.Tensor.long), {}, TypeError, "indices must be int32"),
    "indices strided": (replaced("indices", strided), {}, ValueError, "contiguous vector"),
    "moments fp16": (both_moments_half, {}, TypeError, "moments .*float16"),
    "moments of two dtypes": (replaced("exp_avg_sq", torch.Tensor.bfloat16), {}, TypeError, "float32 and .*bfloat16"),
    "moment too short": (replaced("exp_avg", lambda t: t[1:].clone()), {}, ValueError, "exp_avg .*256.*255"),
    "moment elsewhere": (replaced("exp_avg_sq", meta), {}, ValueError, "exp_avg_sq .*meta"),
    "moment strided": (replaced("exp_avg_sq", strided), {}, ValueError, "exp_avg_sq must be a contiguous arena"),
    "steps too short": (replaced("steps", lambda s: s[:-1]), {}, ValueError, r"steps must be float32 \(2,\).*\(1,\)"),
    "steps int": (replaced("steps", torch.Tensor.int), {}, ValueError, "steps must be .*int32"),
    "master bf16": (replaced("master", torch.Tensor.bfloat16), {}, TypeError, "master must be .*bfloat16"),
    "master too long": (replaced("master", lambda t: t.repeat(2)), {}, ValueError, "master must be a contiguous arena"),
    "births int64": (replaced("births", torch.Tensor.long), {}, TypeError, "births must be .*int64"),
    "births elsewhere": (replaced("births", meta), {}, ValueError, "births must be .*meta"),
    "backend unknown": (nothing, {"backend": "cuda"}, ValueError, "unknown backend 'cuda'; choose one of native-cpu"),
    "backend without the op": (nothing, {"backend": "native-cuda"}, RuntimeError, "cannot run arena_migrate_"),
    "index too large": (entry_set("new_indices", 1, 2, 72), CHECKED, IndexError, "new_indices 1: index 72 is out of"),
    "index negative": (entry_set("new_indices", 1, 0, -1), CHECKED, IndexError, "new_indices 1: index -1 is out of"),
    "index twice": (entry_set("new_indices", 1, 0, 9), CHECKED, ValueError, "new_indices 1: .*got 9 before 9"),
    "old list unsorted": (
        lambda migration: migration.indices[64:66].copy_(torch.tensor([9, 3])),
        CHECKED,
        ValueError,
        "matrix 1: .*got 9 before 3 at position 0",
    ),
    "segments overlap": (
        replaced("offsets", lambda o: o - 63, 0),
        CHECKED,
        ValueError,
        r"segment 0 \(65 \+ 1\) overlaps the segment that ends at 66",
    ),
    "new segments overlap": (
        list_of(1, long_list(65)),
        CHECKED,
        ValueError,
        r"segment 0 \(128 \+ 2\) overlaps the segment that ends at 129",
    ),
}


@pytest.mark.parametrize("by_default", [False, True], ids=["asked for", "by default"])
@pytest.mark.parametrize("spoil, options, error, message", BAD_MIGRATIONS.values(), ids=BAD_MIGRATIONS)
def test_arena_migrate_bad_input(backend, spoil, options, error, message, by_default):
    """By default and without gradients the call goes past the dispatcher."""
    migration = make_migration(backend, [(221, [7], [7, 8]), (72, [3, 9], [3, 9, 71])])
    migration.weights[0] = migration.weights[0].view(13, 17)
    whole = migration.copy()
    migration.__dict__.update({name: getattr(whole, name) for name in vars(whole)})
    spoil(migration)
    before = whole.state()
    options = {"backend": None if by_default else backend.name} | options
    with pytest.raises(error, match=message), torch.set_grad_enabled(not by_default):
        migration.run(**options)
    assert_same_bits(whole.state(), before)
