"""What differs between two models that should be alike, and the way out, for messages.

Names are compared first, then shapes, then dtypes. Contents are compared by who calls.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from ..errors import FileError
from ..validation import WEIGHT_DTYPES
from .model_weights import Form


class StoredDifferently(FileError):
    """Names or dtypes differ, as they may between two ways to store one model."""


class Side(NamedTuple):
    """One of two models: what messages call it, and the form of each tensor by name."""

    label: str
    forms: Mapping[str, Form]


_STACKED = "transformers stacks experts in memory and stores them one by one"
_TO_FOLDER = "give the directory and an output, as in apply_delta(folder, delta, output), and load the output"
_ORIGINAL = "give the model that the delta was made for"
_COMMON = {"quantized": "load the model without quantization"}

SAVING = _COMMON | {
    "wrapped": "unwrap the model before it is saved or compared, as with model.module or model._orig_mod",
    "peft": "merge the adapter (merge_and_unload()) and save the model; import_shira reads a saved SHiRA adapter",
    "prefix": "load the base with transformers and save it with save_pretrained, "
    "as `python -m lift_kernels delta make MODEL DELTA --base BASE` does",
    "experts": f"{_STACKED}: save the model with save_pretrained and give both directories",
    "names": "give two checkpoints of one architecture, both saved in the same way",
    "shapes": "give two checkpoints of one architecture",
    "dtypes": "load or save both in one dtype, as `python -m lift_kernels delta make MODEL DELTA --base BASE` does",
}
"""Ways out by reason, where a delta is made."""
IN_MEMORY = _COMMON | {
    "wrapped": "give the unwrapped model, such as model.module or model._orig_mod",
    "peft": "apply the delta before peft wraps the model",
    "prefix": f"load the model with the class that was fine-tuned, or {_TO_FOLDER}",
    "experts": f"{_STACKED}: {_TO_FOLDER}",
    "names": f"{_ORIGINAL}, or {_TO_FOLDER}",
    "shapes": _ORIGINAL,
    "dtypes": "load the model with from_pretrained(..., dtype={dtype})",
}
"""Ways out by reason, where a delta meets a module."""
IN_FILES = _COMMON | {
    "wrapped": "save the unwrapped model and give that one",
    "peft": "give the whole model, and not its adapter",
    "prefix": "load the base with the class that was fine-tuned and save it with save_pretrained, "
    "as `python -m lift_kernels delta apply --base BASE DELTA OUTPUT` does for causal language models",
    "experts": f"{_STACKED}: load the model with from_pretrained and apply the delta to it",
    "names": _ORIGINAL,
    "shapes": _ORIGINAL,
    "dtypes": "save the model in {dtype} with save_pretrained, "
    "as `python -m lift_kernels delta apply --base BASE DELTA OUTPUT` does",
}
"""Ways out by reason, where a delta is applied to a checkpoint."""
REVERTING_FILES = IN_FILES | {
    "prefix": "save the model with the class that was fine-tuned",
    "dtypes": "give the model in {dtype}, as it was fine-tuned",
}
"""Ways out by reason, where a delta is taken off a checkpoint."""

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PEFT = re.compile(r"^base_model\.model\.|\.base_layer\.|\.lora_")
_QUANTIZED = re.compile(r"\.(absmax|quant_map|quant_state\..*|SCB|qweight|qzeros|weight_scale(_inv)?)$")


def require_same_names(
    one: str, other: str, missing: Collection[str], extra: Collection[str], remedies: Mapping[str, str]
) -> None:
    """Raise StoredDifferently unless both sides have the same names.

    Args:
        one: label of the side whose names are expected.
        other: label of the other side.
        missing: names that only ``one`` has.
        extra: names that only ``other`` has.
        remedies: way out by reason.
    """
    if not missing and not extra:
        return
    reason, detail = _reason(missing, extra)
    first, second = (one, other) if missing else (other, one)
    names = sorted(missing or extra)
    count = "one tensor" if len(names) == 1 else f"{len(names)} tensors"
    back = f", and {len(extra)} the other way round, the first {min(extra)}" if missing and extra else ""
    raise StoredDifferently(
        f"the names differ{detail}: {first} has {count} that {second} lacks, the first {names[0]}{back}; "
        f"{remedies[reason]}"
    )


def require_same_forms(one: Side, other: Side, remedies: Mapping[str, str]) -> None:
    """Raise unless tensors of one name have the same shape, and then the same dtype.

    Args:
        one: the side that is expected.
        other: the other side.
        remedies: way out by reason.

    Raises:
        FileError: for shapes.
        StoredDifferently: for dtypes.
    """
    common = [name for name in one.forms if name in other.forms]
    for part, what in ((1, "shapes"), (0, "dtypes")):
        unlike = [name for name in common if one.forms[name][part] != other.forms[name][part]]
        if unlike:
            expected, found = (side.forms[unlike[0]][part] for side in (one, other))
            # A model can be loaded in these dtypes. Others, such as those of counters, are its own.
            reason = "dtypes" if part == 0 and expected in WEIGHT_DTYPES else "shapes"
            message = (
                f"the {what} differ in {len(unlike)} of {len(common)} tensors: {unlike[0]} is {expected} in "
                f"{one.label} and {found} in {other.label}; {remedies[reason].format(dtype=expected)}"
            )
            raise FileError(message) if what == "shapes" else StoredDifferently(message)


def _reason(missing: Collection[str], extra: Collection[str]) -> tuple[str, str]:
    """Return why names differ, as a key of the ways out, and what to say about it."""
    for mark, reason, detail in ((_PEFT, "peft", " by an adapter of peft"), (_QUANTIZED, "quantized", "")):
        if any(mark.search(name) for name in (*missing, *extra)):
            return reason, detail
    wrappers = [part for name in (*missing, *extra) for part in name.split(".") if part in _WRAPPERS]
    if wrappers and {_unwrapped(name) for name in missing} & {_unwrapped(name) for name in extra}:
        return "wrapped", f" by the wrapper's {wrappers[0] + '.'!r}"
    for names, others in ((missing, set(extra)), (extra, set(missing))):
        prefix = next((prefix for name in names for prefix in _prefixes(name, others)), None)
        if prefix is not None:
            return "prefix", f" by the prefix {prefix!r}"
    singly = {_layer(name) for name in (*missing, *extra) if re.search(r"\.experts\.\d+\.", name)}
    stacked = {_layer(name) for name in (*missing, *extra) if re.search(r"\.experts\.[^\d]", name)}
    return ("experts", " where experts are stacked") if singly & stacked else ("names", "")


def _layer(name: str) -> str:
    """Return the layer that holds an expert. Checkpoints may give the block in it another name."""
    return name.partition(".experts.")[0].rpartition(".")[0]


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefixes(name: str, others: set[str]) -> Iterator[str]:
    """Yield what stands in front of one of ``others`` in a name."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if ".".join(parts[i:]) in others:
            yield ".".join(parts[:i]) + "."
