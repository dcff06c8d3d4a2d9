"""Recognize quantized weights, which LIFT does not train yet.

They are recognized by their classes, dtypes and names. The libraries that made them are never
imported.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..validation import quantized_by

_LIBRARIES = ("bitsandbytes", "hqq", "optimum", "gptqmodel", "auto_gptq", "awq", "compressed_tensors")
"""Packages whose linear layers are quantized."""
_CODES = ("qweight", "W_q", "weight_packed")
"""Names of codes in a layer: GPTQ and AWQ, HQQ, compressed-tensors."""


def quantized_layer(module: nn.Module) -> str | None:
    """What a layer is quantized by, or None for an ordinary one. Layers inside it do not count."""
    place = type(module).__module__
    linear = "linear" in type(module).__name__.lower()
    if linear and (place.split(".")[0] in _LIBRARIES or place.startswith("torch.ao.nn")):
        return f"{place.split('.')[0]} {type(module).__name__}"
    held = {name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    for name in held:
        pair = name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in held  # mxfp4
        pair |= name == "codebooks" and "codes" in held  # AQLM. Vector quantizers of activations have no codes.
        if name in _CODES or pair:
            return f"{type(module).__name__}.{name}"
    matrices = [
        t for name, t in held.items() if (linear and name == "weight" and not is_lazy(t)) or _is_stack(module, name, t)
    ]
    return next((found for found in map(quantized_by, matrices) if found is not None), None)


def _is_stack(module: nn.Module, name: str, tensor: Tensor) -> bool:
    return name in module._parameters and not is_lazy(tensor) and tensor.dim() == 3
