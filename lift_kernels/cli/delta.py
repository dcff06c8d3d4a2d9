"""The command ``delta``: make, apply, revert or describe a delta file."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from ..errors import FileError

_BASE_HELP = "model directory, safetensors or GGUF file, or hub id (default: the bundled SmolLM2-135M)"
_TUNED_HELP = "the fine-tuned model: a directory with safetensors or one such file"


def add_parser(commands: Any) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser(
        "delta", help="make, apply, revert or describe a delta file, which holds the entries that fine-tuning changed"
    )
    actions = parser.add_subparsers(dest="action", required=True)
    make = actions.add_parser("make", help="write a delta file with every entry that differs from the base")
    make.add_argument("model", metavar="MODEL", help=_TUNED_HELP)
    make.add_argument("output", metavar="DELTA", help="the file to write")
    make.add_argument("--base", metavar="MODEL", help=_BASE_HELP)
    apply = actions.add_parser("apply", help="write the fine-tuned model: the base with a delta applied")
    apply.add_argument("--base", metavar="MODEL", help=_BASE_HELP)
    revert = actions.add_parser("revert", help="write the base: the fine-tuned model with its delta reverted")
    revert.add_argument("model", metavar="MODEL", help=_TUNED_HELP)
    for action in (apply, revert):
        action.add_argument("delta", metavar="DELTA", help="the delta file")
        action.add_argument("output", metavar="OUTPUT", help="the model to write; it must not exist yet")
    info = actions.add_parser("info", help="print what a delta file holds")
    info.add_argument("delta", metavar="DELTA", help="the delta file")
    for action, run in ((make, _make), (apply, _apply), (revert, _revert), (info, _info)):
        action.set_defaults(run=run, input_errors=(ValueError, TypeError, IndexError))


def _make(options: argparse.Namespace) -> int:
    from ..delta import save_delta

    base, _ = _find_base(options.base, list(_floating_dtypes(options.model)))
    info = save_delta(options.model, base, options.output, _settings(Path(options.model)), progress=True)
    print(_describe(options.output, info))
    return 0


def _apply(options: argparse.Namespace) -> int:
    from ..delta import apply_delta, delta_info

    info = delta_info(options.delta)
    base, tokenizer = _find_base(options.base, list(set(info.dtypes.values())))
    if isinstance(base, Path):
        apply_delta(base, options.delta, options.output)
    else:
        output = Path(options.output)
        if output.exists():
            raise FileError(f"{output} already exists; choose another output or remove it")
        apply_delta(base, options.delta)
        from ..finetune.model_io import save_model  # needs transformers

        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as work:
            save_model(base, tokenizer, Path(work) / output.name)
            (Path(work) / output.name).rename(output)
    print(f"{options.output}: the base with {options.delta} applied ({info.entries:,} entries)")
    return 0


def _revert(options: argparse.Namespace) -> int:
    from ..delta import revert_delta

    revert_delta(options.model, options.delta, options.output)
    print(f"{options.output}: {options.model} with {options.delta} reverted")
    return 0


def _info(options: argparse.Namespace) -> int:
    from ..delta import delta_info

    print(_describe(options.delta, delta_info(options.delta)))
    return 0


def _find_base(name: str | None, dtypes: list) -> tuple[Any, Any]:
    """Locate the base model, and load it unless its tensors can be read from a file.

    Args:
        name: a directory, safetensors or GGUF file, or hub id; None is the bundled model.
        dtypes: floating-point dtypes of the fine-tuned model.

    Returns:
        A path with safetensors and None, or the model and tokenizer that transformers loads.

    Raises:
        FileError: when the base must be loaded but the fine-tuned model has several dtypes.
        UserError: for a base that cannot be found or loaded.
    """
    path = None if name is None else Path(name).expanduser()
    if path is not None and (path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors")))):
        # A base in bfloat16 of a model that was trained in float32 must be widened, as in training.
        if path.is_file() or _floating_dtypes(path) == set(dtypes):
            return path, None
    from ..finetune.model_io import find_model, load_model

    if len(dtypes) != 1:
        raise FileError(
            f"the model has {len(dtypes)} dtypes, so its base must be in safetensors; "
            "save the base with save_pretrained first"
        )
    return load_model(find_model(name), dtypes[0])


def _floating_dtypes(path: str | Path) -> set:
    """Return the floating-point dtypes of a checkpoint."""
    from ..delta.model_weights import CheckpointWeights

    with CheckpointWeights(path) as weights:
        return {dtype for dtype, _ in weights.forms.values() if dtype.is_floating_point}


def _settings(model: Path) -> dict[str, Any]:
    """Return the settings in the ``report.json`` beside a model, or nothing without one."""
    try:
        report = json.loads((model.parent / "report.json").read_text())
        return {key.removeprefix("settings."): value for key, value in report.items() if key.startswith("settings.")}
    except (OSError, ValueError, AttributeError):
        return {}


def _describe(path: str, info: Any) -> str:
    """Return the content of a delta file as text."""
    each = info.file_bytes / max(1, info.entries)
    lines = [
        f"{path}: {info.entries:,} entries changed in {len(info.counts)} tensors; {info.file_bytes / 2**20:.1f} MiB, "
        f"{each:.2f} bytes per entry",
        f"base {info.base[:16]}, result {info.result[:16]}",
    ]
    if info.settings:
        lines.append(", ".join(f"{key} {value}" for key, value in info.settings.items() if value is not None))
    return "\n".join(lines)
