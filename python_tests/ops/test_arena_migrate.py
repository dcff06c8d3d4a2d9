"""Migration of many matrices to new lists on every backend, entry by entry.

Every case is compared with a lookup of each entry in a dictionary, over the whole arenas: gaps,
padding and other segments must keep their bits.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.bits import BF16, FP16, FP32, LAST, assert_same_bits, bits, random_indices
from helpers.migrations import make_migration

from lift_kernels import ops


def shuffled(numel, count, seed):
    return random_indices(numel, count, torch.Generator().manual_seed(seed)).tolist()


def similar(numel, count, seed):
    """Two lists of ``count`` entries that share about three quarters."""
    old = shuffled(numel, count, seed)
    stays = set(old[::4] + old[1::4] + old[2::4])
    others = [index for index in shuffled(numel, numel, seed + 1) if index not in set(old)]
    chosen = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[: count - len(stays)].tolist()
    return old, sorted(stays | {others[at] for at in chosen})


def migrate_and_check(backend, migration, **options):
    expected, kept = migration.expected()
    inputs = migration.inputs()
    found = migration.run(backend.name, **options)
    assert_same_bits(migration.state(), expected)
    assert_same_bits(migration.inputs(), inputs)
    assert found.dtype == torch.int64 and found.device == migration.indices.device and found.tolist() == kept


EDGES = {
    "entering, leaving, staying": ([1, 5, 9, 12], [0, 5, 7, 12, 20]),
    "identical": ([3, 4, 8], [3, 4, 8]),
    "disjoint, interleaved": ([1, 3, 5], [0, 2, 4, 6]),
    "disjoint, all below": ([20, 21], [1, 2, 3]),
    "disjoint, all above": ([1, 2, 3], [20, 21]),
    "subset": ([0, 1, 2, 3, 4], [1, 3]),
    "superset": ([1, 3], [0, 1, 2, 3, 4]),
    "empty old": ([], [0, 7]),
    "empty new": ([0, 7], []),
    "both empty": ([], []),
    "one of one": ([6], [6]),
    "one, another": ([6], [5]),
    "first of two": ([6, 9], [6]),
    "last of two": ([6, 9], [9]),
    "all of the matrix": (list(range(22)), list(range(22))),
    "all from one": ([21], list(range(22))),
}


@pytest.mark.parametrize("aligned", [False, True], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("moment", [FP32, BF16], ids=["fp32", "bf16"])
def test_arena_migrate_edges(backend, moment, aligned):
    """All edge cases as the matrices of one arena, and each alone."""
    lists = [(22, *pair) for pair in EDGES.values()]
    migrate_and_check(backend, make_migration(backend, lists, moment=moment, aligned=aligned))
    for one in lists:
        migrate_and_check(backend, make_migration(backend, [one], moment=moment, aligned=aligned))


@pytest.mark.parametrize("weight, moment", [*itertools.product((FP32, BF16, FP16), (FP32, BF16))], ids=str)
@pytest.mark.parametrize("master, births", [*itertools.product((False, True), repeat=2)], ids=str)
def test_arena_migrate_dtypes(backend, weight, moment, master, births):
    """Masters enter with the weight's exact value. NaN payloads of what stays are kept."""
    lists = [(300, *similar(300, 100, 1)), (40, [0, 9], [9, 39]), (513, *similar(513, 257, 5))]
    migration = make_migration(backend, lists, weight=weight, moment=moment, master=master, births=births)
    migrate_and_check(backend, migration)


@pytest.mark.parametrize(
    "old_count, new_count",
    [(9000, 16400), (16384, 4097), (1025, 1024), (1023, 1025), (4096, 4096), (16383, 16385), (1, 9000), (9000, 1)],
)
def test_arena_migrate_several_blocks(backend, old_count, new_count):
    """Sizes around those of blocks and chunks, beside a small matrix."""
    lists = [(40001, shuffled(40001, old_count, 2), shuffled(40001, new_count, 3)), (9, [2, 3], [3, 4])]
    migrate_and_check(backend, make_migration(backend, lists, aligned=old_count % 2 == 0))


@pytest.mark.parametrize("moment", [FP32, BF16], ids=["fp32", "bf16"])
def test_arena_migrate_across_the_ends_of_blocks(backend, moment):
    """Every staying entry moves to the next place or the one before, also to another block."""
    old = list(range(1, 36001, 2))
    for new in (old, [0, *old], old[1:], [0, *old[1:]], [*old[:-1], 36000], [1, 2, *old[1:]], old[16384:]):
        migrate_and_check(backend, make_migration(backend, [(36002, old, new)], moment=moment))


def test_arena_migrate_a_subset_of_the_matrices(backend):
    """Others keep every bit, whatever the order of the call."""
    lists = [(200, *similar(200, 80, 10 + i)) for i in range(6)]
    whole = make_migration(backend, lists)
    part = whole.copy()
    for rows in ([4, 1], [5, 0, 2], [3]):
        for name in ("weights", "new_indices", "offsets", "counts"):
            setattr(part, name, [getattr(whole, name)[row] for row in rows])
        part.steps = whole.steps[rows]
        migrate_and_check(backend, part)


def test_arena_migrate_there_and_back(backend):
    """Entries that left and come back start anew. The second call reads what the first wrote."""
    old, new = similar(5000, 1200, 4)
    migration = make_migration(backend, [(5000, old, new), (70, [1], [0, 1, 69])])
    migrate_and_check(backend, migration)
    migration.counts = [len(new), 3]
    migration.new_indices = [torch.tensor(x, dtype=torch.int32, device=backend.device) for x in (old, [1])]
    migration.steps += 5
    migrate_and_check(backend, migration)


@pytest.mark.parametrize("moment", [FP32, BF16], ids=["fp32", "bf16"])
def test_arena_migrate_is_what_packed_migrate_does(backend, moment):
    lists = [(30000, shuffled(30000, 5000, 7), shuffled(30000, 6000, 8)), (64, [5], [5, 6])]
    migration = make_migration(backend, lists, weight=BF16, moment=moment)
    expected = migration.copy()
    for i, (weight, new) in enumerate(zip(expected.weights, expected.new_indices)):
        start, count = expected.offsets[i], len(new)
        before, after = slice(start, start + expected.counts[i]), slice(start, start + count)
        entries = ops.packed_gather(weight, new, dtype=FP32, backend=backend.name)
        born = torch.full((count,), int(expected.steps[i]), dtype=torch.int32, device=backend.device)
        fills = {"exp_avg": None, "exp_avg_sq": None, "master": entries, "births": born}
        moved = {
            name: ops.packed_migrate(
                arena[before], expected.indices[before], new, fill_values=fills[name], backend=backend.name
            )
            for name, arena in expected.arenas().items()
            if name != "indices"
        }
        for name, values in (moved | {"indices": new}).items():
            bits(expected.arenas()[name])[after] = bits(values)
    migration.run(backend.name)
    assert_same_bits(migration.state(), expected.state())


def test_arena_migrate_no_matrix(backend):
    migration = make_migration(backend, [(9, [1], [2])])
    before = migration.state()
    for name in ("weights", "new_indices", "offsets", "counts"):
        setattr(migration, name, [])
    migration.steps = migration.steps[:0]
    kept = migration.run(backend.name, validate=True)
    assert kept.shape == (0,) and kept.dtype == torch.int64 and kept.device == migration.indices.device
    assert_same_bits(migration.state(), before)


def test_arena_migrate_of_parameters_and_strided_steps(backend):
    """Weights may require gradients, which they are not asked for."""
    migration = make_migration(backend, [(60, *similar(60, 20, 3)), (60, [], [7])])
    expected, _ = migration.expected()
    migration.weights = [torch.nn.Parameter(weight) for weight in migration.weights]
    migration.steps = migration.steps.repeat_interleave(2)[::2]
    assert not migration.steps.is_contiguous()
    migration.run(backend.name, validate=True)
    assert_same_bits(migration.state(), expected)


def test_arena_migrate_the_largest_index(backend):
    """The last of 2^31 - 1 bf16 entries. Only the pages that are touched take memory."""
    migration = make_migration(backend, [(64, [0, 1, 2], [0, 1, 2, 3])])
    huge = torch.empty(LAST, dtype=BF16, device=backend.device)
    huge[[LAST - 2, LAST - 1]] = torch.tensor([2.5, 3.5], dtype=BF16, device=backend.device)
    offset = migration.offsets[0]
    migration.weights = [huge]
    migration.indices[offset : offset + 3] = torch.tensor([0, 7, LAST - 1], dtype=torch.int32)
    migration.new_indices = [torch.tensor([7, LAST - 2, LAST - 1], dtype=torch.int32, device=backend.device)]
    before = bits(migration.master)[offset : offset + 4].tolist()
    assert migration.run(backend.name).tolist() == [2]
    assert bits(migration.master)[offset : offset + 4].tolist()[::2] == [before[1], before[2]]
    assert migration.master[offset + 1] == 2.5
    assert bits(migration.master)[offset + 3] == before[3], "the tail of the old segment stays"


@pytest.mark.native
def test_arena_migrate_refuses_lists_in_the_arena():
    indices = torch.tensor([1, 2, 5, 0], dtype=torch.int32)
    lists, moments = [indices[1:3]], torch.ones(4)
    arena = [torch.zeros(2, 4)], lists, indices, [0], [3], moments, moments.clone(), torch.ones(1)
    with pytest.raises(ValueError, match="new_indices 0 shares memory with the arena"):
        ops.arena_migrate_(*arena, validate=True)
    assert indices.tolist() == [1, 2, 5, 0] and moments.tolist() == [1] * 4


def test_arena_migrate_in_several_groups():
    """More entries than the scratch of the native op holds at once."""
    generator = torch.Generator().manual_seed(0)
    numel, sizes = 3_000_000, [700_000, 20_000, 400_000, 1_200_000, 5]
    old, new = ([random_indices(numel, size, generator) for size in sizes] for _ in range(2))
    results = []
    for name in ("native-cpu", "reference"):
        offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        arenas = [torch.arange(float(sum(sizes))) + i for i in range(3)]
        weights = [torch.arange(float(numel))] * len(sizes)
        indices = torch.cat(old)
        kept = ops.arena_migrate_(
            weights, new, indices, offsets, sizes, *arenas[:2], torch.ones(5), master=arenas[2], backend=name
        )
        results.append([kept, indices, *arenas])
    assert all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.interpreter
def test_arena_migrate_in_several_parts(backend, monkeypatch):
    """The Triton launcher splits matrices whose scratch would be too long."""
    if backend.name == "triton":
        from lift_kernels.ops.triton import arena_migrate

        monkeypatch.setattr(arena_migrate, "MAX_SCRATCH", 9000)
    lists = [(9000, *similar(9000, size, 20 + size)) for size in (5, 4000, 4100, 1, 4200)]
    migrate_and_check(backend, make_migration(backend, [*lists[:2], (9, [1], []), *lists[2:], (9, [], [])]))


@pytest.mark.parametrize("grad_mode", [False, True], ids=["no grad", "grad"])
def test_arena_migrate_bumps_versions(backend, grad_mode):
    """Also on the way past the dispatcher, where the op must do it itself."""
    migration = make_migration(backend, [(9, [1], [2])])
    written = migration.arenas()
    read = [*migration.weights, *migration.new_indices, migration.steps]
    versions = {name: arena._version for name, arena in written.items()}
    others = [tensor._version for tensor in read]
    with torch.set_grad_enabled(grad_mode):
        for name in (backend.name, None):
            migration.run(name)
    for name, arena in written.items():
        assert arena._version > versions[name], name
    assert [tensor._version for tensor in read] == others


def test_arena_migrate_in_inference_mode(backend):
    migration = make_migration(backend, [(60, *similar(60, 20, 3))])
    with torch.inference_mode():
        migrate_and_check(backend, migration)


@pytest.mark.native
def test_arena_migrate_compiles():
    """A compiled caller sees the writes, and fakes the result."""

    def refresh(weight, new, indices, moments, squares, steps):
        kept = torch.ops.lift_kernels.arena_migrate_([weight], [new], indices, [0], [2], moments, squares, steps)
        return kept + 1, moments * 2

    arguments = torch.arange(9.0), torch.tensor([4, 5]).int(), torch.tensor([3, 4, 0]).int()
    arenas = [[torch.tensor([1.0, 2.0, 9.0]), torch.tensor([3.0, 4.0, 9.0]), torch.ones(1)] for _ in range(2)]
    results = []
    for function, state in zip((refresh, torch.compile(refresh, backend="aot_eager", fullgraph=True)), arenas):
        indices = arguments[2].clone()
        results.append([*function(*arguments[:2], indices, *state), indices, *state])
    assert all(torch.equal(*pair) for pair in zip(*results))
    assert results[0][1].tolist() == [4.0, 0.0, 18.0] and results[0][0].tolist() == [2]


@pytest.mark.gpu
def test_arena_migrate_refuses_a_capture():
    from helpers.backends import BackendDevice

    device = BackendDevice("triton", "cuda")
    migration = make_migration(device, [(60, *similar(60, 20, 3))])
    migration.run("triton")
    before = migration.state()
    with (
        pytest.raises(RuntimeError, match="arena_migrate_ cannot be captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        migration.run("triton")
    assert_same_bits(migration.state(), before)


@pytest.mark.gpu
def test_arena_migrate_never_waits():
    from helpers.backends import BackendDevice

    migration = make_migration(BackendDevice("triton", "cuda"), [(60, *similar(60, 20, 3))] * 5)
    migration.run("triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        migration.run("triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
