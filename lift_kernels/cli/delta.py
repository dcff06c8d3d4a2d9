"""The command ``delta``: make, apply, revert or describe a delta file."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import FileError

_BASE_HELP = (
    "model directory, safetensors or GGUF file, or hub id (default: the bundled SmolLM2-135M). A base that is not "
    "stored with the names and dtypes of the fine-tuned model is loaded with transformers, and takes its size on disk "
    "beside the output while the command runs"
)
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
    from ..delta.matching import common_forms
    from ..delta.model_weights import CheckpointWeights

    def check(base: Path) -> None:
        with CheckpointWeights(options.model) as new, CheckpointWeights(base) as old:
            common_forms(new, old)

    with CheckpointWeights(options.model) as weights:
        dtype = _main_dtype(weights.forms.values())
    with _stored_base(options.base, Path(options.output), dtype, check) as base:
        info = save_delta(options.model, base, options.output, _settings(Path(options.model)), progress=True)
    print(_describe(options.output, info))
    return 0


def _apply(options: argparse.Namespace) -> int:
    from ..delta.apply import apply_delta, require_new
    from ..delta.format import Delta, delta_info
    from ..delta.matching import find_homes
    from ..delta.model_weights import CheckpointWeights

    def check(base: Path) -> None:
        with Delta(options.delta) as delta, CheckpointWeights(base) as weights:
            find_homes(delta, weights, reverse=False)

    info = delta_info(options.delta)
    require_new(options.output)
    with _stored_base(options.base, Path(options.output), _main_dtype(info.forms.values()), check) as base:
        apply_delta(base, options.delta, options.output)
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


@contextmanager
def _stored_base(name: str | None, output: Path, dtype: Any, check: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a base in safetensors that has the names and dtypes of the fine-tuned model.

    A base that is stored in another way is loaded with transformers and saved beside the output. It
    is removed at the end.

    Args:
        name: a directory, safetensors or GGUF file, or hub id; None is the bundled model.
        output: what the command writes.
        dtype: dtype to load the base in.
        check: raises StoredDifferently for a base with other names or dtypes.

    Raises:
        FileError: for a base that does not fit, and when it cannot be saved.
        UserError: for a base that cannot be found or loaded.
    """
    from ..delta.differences import StoredDifferently

    path = None if name is None else Path(name).expanduser()
    if path is not None and (path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors")))):
        try:
            check(path)
        except StoredDifferently as error:
            if not (path / "config.json").is_file():
                raise
            reason = str(error).partition(": ")[0]
            print(f"{path} is loaded with transformers in {dtype}, because {reason}", flush=True)
        else:
            yield path
            return
    from safetensors import SafetensorError

    from ..finetune.model_io import find_model, load_model, save_model  # needs transformers

    source = find_model(name)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as work:
            base = Path(work) / "base"
            save_model(*load_model(source, dtype), base)
            try:
                yield base
            except FileError as error:
                raise FileError(str(error).replace(str(base), f"the base ({source.description})")) from error
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"cannot save the base beside {output}: {error}; free some space or choose another place"
        ) from error


def _main_dtype(forms: Iterable[tuple[Any, tuple[int, ...]]]) -> Any:
    """Return the dtype of the most entries among those in which a model can be loaded."""
    import torch

    from ..validation import WEIGHT_DTYPES

    entries = Counter({torch.float32: 0})
    for dtype, shape in forms:
        if dtype in WEIGHT_DTYPES:
            entries[dtype] += math.prod(shape)
    return entries.most_common(1)[0][0]


def _settings(model: Path) -> dict[str, Any]:
    """Return the settings in the ``report.json`` beside a model, or nothing without one."""
    try:
        report = json.loads((model.parent / "report.json").read_text(encoding="utf-8"))
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
