"""The public op of an optimizer step.

`lift_kernels.ops` describes what all ops have in common.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from ..validation import require
from . import bias_correction, dispatch, reference
from .arena_checks import check_adamw, check_overlap, check_segments
from .dispatch import native_op
from .eager import active_modes, row_major, skips_dispatcher


def sparse_adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Tensor,
    offsets: Sequence[int],
    counts: Sequence[int],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    lr: float | Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
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
    validate: bool = False,
    backend: str | None = None,
) -> None:
    """Apply one AdamW step to the selected entries of n matrices, in place, in one launch.

    The update is AdamW (Loshchilov & Hutter 2019, Algorithm 2) on the entries of the masks, as in
    LIFT (arXiv 2506.00772, section 3). All other entries of the weights keep their bits. An *arena*
    is a vector that holds the segments of all matrices.

    Args:
        weights: n contiguous tensors of one dtype (float32, bfloat16, float16) on one device.
        grads: n gradients of one dtype. They have the shapes of the weights, or ``counts[i]``
            entries each with ``packed_grads``.
        indices: int32 arena of the sorted flat positions.
        offsets: where the segment of each matrix starts in the arenas.
        counts: entries of each segment.
        exp_avg: arena of the first moments, float32, bfloat16 or int8 codes.
        exp_avg_sq: arena of the second moments, of the same dtype, or uint8 codes of their square
            roots (`lift_kernels.ops.state_formats`).
        steps: (n,) float32, the updates of each matrix, this one included.
        lr: learning rate, a float or a 0-dim tensor on the CPU or on the device.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled decay, of the selected entries only.
        master: float32 arena of master weights for bfloat16 or float16 weights. It is updated, and
            the weights become its values rounded to nearest even. An int16 arena holds the low
            halves of the masters of bfloat16 weights.
        births: int32 arena, the step count at which each entry was selected. Given, the bias
            correction of an entry counts the steps since then. None counts the steps of its matrix.
        exp_avg_scale, exp_avg_sq_scale: float32 scales of the codes, one for each 32 positions of
            the arenas. Segments must then start at multiples of 32.
        inv_scale: 0-dim float32 on the device, by which gradients are multiplied: the inverse scale
            of a GradScaler times a clipping factor.
        found_inf: 0-dim float32 on the device. If it is not zero, nothing changes.
        packed_grads: gradients are packed vectors and not dense.
        packed_weights: weights are vectors of the ``counts[i]`` selected entries, and no matrices.
            So are the gradients then. Only the length of ``indices`` counts: it may be one number
            that is expanded.
        maximize: step along the gradient and not against it.
        stochastic: round the weights stochastically. This needs bfloat16 or float16 weights and no
            master. The noise is a function of ``seed``, step and arena position, the same on every
            backend.
        seed: of the noise.
        validate: check the index lists, which waits for the device.
        backend: name of a backend, see `lift_kernels.backends`. None takes the fastest usable one.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: an argument has a wrong shape, layout, device or value, or segments overlap.
        IndexError: a segment does not fit in the arena, or ``validate`` found a position out of
            range.
        RuntimeError: the backend cannot run here.

        Every error is raised before anything is written. It names the position in ``weights`` and
        the value.
    """
    beta1, beta2 = betas
    arena = weights, grads, indices, offsets, counts, exp_avg, exp_avg_sq, steps
    ordinary = type(lr) is float and backend is None and not validate and type(indices) is Tensor and indices.is_cpu
    ordinary = ordinary and not torch.is_grad_enabled() and not is_compiling() and active_modes() == 0
    if ordinary and (native := native_op("sparse_adamw_")):
        # The usual step on a CPU. Its argument checks take a tenth of the time of the Python ones
        # when the caches are cold. Until it runs, no Python code of another module does: looking
        # functions up in other modules takes 1 % of a step on 16 M weights.
        scales = exp_avg_scale, exp_avg_sq_scale, inv_scale, found_inf
        forms = packed_grads, packed_weights, maximize, stochastic, seed & 0xFFFFFFFF
        try:
            bias = None if births is None else _cpu_bias_table(beta1, beta2)
            done = native(*arena, lr, beta1, beta2, eps, weight_decay, master, births, bias, *scales, *forms)
        except (RuntimeError, ValueError, TypeError):
            done = False  # Fall through: the Python path below raises the detailed error.
        if done:
            increment_version([*weights, exp_avg, exp_avg_sq])
            increment_version([x for x in (master, exp_avg_scale, exp_avg_sq_scale) if x is not None])
            return
    lr = lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)
    op = _sparse_adamw_op if skips_dispatcher(indices) else torch.ops.lift_kernels.sparse_adamw_.default
    op(
        *arena,
        lr,
        master,
        births,
        exp_avg_scale,
        exp_avg_sq_scale,
        inv_scale,
        found_inf,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        packed_grads=packed_grads,
        packed_weights=packed_weights,
        maximize=maximize,
        stochastic=stochastic,
        seed=seed,
        validate=validate,
        backend=backend,
    )


@functools.lru_cache(maxsize=16)
def _cpu_bias_table(beta1: float, beta2: float) -> Tensor:
    """Return the bias corrections by age on the CPU. A hit of the cache runs no Python code."""
    return bias_correction.bias_table(beta1, beta2, torch.device("cpu"))


def _sparse_adamw_op(
    weights,
    grads,
    indices,
    offsets,
    counts,
    exp_avg,
    exp_avg_sq,
    steps,
    lr,
    master=None,
    births=None,
    exp_avg_scale=None,
    exp_avg_sq_scale=None,
    inv_scale=None,
    found_inf=None,
    *,
    beta1,
    beta2,
    eps,
    weight_decay,
    packed_grads=False,
    packed_weights=False,
    maximize=False,
    stochastic=False,
    seed=0,
    validate=False,
    backend=None,
):
    arena = weights, grads, indices, offsets, counts, exp_avg, exp_avg_sq, steps
    optional = master, births, exp_avg_scale, exp_avg_sq_scale, inv_scale, found_inf
    check_adamw(*arena, lr, *optional, packed_grads, packed_weights, stochastic)
    if validate and packed_weights:
        check_overlap(offsets, counts)
    elif validate:
        check_segments(weights, indices, offsets, counts)
    if not weights:
        return
    name = dispatch.choose(backend, indices.device, "sparse_adamw_")
    steps = steps.contiguous()
    arena = *arena[:-1], steps
    increment_version([*weights, exp_avg, exp_avg_sq])
    increment_version([x for x in (master, exp_avg_scale, exp_avg_sq_scale) if x is not None])
    if name == "reference":
        return reference.sparse_adamw_ref(
            *arena,
            lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            master=master,
            births=births,
            stochastic=stochastic,
            seed=seed,
            exp_avg_scale=exp_avg_scale,
            exp_avg_sq_scale=exp_avg_sq_scale,
            inv_scale=inv_scale,
            found_inf=found_inf,
            packed_grads=packed_grads,
            packed_weights=packed_weights,
            maximize=maximize,
        )
    launch = weights, [row_major(g) for g in grads], indices, offsets, counts, exp_avg, exp_avg_sq
    bias = bias_correction.bias_table(beta1, beta2, indices.device) if births is not None else None
    if name == "triton":
        from .triton.sparse_adamw import sparse_adamw_triton

        table = bias_correction.adamw_scalars(steps, lr, beta1, beta2, weight_decay, births is not None)
        keys = bias_correction.stochastic_keys(steps, seed) if stochastic else None
        return sparse_adamw_triton(
            *launch,
            table,
            beta1,
            beta2,
            eps,
            master=master,
            births=births,
            steps=steps,
            bias=bias,
            keys=keys,
            exp_avg_scale=exp_avg_scale,
            exp_avg_sq_scale=exp_avg_sq_scale,
            inv_scale=inv_scale,
            found_inf=found_inf,
            packed_grads=packed_grads,
            packed_weights=packed_weights,
            maximize=maximize,
        )
    native = torch.ops.lift_kernels_native.sparse_adamw_.default
    scales = exp_avg_scale, exp_avg_sq_scale, inv_scale, found_inf
    forms = packed_grads, packed_weights, maximize, stochastic, seed & 0xFFFFFFFF
    numbers = float(lr), beta1, beta2, eps, weight_decay
    done = native(*launch, steps, *numbers, master, births, bias, *scales, *forms)
    require(done, "internal error: the native step rejected arguments that passed the checks", RuntimeError)


def _sparse_adamw_fake(
    weights,
    grads,
    indices,
    offsets,
    counts,
    exp_avg,
    exp_avg_sq,
    steps,
    lr,
    master=None,
    births=None,
    exp_avg_scale=None,
    exp_avg_sq_scale=None,
    inv_scale=None,
    found_inf=None,
    *,
    packed_grads=False,
    packed_weights=False,
    stochastic=False,
    **options,
):
    arena = weights, grads, indices, offsets, counts, exp_avg, exp_avg_sq, steps
    optional = master, births, exp_avg_scale, exp_avg_sq_scale, inv_scale, found_inf
    check_adamw(*arena, lr, *optional, packed_grads, packed_weights, stochastic)


# This op is not defined by custom_op, which adds two Python layers to every call. They cost 0.3 ms
# when the caches are cold, as long as a small step. The op does their work itself: it bumps the
# version counters of what it writes.
_library = torch.library.Library("lift_kernels", "FRAGMENT")
_library.define(
    "sparse_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor indices, int[] offsets, int[] counts, "
    "Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor steps, Tensor lr, Tensor(d!)? master=None, "
    "Tensor? births=None, Tensor(e!)? exp_avg_scale=None, Tensor(f!)? exp_avg_sq_scale=None, Tensor? inv_scale=None, "
    "Tensor? found_inf=None, *, float beta1, float beta2, float eps, float weight_decay, bool packed_grads=False, "
    "bool packed_weights=False, bool maximize=False, bool stochastic=False, int seed=0, bool validate=False, "
    "str? backend=None) -> ()"
)
_library.impl("sparse_adamw_", _sparse_adamw_op, "CompositeExplicitAutograd")
torch.library.register_fake("lift_kernels::sparse_adamw_", _sparse_adamw_fake, lib=_library)
