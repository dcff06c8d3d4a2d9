"""Variants of Triton kernels and launches of CUDA kernels to compile.

`bench.kernels.report` compiles them. Each declares what its machine code is held to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from triton.backends.compiler import GPUTarget

from lift_kernels.ops.triton import targets

TARGETS = (75, 80, 86, 89, 90, 100, 120)
TESTED = (80, 90, 100)
"""Targets for which `make test` compiles every kernel.

It compiles those whose options depend on the target for `TESTED_PRODUCTS`, too.
"""
TESTED_PRODUCTS = (75, 120)
BLOCK = 1024
THREADS = 128
FORMATS = {"fp32": "fp32", "fp16": "fp16", "bf16": "i16", "int32": "i32"}  # bf16 travels as bit patterns
FORMATS |= {"int16": "i16", "int8": "i8", "uint8": "u8"}
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int32": 4, "int16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class Case:
    """One variant of a Triton kernel.

    ``types`` holds Triton's types of the runtime arguments. Every argument that is not there is a
    constant, and None unless ``constants`` says otherwise. ``loads`` and ``stores`` are the dtypes
    of the contiguous streams. ``multiples`` are integers that 16 divides.
    """

    name: str
    kernel: str  # module.function in lift_kernels.ops.triton
    types: dict[str, str]
    constants: dict[str, object] = field(default_factory=dict)
    loads: tuple[str, ...] | None = ()  # None: not counted, since the compiler may bypass the registers
    stores: tuple[str, ...] | None = ()
    multiples: tuple[str, ...] = ()  # of 16
    options: dict[str, object] = field(default_factory=dict)  # compiler options instead of the streaming kernels'
    by_target: Callable[[GPUTarget], dict] | None = None  # more constants and options, as the launcher takes them
    tensor_cores: bool = False  # on cards that have them
    # All copies to shared memory past the registers must move 128 bits, on cards that have them.
    wide_copies: bool = False
    single_bytes: int | None = None  # accesses of a byte that a thread may have in its code; None: any

    @property
    def threads(self) -> int:
        """Threads of a program that works on a stream."""
        warps = self.options.get("num_warps", THREADS // 32)
        assert isinstance(warps, int)
        return 32 * warps

    def needed(self, streams: tuple[str, ...] | None) -> int:
        """128-bit accesses a thread makes when all of these streams move as wide as they can.

        The entries of a thread have less than 128 bits of a stream of codes. Neither have they of
        16-bit streams where a program has eight warps.
        """
        return sum(BLOCK // self.threads * BYTES[dtype] // 16 for dtype in streams or ())

    def targets(self, tested: bool) -> tuple[int, ...]:
        """CUDA targets to compile for: those of the report, or fewer that are ``tested``."""
        if not tested:
            return TARGETS
        return (*TESTED, *TESTED_PRODUCTS) if self.by_target else TESTED


@dataclass(frozen=True)
class Launch:
    """How a CUDA kernel is launched, and the least 128-bit accesses of its machine code."""

    threads: int = 256  # a block
    dynamic_shared: int = 0  # bytes a block; what is declared in the kernel is read from the machine code
    wide_loads: int = 0
    wide_stores: int = 0


# By the kernel's name, for all of its template instances, or with template arguments for one of
# them. A kernel without an entry is taken for `Launch()` and still checked for spills. The sources
# are setup.py's CUDA_SOURCES.
CUDA_LAUNCHES = {
    "gaussian_sketch_kernel": Launch(wide_stores=1),
    "gram_kernel<64>": Launch(wide_loads=6, wide_stores=5),  # of the tile and, once, of the block that it raises
    "gram_kernel<128>": Launch(wide_loads=6, wide_stores=17),
    "bitmap_choose_kernel": Launch(threads=1024, wide_loads=3),  # one in each loop over candidates
    "bitmap_count_kernel": Launch(wide_loads=1),
    "bitmap_place_kernel": Launch(threads=1024),
    "bitmap_list_kernel": Launch(wide_loads=1, wide_stores=1),
    "multiply_upper_kernel<64>": Launch(wide_loads=2, wide_stores=4),
    "multiply_upper_kernel<128>": Launch(wide_loads=2, wide_stores=16),
}


def adamw_case(
    weight,
    grad,
    moments,
    *,
    master=False,
    split=False,
    births=False,
    packed=False,
    packed_weights=False,
    stochastic=False,
    scaled=False,
    aligned=True,
    warps=4,
):
    """A variant of the AdamW kernel.

    Dtypes are keys of `FORMATS`, and "int8" stands for 8-bit moments. ``split``: the master is its
    low halves. ``scaled``: with inv_scale and found_inf. The launcher takes eight ``warps`` where a
    block waits for its weights last.
    """
    coded, packed = moments == "int8", packed or packed_weights
    stored = {"exp_avg": moments, "exp_avg_sq": "uint8" if coded else moments}
    types = dict.fromkeys(("weights", "grads", "blocks"), "*i64")
    types |= {"indices": "*i32", "table": "*fp32", "last_age": "i32"}
    types |= {name: f"*{FORMATS[dtype]}" for name, dtype in stored.items()}
    types |= dict.fromkeys(("exp_avg_scale", "exp_avg_sq_scale", "steps") if coded else (), "*fp32")
    types |= dict.fromkeys(("one_minus_beta1", "beta1", "one_minus_beta2", "beta2", "eps"), "fp32")
    optional = {
        "master": ({"master": "*fp32"}, master),
        "low halves": ({"master": "*i16"}, split),
        "births": ({"births": "*i32", "steps": "*fp32", "bias": "*fp32"}, births),
        "packed weights": ({}, packed_weights),
        "stochastic": ({"keys": "*i32"}, stochastic),
        "scaled": ({"inv_scale": "*fp32", "found_inf": "*fp32"}, scaled),
    }
    words = [f"weight {weight}, grad {grad}{' packed' if packed else ''}, moments {moments}"]
    for word, (arguments, present) in optional.items():
        if present:
            types |= arguments
            words.append(word)
    constants = {"PACKED": packed, "ALIGNED": aligned, "WIDE_GRADS": aligned, "MAXIMIZE": False, "BLOCK": BLOCK}
    constants |= {"PACKED_WEIGHTS": packed_weights, "WIDE_WEIGHTS": packed_weights and aligned}
    constants |= {"WEIGHT": FORMATS[weight], "GRAD": FORMATS[grad]}
    if aligned:
        stores = (*stored.values(), *["fp32"] * master, *["int16"] * split)
        loads = (*stores, *["int32"] * births, *[grad] * packed)
        loads += (weight,) * (packed_weights and not master) + ("int32",) * (not packed_weights)
        stores += (weight,) * packed_weights
    else:
        loads = stores = ()
        words.append("unaligned")
    options = {"num_warps": warps}
    if warps != THREADS // 32:
        words.append(f"{warps} warps")
    if coded and aligned:
        options["maxnreg"] = targets.CODED_REGISTERS[warps]
    return Case(
        "sparse_adamw: " + ", ".join(words),
        "sparse_adamw._sparse_adamw_kernel",
        types,
        constants,
        loads,
        stores,
        options=options,
        single_bytes=0 if coded and aligned else None,
    )


def packed_cases():
    """The variants of gather, scatter, migrate and the sums of squares."""
    block = {"BLOCK": BLOCK}
    for source, out in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "fp32")):
        types = {"source": f"*{FORMATS[source]}", "out": f"*{FORMATS[out]}", "indices": "*i32", "count": "i32"}
        name = f"packed_gather: {source} to {out}"
        yield Case(name, "packed_ops._packed_gather_kernel", types, block, ("int32",), (out,))
        types = {"dest": f"*{FORMATS[out]}", "values": f"*{FORMATS[source]}", "indices": "*i32", "count": "i32"}
        name = f"packed_scatter: {source} to {out}"
        yield Case(name, "packed_ops._packed_scatter_kernel", types, block, ("int32", source))
    for dtype in ("fp32", "bf16", "int32"):
        types = dict.fromkeys(("old_indices", "new_indices"), "*i32")
        types |= dict.fromkeys(("values", "out"), f"*{FORMATS[dtype]}")
        types |= dict.fromkeys(("old_count", "new_count", "stride"), "i32")
        yield Case(f"packed_migrate: {dtype}", "packed_ops._packed_migrate_kernel", types, block, ("int32",))
    for dtype, packed in (("fp32", False), ("bf16", False), ("fp32", True), ("bf16", True)):
        types = {"grads": "*i64", "blocks": "*i64", "indices": "*i32", "partials": "*fp64"}
        constants = block | {"GRAD": FORMATS[dtype], "PACKED": packed, "ALIGNED": True, "WIDE_GRADS": True}
        name = f"packed_square_sums: {dtype}{' packed' if packed else ''}"
        yield Case(name, "packed_ops._packed_square_sums_kernel", types, constants, (dtype if packed else "int32",))


def migrate_cases():
    """The launches of a migration: old positions, and each arena taken to scratch and put back."""
    tables = {"matrices": "*i64", "blocks": "*i64"}
    block = {"BLOCK": BLOCK, "WIDE_LISTS": True}
    types = tables | {"indices": "*i32", "positions": "*i32", "kept": "*i64"}
    find = "arena_migrate._arena_migrate_find_kernel"
    yield Case("arena_migrate: find", find, types, block, ("int32",), ("int32",))
    arenas = {"fp32 moments": ("fp32", None), "bf16 moments": ("bf16", None), "births": ("int32", None)}
    arenas |= {f"masters of {weight}": ("int32", weight) for weight in ("fp32", "fp16", "bf16")}
    for name, (dtype, weight) in arenas.items():
        types = tables | dict.fromkeys(("arena", "values"), f"*{FORMATS[dtype]}") | {"positions": "*i32"}
        types |= {"steps": "*fp32"} if name == "births" else {}
        constants = block | {"WEIGHT": FORMATS[weight] if weight else None}
        take = "arena_migrate._arena_migrate_take_kernel"
        yield Case(f"arena_migrate: take {name}", take, types, constants, ("int32",), (dtype,))
    for dtype in ("fp32", "bf16", "int32"):
        types = tables | dict.fromkeys(("values", "arena"), f"*{FORMATS[dtype]}")
        put = "arena_migrate._arena_migrate_put_kernel"
        yield Case(f"arena_migrate: put {dtype}", put, types, block | {"ALIGNED": True}, (dtype,), (dtype,))
    for dtype in ("int8", "uint8"):
        types = tables | {"arena": f"*{FORMATS[dtype]}", "scales": "*fp32", "values": "*fp32"}
        positions = {"positions": "*i32"}
        yield Case(f"arena_migrate: take {dtype} codes", take, types | positions, block, ("int32",), ("fp32",))
        constants = block | {"ALIGNED": True}
        last_block = BLOCK // THREADS  # is stored under a mask, in code of its own
        yield Case(
            f"arena_migrate: put {dtype} codes", put, types, constants, ("fp32",), (dtype,), single_bytes=last_block
        )
    types = tables | {"arena": "*i32"}
    yield Case("arena_migrate: put lists", put, types, block | {"ALIGNED": True}, ("int32",), ("int32",))


def weight_grad_case(dtype, out, precision="tf32", one=None):
    """The fused product of a weight gradient with the launcher's tile.

    An fp32 one is by TF32 or exact. ``one``: the side "m" or "n" that is 1, which the compiler
    takes for a constant.
    """
    types = {name: f"*{dtype}" for name in ("grad_output", "input")} | {"out": f"*{FORMATS[out]}", "tokens": "i32"}
    types |= dict.fromkeys(("bitmap", "firsts"), "*i32") | dict.fromkeys({"m", "n"} - {one}, "i32")
    name = (
        f"packed_weight_grad: {dtype}{f' by {precision}' if dtype == 'fp32' else ''} to "
        f"{out}{f', {one} = 1' if one else ''}"
    )
    return Case(
        name,
        "packed_weight_grad._packed_weight_grad_kernel",
        types,
        {one: 1} if one else {},
        None,
        None,
        multiples=tuple(sorted({"m", "n"} - {one})),
        options={"enable_fp_fusion": True},
        by_target=partial(targets.weight_grad_options, fp32=dtype == "fp32", tf32=precision == "tf32"),
        tensor_cores=precision != "ieee",
    )


def tile_firsts_case():
    """The search that comes before the fused product of a weight gradient."""
    from lift_kernels.ops.triton import packed_weight_grad

    types = dict.fromkeys(("indices", "firsts"), "*i32") | dict.fromkeys(("m", "n", "count", "stride"), "i32")
    constants = {"COLUMNS": 128, "BLOCK": packed_weight_grad.SEARCHES}
    return Case("packed_weight_grad: firsts of tiles", "packed_weight_grad._tile_firsts_kernel", types, constants)


def select_cases():
    """The passes over the tiles of a low-rank product, and the kernels of bitmaps."""
    from lift_kernels.ops.triton import bitmap_to_indices

    factors = {"left": "*fp32", "right": "*fp32", "m": "i32", "n": "i32", "r": "i32", "bracket": "*i32"}
    scan = factors | {"bitmap": "*i32", "counts": "*i32", "capacity": "i32"}
    passes = {
        "candidates": ("lowrank_topk._lowrank_topk_kernel", scan | {"candidates": "*i64"}),
        "ties": ("lowrank_topk._lowrank_topk_kernel", scan | {"ties": "*i32"}),
        "histogram": ("lowrank_topk._lowrank_histogram_kernel", factors | {"histogram": "*i32", "shift": "i32"}),
    }
    for name, (kernel, types) in passes.items():
        options = partial(targets.lowrank_options, histogram=name == "histogram")
        wide, narrow = ({"by_target": partial(options, wide=wide), "tensor_cores": True} for wide in (True, False))
        yield Case(f"lowrank_topk: {name}", kernel, types, multiples=("r",), wide_copies=True, **wide)
        yield Case(f"lowrank_topk: {name}, odd rank", kernel, types, **narrow)
    block = {"BLOCK": BLOCK}
    types = {"bitmap": "*i32", "positions": "*i32", "count": "i32", "n": "i32"}
    yield Case("set_bits", "bitmap_to_indices._set_bits_kernel", types, block, ("int32",))
    words = {"bitmaps": "*i32", "length": "i32", "n": "i32"}
    twice = ("int32", "int32")  # a whole block or the last one, whose length 16 divides too
    yield Case(
        "count_bits",
        "bitmap_to_indices._count_bits_kernel",
        words | {"totals": "*i32"},
        block,
        twice,
        multiples=("length",),
    )
    types = words | {"ends": "*i32", "out": "*i32", "count": "i32"}
    yield Case("list_bits", "bitmap_to_indices._list_bits_kernel", types, block, twice, multiples=("length",))
    types = dict.fromkeys(("bitmaps", "counts", "thresholds", "status"), "*i32") | {"candidates": "*i64"}
    types |= dict.fromkeys(("m", "n", "capacity", "k"), "i32")
    yield Case(
        "bitmap_choose",
        "bitmap_to_indices._bitmap_choose_kernel",
        types,
        bitmap_to_indices.CHOOSE,
        options={"num_warps": bitmap_to_indices.CHOOSE_WARPS},
    )


CASES = (
    adamw_case("fp32", "fp32", "fp32"),
    adamw_case("fp32", "fp32", "fp32", packed=True, births=True),
    adamw_case("bf16", "bf16", "fp32", master=True),
    adamw_case("bf16", "bf16", "fp32", master=True, packed=True, births=True, scaled=True),
    adamw_case("bf16", "bf16", "bf16", master=True),
    adamw_case("bf16", "bf16", "bf16", master=True, packed=True),
    adamw_case("bf16", "fp32", "bf16", packed=True, stochastic=True),
    adamw_case("bf16", "bf16", "bf16", stochastic=True, births=True),
    adamw_case("fp16", "fp16", "fp32", master=True, births=True, scaled=True),
    adamw_case("fp16", "fp16", "bf16", packed=True, stochastic=True),
    adamw_case("bf16", "bf16", "fp32", master=True, packed=True, births=True, aligned=False),
    adamw_case("fp32", "fp32", "int8", births=True),
    adamw_case("bf16", "bf16", "int8", warps=8),
    adamw_case("bf16", "bf16", "int8", packed=True, warps=8),
    adamw_case("bf16", "bf16", "int8", split=True, warps=8),
    adamw_case("bf16", "bf16", "int8", split=True, packed=True, warps=8),
    adamw_case("bf16", "bf16", "int8", split=True, births=True, scaled=True, warps=8),
    adamw_case("bf16", "bf16", "int8", stochastic=True, births=True, packed=True, warps=8),
    adamw_case("fp16", "fp16", "int8", master=True, packed=True, births=True),
    adamw_case("bf16", "bf16", "int8", split=True, packed_weights=True, births=True, scaled=True),
    adamw_case("bf16", "bf16", "fp32", master=True, packed_weights=True),
    adamw_case("bf16", "fp32", "bf16", stochastic=True, packed_weights=True),
    adamw_case("bf16", "bf16", "fp32", split=True, births=True),
    adamw_case("bf16", "bf16", "int8", split=True, packed=True, births=True, aligned=False, warps=8),
    *packed_cases(),
    *migrate_cases(),
    tile_firsts_case(),
    weight_grad_case("bf16", "fp32"),
    weight_grad_case("fp16", "fp32"),
    weight_grad_case("bf16", "bf16"),
    weight_grad_case("fp32", "fp32"),
    weight_grad_case("fp32", "fp32", precision="ieee"),
    weight_grad_case("bf16", "fp32", one="m"),
    weight_grad_case("bf16", "fp32", one="n"),
    *select_cases(),
)
