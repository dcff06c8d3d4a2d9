"""Write a delta file from a model and its base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._progress import with_progress
from ..checkpoint.checksummed_file import ChecksummedWriter, header_space
from ..checkpoint.safetensors_file import has_name
from ..errors import FileError
from ..validation import MAX_ENTRIES, require
from .format import KIND, DeltaInfo, bits, delta_info, parts
from .matching import common_forms
from .model_weights import Fingerprint, Form, Model, open_weights


def save_delta(
    model: Model, base: Model, path: str | Path, settings: Mapping[str, Any] | None = None, *, progress: bool = False
) -> DeltaInfo:
    """Write every entry in which a model differs from its base to a delta file.

    Both models are read one tensor at a time. A tied tensor may be stored once in one model, and
    under two names in the other. The file appears when it is complete, and an older file of that
    name stays until then.

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
        FileError: for models that differ in names, shapes or dtypes, for a tensor that changed and
            has more than 2^31-1 entries or a dtype unknown to torch or safetensors, and for a file
            that cannot be written.
        ValueError: for values that became non-finite.
        TypeError: for settings that JSON cannot hold.
    """
    try:
        described = json.dumps(dict(settings or {}))
    except TypeError as error:
        raise TypeError(
            f"settings must hold JSON values: {error}; give text, numbers, lists or dictionaries"
        ) from error
    with open_weights(model) as new, open_weights(base, "the base") as old:
        forms = common_forms(new, old)
        # Stand-ins for the metadata, at least as long as these will be.
        longest_shapes = json.dumps({name: form[1] for name, form in forms.items()})
        longest_unchanged = _as_json(forms)
        longest_hashes = "0" * 200
        header_size = header_space(
            (part for name in forms for part in parts(name)),
            (described, longest_shapes, longest_unchanged, longest_hashes),
        )
        shapes: dict[str, list[int]] = {}
        before, after = Fingerprint(), Fingerprint()
        with ChecksummedWriter(path, KIND, header_size) as out:
            for name in with_progress(list(forms), "tensors", shown=progress):
                a, b = old.read(name), new.read(name)
                before.add(name, forms[name], a)
                after.add(name, forms[name], b)
                changed = _changed(name, forms[name], a, b)
                if changed.numel():
                    shapes[name] = list(a.shape)
                    values = (bits(t)[changed].view(t.dtype) for t in (a, b))
                    for part, tensor in zip(parts(name), (changed.int(), *values)):
                        out.add(part, tensor)
            hashes = {"base": before.hexdigest(), "result": after.hexdigest()}
            unchanged = {name: form for name, form in forms.items() if name not in shapes}
            out.metadata.update(
                hashes=json.dumps(hashes), shapes=json.dumps(shapes), unchanged=_as_json(unchanged), settings=described
            )
    return delta_info(path)


def _as_json(forms: Mapping[str, Form]) -> str:
    """Return dtypes and shapes by name as JSON."""
    return json.dumps({name: [str(dtype), shape] for name, (dtype, shape) in forms.items()})


def _changed(name: str, form: Form, old: Tensor, new: Tensor) -> Tensor:
    """Return the flat positions (int64, sorted) at which the bits of two tensors differ."""
    changed = (bits(old) != bits(new)).nonzero().flatten()
    if not changed.numel():
        return changed
    require(
        has_name(form[0]),
        f"{name} changed and is of dtype {form[0]}; a delta holds changes of dtypes that torch and safetensors share",
        FileError,
    )
    require(
        old.numel() <= MAX_ENTRIES,
        f"{name} changed and has {old.numel()} entries; int32 indices allow at most 2^31-1",
        FileError,
    )
    # A tensor that did not change may hold any values, such as a mask of infinities.
    bad = changed[~_finite(bits(new)[changed].view(new.dtype))]
    require(
        not bad.numel(),
        f"{name}: {bad.numel()} non-finite weights among those that changed, the first at flat index "
        f"{int(bad[0]) if bad.numel() else ''}; repair the model, or go back to one from before",
    )
    return changed


def _finite(values: Tensor) -> Tensor:
    """Return which values are finite numbers."""
    if values.dtype == torch.float4_e2m1fn_x2:  # it has neither infinities nor NaN, and no conversion
        return torch.ones(values.shape, dtype=torch.bool)
    return torch.isfinite(values.double() if values.is_floating_point() else values)
