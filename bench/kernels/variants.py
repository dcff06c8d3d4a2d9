"""Every variant of the Triton kernels that a launcher can ask for.

`bench.kernels.cases` has a sample of them, with declared wide accesses. These here are compiled by
``python -m bench.kernels.report --all``, which takes a while.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

from bench.kernels.cases import BLOCK, CASES, FORMATS, Case, adamw_case, weight_grad_case
from lift_kernels.ops.triton.targets import lowrank_options

TARGETS = (75, 89, 120)
"""Targets whose multiprocessors hold less than those of the cards that were measured."""
FLOATS = ("fp32", "fp16", "bf16")


def every_case() -> list[Case]:
    """All variants, each once. Those of `cases` come first."""
    known = {case.name: case for case in CASES}
    for case in (*_steps(), *_packed(), *_migrations(), *_weight_grads(), *_selections()):
        known.setdefault(case.name, case)
    return list(known.values())


def _steps() -> Iterator[Case]:
    """The step: weights and masters or stochastic rounding, gradients, moments, births.

    A launcher takes eight warps where a block waits for its weights last. With codes it limits the
    registers.
    """
    forms = [(weight, master, keys) for weight in FLOATS for master, keys in ((False, False), (True, False))]
    forms += [(weight, False, True) for weight in ("fp16", "bf16")]
    flags = (False, True)
    for (weight, master, keys), grad, moments in product(forms, FLOATS, ("fp32", "bf16")):
        if weight == "fp32" and master:
            continue
        for births, packed in product(flags, flags):
            form = {"master": master, "stochastic": keys, "births": births, "packed": packed}
            yield adamw_case(weight, grad, moments, **form)
            if not master and weight != "fp32" and (packed or moments == "bf16"):
                case = adamw_case(weight, grad, moments, **form)
                yield replace(case, name=f"{case.name}, 8 warps", loads=(), stores=(), options={"num_warps": 8})
    every = [(weight, {}) for weight in FLOATS]
    every += [(weight, {"master": True}) for weight in ("fp16", "bf16")]
    every += [(weight, {"stochastic": True}) for weight in ("fp16", "bf16")] + [("bf16", {"split": True})]
    for (weight, form), grad, births, packed in product(every, FLOATS, flags, flags):
        warps = 8 if weight != "fp32" and "master" not in form else 4
        yield adamw_case(weight, grad, "int8", births=births, packed=packed, warps=warps, **form)
        if "split" in form:
            yield adamw_case(weight, grad, "fp32", births=births, packed=packed, warps=8 if packed else 4, **form)
            yield adamw_case(weight, grad, "bf16", births=births, packed=packed, warps=8, **form)
    for (weight, form), moments, births in product(every, ("fp32", "bf16", "int8"), flags):
        yield adamw_case(weight, weight, moments, births=births, packed_weights=True, scaled=True, **form)
    for births, packed, scaled in product(flags, flags, flags):  # the most arguments at once
        yield adamw_case("bf16", "bf16", "fp32", master=True, births=births, packed=packed, scaled=scaled)
        form = {"births": births, "packed": packed, "scaled": scaled, "aligned": False}
        yield adamw_case("bf16", "bf16", "fp32", master=True, **form)


def _packed() -> Iterator[Case]:
    block: dict[str, object] = {"BLOCK": BLOCK}
    for source, out in product(FLOATS, FLOATS):
        types = {"source": f"*{FORMATS[source]}", "out": f"*{FORMATS[out]}", "indices": "*i32", "count": "i32"}
        yield Case(f"packed_gather: {source} to {out}", "packed_ops._packed_gather_kernel", types, block)
        types = {"dest": f"*{FORMATS[out]}", "values": f"*{FORMATS[source]}", "indices": "*i32", "count": "i32"}
        yield Case(f"packed_scatter: {source} to {out}", "packed_ops._packed_scatter_kernel", types, block)
    types = dict.fromkeys(("old_indices", "new_indices"), "*i32") | dict.fromkeys(("values", "out"), "*fp16")
    types |= dict.fromkeys(("old_count", "new_count", "stride"), "i32")
    yield Case("packed_migrate: fp16", "packed_ops._packed_migrate_kernel", types, block)
    for dtype, packed, aligned in product(FLOATS, (False, True), (False, True)):
        types = {"grads": "*i64", "blocks": "*i64", "indices": "*i32", "partials": "*fp64"}
        constants = block | {"GRAD": FORMATS[dtype], "PACKED": packed, "ALIGNED": aligned, "WIDE_GRADS": aligned}
        name = f"packed_square_sums: {dtype}{' packed' * packed}{', unaligned' * (not aligned)}"
        yield Case(name, "packed_ops._packed_square_sums_kernel", types, constants)


def _migrations() -> Iterator[Case]:
    """Migrations of lists and segments that are not aligned."""
    for case in CASES:
        if case.name.startswith("arena_migrate"):
            case = replace(case, single_bytes=None)
            unaligned = dict.fromkeys(case.constants.keys() & {"ALIGNED", "WIDE_LISTS"}, False)
            yield replace(
                case, name=f"{case.name}, unaligned", constants=case.constants | unaligned, loads=(), stores=()
            )


def _selections() -> Iterator[Case]:
    """Passes over a low-rank product whose rank is a multiple of 16 and not of 32."""
    for case in CASES:
        if case.name.startswith("lowrank_topk") and case.multiples:
            narrow = partial(lowrank_options, wide=False, histogram="histogram" in case.name)
            yield replace(case, name=f"{case.name}, rank 16", by_target=narrow)


def _weight_grads() -> Iterator[Case]:
    for dtype, out, one in product(FLOATS, FLOATS, (None, "m", "n")):
        yield weight_grad_case(dtype, out, one=one)
        if dtype == "fp32":
            yield weight_grad_case(dtype, out, precision="ieee", one=one)
