"""Write a delta file from a model and its base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .._progress import with_progress
from ..checkpoint.checksummed_file import ChecksummedWriter, header_space
from ..errors import FileError
from ..validation import MAX_ENTRIES, WEIGHT_DTYPES, check_finite, require
from .format import KIND, DeltaInfo, bits, delta_info, parts
from .model_weights import Fingerprint, Model, Weights, open_weights


def save_delta(
    model: Model, base: Model, path: str | Path, settings: Mapping[str, Any] | None = None, *, progress: bool = False
) -> DeltaInfo:
    """Write every entry in which a model differs from its base to a delta file.

    Both models are read one tensor at a time. The file appears when it is complete, and an older
    file of that name stays until then.

    Args:
        model: the fine-tuned model: a module, a state dict, a model directory with safetensors or
            one such file.
        base: the model before fine-tuning, in any of these forms.
        path: the file to write.
        settings: settings of the method; JSON values that are kept in the file.
        progress: show a progress bar.

    Returns:
        What the file says about itself.

    Raises:
        FileError: for models that differ in names, dtypes or shapes, for a tensor of more than
            2^31-1 entries that changed, and for a file that cannot be written.
        ValueError: for non-finite values.
        TypeError: for settings that JSON cannot hold.
    """
    described = json.dumps(dict(settings or {}))
    with open_weights(model) as new, open_weights(base) as old:
        _check_forms(new, old)
        names = list(old.forms)
        # Stand-ins for the metadata, at least as long as these will be.
        longest_shapes = json.dumps({name: form[1] for name, form in old.forms.items()})
        longest_hashes = "0" * 200
        header_size = header_space(
            (part for name in names for part in parts(name)), (described, longest_shapes, longest_hashes)
        )
        shapes: dict[str, list[int]] = {}
        before, after = Fingerprint(), Fingerprint()
        with ChecksummedWriter(path, KIND, header_size) as out:
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
    """Raise FileError unless both models have the same names, dtypes and shapes."""
    for one, other in ((new, old), (old, new)):
        extra = sorted(one.forms.keys() - other.forms.keys())
        require(
            not extra,
            f"{one.label} holds {len(extra)} tensors that {other.label} lacks, for example {extra[:1]}; "
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
    """Return the flat positions (int64, sorted) at which the bits of two tensors differ."""
    if new.dtype in WEIGHT_DTYPES:
        check_finite(new, name)
    changed = (bits(old) != bits(new)).nonzero().flatten()
    require(
        not changed.numel() or old.numel() <= MAX_ENTRIES,
        f"{name} changed and has {old.numel()} entries; int32 indices allow at most 2^31-1",
        FileError,
    )
    return changed
