"""The tables of a card: the rows of each stage of `bench.gpu_suite`, in their order.

A table takes every row of its stages. So a variant that a stage gains needs no change here. A row
without a time shows its status.
"""

from __future__ import annotations

from bench.tables.types import Selection, Table

TIME = "{row.median_ms:.4g} ms||{row.status}"
SPEED = {"speed against its baseline": "{row.ratio:.3g} x", "baseline": "{row.baseline}"}
ROOFLINE = {"% of roofline": "{row.share_of_floor:.0%} ({row.floor_of})"}
TIMES = {"time": TIME, "host": "{row.host_ms:.3g} ms", **SPEED, **ROOFLINE}


def rows_of(*stages: str) -> list[Selection]:
    """The rows of these stages. Of a whole stage only that it was killed, or died."""
    ends = "killed*", "failed: exit status*"
    return [
        selection
        for stage in stages
        for selection in (
            {"stage": stage, "variant": "[!(]*"},
            *({"stage": stage, "variant": "(whole stage)", "status": end} for end in ends),
        )
    ]


def timed(columns: dict[str, str], *stages: str) -> Table:
    return Table("gpu_time.csv", columns, each=rows_of(*stages), partial=True)


CARD_TABLES = {
    "gpu_check": Table(
        "gpu_check.csv",
        {
            "stage": "{row.stage}",
            "what": "{row.variant}",
            "result": "{row.status}",
            "details": "{row.shape}",
            "seconds": "{row.seconds:.0f} of {row.budget_s:.0f}||{row.seconds:.0f}",
            "commit": "{row.commit}",
        },
        each=[{}],
        partial=True,
    ),
    "gpu_machine": Table(
        "gpu_time.csv",
        {
            "rate": "{row.variant}",
            "of": "{row.shape}",
            "measured": "{bytes.rate/GB:.0f} GB/s||{flops.rate/T:.3g} TFLOP/s||{row.status}",
        },
        each=rows_of("machine"),
        names={"bytes": {"rate_name": "copy"}, "flops": {"rate_name": "[!c]*"}},
        partial=True,
    ),
    "gpu_step": timed(
        {
            "model": "{row.model}, {row.dtype}, {row.shape}||{row.stage}",
            "variant": "{row.variant}",
            **TIMES,
            "% with 64-byte fetches": "{row.share_of_fetched:.0%}",
        },
        "step *",
    ),
    "gpu_packed_ops": timed(
        {
            "op": "{row.op}||{row.stage}",
            "variant": "{row.variant}",
            "on": "{row.model}, {row.shape}, {row.dtype}||{row.shape}, {row.dtype}",
            **TIMES,
        },
        "packed ops",
    ),
    "gpu_gradients": timed(
        {
            "layer": "{row.model}, {row.shape}||{row.stage}",
            "op": "{row.op}",
            "variant": "{row.variant}",
            **TIMES,
            "kept": "{row.kept_mb:.4g} MB",
            "peak": "{row.peak_mb:.4g} MB",
        },
        "gradients",
    ),
    "gpu_selection": timed(
        {
            "matrix": "{row.model}, {row.shape}||{row.stage}",
            "op": "{row.op}",
            "variant": "{row.variant}",
            **TIMES,
        },
        "selection",
        "bitmaps",
    ),
    "gpu_experiments": Table(
        "gpu_experiments.csv",
        {
            "setting": "{row.variant}",
            "on": "{row.model}, {row.shape}",
            "expected": "{row.prediction}",
            "time": TIME,
            "speed against the first": "{row.ratio:.3g} x",
        },
        each=rows_of("experiments"),
        partial=True,
    ),
    "gpu_refresh": timed(
        {
            "model": "{row.model}, {row.shape}||{row.model}||{row.stage}",
            "refresh": "{row.variant}",
            "time": "{row.median_ms:,.1f} ms||{row.status}",
            "passes": "{row.passes:.3g}",
            "settled": "{row.settled:.0f}",
            "eigenproblems": "{row.eigh_share:.0%}",
            "orthonormalization": "{row.orth_share:.0%}",
            **ROOFLINE,
        },
        "refresh",
    ),
    "gpu_factorizations": timed(
        {
            "op": "{row.op}||{row.stage}",
            "variant": "{row.variant}",
            "on": "{row.shape}",
            **TIMES,
            "FLOPs at the TF32 rate / side^3": "{row.eigh_cost:.3g}",
        },
        "factorizations",
    ),
    "gpu_training": timed(
        {
            "model": "{row.model}, {row.dtype}, {row.shape}||{row.stage}",
            "method": "{row.variant}",
            "trained": "{row.trained?/M:,.1f} M",
            "tokens/s": "{row.tokens_per_s:,.0f}||{row.status}",
            "step": "{row.median_ms:.4g} ms",
            **SPEED,
            "peak memory": "{row.peak_gb:.3g} GB",
            "optimizer state": "{row.state_gb:.3g} GB",
            **ROOFLINE,
        },
        "training",
        "training 7B",
    ),
}

LAUNCHED_ALONE = {
    "gpu_triton_3_7": Table(
        "gpu_triton_3_7.csv",
        {
            "product": "{row.stage}",
            "on": "{row.shape}",
            "way": "{row.variant}",
            "time": "{row.median_ms:.3g} ms",
            "largest error": "{row.error}",
        },
        each=[{"stage": "fused product"}, {"stage": "selection"}],
    ),
}
"""Of kernels that another compiler made, launched on a card outside of the suite."""
