"""A small folder of a card's results, as `bench.gpu_suite` writes it."""

from __future__ import annotations

from pathlib import Path

from bench.common.results import write_csv

WHERE = {
    "device": "A card 80GB",
    "level": "",
    "threads": 16,
    "environment": "default",
    "torch": "2.11.0",
    "lift_kernels": "0.1.0",
    "commit": "abc",
    "triton": "3.6.0",
    "cuda": "13.0",
}
SMI = "| NVIDIA-SMI 580.1.2   Driver Version: 580.1.2   CUDA Version: 13.0 |\n"


def row(stage: str, variant: str, median_ms: float | str = "", **columns: object) -> dict:
    """A row of a timed variant, or of one whose ``status`` says why it has no time."""
    return {"stage": stage, "variant": variant, "status": "ok", "median_ms": median_ms} | columns | WHERE


def timed(stage: str, variant: str, median_ms: float, floor_ms: float | str, ratio: float | str, **columns) -> dict:
    floor = {"floor_of": "bytes", "floor_ms": floor_ms, "share_of_floor": floor_ms / median_ms} if floor_ms else {}
    return row(stage, variant, median_ms, host_ms=1.25, ratio=ratio, repeats=20, **floor, **columns)


def time_rows() -> list[dict]:
    """Rows of three stages: rates, the step of two dtypes, and training."""
    step = {"model": "LLaMA-2-7B", "shape": "224 matrices", "op": "sparse_adamw_"}
    bf16, fp32 = {**step, "dtype": "bf16"}, {**step, "dtype": "fp32"}
    full, vector = {"baseline": "AdamW fused, bf16"}, "AdamW fused on a packed vector, scattered"
    train = {"model": "random Llama, 1.1 B", "dtype": "bf16", "shape": "4 x 1024 tokens", "op": "training step"}
    return [
        row("machine", "copy bandwidth", rate_name="copy", rate=2.5e12, shape="1024 MiB"),
        row("machine", "product, bf16", rate_name="bf16", rate=7.5e14, shape="8192"),
        row("machine", "(whole stage)", seconds=6.3, budget_s=15),
        timed("step LLaMA-2-7B", "AdamW fused, bf16", 40, 32, "", **bf16),
        timed("step LLaMA-2-7B", "dense bf16 gradients, fp32 moments", 8, 6, 5.0, **bf16, **full),
        timed("step LLaMA-2-7B", "packed fp32 gradients, fp32 moments", 5, 4, 8.0, **bf16, **full),
        timed("step LLaMA-2-7B", vector, 16, 8, 2.5, **bf16, **full),
        row("step LLaMA-2-7B", "packed bf16 gradients", status="refused, it is wrong: a|b", **bf16),
        timed("step LLaMA-2-7B", "AdamW fused, fp32", 50, 45, "", **fp32),
        row("step LLaMA-2-7B", "(whole stage)", status="failed: 1 of 6 rows", seconds=20, budget_s=40),
        row("step Llama-3-8B", "(whole stage)", status="killed after 40 s", seconds=40, budget_s=40),
        timed(
            "training",
            "full fine-tuning, AdamW fused",
            250,
            125,
            "",
            tokens_per_s=16384.0,
            peak_gb=20,
            state_gb=4.4,
            **train,
        ),
        timed(
            "training",
            "LIFT, packed gradients",
            200,
            150,
            1.25,
            tokens_per_s=20480.0,
            peak_gb=8,
            state_gb=0.5,
            baseline="full fine-tuning, AdamW fused",
            **train,
        ),
    ]


def check_rows() -> list[dict]:
    return [
        row("build", "backend triton", seconds=20.8),
        row("build", "(whole stage)", seconds=28.1, budget_s=45),
        row("tests", "ops/test_x.py", status="failed: 2 tests"),
        row("tests", "gpu tests", status="failed", shape="2 failed, 862 passed"),
    ]


def write(folder: Path, **changed: list[dict]) -> Path:
    """``gpu_check`` and ``gpu_time``: CSVs of these rows, and the log of the check."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in ({"gpu_check": check_rows(), "gpu_time": time_rows()} | changed).items():
        write_csv(folder / f"{name}.csv", rows)
    (folder / "gpu_check.log").write_text(SMI)
    return folder
