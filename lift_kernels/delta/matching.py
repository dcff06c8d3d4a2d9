"""Which tensors of two models, or of a delta and a model, belong together.

Some checkpoints store a tied tensor under all its names, and others under one. A tensor that only
one side has is an alias if it repeats one that both sides have. It goes along with that one.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping

import torch

from ..checkpoint.safetensors_file import tensor_bytes
from ..errors import FileError
from ..validation import require
from .differences import IN_FILES, IN_MEMORY, REVERTING_FILES, SAVING, Side, require_same_forms, require_same_names
from .format import Delta, Homes, bits
from .model_weights import Form, ModuleWeights, Weights


def common_forms(new: Weights, old: Weights) -> dict[str, Form]:
    """Return dtype and shape of each tensor of two models, sorted by name, without aliases.

    Raises:
        FileError: when names, shapes or dtypes differ.
    """
    new.list_as(old.forms)
    old.list_as(new.forms)
    common = {name: name for name in old.forms if name in new.forms}

    def alone(one: Weights, other: Weights) -> set[str]:
        def alike(a: str, b: str) -> bool:
            return torch.equal(bits(other.read(a)), bits(other.read(b)))

        return one.forms.keys() - common.keys() - find_aliases(one, common, alike).keys()

    tuned, base = Side(new.label, new.forms), Side(old.label, old.forms)
    require_same_names(new.label, old.label, alone(new, old), alone(old, new), SAVING)
    require_same_forms(tuned, base, SAVING)
    return {name: old.forms[name] for name in common}


def find_homes(delta: Delta, weights: Weights, reverse: bool) -> Homes:
    """Return for each tensor of a delta the names under which a model has it, sorted by name.

    A file of version 0.1 names changed tensors only. The model's other tensors then stand for the
    others.

    Args:
        delta: the delta.
        weights: weights of the model.
        reverse: whether the delta is to be reverted; messages then give another way out.

    Raises:
        FileError: when names, shapes or dtypes differ.
    """
    info = delta.info
    remedies = IN_MEMORY if isinstance(weights, ModuleWeights) else REVERTING_FILES if reverse else IN_FILES
    label = f"the model of {delta.path}"
    weights.list_as(info.forms)
    own = {name: weights.ties.get(name, name) for name in info.forms}
    found = {name: home for name, home in own.items() if home in weights.forms}
    missing = own.keys() - found.keys()
    if info.unchanged is None and not missing:
        found |= {name: name for name in weights.forms.keys() - found.values()}
    aliases = find_aliases(weights, found, delta.changes_alike)
    extra = weights.forms.keys() - found.values() - aliases.keys()
    expected = Side(label, info.forms)
    require_same_names(label, weights.label, missing, extra, remedies)
    present = {name: weights.forms[home] for name, home in found.items()}
    require_same_forms(expected, Side(weights.label, present), remedies)
    for name, home in found.items():
        require(
            home == name or delta.changes_alike(name, home),
            f"{weights.label} ties {name} to {home}, and {delta.path} changes them in different ways; "
            "load the model with tie_word_embeddings=False",
            FileError,
        )
    return {name: [home, *(a for a, n in aliases.items() if n == name)] for name, home in sorted(found.items())}


def find_aliases(weights: Weights, found: Mapping[str, str], alike: Callable[[str, str], bool]) -> dict[str, str]:
    """Return the tensors of a model that repeat one which has a counterpart on the other side.

    The search ends at the first tensor that has no counterpart and repeats none.

    Args:
        weights: weights of the model.
        found: the model's name by the counterpart's name.
        alike: tells whether two counterparts change alike. A tensor that repeats two which do not
            is no alias, because it could go along with either.

    Returns:
        The counterpart's name by the alias.
    """

    @functools.cache
    def digest(name: str) -> bytes:
        return hashlib.sha256(tensor_bytes(weights.read(name))).digest()

    aliases: dict[str, str] = {}
    taken = set(found.values())
    for extra, form in weights.forms.items():
        if extra in taken:
            continue
        same_form = [name for name, own in found.items() if weights.forms[own] == form]
        repeated = [name for name in same_form if digest(found[name]) == digest(extra)]
        if not repeated or not all(alike(repeated[0], name) for name in repeated[1:]):
            break
        aliases[extra] = repeated[0]
    return aliases
