"""What each table of the READMEs shows, for `bench.tables`: rows of CSVs and formats of cells."""

from __future__ import annotations

from collections.abc import Mapping

from bench.tables import Selection, Table


def _step_rows() -> list[tuple[str, Mapping[str, Selection]]]:
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
            chosen = {alias: {"set": f"{name}, {dtype}", "variant": variant} for alias, variant in picks.items()}
            rows.append((f"{label}, {words}", chosen))
    return rows


def _refresh_rows() -> list[tuple[str, Mapping[str, Selection]]]:
    """What a step takes on average with new masks every 100 steps."""
    rows = [("AdamW fused, no masks", ("AdamW fused", "AdamW fused"))]
    for grads in ("dense", "packed"):
        for words, suffix in (
            ("", ""),
            (" + warm refresh", " + refresh/100"),
            (" + cold refresh", " + cold refresh/100"),
        ):
            variants = f"{grads} grads{suffix}", f"{grads} grads, fp32 moments, fp32 master{suffix}"
            rows.append((f"{grads} gradients{words}", variants))
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


def _baseline_rows() -> list[tuple[str, Mapping[str, Selection]]]:
    ours = {
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
        for label, (fp32, bf16) in (ours | {name: (name, name) for name in others} | renamed).items()
    ]


def _mask_rows() -> list[tuple[str, Mapping[str, Selection]]]:
    def rows(label: str, set_: str, rank: int, *variants: str) -> list[tuple[str, Mapping[str, Selection]]]:
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
    ]


def _packed_op_rows() -> list[tuple[str, Mapping[str, Selection]]]:
    dtypes = {"fp32": "float32", "bf16": "bfloat16"}
    return [
        (f"`{op}`", {dtype: {"op": op, "variant": op, "set": f"*, {name}"} for dtype, name in dtypes.items()})
        for op in ("packed_gather", "packed_scatter_", "packed_migrate", "packed_l2_norm")
    ]


def _kernel_rows() -> list[tuple[str, Mapping[str, Selection]]]:
    selections: dict[str, Selection] = {
        "`sparse_adamw_`, aligned": {"kernel": "sparse_adamw: *", "needed_loads": "[1-9]*"},
        "`packed_gather`": {"kernel": "packed_gather: *"},
        "`packed_scatter_`": {"kernel": "packed_scatter: *"},
        "`packed_migrate`": {"kernel": "packed_migrate: *"},
        "`packed_l2_norm`": {"kernel": "packed_square_sums: *"},
        "`packed_weight_grad`, fused, bf16": {"kernel": "packed_weight_grad: bf16 to fp32"},
        "`lowrank_topk`, rank a multiple of 16": {"kernel": "lowrank_topk: *", "needs_wide_copies": "True"},
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
    return [
        (label, {"all": chosen, **{f"sm{target}": {**chosen, "target": target} for target in ("80", "90", "100")}})
        for label, chosen in selections.items()
    ]


def _headline_rows() -> list[tuple[str, Mapping[str, Selection]]]:
    """Memory and speed of training by each method, from two CSVs."""
    memory = {"file": "memory.csv", "set": "fp32"}
    training = {"file": "training.csv", "set": "SmolLM2-135M, *"}
    return [
        (label, {"memory": {**memory, "variant": held}, "training": {**training, "variant": trained}})
        for label, held, trained in (
            ("full fine-tuning, AdamW fused", "AdamW fused", "full fine-tuning, AdamW fused"),
            ("GaLore, r = 64", "GaLore, r = 64", "GaLore, r = 64"),
            ("SHiRA (peft)", "SHiRA (peft), AdamW fused", "SHiRA (peft), AdamW fused"),
            ("LoRA (peft)", "LoRA (peft), AdamW fused", "LoRA (peft), AdamW fused"),
            ("**LIFT**, dense gradients", "LIFT, matrix mode", "LIFT, matrix mode"),
            ("**LIFT**, packed gradients", "LIFT, packed mode", "LIFT, packed mode"),
        )
    ]


TABLES = {
    "headline": Table(
        "training.csv, memory.csv",
        {
            "training of SmolLM2-135M, fp32": "{label}",
            "peak memory beyond the model": "{training.peak_over_model_mib:.0f} MiB",
            "bytes per parameter": "{memory.total:.3g}",
            "tokens/s": "{training.tokens_s:.3g}, {training.ratio:.2f} x",
        },
        _headline_rows(),
    ),
    "headline_step": Table(
        "sparse_adamw.csv",
        {
            "one step on its 210 matrices": "{label}",
            "AdamW fused": "{fused.median_ms:.3g} ms",
            "LIFT, dense gradients": "{dense.median_ms:.3g} ms, **{dense.ratio:.2f} x**",
            "LIFT, packed gradients": "{packed.median_ms:.3g} ms, **{packed.ratio:.2f} x**",
            "authors' code": "{published.median_ms:.3g} ms",
        },
        [(label.partition("), ")[2], picks) for label, picks in _step_rows()[:2]],
    ),
    "step": Table(
        "sparse_adamw.csv",
        {
            "matrices, weights": "{label}",
            "AdamW fused": "{fused.median_ms:.3g} ms",
            "dense gradients": "{dense.median_ms:.3g} ms, **{dense.ratio:.2f} x**",
            "packed gradients": "{packed.median_ms:.3g} ms, **{packed.ratio:.2f} x**",
            "authors' code": "{published.median_ms:.3g} ms",
            "ours is x times faster, dense / packed": "{published.median_ms/dense.median_ms:.1f} / "
            "{published.median_ms/packed.median_ms:.1f} x",
            "% of roofline, dense / packed": "{dense.share_of_floor:.0%} / {packed.share_of_floor:.0%}",
        },
        _step_rows(),
    ),
    "step_with_refresh": Table(
        "sparse_adamw.csv",
        {"SmolLM2-135M": "{label}", "fp32": "{fp32.median_ms:.3g} ms", "bf16, default": "{bf16.median_ms:.3g} ms"},
        _refresh_rows(),
    ),
    "baselines": Table(
        "peers.csv",
        {
            "optimizer": "{label}",
            "fp32": "{fp32.median_ms:.3g} ms, {fp32.ratio:.2g} x||{fp32.status}",
            "bytes, fp32": "{fp32.state_bytes:.3g}",
            "bf16": "{bf16.median_ms:.3g} ms, {bf16.ratio:.2g} x||{bf16.status}",
            "bytes, bf16": "{bf16.state_bytes:.3g}",
        },
        _baseline_rows(),
    ),
    "masks": Table(
        "masks.csv",
        {
            "matrices": "{label}",
            "number": "{row.matrices}",
            "method": "{row.variant}",
            "seconds": "{row.seconds:.3g}",
            "overlap": "{row.overlap_mean:.3f} / {row.overlap_min:.3f}",
            "captured": "{row.captured_mean:.4f} / {row.captured_min:.4f}",
            "passes": "{row.passes:.3g}",
            "% of roofline": "{row.share_of_floor:.0%}",
        },
        _mask_rows(),
    ),
    "selection": Table(
        "masks.csv",
        {
            "matrix": "{row.set}, r = {row.rank}",
            "method": "{row.variant}",
            "ms": "{row.seconds/ms:.3g}",
            "times as fast as torch.topk": "{row.times_topk:.3g}",
            "% of roofline": "{row.share_of_floor:.0%}",
        },
        each=[{"set": "4096x11008", "times_topk": "?*"}],
    ),
    "main_job": Table(
        "main_job.csv",
        {
            "method": "{row.variant}",
            "held-out loss, before": "{row.loss_before:.3f}",
            "after": "{row.loss_after:.3f}",
            "exact match, before": "{row.exact_before:.1%}",
            "after (95 % interval)": "{row.exact_after:.1%} ({row.exact_low:.0%}..{row.exact_high:.0%})",
            "neutral loss, before": "{row.neutral_before:.3f}",
            "after ": "{row.neutral_after:.3f}",
            "trained": "{row.entries/M:.2f} M, {row.density:.2%}",
            "optimizer state": "{row.state_bytes/MiB:.1f} MiB, {row.state_bytes/row.dense_state_bytes:.1%} of dense",
            "on top of the frozen model": "{row.extra_bytes/MiB:.1f} MiB, "
            "{row.extra_bytes_an_entry:.2f} bytes per entry",
        },
        each=[{"status": "ok"}],
    ),
    "main_job_delta": Table(
        "main_job.csv",
        {
            "delta of the LIFT run": "{row.delta_entries/M:.2f} M entries",
            "file": "{row.delta_bytes/MiB:.1f} MiB",
            "model": "{row.model_bytes/MiB:.0f} MiB",
            "make": "{row.delta_make_s:.1f} s",
            "apply": "{row.delta_apply_s:.1f} s",
            "revert": "{row.delta_revert_s:.1f} s",
        },
        each=[{"variant": "lift"}],
    ),
    "packed_ops": Table(
        "packed_ops.csv",
        {
            "4096 x 11008": "{label}",
            "fp32": "{fp32.median_ms:.3g} ms",
            "speed against plain PyTorch, fp32": "{fp32.ratio:.3g} x",
            "% of roofline, fp32": "{fp32.share_of_floor:.0%}",
            "bf16": "{bf16.median_ms:.3g} ms",
            "speed against plain PyTorch, bf16": "{bf16.ratio:.3g} x",
            "% of roofline, bf16": "{bf16.share_of_floor:.0%}",
        },
        _packed_op_rows(),
    ),
    "packed_grad": Table(
        "packed_grad.csv",
        {
            "part": "{row.part}",
            "variant": "{row.variant}",
            "gradients kept": "{row.kept_bytes/MiB:.3g} MiB, {row.share_of_dense:.2%}",
            "peak beyond the model": "{row.peak_bytes/MiB:.3g} MiB",
            "median": "{row.median_ms:.4g} ms",
            "time against dense (95 % interval)": "{row.cost:.3f} ({row.cost_low:.3f} to {row.cost_high:.3f})",
        },
        each=[{}],
    ),
    "training": Table(
        "training.csv",
        {
            "model": "{row.set}",
            "method": "{row.variant}",
            "tokens/s": "{row.tokens_s:.3g}||{row.status}",
            "speed against full fine-tuning": "{row.ratio:.2f} x",
            "forward, backward": "{row.forward_backward_ms:.4g} ms",
            "step": "{row.step_ms:.3g} ms",
            "refresh": "{row.refresh_ms:.3g} ms",
            "peak beyond the model": "{row.peak_over_model_mib:.4g} MiB",
            "% of roofline": "{row.share_of_floor:.0%}",
        },
        each=[{}],
    ),
    "delta": Table(
        "delta.csv",
        {
            "model": "{row.set}",
            "method": "{row.variant}",
            "median": "{row.median_ms:.4g} ms||{row.status}",
            "speed against safetensors": "{row.ratio:.2f} x",
            "file": "{row.file_bytes/MiB:.4g} MiB",
            "bytes per entry": "{row.bytes_per_entry:.2f}",
            "computed": "{row.computed_bytes}",
            "% of roofline": "{row.share_of_floor:.0%}",
        },
        each=[{}],
    ),
    "memory": Table(
        "memory.csv",
        {
            "weights, state": "{row.set}",
            "method": "{row.variant}",
            "added": "{row.added:.3g}",
            "gradients": "{row.gradients:.3g}",
            "indices": "{row.indices:.3g}",
            "masters": "{row.master:.3g}",
            "moments": "{row.moments:.3g}",
            "warm start": "{row.warm_start:.3g}",
            "total, bytes per parameter": "{row.total:.3g}||{row.status:reason}",
            "computed": "{row.computed:.3g}",
            "of AdamW": "{row.share_of_adamw:.1%}",
        },
        each=[{}],
    ),
    "kernels": Table(
        "kernels.csv",
        {
            "kernel": "{label}",
            "registers sm_80": "{sm80.registers}",
            "sm_90": "{sm90.registers}",
            "sm_100": "{sm100.registers}",
            "occupancy bound": "{all.occupancy:.0%}",
            "128-bit loads": "{all.wide_loads}",
            "stores": "{all.wide_stores}",
            "copies": "{all.wide_copies}",
            "KiB in flight": "{all.bytes_in_flight/KiB:.0f}",
            "spills": "{all.spills}",
            "tensor cores": "{all.tensor_cores}",
        },
        [(label, picks) for label, picks in _kernel_rows() if not label.startswith("CUDA")],
    ),
    "cuda": Table(
        "kernels.csv",
        {
            "kernel": "{label}",
            "registers sm_80": "{sm80.registers}",
            "sm_90": "{sm90.registers}",
            "sm_100": "{sm100.registers}",
            "shared memory, KiB": "{all.static_shared/KiB:.1f}",
            "blocks a multiprocessor": "{all.blocks_by_registers}",
            "128-bit loads": "{all.wide_loads}",
            "stores": "{all.wide_stores}",
            "spills": "{all.spills}",
            "stack": "{all.stack_bytes}",
        },
        [(label.removeprefix("CUDA "), picks) for label, picks in _kernel_rows() if label.startswith("CUDA")],
    ),
    "refresh-cost": Table(
        "refresh_cost.csv",
        {
            "part": "{label}",
            "launches": "{twins.launches:.0f}",
            "GB": "{twins.bytes/GB:.1f}",
            "TFLOP TF32, fp32": "{twins.tf32_flops/T:.2f}, {twins.fp32_flops/T:.2f}",
            "launches, helpers": "{helpers.launches:.0f}",
            "GB, helpers": "{helpers.bytes/GB:.1f}",
            "TFLOP, helpers": "{helpers.tf32_flops/T:.2f}, {helpers.fp32_flops/T:.2f}",
        },
        [
            (part, {way: {"part": part, "way": way} for way in ("twins", "helpers")})
            for part in ("whole matrices", "tall blocks", "eigenproblems")
        ],
    ),
}
