"""What each table of the READMEs shows: its CSV, its columns and its rows."""

from __future__ import annotations

from bench.tables.rows import (
    baseline_rows,
    headline_rows,
    kernel_rows,
    mask_rows,
    packed_op_rows,
    refresh_rows,
    step_rows,
)
from bench.tables.types import Table

TABLES = {
    "headline": Table(
        "training.csv, memory.csv",
        {
            "training of SmolLM2-135M, fp32": "{label}",
            "peak memory beyond the model": "{training.peak_over_model_mib:.0f} MiB",
            "bytes per parameter": "{memory.total:.3g}",
            "tokens/s": "{training.tokens_s:.3g}, {training.ratio:.2f} x",
            "against the linear layers' full fine-tuning": "{training.ratio_linear?:.2f} x",
        },
        headline_rows(),
    ),
    "headline_step": Table(
        "sparse_adamw.csv",
        {
            "one step on its 210 matrices": "{label}",
            "AdamW fused": "{fused.median_ms:.3g} ms",
            "LIFT, dense gradients": "{dense.median_ms:.3g} ms, **{dense.ratio:.2f} x**",
            "LIFT, packed gradients": "{packed.median_ms:.3g} ms, **{packed.ratio:.2f} x**",
            "torch on a packed vector, dense / packed": "{dense_vector.median_ms:.3g} / "
            "{packed_vector.median_ms:.3g} ms",
            "authors' code": "{published.median_ms:.3g} ms",
        },
        [(label.partition("), ")[2], picks) for label, picks in step_rows()[:2]],
    ),
    "step": Table(
        "sparse_adamw.csv",
        {
            "matrices, weights": "{label}",
            "AdamW fused": "{fused.median_ms:.3g} ms",
            "dense gradients": "{dense.median_ms:.3g} ms, **{dense.ratio:.2f} x**",
            "packed gradients": "{packed.median_ms:.3g} ms, **{packed.ratio:.2f} x**",
            "torch on a packed vector, dense / packed": "{dense_vector.median_ms:.3g} / "
            "{packed_vector.median_ms:.3g} ms",
            "ours is x times as fast as that, dense / packed": "{dense.times_packed_vector?:.2f} / "
            "{packed.times_packed_vector?:.2f} x",
            "authors' code": "{published.median_ms:.3g} ms",
            "ours is x times faster, dense / packed": "{published.median_ms/dense.median_ms:.1f} / "
            "{published.median_ms/packed.median_ms:.1f} x",
            "% of roofline, dense / packed": "{dense.share_of_floor:.0%} / {packed.share_of_floor:.0%}",
        },
        step_rows(),
        tuned=2,
    ),
    "step_with_refresh": Table(
        "sparse_adamw.csv",
        {"SmolLM2-135M": "{label}", "fp32": "{fp32.median_ms:.3g} ms", "bf16, default": "{bf16.median_ms:.3g} ms"},
        refresh_rows(),
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
        baseline_rows(),
    ),
    "masks": Table(
        "masks.csv",
        {
            "matrices": "{label}",
            "number": "{row.matrices}",
            "method": "{row.variant}",
            "seconds": "{row.seconds:.3g}",
            "speed against Gram + eigh": "{row.ratio?:.2f} x",
            "overlap": "{row.overlap_mean:.3f} / {row.overlap_min:.3f}",
            "captured": "{row.captured_mean:.4f} / {row.captured_min:.4f}",
            "passes": "{row.passes:.3g}",
            "% of roofline": "{row.share_of_floor:.0%}",
        },
        mask_rows(),
    ),
    "selection": Table(
        "masks.csv",
        {
            "matrix": "{row.set}, r = {row.rank}",
            "method": "{row.variant}",
            "ms": "{row.seconds/ms:.3g}",
            "times as fast as torch.topk": "{row.times_topk:.3g}",
            "as the product, abs and torch.topk": "{row.times_product_topk?:.3g}",
            "as the product": "{row.times_product?:.3g}",
            "% of roofline": "{row.share_of_floor:.0%}",
        },
        each=[{"op": "lowrank_topk", "status": "ok"}],
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
        packed_op_rows(),
        tuned=4,
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
            "against that of the linear layers": "{row.ratio_linear?:.2f} x",
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
        [(label, picks) for label, picks in kernel_rows() if not label.startswith("CUDA")],
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
        [(label.removeprefix("CUDA "), picks) for label, picks in kernel_rows() if label.startswith("CUDA")],
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
