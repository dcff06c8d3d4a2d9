"""The words of the plots: what a key of the CSVs is called, and how a number is written."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

Row = dict[str, str]

DENSE, PACKED, AUTHORS = "LIFT, dense gradients", "LIFT, packed gradients", "Authors' LIFT code"
BF16_STATE, REFRESH = ", bf16 state", " + refresh"

OPS = ("Gather", "Scatter", "L2 norm", "Move to a new mask", "Move all state")

# CSV key -> text in a plot. Keys of one comma-separated part are used inside the names of sets.
LABELS = {
    "smollm2": "SmolLM2-135M",
    "minilm": "MiniLM",
    "random Llama": "Random Llama",
    "float32": "fp32",
    "bfloat16": "bf16",
    "AdamW fused": "AdamW fused",
    "AdamW foreach": "AdamW foreach",
    "AdamW for-loop": "AdamW for-loop",
    "full fine-tuning, AdamW fused": "Full fine-tuning, AdamW fused",
    "full fine-tuning of the linear layers, AdamW fused": "Full fine-tuning, linear layers",
    "packed vector: gather + AdamW fused + scatter": "Packed AdamW, dense gradients",
    "packed vector: AdamW fused + scatter": "Packed AdamW, packed gradients",
    "bitsandbytes AdamW8bit": "AdamW8bit (bitsandbytes)",
    "torchao AdamW8bit": "AdamW8bit (torchao)",
    "flashoptim FlashAdamW": "FlashAdamW (flashoptim)",
    "GaLore, r = 64": "GaLore, rank 64",
    "APOLLO, r = 64": "APOLLO, rank 64",
    "LoRA (peft), AdamW fused": "LoRA (peft)",
    "SHiRA (peft), AdamW fused": "SHiRA (peft)",
    "SHiRA's values, AdamW fused": "SHiRA values, AdamW fused",
    "published LIFT step": AUTHORS,
    "one indexed Triton launch a parameter": "one Triton launch per parameter",
    "LIFT, matrix mode": DENSE,
    "LIFT, packed mode": PACKED,
    "dense grads": DENSE,
    "packed grads": PACKED,
    "dense grads + refresh/100": DENSE + REFRESH,
    "packed grads + refresh/100": PACKED + REFRESH,
    "dense grads, bf16 moments": DENSE + BF16_STATE,
    "packed grads, bf16 moments": PACKED + BF16_STATE,
    "dense grads, fp32 moments, fp32 master": DENSE,
    "packed grads, fp32 moments, fp32 master": PACKED,
    "dense grads, fp32 moments, fp32 master + refresh/100": DENSE + REFRESH,
    "packed grads, fp32 moments, fp32 master + refresh/100": PACKED + REFRESH,
    "sparse_adamw_, dense grads": DENSE,
    "sparse_adamw_, packed grads": PACKED,
    "sparse_adamw_, dense grads, reference": "PyTorch reference of the step",
    "sparse_adamw_, dense grads, Triton": "Triton kernel",
    "sparse_adamw_, dense grads, fp32 moments and master": DENSE,
    "sparse_adamw_, packed grads, fp32 moments and master": PACKED,
    "sparse_adamw_, dense grads, bf16 moments, no master": DENSE + BF16_STATE,
    "sparse_adamw_, packed grads, bf16 moments, no master": PACKED + BF16_STATE,
    "packed_gather": "Gather (packed_gather)",
    "packed_scatter_": "Scatter (packed_scatter_)",
    "packed_l2_norm": "L2 norm (packed_l2_norm)",
    "arena_migrate_": "Move all state to a new mask (arena_migrate_)",
    "packed_migrate": "Move to a new mask (packed_migrate)",
    "arena_migrate_, packed_migrate for each arena": "Each arena by itself (packed_migrate)",
    "safetensors save_file + fsync": "Save the whole model",
    "safetensors load_file": "Load the whole model",
    "save_delta": "Save a delta",
    "apply": "Apply a delta in memory",
    "revert": "Revert a delta in memory",
    "apply to a checkpoint": "Apply a delta to a checkpoint file",
    "SHA-256 of the model, for comparison": "SHA-256 of the model, for scale",
    "Chebyshev, l = 2r": "Chebyshev, l = 2r",
    "svd_lowrank, q = 2r": "svd_lowrank, q = 2r",
    "gradients": "gradients",
    "moments": "moments",
    "master": "fp32 master weights",
    "indices": "mask indices",
    "added": "added weights",
    "warm_start": "start of the next mask",
    "forward_backward_ms": "forward and backward",
    "step_ms": "optimizer step",
    "refresh_ms": "refresh of masks or projections, per step",
}


def label(key: str) -> str:
    """The text for a variant, a part or a set of the CSVs."""
    if key in LABELS:
        return LABELS[key]
    text = ", ".join(LABELS.get(part, part) for part in key.split(", "))
    return re.sub(r"([\d.]+) M\b", r"\1M parameters", re.sub(r"(\d+) ?x ?(\d+)", r"\1 × \2", text))


def number(value: float | str, significant: int = 3) -> str:
    """A few significant digits, without an exponent. A dash for an empty field."""
    if value == "":
        return "–"
    if float(value) == 0:
        return "0"
    rounded = float(f"{float(value):.{significant}g}")
    return f"{rounded:,.{max(0, significant - 1 - math.floor(math.log10(abs(rounded))))}f}"


def amount(value: float | str, unit: str) -> str:
    """A number and its unit."""
    return f"{number(value)} {unit}" if value != "" else "–"


def times(ratio: str) -> str:
    """A ratio, in two decimals where they are enough."""
    if not ratio:
        return "–"
    value = float(ratio)
    return f"{value:.2f}×" if 0.1 <= value < 10 else f"{number(value, 2 if value < 1 else 3)}×"


def percent(share: float | str) -> str:
    """A share in whole percent."""
    return f"{100 * float(share):.0f} %" if share != "" else "–"


def origin(rows: Sequence[Row], *remarks: str) -> str:
    """The caption: remarks, methods that this machine cannot run, the machine and versions."""
    absent = [row for row in rows if not row["status"].startswith(("ok", "refused", "not offered"))]
    names = ", ".join(dict.fromkeys(label(row["variant"]) for row in absent))
    missing = [f"Without a figure on this machine: {names}."] if names else []
    first = rows[0]
    level = f" · {first['level']}" if first.get("level") else ""
    triton = f" · triton {first['triton']}" if first.get("triton") else ""
    machine = f"Machine: {first['device']}{level} · {first['threads']} threads · torch {first['torch']}{triton}"
    return "\n".join([*remarks, *missing, f"{machine} · lift_kernels {first['lift_kernels']}, {first['commit']}"])
