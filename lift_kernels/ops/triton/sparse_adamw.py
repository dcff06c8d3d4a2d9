"""AdamW on the selected entries of many matrices in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_tables import block_size, block_table, pointer_table
from .memory import load_stream, store_stream
from .rounding import FORMATS, bits, counter_hash, narrow, narrow_stochastic, widen
from .state_formats import decode, dither, encode_first, encode_root, group_scales, join_master, low_half, spread
from .targets import step_options


@triton.jit(do_not_specialize=["last_age"])
def _sparse_adamw_kernel(
    weights,  # (n,) int64 addresses of matrices, or of packed vectors
    grads,  # (n,) int64 addresses of matrices, or of packed vectors
    blocks,  # (programs, 4) int64: matrix, arena position, position in the list, entries left
    indices,  # arena, int32
    exp_avg,  # arena, fp32, bf16 bits or int8 codes
    exp_avg_sq,  # arena, the same, or uint8 codes of roots
    exp_avg_scale,  # fp32, one for each 32 positions of the arenas; None without codes
    exp_avg_sq_scale,  # the same
    master,  # arena, fp32 or int16 low halves, or None
    births,  # arena, int32, or None: global bias correction
    table,  # (n, 3) fp32: step size, 1/sqrt(bias correction 2), decay factor
    steps,  # (n,) fp32
    bias,  # (2, last_age + 1) fp32 corrections by age, with births
    keys,  # (n,) int32 of the rounding noise, or None: to nearest
    inv_scale,  # () fp32 or None
    found_inf,  # () fp32 or None
    last_age,
    one_minus_beta1,
    beta1,
    one_minus_beta2,
    beta2,
    eps,
    WEIGHT: tl.constexpr,  # element types, bf16 as int16
    GRAD: tl.constexpr,
    PACKED: tl.constexpr,  # gradients are packed
    PACKED_WEIGHTS: tl.constexpr,  # weights are packed, too
    ALIGNED: tl.constexpr,  # segments are aligned and padded to 64 entries
    WIDE_GRADS: tl.constexpr,  # packed gradients start at multiples of 16 bytes
    WIDE_WEIGHTS: tl.constexpr,  # so do packed weights
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = blocks + tl.program_id(0).to(tl.int64) * 4
    matrix = tl.load(row)
    start = tl.load(row + 1)
    place = tl.load(row + 2)
    count = tl.minimum(tl.load(row + 3), BLOCK).to(tl.int32)
    if found_inf is not None:
        count = tl.where(tl.load(found_inf) != 0.0, 0, count)  # masks every access below

    lanes = tl.arange(0, BLOCK)
    real = lanes < count
    if ALIGNED:
        # With this hint and a bound that is a multiple of the vector width, the compiler uses
        # 128-bit accesses.
        start = tl.multiple_of(start, 64)
        inside = lanes < tl.cdiv(count, 64) * 64
    else:
        inside = real

    # All loads stand before the arithmetic. A block then waits for the memory twice: for its index
    # and streams, and for the weights and gradients that the index points at.
    if not PACKED_WEIGHTS:
        index = tl.load(indices + start + lanes, mask=inside, other=0).to(tl.int64)
    m_stored = tl.load(exp_avg + start + lanes, mask=inside, other=0)
    v_stored = tl.load(exp_avg_sq + start + lanes, mask=inside, other=0)
    if exp_avg_scale is not None:
        group, owned = group_scales(start, count, BLOCK)
        m_scale = tl.load(exp_avg_scale + group, mask=owned, other=0.0)
        v_scale = tl.load(exp_avg_sq_scale + group, mask=owned, other=0.0)
    if master is not None:
        w_stored = tl.load(master + start + lanes, mask=inside, other=0)
    if births is not None:
        birth = tl.load(births + start + lanes, mask=inside, other=0)
    grad = tl.load(grads + matrix).to(tl.pointer_type(GRAD), bitcast=True)
    if PACKED:
        if WIDE_GRADS:
            place = tl.multiple_of(place, 64)
            grad = tl.multiple_of(grad, 16)
        g_stored = load_stream(grad + place, count, BLOCK)
    else:
        g_stored = tl.load(grad + index, mask=real, other=0)
    weight = tl.load(weights + matrix).to(tl.pointer_type(WEIGHT), bitcast=True)
    if PACKED_WEIGHTS:
        if WIDE_WEIGHTS:
            place = tl.multiple_of(place, 64)
            weight = tl.multiple_of(weight, 16)
        weight += place
    else:
        weight += index
    if master is not None and master.dtype.element_ty == tl.float32:
        w = w_stored
    else:
        if PACKED_WEIGHTS:
            pattern = load_stream(weight, count, BLOCK)
        else:
            pattern = tl.load(weight, mask=real, other=0)
        w = widen(pattern) if master is None else join_master(pattern, w_stored)

    g = widen(g_stored)
    if inv_scale is not None:
        g = g * tl.load(inv_scale)
    if MAXIMIZE:
        g = -g
    if exp_avg_scale is None:
        m = widen(m_stored)
        v = widen(v_stored)
    else:
        m = decode(m_stored, spread(m_scale, BLOCK))
        old_root = decode(v_stored, spread(v_scale, BLOCK))
        v = old_root * old_root
    # torch's lerp is exact at both ends, so that beta1 = 0 leaves the gradient itself.
    m = tl.where(one_minus_beta1 < 0.5, m + one_minus_beta1 * (g - m), g - beta1 * (g - m))
    v = beta2 * v + one_minus_beta2 * g * g

    step_size = tl.load(table + matrix * 3)
    correction = tl.load(table + matrix * 3 + 1)
    decay = tl.load(table + matrix * 3 + 2)
    if births is not None:
        age = tl.load(steps + matrix).to(tl.int32) - birth
        age = tl.minimum(tl.maximum(age, 0), last_age)
        step_size = step_size * tl.load(bias + age, mask=real, other=0.0)
        correction = correction * tl.load(bias + last_age + 1 + age, mask=real, other=0.0)
    w = w * decay - tl.div_rn(step_size * m, tl.sqrt_rn(v) * correction + eps)

    # A vector store must cover the padding too. The kernel must not change what lies there, so it
    # writes the old bits back.
    if exp_avg_scale is None:
        tl.store(exp_avg + start + lanes, tl.where(real, narrow(m, m_stored.dtype), m_stored), mask=inside)
        tl.store(exp_avg_sq + start + lanes, tl.where(real, narrow(v, v_stored.dtype), v_stored), mask=inside)
    if master is not None:
        kept = w if w_stored.dtype == tl.float32 else low_half(w)
        tl.store(master + start + lanes, tl.where(real, kept, w_stored), mask=inside)
    position = start.to(tl.uint32) + lanes.to(tl.uint32)
    if keys is not None:
        key = tl.load(keys + matrix).to(tl.uint32, bitcast=True)
        rounded = narrow_stochastic(w, counter_hash(counter_hash(position) ^ key), WEIGHT)
    else:
        rounded = narrow(w, WEIGHT)
    if PACKED_WEIGHTS:
        store_stream(weight, rounded, count, BLOCK)
    else:
        tl.store(weight, rounded, mask=real)
    if exp_avg_scale is not None:  # last, when nothing of the weights takes registers any more
        codes, m_scale = encode_first(m, real, BLOCK)
        tl.store(exp_avg + start + lanes, tl.where(real, codes, m_stored), mask=inside)
        tl.store(exp_avg_scale + group, m_scale, mask=owned)
        up = dither(position, tl.load(steps + matrix).to(tl.int32))
        codes, v_scale = encode_root(tl.sqrt_rn(v), up, real, BLOCK)
        tl.store(exp_avg_sq + start + lanes, tl.where(real, codes, v_stored), mask=inside)
        tl.store(exp_avg_sq_scale + group, v_scale, mask=owned)


def sparse_adamw_triton(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Tensor,
    offsets: Sequence[int],
    counts: Sequence[int],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    table: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    *,
    exp_avg_scale: Tensor | None = None,
    exp_avg_sq_scale: Tensor | None = None,
    master: Tensor | None = None,
    births: Tensor | None = None,
    steps: Tensor | None = None,
    bias: Tensor | None = None,
    keys: Tensor | None = None,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    packed_grads: bool = False,
    packed_weights: bool = False,
    maximize: bool = False,
) -> None:
    """Run one step in place.

    The arguments are those of `lift_kernels.ops.sparse_adamw_`, with derived scalars in place of lr
    and decay. `lift_kernels.ops.bias_correction` forms them.

    Args:
        grads: contiguous gradients.
        table: (n, 3) fp32, from `adamw_scalars`.
        bias: (2, T + 1) fp32, from `bias_table`. It comes with ``births``.
        keys: (n,) int32, from `stochastic_keys`. Given, weights are rounded stochastically.
    """
    block = block_size()
    # Without an fp32 master, a block waits for the weights last.
    late = (master is None or master.dtype == torch.int16) and weights[0].element_size() == 2 and not packed_weights
    late = late and (packed_grads or exp_avg.element_size() <= 2)
    with torch.cuda.device_of(indices):
        blocks, aligned = block_table(offsets, counts, indices.numel(), block, indices.device)
        if blocks.shape[0] == 0:
            return
        grad_table, wide_grads = pointer_table(grads, indices.device)
        weight_table, wide_weights = pointer_table(weights, indices.device)
        _sparse_adamw_kernel[(blocks.shape[0],)](
            weight_table,
            grad_table,
            blocks,
            indices,
            bits(exp_avg),
            bits(exp_avg_sq),
            exp_avg_scale,
            exp_avg_sq_scale,
            master,
            births,
            table,
            steps,
            bias,
            keys,
            inv_scale,
            found_inf,
            0 if bias is None else bias.shape[1] - 1,
            1 - beta1,
            beta1,
            1 - beta2,
            beta2,
            eps,
            WEIGHT=FORMATS[weights[0].dtype],
            GRAD=FORMATS[grads[0].dtype],
            PACKED=packed_grads,
            PACKED_WEIGHTS=packed_weights,
            ALIGNED=aligned,
            WIDE_GRADS=wide_grads,
            WIDE_WEIGHTS=packed_weights and wide_weights,
            MAXIMIZE=maximize,
            BLOCK=block,
            **step_options(indices.device, late=late, coded=exp_avg_scale is not None, aligned=aligned),
        )
