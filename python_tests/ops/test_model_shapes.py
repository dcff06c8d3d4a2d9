"""Triton and native CUDA ops at the shapes of a model: three matrices of 4096 x 11008.

Each test also runs on the CPU, at a small shape and with the default backend there. Other tests of
ops look at edges; these look at the launches of large grids.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.bits import BF16, FP32, assert_near, bits
from torch import Tensor

from lift_kernels import ops
from lift_kernels.ops import dispatch

COUNT = 3
HYPER = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEP = 7


@dataclass(frozen=True)
class Place:
    """Where a test runs, and the shape of its matrices there."""

    device: str
    backend: str | None
    m: int
    n: int
    rank: int
    tokens: int

    @property
    def numel(self) -> int:
        return self.m * self.n

    @property
    def k(self) -> int:
        """Trained entries of a matrix: 4.3 %."""
        return self.numel * 43 // 1000

    def normal(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device)

    def positions(self, count: int, seed: int) -> Tensor:
        """Sorted positions in a matrix, one in each of ``count`` equal parts, int32."""
        edges = torch.arange(count + 1, device=self.device) * self.numel // count
        generator = torch.Generator(self.device).manual_seed(seed)
        shift = torch.rand(count, generator=generator, device=self.device) * (edges[1:] - edges[:-1])
        return (edges[:-1] + torch.minimum(shift.long(), edges[1:] - edges[:-1] - 1)).int()


def places(op: str) -> pytest.MarkDecorator:
    """The place on the CPU, and one on a GPU for each backend of ``op`` there."""
    params = [pytest.param(Place("cpu", None, 40, 88, 8, 12), id="cpu")]
    for name in dispatch.OPS[op]:
        if name in ("triton", "native-cuda"):
            place = Place("cuda", name, 4096, 11008, 128, 2048)
            params.append(pytest.param(place, id=f"{name}-on-gpu", marks=pytest.mark.gpu))
    return pytest.mark.parametrize("place", params)


@pytest.fixture(autouse=True)
def memory_is_given_back():
    """Other processes use the card at the same time."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def segments(place: Place) -> tuple[list[int], list[int], int]:
    """Offsets, counts and length of an arena. The matrices have slightly different counts."""
    counts = [place.k - 37 * i for i in range(COUNT)]
    offsets, end = [], 0
    for count in counts:
        offsets.append(end)
        end += -(-count // 64) * 64
    return offsets, counts, end


def arena_of(place: Place, parts: list[Tensor]) -> Tensor:
    """``parts`` at their places, and zeros between."""
    offsets, counts, length = segments(place)
    arena = torch.zeros(length, dtype=parts[0].dtype, device=place.device)
    for offset, count, part in zip(offsets, counts, parts):
        arena[offset : offset + count] = part
    return arena


def joined(place: Place, arena: Tensor) -> Tensor:
    """The entries of all segments."""
    offsets, counts, _ = segments(place)
    return torch.cat([arena[offset : offset + count] for offset, count in zip(offsets, counts)])


def adamw(dtype: torch.dtype, w: Tensor, m: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """torch's for-loop AdamW on single entries."""
    w, m, v, g = (t.to(dtype) for t in (w, m, v, g))
    (beta1, beta2), lr = HYPER["betas"], HYPER["lr"]
    m = torch.lerp(m, g, 1 - beta1)
    v = v * beta2 + (1 - beta2) * g * g
    denominator = v.sqrt() / (1 - beta2**STEP) ** 0.5 + HYPER["eps"]
    return w * (1 - lr * HYPER["weight_decay"]) - lr / (1 - beta1**STEP) * m / denominator, m, v


@pytest.mark.parametrize("packed", [False, True], ids=["dense gradients", "packed gradients"])
@places("sparse_adamw_")
def test_a_step_of_large_matrices(place, packed):
    """bf16 weights with masters, and dense bf16 or packed fp32 gradients."""
    offsets, counts, _ = segments(place)
    lists = [place.positions(count, seed=i) for i, count in enumerate(counts)]
    weights = [(0.05 * place.normal(place.m, place.n, seed=i)).to(BF16) for i in range(COUNT)]
    grads = [place.normal(place.m, place.n, seed=10 + i).to(BF16) for i in range(COUNT)]
    chosen = [g.view(-1)[index.long()].float() for g, index in zip(grads, lists)]
    grads = chosen if packed else grads
    indices = arena_of(place, lists)
    master = arena_of(place, [w.view(-1)[index.long()].float() for w, index in zip(weights, lists)])
    moment = arena_of(place, [0.2 * place.normal(count, seed=20 + i) for i, count in enumerate(counts)])
    square = moment.square() + 0.01
    before = [w.clone() for w in weights]
    entries = [joined(place, t) for t in (master, moment, square)] + [torch.cat(chosen)]
    truth, yardstick = adamw(torch.float64, *entries), adamw(FP32, *entries)
    steps = torch.full((COUNT,), float(STEP), device=place.device)
    arena = weights, grads, indices, offsets, counts, moment, square, steps
    ops.sparse_adamw_(*arena, master=master, packed_grads=packed, backend=place.backend, **HYPER)
    for found, right, usual, name in zip((master, moment, square), truth, yardstick, ("master", "m", "v")):
        assert_near(joined(place, found), right, usual, name)
    rounded = joined(place, master).to(BF16)
    for weight, old, index, part in zip(weights, before, lists, rounded.split(counts)):
        old.view(-1)[index.long()] = part
        assert torch.equal(bits(weight), bits(old)), "an entry outside of the list, or no rounded master"


@places("packed_gather")
def test_gather_and_scatter_in_large_matrices(place):
    weight, index = place.normal(place.m, place.n).to(BF16), place.positions(place.k, seed=3)
    found = ops.packed_gather(weight, index, dtype=FP32, backend=place.backend)
    assert torch.equal(found, weight.view(-1)[index.long()].float())
    expected = weight.clone()
    expected.view(-1)[index.long()] = (found + 0.3).to(BF16)
    ops.packed_scatter_(weight, index, found + 0.3, backend=place.backend)
    assert torch.equal(bits(weight), bits(expected))


@places("packed_migrate")
def test_migration_of_a_long_list(place):
    old = place.positions(place.k, seed=4)
    stay = place.normal(place.k, seed=5) > -1  # 84 %
    new = torch.cat([old[stay], place.positions(place.k // 9, seed=6)]).unique()
    values = place.normal(place.k, seed=7)
    found = ops.packed_migrate(values, old, new, fill=3, backend=place.backend)
    assert torch.equal(found, ops.packed_migrate(values, old, new, fill=3, backend="reference"))
    assert 0.75 < (found != 3).double().mean() < 1


@places("packed_l2_norm")
def test_norm_of_large_matrices(place):
    offsets, counts, _ = segments(place)
    lists = [place.positions(count, seed=i) for i, count in enumerate(counts)]
    grads = [place.normal(place.m, place.n, seed=i).to(BF16) for i in range(COUNT)]
    truth = sum(float(g.view(-1)[i.long()].double().square().sum()) for g, i in zip(grads, lists)) ** 0.5
    arena = arena_of(place, lists)
    found = [ops.packed_l2_norm(grads, arena, offsets, counts, backend=place.backend) for _ in range(2)]
    assert abs(float(found[0]) - truth) <= 2.0**-23 * truth and torch.equal(*found)


@places("arena_migrate_")
def test_migration_of_an_arena(place):
    """Five of six entries stay; every buffer is that of the reference."""
    offsets, counts, _ = segments(place)
    old = [place.positions(count, seed=i) for i, count in enumerate(counts)]
    new = [exchanged(place, index, seed=30 + i) for i, index in enumerate(old)]
    weights = [place.normal(place.m, place.n, seed=i).to(BF16) for i in range(COUNT)]
    results = []
    for backend in (place.backend, "reference"):
        indices = arena_of(place, old)
        m, v, master = (place.normal(len(indices), seed=40 + i) for i in range(3))
        births = place.positions(len(indices), seed=50)
        steps = torch.arange(float(COUNT), device=place.device) + STEP
        lists = weights, new, indices, offsets, counts
        kept = ops.arena_migrate_(*lists, m, v, steps, master=master, births=births, backend=backend)
        results.append((kept, indices, m, v, master, births))
    for found, expected in zip(*results):
        assert torch.equal(found, expected)
    assert torch.equal(joined(place, results[0][1]), torch.cat(new))
    assert all(0.5 * count < kept < count for kept, count in zip(results[0][0].tolist(), counts))


def exchanged(place: Place, index: Tensor, seed: int) -> Tensor:
    """A list of the same length, in which about every sixth entry is another one."""
    others = place.positions(len(index), seed)
    return torch.where(place.normal(len(index), seed=seed) > 1, others, index)


@pytest.mark.parametrize("fused", [False, True])
@places("packed_weight_grad")
def test_weight_gradient_of_a_large_layer(place, fused):
    """The same bits as a gather from torch's product, or near the sum in fp64 without one.

    Tensor cores may cut off each of 128 partial sums. That is less than 1e-4 of the largest entry,
    a hundredth of what rounding to bf16 would be.
    """
    grad, x = place.normal(place.tokens, place.m).to(BF16), place.normal(place.tokens, place.n, seed=1).to(BF16)
    index = place.positions(place.k, seed=2)
    fused = fused and place.backend == "triton"
    found = ops.packed_weight_grad(grad, x, index, fused=fused, backend=place.backend)
    if place.device == "cuda" and not fused:
        assert torch.equal(found, (grad.t() @ x).view(-1)[index.long()].float())
        return
    truth = (grad.double().t() @ x.double()).view(-1)[index.long()]
    assert found.dtype == FP32
    assert float((found - truth).abs().max()) <= (1e-4 if fused else 2.0**-8) * float(truth.abs().max())


@places("lowrank_topk")
def test_selection_from_large_products(place):
    """No entry that was left out is larger, but for rounding; and a batch gives what one gives."""
    left, right = place.normal(COUNT, place.m, place.rank), place.normal(COUNT, place.n, place.rank, seed=1)
    lists, thresholds = ops.lowrank_topk(left, right, place.k, backend=place.backend)
    for i in range(COUNT):
        index = lists[i].long()
        assert bool((index[1:] > index[:-1]).all()) and 0 <= int(index[0]) and int(index[-1]) < place.numel
        magnitude = (left[i].double() @ right[i].double().T).abs_().view(-1)
        lowest = float(magnitude[index].min())
        magnitude[index] = 0.0
        assert lowest >= float(magnitude.max()) * (1 - 1e-4)
        assert abs(float(thresholds[i]) - lowest) <= 1e-4 * lowest
    alone = ops.lowrank_topk(left[1], right[1], place.k, backend=place.backend)
    assert torch.equal(alone[0], lists[1]) and torch.equal(alone[1], thresholds[1])


@places("bitmap_to_indices")
def test_lists_from_large_bitmaps(place):
    """The bracket is 4 % wide, and candidates come in falling order of their positions."""
    given = []
    for seed in range(COUNT):
        magnitude = place.normal(place.m, place.n, seed=seed).abs_()
        threshold = magnitude.view(-1).sort(descending=True).values[place.k - 1]
        above = magnitude > threshold * 1.02
        near = ((magnitude >= threshold * 0.98) & ~above).view(-1).nonzero().view(-1).flip(0)
        notes = (magnitude.view(-1)[near].view(torch.int32).long() << 32) + (2**31 - 1 - near)
        given.append((above, notes))
    capacity = max(len(notes) for _, notes in given)
    candidates = torch.stack([torch.nn.functional.pad(notes, (0, capacity - len(notes))) for _, notes in given])
    counts = torch.tensor([[int(above.sum()), len(notes)] for above, notes in given]).int().to(place.device)
    power = torch.arange(32, dtype=torch.int32, device=place.device)
    words = [torch.nn.functional.pad(above.int(), (0, -place.n % 32)).unflatten(1, (-1, 32)) for above, _ in given]
    bitmaps = torch.stack([(word << power).sum(2, dtype=torch.int32) for word in words])
    arguments = bitmaps, candidates, counts, place.n, place.k
    found = ops.bitmap_to_indices(*arguments, backend=place.backend)
    assert all(map(torch.equal, found, ops.bitmap_to_indices(*arguments, backend="reference")))
    assert found[2].tolist() == [0] * COUNT


@pytest.mark.parametrize("width", [192, 256])
@places("cholesky_qr_")
def test_blocks_of_the_iteration(place, width):
    """Widths of a warm and a cold start at rank 128, from a basis that was kept in bf16."""
    width = width if place.device == "cuda" else width // 16
    block = ops.gaussian_sketch(COUNT, place.m, width, seed=1, device=place.device, backend="reference")
    basis = torch.linalg.qr(block).Q.to(BF16).float().contiguous()
    image = 0.1 * place.normal(COUNT, place.n, width)
    edge = torch.tensor([0.5, 1.0, 2.0], device=place.device)
    results = []
    for backend in (place.backend, "reference"):
        start, other = basis.clone(), image.clone()
        status = ops.cholesky_qr_(start, other, backend=backend)
        moved = start.clone()
        raised, stepped = ops.chebyshev_step_(block, moved, start, edge, backend=backend)
        assert status.tolist() == stepped.tolist() == [0] * COUNT
        gram = raised.double().mT @ raised.double()
        assert float((gram - torch.eye(width, device=place.device)).abs().max()) <= 1e-4
        results.append((start, other, raised, moved))
    for found, expected in zip(*results):
        assert torch.allclose(found, expected, atol=2e-4 * max(1.0, float(expected.abs().max())))


@places("gaussian_sketch_")
def test_a_large_sketch(place):
    found = ops.gaussian_sketch(COUNT, place.n, 256, seed=2**40 + 5, device=place.device, backend=place.backend)
    expected = ops.gaussian_sketch(COUNT, place.n, 256, seed=2**40 + 5, device=place.device, backend="reference")
    assert torch.allclose(found, expected, atol=4e-6, rtol=4e-6)
