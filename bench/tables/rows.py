"""The lines of the tables: their labels, and the rows of the CSVs that they show."""

from __future__ import annotations

from bench.tables.types import Rows, Selection


def step_rows() -> Rows:
    """The step of all matrices of a set, beside fused AdamW and the authors' code."""
    rows = []
    for name, label in (
        ("smollm2", "SmolLM2-135M (210, real masks, 5 %)"),
        ("4096x4096", "4096 x 4096"),
        ("4096x11008", "4096 x 11008"),
    ):
        for dtype, suffix, words in (
            ("fp32", "", "fp32"),
            ("bf16", ", fp32 moments, fp32 master", "bf16, moments and master fp32 (default)"),
            ("bf16", ", bf16 moments, fp32 master", "bf16, moments bf16, master fp32"),
            ("bf16", ", bf16 moments", "bf16, moments bf16, no master"),
        ):
            picks = {"fused": "AdamW fused", "dense": f"dense grads{suffix}", "packed": f"packed grads{suffix}"}
            picks["published"] = "published LIFT step"
            picks["dense_vector?"] = "packed vector: gather + AdamW fused + scatter"
            picks["packed_vector?"] = "packed vector: AdamW fused + scatter"
            chosen = {alias: {"set": f"{name}, {dtype}", "variant": variant} for alias, variant in picks.items()}
            rows.append((f"{label}, {words}", chosen))
    return rows


def refresh_rows() -> Rows:
    """What a step takes on average with new masks every 100 steps."""
    rows = [("AdamW fused, no masks", ("AdamW fused", "AdamW fused"))]
    for grads in ("dense", "packed"):
        for words, suffix in (
            ("", ""),
            (" + warm refresh", " + refresh/100"),
            (" + warm refresh, skipping masks that stay", " + refresh/100, skipping"),
            (" + cold refresh", " + cold refresh/100"),
        ):
            variants = f"{grads} grads{suffix}", f"{grads} grads, fp32 moments, fp32 master{suffix}"
            may_be_missing = "?" if "skipping" in suffix else ""
            rows.append((f"{may_be_missing}{grads} gradients{words}", variants))
    sets = "smollm2, fp32", "smollm2, bf16"
    return [
        (
            label,
            {
                dtype: {"set": set_, "variant": variant}
                for dtype, set_, variant in zip(("fp32", "bf16"), sets, variants)
            },
        )
        for label, variants in rows
    ]


def refresh_cost_rows() -> Rows:
    """A warm refresh by parts. Not every way to multiply the weights has been counted."""
    parts = (
        *("copies and checks of weights", "whole matrices", "tall blocks", "eigenproblems"),
        *("selection", "migration", "all"),
    )
    states = (
        ("bf16, multiplied in bf16", {"weights": "bf16", "products": "bf16"}),
        ("bf16, multiplied as fp32 copies", {"weights": "bf16", "products": "fp32 copies"}),
        ("fp32", {"weights": "fp32", "products": "fp32 copies"}),
    )
    return [
        (
            f"?{label}",
            {alias: chosen | {"part": part, "way": way} for alias, way in (("ops", "cuda ops"), ("references",) * 2)},
        )
        for label, chosen in states
        for part in parts
    ]


def baseline_rows() -> Rows:
    lift = {
        "**ours**, dense gradients": (
            "sparse_adamw_, dense grads",
            "sparse_adamw_, dense grads, fp32 moments and master",
        ),
        "**ours**, packed gradients": (
            "sparse_adamw_, packed grads",
            "sparse_adamw_, packed grads, fp32 moments and master",
        ),
    }
    others = [
        "AdamW fused",
        "AdamW foreach",
        "AdamW for-loop",
        "SHiRA's values, AdamW fused",
        "APOLLO, r = 64",
        "GaLore, r = 64",
        "bitsandbytes AdamW",
        "bitsandbytes AdamW8bit",
        "torchao AdamW8bit",
        "flashoptim FlashAdamW",
        "one indexed Triton launch a parameter",
    ]
    renamed = {"authors' code": ("published LIFT step", "published LIFT step")}
    return [
        (label, {"fp32": {"set": "*, float32", "variant": fp32}, "bf16": {"set": "*, bfloat16", "variant": bf16}})
        for label, (fp32, bf16) in (lift | {name: (name, name) for name in others} | renamed).items()
    ]


def mask_rows() -> Rows:
    def rows(label: str, set_: str, rank: int, *variants: str) -> Rows:
        return [(label, {"row": {"set": set_, "rank": str(rank), "variant": variant}}) for variant in variants]

    published = "svd + topk (published)", "svd_lowrank(2r, 2) (published)"
    cold = "chebyshev, cold", "default, cold"
    return [
        *rows("SmolLM2, r = 64", "smollm2", 64, *published, "Gram + eigh + numpy.partition", *cold),
        *rows("SmolLM2, r = 64, after 25 steps at lr 1e-4", "smollm2 after 25 steps at lr 0.0001", 64, "warm"),
        *rows("SmolLM2, r = 32", "smollm2", 32, "default, cold"),
        *rows("SmolLM2, r = 32, after 25 steps at lr 1e-4", "smollm2 after 25 steps at lr 0.0001", 32, "warm"),
        *rows("MiniLM, r = 32", "minilm", 32, "default, cold"),
        *rows(
            "4096 x 11008, slow spectrum, r = 64", "4096x11008", 64, *published, "Gram + eigh + topk", "default, cold"
        ),
        *rows("the same, selected entries moved by 3 %", "4096x11008, changed by 3 %", 64, "warm"),
        *rows("?the same, selected entries moved by 3 %", "4096x11008, changed by 3 %", 64, "chebyshev, warm"),
        *(
            (f"?{side} x {side}, alone", {"row": {"set": f"{side}x{side}", "variant": "principal_indices"}})
            for side in (64, 128, 256, 512, 1024, 2048)
        ),
        ("?1536 x 576, alone", {"row": {"set": "1536x576", "variant": "principal_indices"}}),
    ]


def packed_op_rows() -> Rows:
    dtypes = {"fp32": "float32", "bf16": "bfloat16"}
    return [
        (f"`{op}`", {dtype: {"op": op, "variant": op, "set": f"*, {name}"} for dtype, name in dtypes.items()})
        for op in ("packed_gather", "packed_scatter_", "packed_migrate", "packed_l2_norm")
    ]


def kernel_rows() -> Rows:
    selections: dict[str, Selection] = {
        "`sparse_adamw_`, aligned": {"kernel": "sparse_adamw: *moments [!i]*", "needed_loads": "[1-9]*"},
        "`sparse_adamw_`, aligned, 8-bit moments": {"kernel": "sparse_adamw: *moments int8*", "needed_loads": "[1-9]*"},
        "`packed_gather`": {"kernel": "packed_gather: *"},
        "`packed_scatter_`": {"kernel": "packed_scatter: *"},
        "`packed_migrate`": {"kernel": "packed_migrate: *"},
        "`arena_migrate_`, find": {"kernel": "arena_migrate: find"},
        "`arena_migrate_`, take": {"kernel": "arena_migrate: take *"},
        "`arena_migrate_`, put": {"kernel": "arena_migrate: put *"},
        "`packed_l2_norm`": {"kernel": "packed_square_sums: *"},
        "`packed_weight_grad`, fused, bf16": {"kernel": "packed_weight_grad: bf16 to fp32"},
        "`lowrank_topk`, rank a multiple of 32": {"kernel": "lowrank_topk: *[!k]"},
        "`set_bits`": {"kernel": "set_bits", "language": "triton"},
        "`count_bits`": {"kernel": "count_bits", "language": "triton"},
        "`list_bits`": {"kernel": "list_bits", "language": "triton"},
        "`bitmap_to_indices`, choose": {"kernel": "bitmap_choose", "language": "triton"},
        "CUDA `packed_gather`": {"kernel": "packed_gather_kernel<*"},
        "CUDA `packed_scatter_`": {"kernel": "packed_scatter_kernel<*"},
        "CUDA `packed_migrate`": {"kernel": "packed_migrate_kernel<*"},
        "CUDA `gaussian_sketch`": {"kernel": "gaussian_sketch_kernel<*"},
        "CUDA `cholesky_qr_`, Gram, l to 64": {"kernel": "gram_kernel<64>"},
        "CUDA `cholesky_qr_`, Gram, wider": {"kernel": "gram_kernel<128>"},
        "CUDA `cholesky_qr_`, sum": {"kernel": "gram_sum_kernel"},
        "CUDA `cholesky_qr_`, factor and inverse": {"kernel": "cholesky_inverse_kernel"},
        "CUDA `cholesky_qr_`, product, l to 64": {"kernel": "multiply_upper_kernel<64>"},
        "CUDA `cholesky_qr_`, product, wider": {"kernel": "multiply_upper_kernel<128>"},
        "CUDA `bitmap_to_indices`, choose": {"kernel": "bitmap_choose_kernel<*"},
        "CUDA `bitmap_to_indices`, count": {"kernel": "bitmap_count_kernel<*"},
        "CUDA `bitmap_to_indices`, place": {"kernel": "bitmap_place_kernel<*"},
        "CUDA `bitmap_to_indices`, list": {"kernel": "bitmap_list_kernel<*"},
    }
    generations = {"sm75": "75", "sm8x": "8?", "sm90": "90", "sm100": "100", "sm120": "120"}
    return [
        (
            label,
            {
                "all": chosen,
                "multiplied?": {**chosen, "needs_tensor_cores": "True"},
                **{alias: {**chosen, "target": target} for alias, target in generations.items()},
            },
        )
        for label, chosen in selections.items()
    ]


def cpu_loop_rows() -> Rows:
    """The loops of the CPU ops, at each level of instruction sets."""
    levels = {"all": "*", "v2": "x86-64-v2", "v3": "x86-64-v3", "v4": "x86-64-v4", "arm": "aarch64"}
    functions = [
        *("update: fp32", "update: bf16", "update_per_entry: fp32", "update_per_entry: bf16"),
        *("widen: bf16", "widen: fp16", "round_nearest: bf16", "round_nearest: fp16"),
        *("round_stochastic: bf16", "round_stochastic: fp16"),
        *("add_squares: fp32", "add_squares: bf16", "add_squares: fp16", "compute_keys", "at_least"),
    ]
    return [
        (
            f"`{function.partition(':')[0]}`{function.partition(':')[2]}",
            {alias: {"function": function, "level": level} for alias, level in levels.items()},
        )
        for function in functions
    ]


def headline_rows() -> Rows:
    """Memory and speed of training by each method, from two CSVs."""
    memory = {"file": "memory.csv", "set": "fp32"}
    training = {"file": "training.csv", "set": "SmolLM2-135M, *"}
    return [
        (label, {"memory": {**memory, "variant": held}, "training": {**training, "variant": trained}})
        for label, held, trained in (
            ("full fine-tuning, AdamW fused", "AdamW fused", "full fine-tuning, AdamW fused"),
            (
                "?full fine-tuning of the linear layers",
                "AdamW fused",
                "full fine-tuning of the linear layers, AdamW fused",
            ),
            ("GaLore, r = 64", "GaLore, r = 64", "GaLore, r = 64"),
            ("SHiRA (peft)", "SHiRA (peft), AdamW fused", "SHiRA (peft), AdamW fused"),
            ("LoRA (peft)", "LoRA (peft), AdamW fused", "LoRA (peft), AdamW fused"),
            ("**LIFT**, dense gradients", "LIFT, matrix mode", "LIFT, matrix mode"),
            ("**LIFT**, packed gradients", "LIFT, packed mode", "LIFT, packed mode"),
        )
    ]
