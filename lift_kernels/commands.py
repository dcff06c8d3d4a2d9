"""The commands beside ``finetune``: their arguments and what they print. Heavy imports wait until a
command runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

MODEL_HELP = "model directory, safetensors or GGUF file, or hub id (default: the bundled SmolLM2-135M)"


def add_commands(commands: Any) -> None:
    """Add the parsers of ``delta``, ``doctor`` and ``mask``."""
    delta = commands.add_parser("delta", help="make, apply, revert or describe a delta file: what fine-tuning changed")
    actions = delta.add_subparsers(dest="action", required=True)
    make = actions.add_parser("make", help="write every entry that differs from the base")
    make.add_argument(
        "model", metavar="MODEL", help="the fine-tuned model: a directory with safetensors or one such file"
    )
    make.add_argument("output", metavar="DELTA", help="the file to write")
    make.add_argument("--base", metavar="MODEL", help=MODEL_HELP)
    apply = actions.add_parser("apply", help="write the fine-tuned model: the base with a delta")
    apply.add_argument("--base", metavar="MODEL", help=MODEL_HELP)
    revert = actions.add_parser("revert", help="write the base again: the fine-tuned model without the delta")
    revert.add_argument(
        "model", metavar="MODEL", help="the fine-tuned model: a directory with safetensors or one such file"
    )
    for parser in (apply, revert):
        parser.add_argument("delta", metavar="DELTA")
        parser.add_argument("output", metavar="OUTPUT", help="the model to write; must not exist")
    info = actions.add_parser("info", help="say what a delta file holds")
    info.add_argument("delta", metavar="DELTA")

    commands.add_parser("doctor", help="say what works on this machine, and how to mend the rest")

    mask = commands.add_parser("mask", help="report and draw where a model's principal weights lie")
    mask.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    mask.add_argument("--density", type=float, default=0.05, help="share of each matrix that is chosen (default: 0.05)")
    mask.add_argument("--rank", type=int, default=64, help="rank of the approximation that chooses (default: 64)")
    mask.add_argument(
        "--budget-rank", type=int, help="choose (rows + columns) x this many entries, instead of --density"
    )
    mask.add_argument("--output", metavar="DIR", default="mask_report", help="where to write (default: mask_report)")


def run_command(options: argparse.Namespace) -> int:
    """Run one of these commands; returns the exit code, 2 for a mistake of the user."""
    try:
        if options.command == "doctor":
            from .doctor import main as doctor

            return doctor()
        if options.command == "mask":
            from .mask_report import write_report

            write_report(options.model, options.density, options.rank, options.budget_rank, Path(options.output))
            return 0
        return {"make": _make, "apply": _apply, "revert": _revert, "info": _info}[options.action](options)
    except ModuleNotFoundError as error:
        print(
            f"error: the package {error.name} is missing; run `pip install 'lift_kernels[finetune]'`", file=sys.stderr
        )
    except (ValueError, TypeError, IndexError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 2


def _make(options: argparse.Namespace) -> int:
    from .delta import save_delta

    base, _ = _find_base(options.base, list(_floating_dtypes(options.model)))
    info = save_delta(options.model, base, options.output, _settings(Path(options.model)), progress=True)
    print(_describe(options.output, info))
    return 0


def _apply(options: argparse.Namespace) -> int:
    from .delta import apply_delta, delta_info
    from .files import FileError

    info = delta_info(options.delta)
    base, tokenizer = _find_base(options.base, list(set(info.dtypes.values())))
    if isinstance(base, Path):
        apply_delta(base, options.delta, options.output)
    else:
        output = Path(options.output)
        if output.exists():
            raise FileError(f"{output} exists already; choose another output or remove it")
        apply_delta(base, options.delta)
        from .finetune.modelio import save_model

        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as work:
            save_model(base, tokenizer, Path(work) / output.name)
            (Path(work) / output.name).rename(output)
    print(f"{options.output}: the base with {options.delta} ({info.entries:,} entries)")
    return 0


def _revert(options: argparse.Namespace) -> int:
    from .delta import revert_delta

    revert_delta(options.model, options.delta, options.output)
    print(f"{options.output}: {options.model} without {options.delta}")
    return 0


def _info(options: argparse.Namespace) -> int:
    from .delta import delta_info

    print(_describe(options.delta, delta_info(options.delta)))
    return 0


def _find_base(name: str | None, dtypes: list) -> tuple[Any, Any]:
    """The base: a path where its tensors can be read from safetensors, else the model and tokenizer
    that transformers loads.
    """
    from .files import FileError

    path = None if name is None else Path(name).expanduser()
    if path is not None and (path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors")))):
        # A bfloat16 base of a model that was trained in float32 has to be widened as the training
        # did.
        if path.is_file() or _floating_dtypes(path) == set(dtypes):
            return path, None
    from .finetune.modelio import find_model, load_model
    from .finetune.settings import UserError

    if len(dtypes) != 1:
        raise FileError(
            f"a model in {len(dtypes)} dtypes needs a base in safetensors; save the base with save_pretrained first"
        )
    try:
        return load_model(find_model(name), dtypes[0])
    except UserError as error:
        raise FileError(str(error)) from error


def _floating_dtypes(path: str | Path) -> set:
    from .weights import CheckpointWeights

    with CheckpointWeights(path) as weights:
        return {dtype for dtype, _ in weights.forms.values() if dtype.is_floating_point}


def _settings(model: Path) -> dict[str, Any]:
    """The settings of the run that made a model, where its report lies beside it."""
    try:
        report = json.loads((model.parent / "report.json").read_text())
        return {key.removeprefix("settings."): value for key, value in report.items() if key.startswith("settings.")}
    except (OSError, ValueError, AttributeError):
        return {}


def _describe(path: str, info: Any) -> str:
    each = info.file_bytes / max(1, info.entries)
    lines = [
        f"{path}: {info.entries:,} entries changed in {len(info.counts)} tensors; {info.file_bytes / 2**20:.1f} MiB, "
        f"{each:.2f} bytes an entry",
        f"base {info.base[:16]}, result {info.result[:16]}",
    ]
    if info.settings:
        lines.append(", ".join(f"{key} {value}" for key, value in info.settings.items() if value is not None))
    return "\n".join(lines)
