"""A state dict in the order of the optimizer that loads it, by the names of its parameters."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch

from ..validation import require

logger = logging.getLogger("lift_kernels")
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that DDP, torch.compile, FSDP and activation checkpointing put in."""


def in_own_order(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state dict with groups and parameters in the order of the loading optimizer's ``groups``.

    Parameters are matched by name where both sides have names, else by position, as torch does.
    Saved names are those in ``params``, where the optimizer knows them, else ``param_names``.
    Entries are found by the ids or names in the saved groups' ``params``, and are returned by
    position. ``values`` of a packed layer and its ``weight`` count as the same name, so matrix mode
    and packed mode load into each other. So do names that differ by what a wrapper puts in, such as
    DDP's ``module.`` or torch.compile's ``_orig_mod.``.

    ``refresh_drift`` stays that of ``groups`` where none was saved. A form of state stays where it
    is not the default: moments and masters are put into it. ``offload`` always stays.

    Raises ValueError, with the names that differ, for parameters of other names or in other groups.
    """
    require(
        "state" in state_dict and "param_groups" in state_dict,
        f"a state dict holds 'state' and 'param_groups', got {sorted(map(str, state_dict))}; give what "
        "LiftAdamW.state_dict() returned",
    )
    saved, ordered = state_dict["param_groups"], [dict(group) for group in state_dict["param_groups"]]
    if saved and all("param_names" in group for group in groups):
        theirs = _saved_names(saved, groups)
        ordered = ordered if theirs is None else _by_name(saved, theirs, groups)
    count, own = (sum(len(group["params"]) for group in side) for side in (saved, groups))
    require(
        count == own,
        f"the state dict is of a model with {count} parameters, this optimizer has {own}; build the optimizer from the "
        "same parameters, best with their names",
    )
    ids = list(chain.from_iterable(group["params"] for group in ordered))
    for key in state_dict["state"]:
        require(key in ids, f"the state dict has an entry for parameter {key}, which is in none of its groups")
    positions = iter(range(len(ids)))
    for group in ordered:
        group["params"] = [next(positions) for _ in group["params"]]
    for group, own_group in zip(ordered, groups):
        if group.get("refresh_drift") is None:  # Version 0.1 has no such key.
            group["refresh_drift"] = own_group.get("refresh_drift")
        group["offload"] = own_group.get("offload")  # of this machine
        if own_group["state_dtype"] != torch.float32:
            group["state_dtype"] = own_group["state_dtype"]
        if own_group["master"] != "fp32":
            group.update(master=own_group["master"], rounding=own_group["rounding"])
    entries = {i: state_dict["state"][key] for i, key in enumerate(ids) if key in state_dict["state"]}
    return {**state_dict, "state": entries, "param_groups": ordered}


def _saved_names(saved: list[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> list[list[str]] | None:
    """Names of the parameters of ``saved`` groups as in this optimizer, None where they have none.

    torch's ``set_state_dict`` puts names into ``params``, in the order of the loading optimizer. It
    leaves ``param_names`` in the order of the saving one, so these do not tell which is which then.

    Raises ValueError where they would be needed.
    """
    ours = [list(group["param_names"]) for group in groups]
    own, ids = set(chain(*ours)), [group["params"] for group in saved]
    by_name = all(isinstance(key, str) for key in chain(*ids))
    if by_name and set(chain(*(theirs := _as_own(ids, own)))) == own:
        return theirs
    if not all("param_names" in group for group in saved):
        return None
    theirs = _as_own([group["param_names"] for group in saved], own)
    require(
        not by_name or theirs == ours or set(chain(*theirs)) != own,
        f"the state dict has parameters named {_some(chain(*ids))}, which this optimizer names "
        f"{_some(own)}, in another order; give it the names of model.named_parameters()",
    )
    return theirs


def _as_own(theirs: Sequence[Sequence[Any]], own: set[str]) -> list[list[str]]:
    """Saved names as this optimizer has them, where it does."""
    found = [[_own_name(str(name), own) for name in names] for names in theirs]
    return found if set(chain(*found)) == own else _through_wrappers(found, own)


def _by_name(
    saved: list[dict[str, Any]], theirs: list[list[str]], groups: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Copies of the ``saved`` groups, with groups and parameters in the order of ``groups``.

    ``theirs`` are the names of their parameters.
    """
    ours = [list(group["param_names"]) for group in groups]
    for group, names in zip(saved, theirs):
        require(
            len(names) == len(group["params"]),
            f"a group of the state dict has {len(names)} param_names for {len(group['params'])} parameters",
        )
    if theirs == ours:
        return [{**group, "param_names": names} for group, names in zip(saved, ours)]
    _check_names(theirs, ours)
    at: dict[frozenset[str], list[int]] = {}
    for i, names in enumerate(theirs):
        at.setdefault(frozenset(names), []).append(i)
    places = [at[frozenset(names)].pop(0) for names in ours]  # Only groups without parameters have several.
    if places != sorted(places) and any("initial_lr" in group for group in saved):
        logger.warning(
            "the groups of the state dict come in another order: options follow the names of their parameters, but a "
            "learning rate scheduler's own state goes by position"
        )
    ordered = []
    for place, names in zip(places, ours):
        keys = dict(zip(theirs[place], saved[place]["params"]))
        ordered.append({**saved[place], "params": [keys[name] for name in names], "param_names": names})
    return ordered


def _own_name(name: str, own: set[str]) -> str:
    """The name of a saved parameter in this optimizer.

    ``values`` of a packed layer may be its ``weight`` here, and the other way round.
    """
    other = re.sub(r"(?<![^.])(values|weight)$", lambda found: {"values": "weight", "weight": "values"}[found[0]], name)
    return other if name not in own and other in own else name


def _through_wrappers(theirs: list[list[str]], own: set[str]) -> list[list[str]]:
    """Saved names as in this optimizer, where they differ by the parts of wrappers alone.

    They stay where two names of one side would become the same.
    """
    plain = {_without_wrappers(name): name for name in own}
    saved = [[_own_name(_without_wrappers(name), set(plain)) for name in names] for names in theirs]
    every = list(chain(*saved))
    if len(plain) < len(own) or len(set(every)) < len(every):
        return theirs
    return [[plain.get(new, old) for new, old in zip(*pair)] for pair in zip(saved, theirs)]


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _check_names(theirs: list[list[str]], ours: list[list[str]]) -> None:
    """Raise unless both sides have the same names, each once, in the same groups."""
    for side, groups in (("the state dict", theirs), ("this optimizer", ours)):
        repeated = [name for name, count in Counter(chain(*groups)).items() if count > 1]
        require(
            not repeated,
            f"{side} has more than one parameter named {_some(repeated)}: parameters in another order can only "
            "be matched by names that differ",
        )
    saved, own = set(chain(*theirs)), set(chain(*ours))
    require(
        saved == own,
        f"the state dict is of other parameters: only it has {_some(saved - own)}, only this optimizer has "
        f"{_some(own - saved)}; build the optimizer from the same named parameters, or rename those in the state "
        "dict's param_names",
    )
    together = {name: set(names) for names in theirs for name in names}
    for names in ours:
        for name in names:
            require(
                together[name] == set(names),
                f"{name} shares its group of the state dict with {_some(together[name] - {name})}, its group of this "
                f"optimizer with {_some(set(names) - {name})}; build the optimizer with the groups that were saved",
            )
    require(
        len(theirs) == len(ours),
        f"the state dict has {len(theirs)} groups, this optimizer {len(ours)}; build the optimizer with the groups "
        "that were saved",
    )


def _some(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    listed = sorted(map(str, names))
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "") if listed else "none"
