"""Optimizer steps to compare: `sparse_adamw_`, the authors' code, torch's AdamW.

torch's AdamW steps whole matrices, or a vector of their selected entries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bench.common.arenas import LINE, Arena
from bench.common.baselines import parameters
from bench.common.timing import difference
from lift_kernels import ops
from lift_kernels.ops.state_formats import GROUP, groups_of, join_master

HYPER = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
FP32, BF16 = torch.float32, torch.bfloat16
DENSITY, RANK = 0.05, 64


class SparseStep:
    """`sparse_adamw_` on all matrices, ten steps into their training.

    The dtype int8 of ``moment`` says 8-bit moments. ``split`` has low halves of masters.
    """

    def __init__(
        self, weights, grads, arena: Arena, moment=FP32, master=False, packed=False, stochastic=False, split=False
    ):
        self.weights, self.arena, self.packed, self.stochastic = weights, arena, packed, stochastic
        flat = [index.long() for index in arena.lists()]
        self.grads = [g.view(-1)[i] for g, i in zip(grads, flat)] if packed else grads
        coded = moment == torch.int8
        self.exp_avg, self.exp_avg_sq = arena.zeros(moment), arena.zeros(torch.uint8 if coded else moment)
        names = ("exp_avg_scale", "exp_avg_sq_scale") if coded else ()
        groups = groups_of(len(arena.indices))
        self.scales = {name: torch.zeros(groups, device=arena.indices.device) for name in names}
        self.master = arena.zeros(torch.int16 if split else FP32) if master or split else None
        if master and not split:
            for weight, offset, index in zip(weights, arena.offsets, flat):
                self.master[offset : offset + len(index)] = weight.view(-1)[index].float()
        self.steps = torch.full((len(weights),), 10.0, device=arena.indices.device)

    @torch.no_grad()  # as in the step of any optimizer
    def __call__(self, backend: str | None = None) -> None:
        arena = self.arena
        ops.sparse_adamw_(
            self.weights,
            self.grads,
            arena.indices,
            arena.offsets,
            arena.counts,
            self.exp_avg,
            self.exp_avg_sq,
            self.steps,
            master=self.master,
            **self.scales,
            packed_grads=self.packed,
            stochastic=self.stochastic,
            seed=1,
            backend=backend,
            **HYPER,
        )

    def roofline_bytes(self, fetch: int | None = None) -> float:
        """Bytes that a step moves at least.

        Lines of weights are read and written, those of dense gradients are read. Each entry adds
        its index (4 bytes), two moments and their scales read and written, a master or its low half
        read and written (8 or 4) and a packed gradient. A weight that has a master is only written.
        But its lines must be read too, since they are written in part.

        Args:
            fetch: bytes that the device fetches where an entry is read, if more than a line. A
                line that is only written in part is not fetched so.
        """
        width = self.weights[0].element_size()
        lines = self.arena.line_bytes(width) + self.arena.line_bytes(width, None if self.master is not None else fetch)
        stream = 4 + 4 * self.exp_avg.element_size() + len(self.scales) * 8 / GROUP
        stream += 0 if self.master is None else 2 * self.master.element_size()
        if self.packed:
            stream += self.grads[0].element_size()
        else:
            lines += self.arena.line_bytes(self.grads[0].element_size(), fetch)
        return lines + self.arena.entries * stream

    def scattered_lines(self) -> int:
        """Cache lines that a step visits one by one: of the weights and of dense gradients."""
        visited = self.arena.line_bytes(self.weights[0].element_size())
        if not self.packed:
            visited += self.arena.line_bytes(self.grads[0].element_size())
        return visited // LINE

    def check(self) -> str:
        """What is wrong with two steps, or an empty string.

        It is one step with 8-bit moments, because a code that is rounded otherwise differs by more
        than rounding in the next. Whole weights are compared with the reference's. All tensors are
        put back.
        """
        state = [*self.weights, self.exp_avg, self.exp_avg_sq, *self.scales.values()]
        state += [] if self.master is None else [self.master]
        saved = [tensor.clone() for tensor in state]
        results = []
        for backend in ("reference", None):
            for _ in range(1 if self.scales else 2):
                self(backend)
            results.append([tensor.clone() for tensor in state])
            if self.master is not None and self.master.dtype == torch.int16:
                results[-1][-1] = self._joined()
            for tensor, old in zip(state, saved):
                tensor.copy_(old)
        return difference(*results)

    def _joined(self) -> Tensor:
        """The fp32 masters of all entries."""
        weights = [w.view(-1)[index.long()] for w, index in zip(self.weights, self.arena.lists())]
        halves = [self.master[o : o + c] for o, c in zip(self.arena.offsets, self.arena.counts)]
        return torch.cat([join_master(*pair) for pair in zip(weights, halves)])


class AuthorsStep:
    """The step of the authors' code, rewritten.

    It has a dense bool mask per parameter, boolean indexing, a dense update and a Python loop.
    """

    def __init__(self, weights: list[Tensor], grads: list[Tensor], arena: Arena):
        self.weights, self.grads, self.step = weights, grads, 10
        self.masks, self.exp_avg, self.exp_avg_sq = [], [], []
        for weight, index in zip(weights, arena.lists()):
            mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
            mask[index.long()] = True
            self.masks.append(mask.view_as(weight))
            self.exp_avg.append(torch.zeros(len(index), dtype=weight.dtype, device=weight.device))
            self.exp_avg_sq.append(torch.zeros(len(index), dtype=weight.dtype, device=weight.device))

    @torch.no_grad()
    def __call__(self) -> None:
        beta1, beta2 = HYPER["betas"]
        self.step += 1
        size = HYPER["lr"] * (1 - beta2**self.step) ** 0.5 / (1 - beta1**self.step)
        for weight, grad, mask, m, v in zip(self.weights, self.grads, self.masks, self.exp_avg, self.exp_avg_sq):
            g = grad[mask]
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            update = torch.zeros_like(weight)
            update[mask] = m / v.sqrt().add_(HYPER["eps"])
            weight.add_(update, alpha=-size)


SCATTERS: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "scatter_": lambda weight, index, values: weight.scatter_(0, index, values),
    "index_copy_": lambda weight, index, values: weight.index_copy_(0, index, values),
    "put_": lambda weight, index, values: weight.put_(index, values),
    "index_put_": lambda weight, index, values: weight.index_put_((index,), values),
}
"""torch's ways to write values to flat positions. Which is fastest depends on the dtype."""


class PackedVector:
    """What one would write with torch alone: AdamW on one fp32 vector of all selected entries.

    Then the values are scattered into the weights. Gradients are given as such a vector, or they
    are gathered from dense ones. ``scatter``: the name in `SCATTERS` of the way that was fastest
    here.
    """

    def __init__(self, weights: Sequence[Tensor], grads: Sequence[Tensor], arena: Arena, packed: bool):
        self.flat = [index.long() for index in arena.lists()]
        self.grads = [] if packed else [grad.view(-1) for grad in grads]
        self.weights, self.dtype = [weight.view(-1) for weight in weights], weights[0].dtype
        self.values = nn.Parameter(torch.cat([weight[i].float() for weight, i in zip(self.weights, self.flat)]))
        self.values.grad = torch.cat([grad.view(-1)[i].float() for grad, i in zip(grads, self.flat)])
        # torch gathers into memory of the gradients' dtype.
        self.gathered = self.values.grad if self.dtype == FP32 else torch.empty_like(self.values, dtype=self.dtype)
        self.places = self._of_each(self.gathered)
        self.adamw = torch.optim.AdamW([self.values], **HYPER, fused=True)
        self.scatter = min(SCATTERS, key=self._seconds)

    def _of_each(self, vector: Tensor) -> Sequence[Tensor]:
        """The parts of a vector, one a matrix."""
        return vector.split([len(index) for index in self.flat])

    def _seconds(self, scatter: str) -> float:
        """The least time of three of a way to scatter. It writes the values that are there."""
        self.scatter, taken = scatter, []
        wait = torch.cuda.synchronize if self.values.is_cuda else lambda: None
        for _ in range(3):
            wait()
            start = time.perf_counter()
            self.write()
            wait()
            taken.append(time.perf_counter() - start)
        return min(taken)

    @torch.no_grad()
    def write(self) -> None:
        put = SCATTERS[self.scatter]
        for weight, index, values in zip(self.weights, self.flat, self._of_each(self.values.to(self.dtype))):
            put(weight, index, values)

    @torch.no_grad()
    def __call__(self) -> None:
        for grad, index, place in zip(self.grads, self.flat, self.places):
            torch.index_select(grad, 0, index, out=place)
        if self.grads and self.gathered is not self.values.grad:
            self.values.grad.copy_(self.gathered)
        self.adamw.step()
        self.write()


def dense_step(weights: Sequence[Tensor], grads: Sequence[Tensor], **flags: bool) -> Callable[[], None]:
    """The step of torch's AdamW over parameters that share the weights."""
    return torch.optim.AdamW(parameters(weights, grads), **HYPER, **flags).step
