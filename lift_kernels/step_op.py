"""The public op of a step: schema, fake, argument checks and the choice of a backend, as in `ops`.
No kernels.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from . import dispatch, reference, scalars
from .checks import check_adamw, check_segments, require

logger = logging.getLogger("lift_kernels")
_strided_logged = False


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
    plain = type(indices) is Tensor and not torch.is_grad_enabled() and not is_compiling()
    if (
        plain
        and indices.is_cpu
        and backend is None
        and not validate
        and type(lr) is float
        and (native := _native_step())
    ):
        try:
            bias = None if births is None else scalars.bias_table(beta1, beta2, indices.device)
            done = native(
                weights,
                grads,
                indices,
                offsets,
                counts,
                exp_avg,
                exp_avg_sq,
                steps,
                lr,
                beta1,
                beta2,
                eps,
                weight_decay,
                master,
                births,
                bias,
                inv_scale,
                found_inf,
                packed_grads,
                maximize,
                stochastic,
                seed & 0xFFFFFFFF,
            )
        except (
            RuntimeError,
            ValueError,
            TypeError,
        ):  # arguments that the native op cannot take: below they are told so in words
            done = False
        if done:
            increment_version([*weights, exp_avg, exp_avg_sq, *([] if master is None else [master])])
            return
    lr = lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)
    # Nothing is recorded or traced in an optimizer's step on plain tensors: the dispatcher's Python
    # layers are passed by.
    op = _sparse_adamw_op if plain else torch.ops.lift_kernels.sparse_adamw_.default
    op(
        weights,
        grads,
        indices,
        offsets,
        counts,
        exp_avg,
        exp_avg_sq,
        steps,
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
    check_adamw(
        weights,
        grads,
        indices,
        offsets,
        counts,
        exp_avg,
        exp_avg_sq,
        steps,
        lr,
        master,
        births,
        inv_scale,
        found_inf,
        packed_grads,
        stochastic,
    )
    if validate:
        check_segments(weights, indices, offsets, counts)
    if not weights:
        return
    name = dispatch.choose(backend, indices.device, "sparse_adamw_")
    steps = steps.contiguous()
    increment_version([*weights, exp_avg, exp_avg_sq, *([] if master is None else [master])])
    if name == "reference":
        return reference.sparse_adamw_ref(
            weights,
            grads,
            indices,
            offsets,
            counts,
            exp_avg,
            exp_avg_sq,
            steps,
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
    grads = [row_major(g) for g in grads]
    bias = scalars.bias_table(beta1, beta2, indices.device) if births is not None else None
    if name == "triton":
        from .triton_kernels.adamw import sparse_adamw_triton

        table = scalars.adamw_scalars(steps, lr, beta1, beta2, weight_decay, births is not None)
        keys = scalars.stochastic_keys(steps, seed) if stochastic else None
        return sparse_adamw_triton(
            weights,
            grads,
            indices,
            offsets,
            counts,
            exp_avg,
            exp_avg_sq,
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
    done = torch.ops.lift_kernels_native.sparse_adamw_.default(
        weights,
        grads,
        indices,
        offsets,
        counts,
        exp_avg,
        exp_avg_sq,
        steps,
        float(lr),
        beta1,
        beta2,
        eps,
        weight_decay,
        master,
        births,
        bias,
        inv_scale,
        found_inf,
        packed_grads,
        maximize,
        stochastic,
        seed & 0xFFFFFFFF,
    )
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
    check_adamw(
        weights,
        grads,
        indices,
        offsets,
        counts,
        exp_avg,
        exp_avg_sq,
        steps,
        lr,
        master,
        births,
        inv_scale,
        found_inf,
        packed_grads,
        stochastic,
    )


# Not by custom_op, which passes two more Python layers at every call: 0.3 ms when the caches are
# cold, as long as a small step. What they would do, this op does itself: it bumps the versions of
# what it writes.
_library = torch.library.Library("lift_kernels", "FRAGMENT")
_library.define(
    "sparse_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor indices, int[] offsets, int[] counts, "
    "Tensor(b!) exp_avg, "
    "Tensor(c!) exp_avg_sq, Tensor steps, Tensor lr, Tensor(d!)? master=None, Tensor? births=None, "
    "Tensor? inv_scale=None, "
    "Tensor? found_inf=None, *, float beta1, float beta2, float eps, float weight_decay, bool packed_grads=False, "
    "bool maximize=False, bool stochastic=False, int seed=0, bool validate=False, str? backend=None) -> ()"
)
_library.impl("sparse_adamw_", _sparse_adamw_op, "CompositeExplicitAutograd")
torch.library.register_fake("lift_kernels::sparse_adamw_", _sparse_adamw_fake, lib=_library)


def row_major(grad: Tensor) -> Tensor:
    """``grad``, copied if it must be; the first copy is logged."""
    if grad.is_contiguous():
        return grad
    global _strided_logged
    if not _strided_logged:
        _strided_logged = True
        logger.warning(
            "a gradient of shape %s has strides %s: it is copied to row-major order at every step",
            tuple(grad.shape),
            grad.stride(),
        )
    return grad.contiguous()
