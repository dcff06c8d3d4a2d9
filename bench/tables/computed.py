"""The tables of what is computed: costs, rounding, recipes, comparisons of methods, probes."""

from __future__ import annotations

from bench.tables.comparisons import COMPARISON_TABLES
from bench.tables.probes import PROBE_TABLES
from bench.tables.rows import refresh_cost_rows
from bench.tables.types import Table

_PLAN = {
    "form": "{row.form}",
    "weights": "{row.weights_gib:.1f}",
    "state": "{row.state_gib:.1f}",
    "gradients": "{row.gradients_gib:.1f}",
    "scratch": "{row.scratch_gib:.1f}",
    "activations": "{row.activations_gib:.1f}",
    "total": "{row.total_gib:.1f} GiB",
    "with checkpointing: activations": "{row.activations_checkpointed_gib:.1f}",
    "total ": "{row.total_checkpointed_gib:.1f} GiB",
    "fits": "{row.fits}",
}
COMPUTED_TABLES = {
    "refresh-cost": Table(
        "refresh_cost.csv",
        {
            "weights": "{label}",
            "part": "{ops.part}",
            "launches": "{ops.launches:.0f}",
            "waits": "{ops.waits:.0f}",
            "GB": "{ops.bytes/GB:.1f}",
            "TFLOP bf16, TF32, fp32": "{ops.bf16_flops/T:.2f}, {ops.tf32_flops/T:.2f}, {ops.fp32_flops/T:.2f}",
            "eigenproblems": "{ops.eigenproblems:.0f}",
            "predicted": "{ops.predicted_ms:.1f} ms",
            "references: launches": "{references.launches:.0f}",
            "GB ": "{references.bytes/GB:.1f}",
            "predicted ": "{references.predicted_ms:.1f} ms",
        },
        refresh_cost_rows(),
    ),
    "mask-rounding": Table(
        "mask_rounding.csv",
        {
            "rank": "{row.rank}",
            "products": "{row.products}",
            "start": "{row.start}",
            "overlap": "{row.overlap_mean:.4f} / {row.overlap_min:.3f}",
            "captured": "{row.captured_mean:.5f} / {row.captured_min:.4f}",
            "passes": "{row.passes:.3g}",
            "converged": "{row.converged:.0f} of {row.matrices:.0f}",
        },
        each=[{"status": "ok"}],
    ),
    "recipes": Table(
        "recipes.csv",
        {
            "model": "{row.model}",
            "a step": "{row.setting}",
            "weights": "{row.weights_gb:.1f} GB",
            "trained entries": "{row.entries_gb:.1f} GB",
            "activations": "{row.activations_gb:.1f} GB",
            "sum": "{row.total_gb:.1f} GB",
            "card": "{row.card_gb} GB",
            "minutes: H200": "{row.minutes_h200:.0f}",
            "A100": "{row.minutes_a100?:.0f}",
            "L40S": "{row.minutes_l40s?:.0f}",
            "RTX 4090": "{row.minutes_rtx_4090?:.0f}",
        },
        each=[{}],
    ),
    "plan-8b": Table("memory_plans.csv", _PLAN, each=[{"model": "Llama-3-8B"}]),
    "plan-70b": Table("memory_plans.csv", _PLAN | {"runs today": "{row.today}"}, each=[{"model": "Llama-3-70B"}]),
    **COMPARISON_TABLES,
    **PROBE_TABLES,
}
