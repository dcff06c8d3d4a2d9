"""The public op of a step: schema, fake, argument checks and the choice of a backend, as in `ops`.
No kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..validation import require
from . import bias_correction, dispatch, reference
from .checks import check_adamw, check_segments
from .eager import row_major, skips_dispatcher


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
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    packed_grads: bool = False,
    maximize: bool = False,
    stochastic: bool = False,
    seed: int = 0,
    validate: bool = False,
    backend: str | None = None,
) -> None:
    """One AdamW step on the selected entries of n matrices, in place, in one launch.

    Args:
        weights: n contiguous tensors of one dtype (fp32, bf16, fp16) on one device.
        grads: n gradients of one dtype: dense, of the weights' shapes, or (``packed_grads``)
            vectors of ``counts[i]`` entries.
        indices: int32 arena of sorted flat positions.
        exp_avg, exp_avg_sq: arenas of the moments, fp32 or bf16.
        steps: (n,) fp32, updates of each matrix with this one counted.
        lr: a float, or a 0-dim tensor that may live on the device.
        master: fp32 arena; the truth for bf16/fp16 weights, which become its round-to-nearest-even.
        births: int32 arena, the step count at which an entry came in; given, bias correction is per
            entry.
        inv_scale: 0-dim fp32; gradients are multiplied by it (GradScaler's inverse scale times a
            clipping factor).
        found_inf: 0-dim fp32; non-zero leaves every bit as it was.
        stochastic: round the weight stochastically; bf16/fp16 weights without master only. The
            noise is a function of (``seed``, step, arena position), the same on every backend.

    Raises ValueError, TypeError or IndexError, before anything is written, with the position in
    ``weights`` and the value.
    """
    beta1, beta2 = betas
    plain = skips_dispatcher(indices)
    arena = weights, grads, indices, offsets, counts, exp_avg, exp_avg_sq, steps
    native = _native_step() if plain and indices.is_cpu and backend is None and not validate else None
    if native is not None and type(lr) is float:
        scales = inv_scale, found_inf, packed_grads, maximize, stochastic, seed & 0xFFFFFFFF
        try:
            bias = None if births is None else bias_correction.bias_table(beta1, beta2, indices.device)
            done = native(*arena, lr, beta1, beta2, eps, weight_decay, master, births, bias, *scales)
        except (RuntimeError, ValueError, TypeError):
            done = False  # Fall through: the Python path below raises the detailed error.
        if done:
            increment_version([*weights, exp_avg, exp_avg_sq, *([] if master is None else [master])])
            return
    lr = lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)
    op = _sparse_adamw_op if plain else torch.ops.lift_kernels.sparse_adamw_.default
    op(
        *arena,
        lr,
        master,
        births,
        inv_scale,
        found_inf,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        packed_grads=packed_grads,
        maximize=maximize,
        stochastic=stochastic,
        seed=seed,
        validate=validate,
        backend=backend,
    )


@functools.cache
def _native_step() -> Callable[..., bool] | None:
    """The native step, when CPU tensors go to it. Its own checks of form take a tenth of Python's
    time when caches are cold.

    Kept, as are the functions beside it: with cold caches, looking all of them up in modules takes
    1 % of a step on 16 M weights.
    """
    serves = dispatch.choose(None, torch.device("cpu"), "sparse_adamw_") == "native-cpu"
    return torch.ops.lift_kernels_native.sparse_adamw_.default if serves else None


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
    inv_scale=None,
    found_inf=None,
    *,
    beta1,
    beta2,
    eps,
    weight_decay,
    packed_grads=False,
    maximize=False,
    stochastic=False,
    seed=0,
    validate=False,
    backend=None,
):
    arena = weights, grads, indices, offsets, counts, exp_avg, exp_avg_sq, steps
    optional = master, births, inv_scale, found_inf
    check_adamw(*arena, lr, *optional, packed_grads, stochastic)
    if validate:
        check_segments(weights, indices, offsets, counts)
    if not weights:
        return
    name = dispatch.choose(backend, indices.device, "sparse_adamw_")
    steps = steps.contiguous()
    arena = *arena[:-1], steps
    increment_version([*weights, exp_avg, exp_avg_sq, *([] if master is None else [master])])
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
            inv_scale=inv_scale,
            found_inf=found_inf,
            packed_grads=packed_grads,
            maximize=maximize,
            stochastic=stochastic,
            seed=seed,
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
            inv_scale=inv_scale,
            found_inf=found_inf,
            packed_grads=packed_grads,
            maximize=maximize,
        )
    scales = inv_scale, found_inf, packed_grads, maximize, stochastic, seed & 0xFFFFFFFF
    native = torch.ops.lift_kernels_native.sparse_adamw_.default
    done = native(*launch, steps, float(lr), beta1, beta2, eps, weight_decay, master, births, bias, *scales)
    require(done, "the native step refused arguments that had passed the checks", RuntimeError)


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
    inv_scale=None,
    found_inf=None,
    *,
    packed_grads=False,
    stochastic=False,
    **options,
):
    arena = weights, grads, indices, offsets, counts, exp_avg, exp_avg_sq, steps
    check_adamw(*arena, lr, master, births, inv_scale, found_inf, packed_grads, stochastic)


# Not by custom_op, which passes two more Python layers at every call: 0.3 ms when the caches are
# cold, as long as a small step. What they would do, this op does itself: it bumps the versions of
# what it writes.
_library = torch.library.Library("lift_kernels", "FRAGMENT")
_library.define(
    "sparse_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor indices, int[] offsets, int[] counts, "
    "Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor steps, Tensor lr, Tensor(d!)? master=None, "
    "Tensor? births=None, Tensor? inv_scale=None, Tensor? found_inf=None, *, float beta1, float beta2, float eps, "
    "float weight_decay, bool packed_grads=False, bool maximize=False, bool stochastic=False, "
    "int seed=0, bool validate=False, str? backend=None) -> ()"
)
_library.impl("sparse_adamw_", _sparse_adamw_op, "CompositeExplicitAutograd")
torch.library.register_fake("lift_kernels::sparse_adamw_", _sparse_adamw_fake, lib=_library)
