"""What a run trains and what it leaves out, by kind of layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UserError
from ..nn.weight_kinds import EMBEDDING, LINEAR, MATRICES, MATRIX, OTHER, STACK, Weight
from .config import SPARSE, Settings

_ORDER = (*MATRICES, EMBEDDING)  # of the table; others follow


@dataclass(frozen=True)
class Kind:
    """The weights of one kind of layer, such as all q_proj.

    Attributes:
        kind: name of the layers, or of other weights.
        matrices: how many matrices there are, or vectors.
        trained_matrices: how many of them are trained, in whole or in part.
        weights: entries of all of them.
        trained: entries that are trained. Those of lora and shira are numbers of their adapters.
        remedy: the option that trains what is left out; "" where nothing is.
    """

    kind: str
    matrices: int
    trained_matrices: int
    weights: int
    trained: int
    remedy: str

    def row(self) -> dict[str, Any]:
        """Return the JSON form, with the share of the weights that is trained."""
        return asdict(self) | {"share": self.trained / self.weights}


def chosen_by_name(weights: Sequence[Weight], settings: Settings, what: str) -> list[Weight]:
    """Return the weights whose names ``include`` matches, or all without it, and ``exclude`` not.

    `lift_param_groups` has the same rules for the methods of SPARSE.

    Args:
        weights: weights to choose from.
        settings: options of the run.
        what: a word for one of them, for the message.

    Raises:
        UserError: when a name matches both, and when no weight is left.
    """
    include, exclude = settings.include, settings.exclude
    found = [w for w in weights if include is None or re.search(include, w.name)]
    kept = [w for w in found if exclude is None or not re.search(exclude, w.name)]
    if include is not None and len(kept) < len(found):
        name = next(w.name for w in found if w not in kept)
        raise UserError(f"{name} matches both include={include!r} and exclude={exclude!r}; make the rules disjoint")
    if not kept:
        names = ", ".join(w.name for w in weights[:3]) + f" and {len(weights) - 3} more" * (len(weights) > 3)
        raise UserError(
            f"no {what} is left with include={include!r}, exclude={exclude!r}; change these rules for the names "
            f"{names or 'of this model, which has none'}"
        )
    return kept


def by_kind(weights: Sequence[Weight], entries: Mapping[int, int], settings: Settings) -> list[Kind]:
    """Return what is trained of each kind of layer, linear layers first.

    Args:
        weights: all weights of the plain model.
        entries: trained entries of those that are trained, by the id of the parameter.
        settings: options of the run.
    """
    names = _names(weights)
    ordered = sorted(weights, key=lambda w: _ORDER.index(w.kind) if w.kind in _ORDER else len(_ORDER))
    members: dict[tuple[str, str], list[Weight]] = {}
    for w in ordered:
        members.setdefault((w.kind, names[w.name]), []).append(w)
    return [_kind(name, kind, of_kind, entries, settings) for (kind, name), of_kind in members.items()]


def _kind(name: str, kind: str, weights: Sequence[Weight], entries: Mapping[int, int], settings: Settings) -> Kind:
    trained = [w for w in weights if id(w.parameter) in entries]
    return Kind(
        kind=name,
        matrices=sum(_matrices(w) for w in weights),
        trained_matrices=sum(_matrices(w) for w in trained),
        weights=sum(w.numel for w in weights),
        trained=sum(entries[id(w.parameter)] for w in trained),
        remedy=_remedy(kind, settings) if len(trained) < len(weights) else "",
    )


def _matrices(weight: Weight) -> int:
    """Return how many matrices a weight is: those of a stack, else one."""
    return weight.parameter.shape[:-2].numel() if weight.kind == STACK else 1


def _remedy(kind: str, settings: Settings) -> str:
    """Return the option that trains weights of a kind, some of which are left out."""
    by_default = kind == LINEAR or (kind == STACK and settings.method in SPARSE and settings.extra is None)
    if by_default or settings.method == "full":
        return "change --include, --exclude"
    if settings.method in SPARSE and kind in (STACK, MATRIX, EMBEDDING):
        return "--extra REGEX trains them"
    return "--method full trains them"


def _names(weights: Sequence[Weight]) -> dict[str, str]:
    """Return a name of its kind for each weight, by its name in the model.

    Layers are called by their last name, such as q_proj. Where layers of that name are in several
    places, the place comes in front, as in attn.c_proj and mlp.c_proj.
    """
    own: dict[str, tuple[str, str]] = {}
    for w in weights:
        parts = [part for part in w.name.split(".") if not part.isdigit()]
        if w.kind == LINEAR:
            parts = parts[:-1]
        own[w.name] = (".".join(parts[-2:-1]), parts[-1])
    places: dict[str, set[str]] = {}
    for place, last in own.values():
        places.setdefault(last, set()).add(place)
    found = {}
    for w in weights:
        place, last = own[w.name]
        if w.kind == OTHER:
            found[w.name] = "biases" if last.endswith("bias") else "norms and other vectors"
        elif w.kind in (LINEAR, STACK, MATRIX):
            several = len(places[last]) > 1 or w.kind != LINEAR
            found[w.name] = f"{place}.{last}" if several and place else last
        else:
            found[w.name] = "embeddings and head" if w.kind == EMBEDDING else f"{w.kind}s"
    return found


def table(kinds: Sequence[Kind]) -> str:
    """Return the kinds as aligned text."""
    rows = [("", "matrices", "weights", "trained", "share", "left out")]
    for k in kinds:
        some = f"{k.trained_matrices} of {k.matrices}" if 0 < k.trained_matrices < k.matrices else str(k.matrices)
        share = f"{k.trained / k.weights:.2%}" if k.trained else "-"
        rows.append((k.kind, some, f"{k.weights:,}", f"{k.trained:,}", share, k.remedy))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        f"  {row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:5], widths[1:], strict=True))
        + f"  {row[5]}".rstrip()
        for row in rows
    )
