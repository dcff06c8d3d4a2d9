"""Argument validation shared across modules.

Each check raises before anything is changed, names the value and says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOMENT_DTYPES = (torch.float32, torch.bfloat16)
MAX_ENTRIES = 2**31 - 1
ALIGNMENT = 64
"""Entries: a segment of an arena starts at a multiple of it and is padded to the next.

That is a 128-byte boundary in every stored dtype, so wide loads are legal.
"""


def require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    """Raise ``error(message)`` unless ``condition`` holds."""
    if not condition:
        raise error(message)


def check_matrix(weight: Tensor, name: str) -> None:
    """Raise, naming the weight, unless LIFT can train it.

    That is a contiguous strided matrix, or a 3-D batch of matrices, of dtype fp32, bf16 or fp16 and
    with under 2^31 entries. It has values, so it is not on the meta device, and they are its own:
    it is neither quantized nor sharded.
    """
    quantization = quantized_by(weight)
    require(
        quantization is None,
        f"{name}: the weight is quantized ({quantization}), and LIFT trains float32, bfloat16 or float16; load the "
        "model without quantization_config, or leave this weight out",
        TypeError,
    )
    require(
        not is_traceable_wrapper_subclass(weight),
        f"{name}: the weight is a {type(weight).__name__}, and LIFT trains plain tensors; sharded weights "
        "(fully_shard, tensor parallelism) are not supported yet, replicas (DDP) are",
        TypeError,
    )
    require(weight.layout == torch.strided, f"{name}: a dense (strided) weight is needed, got layout {weight.layout}")
    require(
        weight.dtype in WEIGHT_DTYPES,
        f"{name}: weights must be float32, bfloat16 or float16, got {weight.dtype}; convert the model, or give this "
        "weight in a group with lift=False",
        TypeError,
    )
    values = ", or make groups of pack_gradients again whose model was unpacked or is gone" if weight.dim() == 1 else ""
    require(
        weight.dim() in (2, 3),
        f"{name}: LIFT trains matrices and 3-D batches, got shape {tuple(weight.shape)}; "
        f"pass lift=False for dense AdamW{values}",
    )
    require(
        0 < weight.numel() <= MAX_ENTRIES,
        f"{name}: needs 1 to 2^31-1 entries, got {weight.numel()} (int32 index lists)",
    )
    require(
        weight.is_contiguous(),
        f"{name}: the weight must be contiguous, got strides {weight.stride()}; set p.data = p.data.contiguous()",
    )
    require(
        weight.device.type != "meta",
        f"{name}: the weight is on the meta device and has no values; load the weights first (from_pretrained without "
        "device_map offloading, or to_empty and load_state_dict)",
    )


def quantized_by(weight: Tensor) -> str | None:
    """What a weight is quantized by, or None for an ordinary one.

    The dtype alone does not tell: torchao's int8 weight calls itself float32.
    """
    library, dtype = type(weight).__module__.split(".")[0], weight.dtype
    if library in ("bitsandbytes", "torchao"):
        return f"{library} {type(weight).__name__}"
    narrow = dtype.is_floating_point and dtype.itemsize == 1  # the float8 formats
    codes = narrow or not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    return str(dtype) if codes else None


def check_gradient(grad: Tensor, weight: Tensor, name: str, sparse: bool = True) -> None:
    """Raise, naming the weight, unless its gradient is strided and has its shape and device.

    With ``sparse`` the gradient must have a dtype that the sparse step supports, too.
    """
    ordinary = grad.layout == torch.strided and grad.dtype == weight.dtype and grad.device == weight.device
    if ordinary and grad.shape == weight.shape:
        return  # The usual case. The messages below take longer to build than all checks.
    require(
        grad.layout == torch.strided,
        f"{name}: sparse gradients are not supported, got layout {grad.layout}; make embeddings with sparse=False",
        RuntimeError,
    )
    require(not grad.is_complex(), f"{name}: complex gradients are not supported, got {grad.dtype}", TypeError)
    require(
        not sparse or grad.dtype in WEIGHT_DTYPES,
        f"{name}: gradients must be float32, bfloat16 or float16, got {grad.dtype}",
        TypeError,
    )
    require(grad.device == weight.device, f"{name}: the gradient is on {grad.device}, the weight on {weight.device}")
    require(
        grad.shape == weight.shape,
        f"{name}: the gradient has shape {tuple(grad.shape)}, the weight {tuple(weight.shape)}",
    )


def check_index_list(indices: Tensor, numel: int, name: str, device: torch.device | None = None) -> None:
    """Raise unless ``indices`` is a flat int32 list: sorted, unique, within ``0 .. numel - 1``.

    Reads the list, so it waits for the list's device: once, unless something is wrong.
    """
    check_index_form(indices, name, device)
    if bool(_misplaced(indices, numel)):
        _report_misplaced(indices, numel, name)


def check_index_lists(
    lists: Sequence[Tensor], numels: Sequence[int], names: Sequence[str], device: torch.device | None = None
) -> None:
    """`check_index_list` of many lists, with one wait for each device that holds some of them."""
    for indices, name in zip(lists, names):
        check_index_form(indices, name, device)
    flags: dict[torch.device, list[Tensor]] = {}
    for indices, numel in zip(lists, numels):
        flags.setdefault(indices.device, []).append(_misplaced(indices, numel))
    if any(bool(torch.stack(of_one).any()) for of_one in flags.values()):
        for indices, numel, name in zip(lists, numels, names):
            check_index_list(indices, numel, name)


def check_index_form(indices: Tensor, name: str, device: torch.device | None = None) -> None:
    """Raise unless ``indices`` is a flat int32 tensor on ``device``. Waits for nothing."""
    require(
        isinstance(indices, Tensor), f"{name}: the index list must be a tensor, got {type(indices).__name__}", TypeError
    )
    require(indices.dtype == torch.int32, f"{name}: the index list must be int32, got {indices.dtype}", TypeError)
    require(indices.dim() == 1, f"{name}: the index list must be one-dimensional, got shape {tuple(indices.shape)}")
    require(
        device is None or indices.device == device, f"{name}: the index list is on {indices.device}, expected {device}"
    )


def _disorder(indices: Tensor) -> Tensor:
    """Where an entry is not below the next. A difference of two int32 values could wrap."""
    return indices[1:] <= indices[:-1]


def _misplaced(indices: Tensor, numel: int) -> Tensor:
    """0-dim bool on the device: whether the list has disorder or an index out of range."""
    if indices.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=indices.device)
    # In a sorted list the ends are the extremes. No int32 is above MAX_ENTRIES.
    wrong = _disorder(indices).any() | (indices[0] < 0)
    return wrong if numel > MAX_ENTRIES else wrong | (indices[-1] >= numel)


def _report_misplaced(indices: Tensor, numel: int, name: str) -> None:
    """Raise with what `_misplaced` has found."""
    disorder = _disorder(indices).nonzero()
    if disorder.numel():
        at = int(disorder[0])
        raise ValueError(
            f"{name}: the index list must be sorted without duplicates, got {int(indices[at])} "
            f"before {int(indices[at + 1])} at position {at}"
        )
    low, high = int(indices[0]), int(indices[-1])
    raise IndexError(f"{name}: index {low if low < 0 else high} is out of range for {numel} entries")


def check_finite(tensor: Tensor, name: str, what: str = "weights", remedy: str = "repair or reload the weight") -> None:
    """Raise for a NaN or an infinity. Waits for the device."""
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        first = int((~finite).reshape(-1).nonzero()[0])
        raise ValueError(f"{name}: {bad} non-finite {what}, the first at flat index {first}; {remedy}")
