"""Ahead-of-time compilation of the Triton kernels, and what the compiler made of them. Needs no GPU.

As a script, ``python python_tests/triton_compile.py`` prints a table, with ``--json`` one record a line. `survey` runs
it in processes of their own, because TRITON_INTERPRET=1 replaces the compiler when triton is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

TARGETS = (80, 90, 100)
BLOCK = 1024
THREADS = 128
FORMATS = {"fp32": "fp32", "fp16": "fp16", "bf16": "i16", "int32": "i32"}  # bf16 travels as bit patterns
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int32": 4}


@dataclass(frozen=True)
class Case:
    """One variant of a kernel.

    ``types`` holds Triton's types of the runtime arguments; every argument that is not there is a constant, and None
    unless ``constants`` says otherwise. ``loads`` and ``stores`` are the dtypes of the contiguous streams.
    ``multiples`` are integers that 16 divides. ``tile``: the kernel multiplies tiles of matrices, with the constants and
    options of its module.
    """

    name: str
    kernel: str  # module.function in lift_kernels.triton_kernels
    types: dict[str, str]
    constants: dict[str, object] = field(default_factory=dict)
    loads: tuple[str, ...] | None = ()  # None: not counted, for the compiler may copy to shared memory past the registers
    stores: tuple[str, ...] | None = ()
    multiples: tuple[str, ...] = ()  # of 16
    options: dict[str, object] = field(default_factory=dict)  # of the compiler, in place of those of the streaming kernels
    tensor_cores: bool = False


@dataclass(frozen=True)
class Compiled:
    """What became of a case on a target. Accesses are 128-bit units of a thread: found in the PTX, and needed if all
    streams move that wide. Copies bypass the registers on their way to shared memory."""

    case: str
    target: int
    registers: int
    stack_bytes: int
    local_bytes: int
    local_accesses: int
    shared_bytes: int
    wide_loads: int
    needed_loads: int
    wide_stores: int
    needed_stores: int
    wide_copies: int
    narrow_copies: int
    products: str  # how many instructions of the tensor cores, and which


def adamw_case(
    weight, grad, moments, *, master=False, births=False, packed=False, stochastic=False, scaled=False, aligned=True
):
    """A variant of the AdamW kernel; dtypes as keys of `FORMATS`, ``scaled``: with inv_scale and found_inf."""
    types = dict.fromkeys(("weights", "grads", "blocks"), "*i64")
    types |= {"indices": "*i32", "table": "*fp32", "last_age": "i32"}
    types |= dict.fromkeys(("exp_avg", "exp_avg_sq"), f"*{FORMATS[moments]}")
    types |= dict.fromkeys(("one_minus_beta1", "beta1", "one_minus_beta2", "beta2", "eps"), "fp32")
    optional = {
        "master": ({"master": "*fp32"}, master),
        "births": ({"births": "*i32", "steps": "*fp32", "bias": "*fp32"}, births),
        "stochastic": ({"keys": "*i32"}, stochastic),
        "scaled": ({"inv_scale": "*fp32", "found_inf": "*fp32"}, scaled),
    }
    words = [f"weight {weight}, grad {grad}{' packed' if packed else ''}, moments {moments}"]
    for word, (arguments, present) in optional.items():
        if present:
            types |= arguments
            words.append(word)
    constants = {"PACKED": packed, "ALIGNED": aligned, "WIDE_GRADS": aligned, "MAXIMIZE": False, "BLOCK": BLOCK}
    constants |= {"WEIGHT": FORMATS[weight], "GRAD": FORMATS[grad]}
    if aligned:
        loads = ("int32", moments, moments, *["fp32"] * master, *["int32"] * births, *[grad] * packed)
        stores = (moments, moments, *["fp32"] * master)
    else:
        loads = stores = ()
        words.append("unaligned")
    return Case("sparse_adamw: " + ", ".join(words), "adamw._sparse_adamw_kernel", types, constants, loads, stores)


def packed_cases():
    """The variants of gather, scatter, migrate and the sums of squares."""
    block = {"BLOCK": BLOCK}
    for source, out in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "fp32")):
        types = {"source": f"*{FORMATS[source]}", "out": f"*{FORMATS[out]}", "indices": "*i32", "count": "i32"}
        name = f"packed_gather: {source} to {out}"
        yield Case(name, "packed._packed_gather_kernel", types, block, ("int32",), (out,))
        types = {"dest": f"*{FORMATS[out]}", "values": f"*{FORMATS[source]}", "indices": "*i32", "count": "i32"}
        name = f"packed_scatter: {source} to {out}"
        yield Case(name, "packed._packed_scatter_kernel", types, block, ("int32", source))
    for dtype in ("fp32", "bf16", "int32"):
        types = dict.fromkeys(("old_indices", "new_indices"), "*i32")
        types |= dict.fromkeys(("values", "out"), f"*{FORMATS[dtype]}")
        types |= dict.fromkeys(("old_count", "new_count", "stride"), "i32")
        yield Case(f"packed_migrate: {dtype}", "packed._packed_migrate_kernel", types, block, ("int32",))
    for dtype, packed in (("fp32", False), ("bf16", False), ("fp32", True), ("bf16", True)):
        types = {"grads": "*i64", "blocks": "*i64", "indices": "*i32", "partials": "*fp64"}
        constants = block | {"GRAD": FORMATS[dtype], "PACKED": packed, "ALIGNED": True, "WIDE_GRADS": True}
        name = f"packed_square_sums: {dtype}{' packed' if packed else ''}"
        yield Case(name, "packed._packed_square_sums_kernel", types, constants, (dtype if packed else "int32",))


def weight_grad_case(dtype, out, precision="tf32", one=None):
    """The fused product of a weight gradient with the launcher's tile; an fp32 one by TF32 or exact. ``one``: the side "m" or "n"
    that is 1, which the compiler takes for a constant."""
    from lift_kernels.triton_kernels import linear_grad

    types = {name: f"*{dtype}" for name in ("grad_output", "input")} | {"indices": "*i32", "out": f"*{FORMATS[out]}"}
    types |= dict.fromkeys(("tokens", "count", "stride"), "i32") | dict.fromkeys({"m", "n"} - {one}, "i32")
    constants = {name: getattr(linear_grad, name) for name in ("ROWS", "COLUMNS", "TOKENS", "ENTRIES")}
    constants |= {"PRECISION": precision} | ({one: 1} if one else {})
    name = f"packed_weight_grad: {dtype}{f' by {precision}' if dtype == 'fp32' else ''} to {out}{f', {one} = 1' if one else ''}"
    options = {"num_warps": linear_grad.WARPS, "num_stages": linear_grad.STAGES, "enable_fp_fusion": True}
    return Case(name, "linear_grad._packed_weight_grad_kernel", types, constants, None, None,
                multiples=tuple(sorted({"m", "n"} - {one})), options=options, tensor_cores=precision != "ieee")  # fmt: skip


def select_cases():
    """The passes over the tiles of a low-rank product, and the kernels that fill and list a bitmap."""
    from lift_kernels.triton_kernels import select

    factors = {"left": "*fp32", "right": "*fp32", "m": "i32", "n": "i32", "r": "i32", "bracket": "*i32"}
    scan = factors | {"bitmap": "*i32", "counts": "*i32", "capacity": "i32"}
    passes = {
        "candidates": ("select._lowrank_topk_kernel", scan | {"candidates": "*i64"}),
        "ties": ("select._lowrank_topk_kernel", scan | {"ties": "*i32"}),
        "histogram": ("select._lowrank_histogram_kernel", factors | {"histogram": "*i32", "shift": "i32"}),
    }
    tile = {"constants": select.TILE, "options": select.TILE_OPTIONS, "tensor_cores": True}
    for name, (kernel, types) in passes.items():
        yield Case(f"lowrank_topk: {name}", kernel, types, multiples=("r",), **tile)
        yield Case(f"lowrank_topk: {name}, odd rank", kernel, types, **tile)
    block = {"BLOCK": BLOCK}
    types = {"bitmap": "*i32", "positions": "*i32", "count": "i32", "n": "i32"}
    yield Case("set_bits", "select._set_bits_kernel", types, block, ("int32",))
    types = {"bitmap": "*i32", "totals": "*i32", "length": "i32"}
    yield Case("count_bits", "select._count_bits_kernel", types, block, ("int32",))
    types = dict.fromkeys(("bitmap", "ends", "out"), "*i32") | dict.fromkeys(("length", "count", "n"), "i32")
    yield Case("list_bits", "select._list_bits_kernel", types, block, ("int32",))


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
    *packed_cases(),
    weight_grad_case("bf16", "fp32"),
    weight_grad_case("fp16", "fp32"),
    weight_grad_case("bf16", "bf16"),
    weight_grad_case("fp32", "fp32"),
    weight_grad_case("fp32", "fp32", precision="ieee"),
    weight_grad_case("bf16", "fp32", one="m"),
    weight_grad_case("bf16", "fp32", one="n"),
    *select_cases(),
)


def compile_case(case: Case, target: int) -> Compiled:
    """Compile for one CUDA target (80, 90, 100) as the launcher would for tensors at multiples of 16 bytes."""
    import importlib

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    module, function = case.kernel.split(".")
    kernel = getattr(importlib.import_module(f"lift_kernels.triton_kernels.{module}"), function)
    formats = {"fp32": tl.float32, "fp16": tl.float16, "i16": tl.int16}
    signature = {name: case.types.get(name, "constexpr") for name in kernel.arg_names}
    constants, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name not in case.types:
            value = case.constants.get(name)
            constants[(position,)] = formats.get(value, value) if isinstance(value, str) else value
        elif case.types[name].startswith("*") or name in case.multiples:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": THREADS // 32, "enable_fp_fusion": False} | case.options
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    usage, sass = _inspect(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Compiled(
        case.name, target, usage["REG"], usage["STACK"], usage["LOCAL"], len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        compiled.metadata.shared, _wide(ptx, "ld"), _needed(case.loads), _wide(ptx, "st"), _needed(case.stores),
        *_copies(ptx), _products(ptx),
    )  # fmt: skip


def survey() -> list[Compiled]:
    """Every case on every target, compiled in a process that has Triton's compiler and not its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    workers = [
        subprocess.Popen([sys.executable, __file__, "--json", "--share", str(i), "2"], env=environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(2)
    ]  # fmt: skip
    records = []
    for worker in workers:
        output, errors = worker.communicate()
        if worker.returncode != 0:
            raise RuntimeError(f"compiling the Triton kernels failed:\n{errors}")
        records += [Compiled(**json.loads(line)) for line in output.splitlines()]
    return records


def _inspect(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage and SASS of a cubin, by the tools in triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, sass = (
            subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}, sass


def _wide(ptx: str, access: str) -> int:
    """128-bit units moved by vector accesses to global memory; a 256-bit access counts twice."""
    sizes = (int(n) * int(bits) for n, bits in re.findall(rf"\b{access}\.global[\w.:]*\.v(\d)\.[bfu](\d+)", ptx))
    return sum(size // 128 for size in sizes)


def _copies(ptx: str) -> tuple[int, int]:
    """Asynchronous copies into shared memory: how many of 128 bits, and how many narrower ones."""
    sizes = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[\w.:]* \[[^]]+\], \[[^]]+\], (\w+)", ptx)
    wide = sum(int(size, 0) == 16 for size in sizes)
    return wide, len(sizes) - wide


def _products(ptx: str) -> str:
    """Instructions of the tensor cores, as "6 wgmma.mma_async..."; several kinds are separated by commas."""
    kinds = Counter(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*", ptx))
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _needed(streams: tuple[str, ...] | None) -> int:
    """128-bit accesses a thread makes when all of these streams move that wide."""
    return sum(BLOCK // THREADS * BYTES[dtype] // 16 for dtype in streams or ())


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON record a line")
    parser.add_argument("--share", nargs=2, type=int, default=(0, 1), metavar=("I", "N"), help="cases I, I + N, ...")
    arguments = parser.parse_args()
    if not arguments.json:
        print("target registers shared  loads wide/needed  stores wide/needed  case  products")
    for case in CASES[arguments.share[0] :: arguments.share[1]]:
        for target in TARGETS:
            c = compile_case(case, target)
            if arguments.json:
                print(json.dumps(asdict(c)))
            else:
                print(f"sm_{target:<4d}{c.registers:8d} {c.shared_bytes:6d} {c.wide_loads:8d}/{c.needed_loads:<8d} "
                      f"{c.wide_stores:10d}/{c.needed_stores:<8d}  {c.case}  {c.products}")  # fmt: skip


if __name__ == "__main__":
    _main()
