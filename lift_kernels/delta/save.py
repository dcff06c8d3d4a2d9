"""Making a delta file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .._progress import with_progress
from ..checkpoint.checksummed_file import ChecksummedWriter, header_room
from ..errors import FileError
from ..validation import MAX_ENTRIES, WEIGHT_DTYPES, check_finite, require
from .format import KIND, DeltaInfo, bits, delta_info, parts
from .model_weights import Fingerprint, Model, Weights, open_weights


def save_delta(
    model: Model, base: Model, path: str | Path, settings: Mapping[str, Any] | None = None, *, progress: bool = False
) -> DeltaInfo:
    """Write every entry in which ``model`` differs from ``base`` to a delta file: sorted int32
    indices, old and new values.

    Both are read one tensor at a time; either may be a module, a state dict, a model directory with
    safetensors or one such file. ``settings`` (JSON) are kept in the file. The file appears when it
    is complete; one that was there before stays until then. Raises FileError or ValueError, naming
    the tensor, for models of different form and for non-finite values.
    """
    described = json.dumps(dict(settings or {}))
    with open_weights(model) as new, open_weights(base) as old:
        _check_forms(new, old)
        names = list(old.forms)
        shapes_size = json.dumps({name: form[1] for name, form in old.forms.items()})
        hashes_size = "0" * 200
        room = header_room((part for name in names for part in parts(name)), (described, shapes_size, hashes_size))
        shapes: dict[str, list[int]] = {}
        before, after = Fingerprint(), Fingerprint()
        with ChecksummedWriter(path, KIND, room) as out:
            for name in with_progress(names, "tensors", shown=progress):
                a, b = old.read(name), new.read(name)
                before.add(name, a)
                after.add(name, b)
                changed = _changed(name, a, b)
                if changed.numel():
                    shapes[name] = list(a.shape)
                    values = (bits(t)[changed].view(t.dtype) for t in (a, b))
                    for part, tensor in zip(parts(name), (changed.int(), *values)):
                        out.add(part, tensor)
            hashes = {"base": before.hexdigest(), "result": after.hexdigest()}
            out.metadata.update(hashes=json.dumps(hashes), shapes=json.dumps(shapes), settings=described)
    return delta_info(path)


def _check_forms(new: Weights, old: Weights) -> None:
    """Raise FileError unless both hold the same tensors."""
    for one, other in ((new, old), (old, new)):
        extra = sorted(one.forms.keys() - other.forms.keys())
        require(
            not extra,
            f"{one.label} holds {len(extra)} tensors that {other.label} lacks, {extra[:1]} for one; "
            "give two checkpoints of one architecture, both saved in the same way",
            FileError,
        )
    for name, form in old.forms.items():
        require(
            new.forms[name] == form,
            f"{name} is {form} in {old.label} and {new.forms[name]} in {new.label}; save both in one dtype",
            FileError,
        )


def _changed(name: str, old: Tensor, new: Tensor) -> Tensor:
    """Flat positions (int64, sorted) at which the bits differ."""
    if new.dtype in WEIGHT_DTYPES:
        check_finite(new, name)
    changed = (bits(old) != bits(new)).nonzero().flatten()
    require(
        not changed.numel() or old.numel() <= MAX_ENTRIES,
        f"{name} changed and has {old.numel()} entries; int32 indices reach 2^31-1",
        FileError,
    )
    return changed
