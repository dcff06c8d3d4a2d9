"""Every public op of the package.

Each op has a schema, a fake, argument checks and a choice of backend in the module of its stem. No
kernels are written here. `reference` is the executable specification, `triton` holds the Triton
kernels, `cuda` launches the CUDA kernels of csrc, and the C++ ops are called under their private
names.

An op writes only to tensors that its schema marks. So autograd's version counters,
functionalization and `torch.compile` see every mutation. Arena arguments (``indices``, moments,
``master``, ``births``) hold the segments of many matrices. Matrix i owns ``offsets[i] .. offsets[i]
+ counts[i]``. Index lists are trusted unless ``validate=True``. `PackedState` checks them once,
where they enter. Ops never wait for the device, apart from ``validate``, the reference backend and
`lowrank_topk`.

A fake checks its arguments like the op itself. A single meta tensor among the arguments sends a
call to the fake, which would otherwise silently do nothing.
"""

from .arena_migrate import arena_migrate_
from .lowrank_topk import bitmap_to_indices, lowrank_topk
from .packed_ops import packed_gather, packed_l2_norm, packed_migrate, packed_scatter_
from .packed_weight_grad import packed_weight_grad
from .sparse_adamw import sparse_adamw_
from .subspace_ops import chebyshev_step_, cholesky_qr_, gaussian_sketch

__all__ = [
    "arena_migrate_",
    "bitmap_to_indices",
    "chebyshev_step_",
    "cholesky_qr_",
    "gaussian_sketch",
    "lowrank_topk",
    "packed_gather",
    "packed_l2_norm",
    "packed_migrate",
    "packed_scatter_",
    "packed_weight_grad",
    "sparse_adamw_",
]
