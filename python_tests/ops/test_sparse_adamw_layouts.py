"""`sparse_adamw_` with gradients and weights of unusual layouts and sizes."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import BF16, assert_same_bits, bits
from helpers.step_problems import BORDER, make_problem, step_and_check


def test_sparse_adamw_strided_gradients(backend):
    """A transposed or sliced gradient counts by its values, not by its memory."""
    problem = make_problem(backend, [((30, 20), 77), ((10, 12), 33)])
    contiguous = problem.copy()
    problem.grads[0] = problem.grads[0].t().contiguous().t()
    problem.grads[1] = torch.stack([problem.grads[1], -problem.grads[1]], dim=-1)[..., 0]
    assert not any(grad.is_contiguous() for grad in problem.grads)
    problem.step(backend)
    contiguous.step(backend)
    assert_same_bits(problem.state(), contiguous.state())


@pytest.mark.parametrize(
    "shape, indices",
    [((300, 300), [0, 65535, 65536, 65537, 89999]), ((4097, 4097), [2**24 - 1, 2**24, 2**24 + 1, 4097 * 4097 - 1])],
    ids=["past-bf16", "past-fp32"],
)
def test_sparse_adamw_large_positions(backend, shape, indices):
    """Positions that bf16 (65537) or fp32 (2^24 + 1) cannot hold are still their own."""
    problem = make_problem(backend, [((8, 8), len(indices))], weight=BF16, packed=True)
    buffer = torch.zeros(shape[0] * shape[1] + 2 * BORDER, dtype=BF16, device=backend.device)
    problem.buffers, problem.weights = [buffer], [buffer[BORDER:-BORDER].view(shape)]
    problem.indices[problem.segment(0)] = torch.tensor(indices, dtype=torch.int32, device=backend.device)
    step_and_check(backend, problem, lr=0.5)
    assert problem.weights[0].view(-1).nonzero().flatten().tolist() == indices


def test_sparse_adamw_four_gigabyte_weight(backend):
    """Byte offsets go beyond 2^32, up to the last of 2^31 - 1 entries.

    Only the pages that are touched take memory.
    """
    last = 2**31 - 2
    problem = make_problem(backend, [((8, 8), 3)], weight=BF16, packed=True)
    weight = torch.empty(1, 2**31 - 1, dtype=BF16, device=backend.device)
    index = torch.tensor([5, 2**30 + 1, last], device=backend.device)
    neighbours = torch.cat([index - 1, index[:2] + 1])
    weight.view(-1)[index] = problem.weights[0].view(-1)[problem.index(0)]
    weight.view(-1)[neighbours] = 1.0
    small = problem.copy()
    problem.weights, problem.indices[problem.segment(0)] = [weight], index.int()
    problem.step(backend)
    small.step(backend)
    assert torch.equal(weight.view(-1)[index], small.weights[0].view(-1)[small.index(0)])
    assert torch.equal(weight.view(-1)[neighbours], torch.ones(5, dtype=BF16, device=backend.device))


def test_sparse_adamw_takes_packed_gradients_of_any_shape_and_strided_counts(backend):
    """Only their numbers matter, as in the reference."""
    plain, shaped = (make_problem(backend, [((6, 7), 12), ((5, 4), 20)], packed=True) for _ in range(2))
    shaped.grads = [grad.view(4, -1) for grad in shaped.grads]
    plain.steps.fill_(8.0)
    shaped.steps = plain.steps[:1].clone().expand(2)
    plain.step(backend, advance=False)
    shaped.step(backend, advance=False)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(plain.weights, shaped.weights))
