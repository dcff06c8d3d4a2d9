"""The executable specification: every op in plain PyTorch, slow and obvious.

Tests compare each backend with these functions, and an op falls back to them. It imports
torch, and the two modules `state_formats` and `stochastic_rounding`, which import torch alone. So
the specification can be read, copied into a notebook and believed on its own.

A matrix has m * n entries in row-major order. Its index list holds k sorted, unique flat positions
(int32). The lists of many matrices lie one behind the other in an *arena*. Matrix i owns the arena
positions ``offsets[i] .. offsets[i] + counts[i]``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import state_formats
from .stochastic_rounding import counter_hash, round_stochastic_ref, stochastic_key

GROUP = state_formats.GROUP
_MASK32 = 0xFFFFFFFF
_LAST = 0x7FFFFFFF


def sparse_adamw_ref(
    weights: list[Tensor],
    grads: list[Tensor],
    indices: Tensor,
    offsets: list[int],
    counts: list[int],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    lr: float | Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    master: Tensor | None = None,
    births: Tensor | None = None,
    exp_avg_scale: Tensor | None = None,
    exp_avg_sq_scale: Tensor | None = None,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    packed_grads: bool = False,
    packed_weights: bool = False,
    maximize: bool = False,
    stochastic: bool = False,
    seed: int = 0,
) -> None:
    """Apply one AdamW step to the selected entries of many matrices, in place.

    AdamW is Algorithm 2 of Loshchilov & Hutter 2019. `lift_kernels.ops.sparse_adamw_` describes all
    arguments.
    """
    if found_inf is not None and float(found_inf) != 0.0:
        return
    lr = float(lr)
    for i, (weight, grad) in enumerate(zip(weights, grads)):
        segment = slice(offsets[i], offsets[i] + counts[i])
        groups = slice(offsets[i] // GROUP, offsets[i] // GROUP + state_formats.groups_of(counts[i]))
        index = indices[segment].long()
        place = slice(None) if packed_weights else index
        flat = weight.view(-1)
        compute = torch.promote_types(weight.dtype, torch.float32)

        if master is None:
            w = flat[place].to(compute, copy=True)
        elif master.dtype == torch.int16:
            w = state_formats.join_master(flat[place], master[segment])
        else:
            w = master[segment].clone()
        g = (grad.reshape(-1) if packed_grads else grad.reshape(-1)[index]).to(compute)
        if inv_scale is not None:
            g = g * inv_scale.to(compute)
        if maximize:
            g = -g
        if exp_avg_scale is None or exp_avg_sq_scale is None:
            m, v = exp_avg[segment].to(compute, copy=True), exp_avg_sq[segment].to(compute, copy=True)
        else:
            m = state_formats.decode(exp_avg[segment], exp_avg_scale[groups])
            v = state_formats.decode(exp_avg_sq[segment], exp_avg_sq_scale[groups]).square()

        # This is the sequence of torch.optim.AdamW(foreach=False), with scalars as Python floats.
        # At density 1 the result equals it bit for bit.
        w.mul_(1 - lr * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        step = float(steps[i])
        if births is None:
            denom = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
            w.addcdiv_(m, denom, value=-(lr / (1 - beta1**step)))
        else:
            age = step - births[segment].double()
            denom = (v.sqrt() / (1 - beta2**age).sqrt().to(compute)).add_(eps)
            w.sub_((lr / (1 - beta1**age)).to(compute) * m / denom)

        position = torch.arange(segment.start, segment.stop, device=weight.device)
        if exp_avg_scale is None or exp_avg_sq_scale is None:
            exp_avg[segment] = m.to(exp_avg.dtype)
            exp_avg_sq[segment] = v.to(exp_avg_sq.dtype)
        else:
            up = state_formats.dither(position, int(step))
            exp_avg[segment], exp_avg_scale[groups] = state_formats.encode_first(m)
            exp_avg_sq[segment], exp_avg_sq_scale[groups] = state_formats.encode_root(v.sqrt(), up)
        if master is not None:
            master[segment] = state_formats.split_master(w) if master.dtype == torch.int16 else w
        if stochastic:
            noise = counter_hash(counter_hash(position) ^ stochastic_key(steps[i], seed))
            flat[place] = round_stochastic_ref(w, noise, weight.dtype)
        else:
            flat[place] = w.to(weight.dtype)


def packed_gather_ref(source: Tensor, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the entries of ``source`` at ``indices`` (k), in its dtype or in ``dtype``."""
    return source.reshape(-1)[indices.long()].to(dtype or source.dtype)


def packed_scatter_ref(dest: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write ``values`` (k), rounded to nearest even, into ``dest`` at ``indices`` (k)."""
    dest.view(-1)[indices.long()] = values.to(dest.dtype)


def packed_migrate_ref(
    values: Tensor, old_indices: Tensor, new_indices: Tensor, fill: float = 0.0, fill_values: Tensor | None = None
) -> Tensor:
    """Carry ``values`` (k_old) of one sorted index list over to another (k_new).

    Entries in both lists keep their value. Entering entries get ``fill``, or their element of
    ``fill_values`` (k_new).
    """
    if fill_values is None:
        out = torch.full(new_indices.shape, fill, dtype=values.dtype, device=values.device)
    else:
        out = fill_values.to(values.dtype, copy=True)
    if old_indices.numel() > 0:
        place = torch.searchsorted(old_indices, new_indices).clamp_(max=old_indices.numel() - 1)
        stays = old_indices[place] == new_indices
        out[stays] = values[place[stays]]
    return out


def arena_migrate_ref(
    weights: list[Tensor],
    new_indices: list[Tensor],
    indices: Tensor,
    offsets: list[int],
    counts: list[int],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    master: Tensor | None = None,
    births: Tensor | None = None,
    exp_avg_scale: Tensor | None = None,
    exp_avg_sq_scale: Tensor | None = None,
) -> Tensor:
    """Move the segments of many matrices to new sorted lists, in place.

    `lift_kernels.ops.arena_migrate_` describes arguments and result.
    """
    kept = torch.zeros(len(weights), dtype=torch.int64, device=indices.device)
    for i, (weight, new) in enumerate(zip(weights, new_indices)):
        before, after = (slice(offsets[i], offsets[i] + count) for count in (counts[i], new.numel()))
        old = indices[before].clone()
        kept[i] = (packed_migrate_ref(old, old, new, -1) >= 0).sum()
        moments = (exp_avg, exp_avg_scale), (exp_avg_sq, exp_avg_sq_scale)
        for arena, scale in moments:
            if scale is None:
                arena[after] = packed_migrate_ref(arena[before], old, new)
            else:  # through fp32, because other entries share the groups
                first = offsets[i] // GROUP
                was, now = (slice(first, first + state_formats.groups_of(n)) for n in (counts[i], new.numel()))
                values = state_formats.decode(arena[before], scale[was])
                encode = state_formats.encode_first if arena is exp_avg else state_formats.encode_root
                arena[after], scale[now] = encode(packed_migrate_ref(values, old, new))
        if births is not None:
            births[after] = packed_migrate_ref(births[before], old, new, int(steps[i]))
        if master is not None:
            split = master.dtype == torch.int16  # An entry that enters has the weight's value, whose low half is 0.
            entries = None if split else packed_gather_ref(weight, new, torch.float32)
            master[after] = packed_migrate_ref(master[before], old, new, 0, entries)
        indices[after] = new
    return kept


def packed_l2_norm_ref(
    grads: list[Tensor], indices: Tensor, offsets: list[int], counts: list[int], packed_grads: bool = False
) -> Tensor:
    """Return the norm over the selected entries of all gradients, a 0-dim fp32 tensor.

    Squares are summed in fp64.
    """
    total = torch.zeros((), dtype=torch.float64, device=indices.device)
    for grad, offset, count in zip(grads, offsets, counts):
        flat = grad.reshape(-1)
        entries = flat if packed_grads else flat[indices[offset : offset + count].long()]
        total += entries.double().square().sum()
    return total.sqrt().float()


def lowrank_topk_ref(left: Tensor, right: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the positions of the k largest |left @ right.T| and the k-th magnitude.

    The positions are (k) sorted int32. Ties go to the lower position.
    """
    # The bits without the sign are integers in the order of the magnitudes. A stable descending
    # sort keeps ties in order.
    keys = (left @ right.T).reshape(-1).view(torch.int32) & 0x7FFFFFFF
    order = keys.sort(descending=True, stable=True).indices[:k]
    return order.sort().values.int(), keys[order[-1]].clone().view(torch.float32)


def bitmap_to_indices_ref(
    bitmaps: Tensor, candidates: Tensor, counts: Tensor, columns: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn bitmaps and their largest candidates into sorted index lists of k positions.

    Bits of the bitmaps are definite positions, and the k - definite largest candidates are chosen.
    `lift_kernels.ops.bitmap_to_indices` describes arguments and results.
    """
    batch, rows = bitmaps.shape[:2]
    indices = bitmaps.new_full((batch, k), -1)
    thresholds = bitmaps.new_full((batch,), torch.nan, dtype=torch.float32)
    status = bitmaps.new_ones(batch)
    lane = torch.arange(32, dtype=torch.int32, device=bitmaps.device)
    for i, (definite, near) in enumerate(counts.tolist()):
        if definite >= k or definite + near < k or near > candidates.shape[1]:
            continue
        chosen = candidates[i, :near].sort(descending=True).values[: k - definite]
        position = _LAST - (chosen & _LAST)
        bits = (bitmaps[i, :, :, None] >> lane & 1).bool().flatten(1)[:, :columns].flatten()
        bits[position[position < rows * columns]] = True
        positions = bits.nonzero().flatten()
        if len(positions) == k:
            indices[i], status[i] = positions, 0
            thresholds[i] = (chosen[-1] >> 32).int().view(torch.float32)
    return indices, thresholds, status


def packed_weight_grad_ref(grad_output: Tensor, input: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the entries ``indices`` (k) of the weight gradient of a linear layer.

    The gradient is ``grad_output^T @ input`` for ``grad_output`` (t, m) and ``input`` (t, n) of t
    tokens. The whole product is formed in their dtype, and the result is a vector of ``dtype``.
    """
    return packed_gather_ref(grad_output.t() @ input, indices, dtype)


def gaussian_sketch_ref_(block: Tensor, seed: int, first: int = 0) -> None:
    """Fill ``block`` (b, n, l), fp32 or bf16, with standard normal numbers.

    Each number is a function of ``seed``, matrix and position alone. The generator is Philox4x32-10
    (Salmon et al. 2011) under the key ``seed``. The numbers 4g .. 4g+3 of matrix ``first + i`` come
    from the counter (g, first + i) by Box-Muller, two numbers from two words.
    """
    count = block[0].numel() if len(block) else 0
    group = torch.arange((count + 3) // 4, dtype=torch.int64, device=block.device)
    for i, matrix in enumerate(block):
        words = philox(group, first + i, seed)
        uniform = [word.float() for word in words]
        normal = []
        for a, b in (uniform[:2], uniform[2:]):
            radius, angle = (-2.0 * (a * 2.0**-32 + 2.0**-33).log()).sqrt(), b * (2.0 * math.pi * 2.0**-32)
            normal += [radius * angle.cos(), radius * angle.sin()]
        matrix.copy_(torch.stack(normal, 1).view(-1)[:count].view_as(matrix))


def philox(group: Tensor, matrix: int, seed: int) -> list[Tensor]:
    """Return four uint32 words, held in int64, for each counter (group, matrix).

    ``seed`` is the 64-bit key.
    """
    x = [group & _MASK32, group >> 32, torch.full_like(group, matrix & _MASK32), torch.full_like(group, matrix >> 32)]
    key = [seed & _MASK32, seed >> 32 & _MASK32]
    for _ in range(10):
        # A product may wrap in int64, but its 64 bits stay right, and so do its two halves.
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(b >> 32 & _MASK32) ^ x[1] ^ key[0], b & _MASK32, (a >> 32 & _MASK32) ^ x[3] ^ key[1], a & _MASK32]
        key = [(key[0] + 0x9E3779B9) & _MASK32, (key[1] + 0xBB67AE85) & _MASK32]
    return x


def cholesky_qr_ref_(block: Tensor, other: Tensor | None = None, rounds: int = 1) -> Tensor:
    """Orthonormalize the columns of each block (b, n, l) in place: X <- X D R^-1.

    Here D = diag(X^T X)^-1/2 and R^T R = D X^T X D. ``other`` is multiplied by the same factor from
    the right. Returns status (b,) int32 of the last round. 0: orthonormal to working precision. 1:
    deficient, with a zero column or a pivot of at most l eps. A shift of 8 l eps or more then
    leaves the block better conditioned but not orthonormal. 2: not finite, left as it is.
    """
    status = torch.zeros(len(block), dtype=torch.int32, device=block.device)
    width = block.shape[-1]
    eps = torch.finfo(torch.float32).eps
    for _ in range(rounds):
        gram = block.mT @ block
        square = gram.diagonal(dim1=-2, dim2=-1)
        finite = square.isfinite().all(-1)
        deficient = (square == 0).any(-1)
        scale = torch.where(square > 0, square.sqrt().reciprocal(), 0.0)
        gram = gram * scale[..., :, None] * scale[..., None, :]
        gram.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        factor, broken = _cholesky(gram, width * eps)
        shift, attempts = 8 * width * eps, 0
        while bool((broken & finite).any()):
            deficient |= broken
            attempts += 1
            finite &= ~broken | (attempts < 5)
            gram.diagonal(dim1=-2, dim2=-1).copy_(torch.where(broken, 1.0 + shift, 1.0)[:, None])
            shifted, still = _cholesky(gram, width * eps)
            factor, broken, shift = torch.where(broken[:, None, None], shifted, factor), broken & still, 10 * shift
        status = torch.where(finite, deficient.int(), 2).int()
        for x in (block, other):
            if x is not None:
                q = torch.linalg.solve_triangular(factor, x * scale[..., None, :], upper=True, left=False)
                x.copy_(torch.where(finite[:, None, None], q, x))
    return status


def _cholesky(gram: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return the upper factor of each matrix (b, l, l), and whether it broke down (b,)."""
    factor, info = torch.linalg.cholesky_ex(gram, upper=True)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    return factor, (info != 0) | ~(pivots > tolerance).all(-1)


def chebyshev_step_ref_(product: Tensor, block: Tensor, previous: Tensor | None, edge: Tensor) -> tuple[Tensor, Tensor]:
    """Advance a Chebyshev recurrence by one step: 2 ((2/a) Z - X) - X_previous.

    The result is orthonormalized, and X is multiplied by the same factor R^-1 in place.

    ``product`` is Z = A^T A X, ``block`` X and ``previous`` X_previous, each (b, n, l). ``edge`` is
    a (b,). Without ``previous`` this is the first step, (2/a) Z - X. Returns the next block and the
    status of `cholesky_qr_ref_`.
    """
    raised = (2.0 / edge)[:, None, None] * product - block
    if previous is not None:
        raised = 2.0 * raised - previous
    return raised, cholesky_qr_ref_(raised, block)
