"""Deltas as PEFT's SHiRA adapters and back, and a SHiRA mask of principal weights.

This module does not need peft. Loading an adapter into a model does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.atomic_file import write_atomic
from ..checkpoint.safetensors_file import TensorFile, save_tensors
from ..delta.differences import SAVING, require_same_names
from ..delta.format import Delta, DeltaInfo
from ..delta.model_weights import Model, Weights, open_weights
from ..delta.save import save_delta
from ..errors import FileError
from ..masks.principal import principal_indices
from ..validation import MAX_ENTRIES, require

_PREFIX = "base_model.model."
_REMEDIES = SAVING | {
    "names": "give the base of the adapter",
    "prefix": "load the base with the class that the adapter was trained on, and give the module",
    "peft": "give the base without an adapter, as model.unload() returns it",
}
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def shira_mask(rank: int = 64) -> Callable[..., Tensor]:
    """Return a mask function for ``ShiraConfig`` that selects principal weights.

    For a layer of m x n it selects the r (m + n) principal weights.

    >>> config = ShiraConfig(r=8, mask_type="lift", target_modules=["q_proj"])
    >>> config.mask_fn = shira_mask()

    Args:
        rank: rank of the approximation that selects the weights.

    Returns:
        A function of the layer and r. Its result is 1 at the selected weights and 0 elsewhere, with
        shape, dtype and device of the layer's weight. It raises ValueError for a layer with fewer
        than r (m + n) entries and for non-finite weights.
    """

    def mask(base_layer: nn.Module, r: int, **kwargs: Any) -> Tensor:
        weight = base_layer.weight.detach()  # type: ignore[operator]
        m, n = weight.shape
        require(r * (m + n) <= m * n, f"a layer of {m} x {n} has fewer than r (m + n) = {r * (m + n)} entries; lower r")
        chosen = principal_indices(weight, min(rank, m, n), r * (m + n), name=type(base_layer).__name__)
        out = torch.zeros_like(weight)
        out.view(-1)[chosen.long()] = 1
        return out

    return mask


def export_shira(delta: str | Path, folder: str | Path, base_model: str | None = None) -> int:
    """Write a delta as a SHiRA adapter that an unmodified peft loads.

    SHiRA has r (m + n) entries in every m x n matrix. The adapter takes the smallest r that is
    enough for all matrices, and pads the others with entries that change nothing. Values are
    differences in fp32. peft adds them to the weights, with its own scale and in the base's dtype.

    Args:
        delta: the delta file.
        folder: directory to write.
        base_model: name of the base for the adapter's configuration.

    Returns:
        The r of the adapter.

    Raises:
        FileError: when something other than a matrix changed, a matrix has fewer than r (m + n)
            entries, ``folder`` already holds an adapter, or ``folder`` cannot be written.
    """
    target = Path(folder)
    require(not (target / _CONFIG).exists(), f"{target} already holds an adapter; choose another folder", FileError)
    with Delta(delta) as opened:
        r = _smallest_r(opened.info)
        tensors = {}
        for name in opened.info.shapes:
            module = name.removesuffix(".weight")
            indices, values = _padded(opened, name, r)
            tensors[f"{_PREFIX}{module}.shira_indices"] = indices
            tensors[f"{_PREFIX}{module}.shira_weight"] = values
        config = {
            "peft_type": "SHIRA",
            "r": r,
            "mask_type": "lift",
            "inference_mode": True,
            "fan_in_fan_out": False,
            "target_modules": [name.removesuffix(".weight") for name in opened.info.shapes],
            "init_weights": True,
            "modules_to_save": None,
            "random_seed": None,
            "task_type": None,
            "revision": None,
            "base_model_name_or_path": base_model,
        }
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write {target}: {error.strerror}; choose another place") from error
    save_tensors(target / _WEIGHTS, tensors)
    write_atomic(target / _CONFIG, json.dumps(config, indent=2) + "\n")
    return r


def import_shira(
    folder: str | Path, base: Model, path: str | Path, settings: Mapping[str, Any] | None = None
) -> DeltaInfo:
    """Write a delta file that changes a base as a saved SHiRA adapter does.

    The changed weights are computed in fp32 and rounded to the dtype of the base.

    Args:
        folder: directory of the adapter, in safetensors.
        base: the base model, as in `save_delta`.
        path: the delta file to write.
        settings: further settings to keep in the delta file.

    Returns:
        What the delta file says about itself.

    Raises:
        FileError: for a folder without a readable SHiRA adapter, for an adapter that does not fit
            the base, and for a file that cannot be written.
        ValueError: for non-finite weights.
    """
    source = Path(folder)
    try:
        config = json.loads((source / _CONFIG).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{source} holds no readable {_CONFIG}; give the folder of a saved adapter") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    require(kind == "SHIRA", f"{source} holds an adapter of type {kind}; only SHIRA can become a delta", FileError)
    require(
        not config.get("modules_to_save"),
        f"{source} replaces whole modules (modules_to_save), which a delta cannot; train the adapter without them",
        FileError,
    )
    require(
        (source / _WEIGHTS).is_file(),
        f"{source} holds no {_WEIGHTS}; save the adapter with save_pretrained(..., safe_serialization=True)",
        FileError,
    )
    with TensorFile(source / _WEIGHTS) as adapter, open_weights(base, "the base") as old:
        with _Adapted(old, adapter, str(source)) as model:
            return save_delta(model, old, path, {"method": "shira", "r": config.get("r")} | dict(settings or {}))


class _Adapted(Weights):
    """The weights of a base with a SHiRA adapter merged in, computed as they are read."""

    def __init__(self, base: Weights, adapter: TensorFile, label: str) -> None:
        super().__init__(label)
        self.base, self.adapter, self.forms = base, adapter, base.forms
        names = set()
        for key in adapter.entries:
            stem, _, part = key.removeprefix(_PREFIX).rpartition(".")
            name = f"{stem}.weight"
            names.add(name)
            known = key.startswith(_PREFIX) and part in ("shira_weight", "shira_indices")
            require(
                known, f"{label} holds {key}, which is no part of a SHiRA adapter; save the adapter again", FileError
            )
            require(
                self._key(name, "shira_indices") in adapter.entries
                and self._key(name, "shira_weight") in adapter.entries,
                f"{label} lacks indices or values of {stem}; save the adapter again",
                FileError,
            )
        if missing := names - base.forms.keys():
            require_same_names(label, base.label, missing, base.forms.keys() - names, _REMEDIES)

    @staticmethod
    def _key(name: str, part: str) -> str:
        return f"{_PREFIX}{name.removesuffix('.weight')}.{part}"

    def read(self, name: str) -> Tensor:
        """Return a weight of the base with the adapter's changes."""
        weight = self.base.read(name)
        if self._key(name, "shira_weight") not in self.adapter.entries:
            return weight
        values, indices = (self.adapter.read(self._key(name, part)) for part in ("shira_weight", "shira_indices"))
        good = (
            weight.dim() == 2 and values.dim() == 1 and indices.shape == (2, len(values)) and values.is_floating_point()
        )
        require(
            good, f"{self.label}: indices and values of {name} do not fit a matrix; save the adapter again", FileError
        )
        rows, columns = indices.long()
        m, n = weight.shape
        inside = bool(((rows >= 0) & (rows < m) & (columns >= 0) & (columns < n)).all())
        require(
            inside,
            f"{self.label}: an index of {name} lies outside its {m} x {n} entries; save the adapter again",
            FileError,
        )
        out = weight.float()
        out = out.clone() if out is weight else out  # the base's own weight must not change
        out.view(-1).index_add_(0, rows * n + columns, values.float())
        out = out.to(weight.dtype)
        changes = torch.zeros(m * n, dtype=torch.bool)
        changes[(rows * n + columns)[values != 0]] = True
        return torch.where(changes.view(m, n), out, weight)  # adding a padded 0 turns -0.0 into +0.0


def _smallest_r(info: DeltaInfo) -> int:
    """Return the smallest r with which r (m + n) entries hold the changes of every matrix."""
    require(
        info.entries > 0,
        "the delta changes nothing, so there is no adapter to write; give the delta of a fine-tuned model",
        FileError,
    )
    for name, shape in info.shapes.items():
        linear = len(shape) == 2 and name.endswith(".weight")
        require(
            linear,
            f"{name} changed, and SHiRA changes weights of linear layers only; train with freeze_rest=True",
            FileError,
        )
    r = max(-(-info.counts[name] // sum(shape)) for name, shape in info.shapes.items())
    for name, (m, n) in info.shapes.items():
        require(
            r * (m + n) <= m * n,
            f"{name} of {m} x {n} has fewer than the {r * (m + n)} entries that SHiRA needs for r = {r}; "
            "use the delta itself, or a lower density",
            FileError,
        )
    return r


def _padded(delta: Delta, name: str, r: int) -> tuple[Tensor, Tensor]:
    """Return the changes of a matrix, padded to r (m + n) entries.

    The padding takes the unchanged entries of lowest index, with a difference of zero.

    Args:
        delta: the delta file.
        name: name of the matrix.
        r: the r of the adapter.

    Returns:
        Rows and columns (2, r (m + n)) int32, sorted, and differences (r (m + n)) fp32.
    """
    indices, old, new = delta.read(name)
    m, n = delta.info.shapes[name]
    assert m * n <= MAX_ENTRIES
    need = r * (m + n)
    taken = torch.zeros(m * n, dtype=torch.bool)
    taken[indices.long()] = True
    differences = torch.zeros(m * n)
    differences[indices.long()] = new.float() - old.float()
    taken[(~taken).nonzero().flatten()[: need - len(indices)]] = True
    flat = taken.nonzero().flatten()
    places = torch.stack([flat // n, flat % n]).int()
    return places, differences[flat]
