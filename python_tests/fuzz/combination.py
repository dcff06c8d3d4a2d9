"""A combination of options as plain data, drawn from a seed."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from . import spoils
from .models import KEEPS_WIDTH, Block, Model, build

HALF = {"bf16", "fp16"}
SPOILED = 0.25
"""Share of combinations with something that cannot work."""


@dataclass(frozen=True)
class Combination:
    """What a run does. Every field but the first ones has a plain default, to which it may shrink.

    Attributes:
        mode: ``linear`` (lift_param_groups), ``named`` or ``unnamed`` (all parameters), ``packed``.
        pack: options of pack_gradients.
        choice: include, exclude and freeze_rest of lift_param_groups or pack_gradients; extra.
        groups: options of each group; parameters are dealt out in turns.
        options: of LiftAdamW.
        zero: who clears gradients after a step: ``optimizer``, ``model``, ``fill`` (with zeros)
            or ``none``.
        scaler: None, ``plain``, ``unscale``; ``overflow`` is the step with an infinite gradient.
        cold: a parameter that is frozen from the start.
        late: a parameter that joins in a group of its own at step ``joins``.
        frozen, freezes, thaws: a parameter without gradient from one step to another.
        touches: the step before which some entries of all weights are changed from outside.
        resume, resumes: how, and before which step.
        spoil: the one thing that cannot work (`spoils`).
    """

    seed: int
    width: int
    blocks: tuple[Block, ...]
    words: int = 0
    mode: str = "linear"
    pack: dict[str, Any] = field(default_factory=dict)
    choice: dict[str, Any] = field(default_factory=dict)
    groups: tuple[dict[str, Any], ...] = ({},)
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 4
    batches: int = 1
    zero: str = "optimizer"
    closure: bool = False
    scaler: str | None = None
    overflow: int = -1
    autocast: bool = False
    scheduler: str | None = None
    tensor_lr: bool = False
    refreshes: tuple[int, ...] = ()
    cold: str | None = None
    late: str | None = None
    joins: int = -1
    frozen: str | None = None
    freezes: int = -1
    thaws: int = -1
    touches: int = -1
    resume: str | None = None
    resumes: int = -1
    unpack: bool = False
    spoil: str | None = None

    def model(self) -> Model:
        model = build(self.seed, self.width, self.blocks, self.words)
        if self.cold is not None:
            model.get_parameter(self.cold).requires_grad_(False)
        return model


def simpler(c: Combination) -> list[Combination]:
    """The combination with one thing fewer, for each of its things."""
    found = []
    for f in fields(Combination)[4:]:
        default = f.default_factory() if callable(f.default_factory) else f.default
        if f.name in ("mode", "spoil") or getattr(c, f.name) == default:
            continue
        found.append(replace(c, **{f.name: default}))
        if isinstance(default, dict):
            value = getattr(c, f.name)
            found += [replace(c, **{f.name: {k: v for k, v in value.items() if k != key}}) for key in value]
    for i, group in enumerate(c.groups):
        for key in group:
            rest = {k: v for k, v in group.items() if k != key}
            found.append(replace(c, groups=(*c.groups[:i], rest, *c.groups[i + 1 :])))
    for i in range(len(c.blocks)):
        if len(c.blocks) > 1 and not any(b.kind == "tied" for b in c.blocks):
            found.append(replace(c, blocks=c.blocks[:i] + c.blocks[i + 1 :]))
    return found


def by_column(weight: torch.Tensor, k: int) -> torch.Tensor:
    """A selection of a user: k entries evenly over the matrix."""
    return (torch.arange(k, dtype=torch.int64) * weight.numel() // k).int()


def draw(seed: int) -> Combination:
    """The combination of a seed."""
    r = random.Random(seed)
    side = lambda: r.choice([1, 2, 3, 5, 7, 8, 13, 16, 17, 24, 31, 33, 40])  # noqa: E731
    width, main = side(), r.choice(["fp32"] * 5 + ["bf16"] * 3 + ["fp16"] * 2)
    mixed = r.random() < 0.15
    mode = r.choice(["linear", "linear", "named", "unnamed", "packed", "packed", "packed"])
    blocks = _draw_blocks(r, width, side, main, mixed, mode)
    c = Combination(seed, width, blocks, words=r.choice([0, 0, 0, 11]), mode=mode)
    shapes = {name: p.shape for name, p in c.model().named_parameters() if p.dim() >= 2}
    smallest = min(min(shape[-2:]) for shape in shapes.values())
    c = replace(c, **_draw_training(r, c, main, mixed))
    matrices = _chosen(c, shapes)
    halves = main in HALF and not mixed and not c.words
    count = r.choice([1, 1, 1, 2, 3])
    selection = c.pack.get("selection") or _draw_selection(r, mode)
    if mode == "packed":
        c = replace(c, pack={"selection": selection, **_draw_size(r, smallest)})
    options = _draw_options(r, c, selection, smallest, halves)
    groups = tuple(_draw_group(r, c, selection, smallest, halves) if count > 1 else {} for _ in range(count))
    if mode in ("named", "unnamed"):
        groups = (*groups, {"lift": False}) if r.random() < 0.5 else groups
    c = replace(c, options=options, groups=groups)
    if len(matrices) > 1 and r.random() < 0.25 and c.scheduler in (None, "manual"):
        c = replace(c, late=r.choice(matrices), joins=r.randrange(1, c.steps))
    if r.random() < 0.2 and mode != "packed":
        steps = sorted(r.sample(range(c.steps + 1), 2))
        c = replace(c, frozen=r.choice([*shapes]), freezes=steps[0], thaws=steps[1])
    if r.random() < 0.3:
        c = replace(c, cold=r.choice([*shapes]))
    if r.random() < 0.15:
        c = replace(c, touches=r.randrange(c.steps))
    c = _consistent(c)
    return _spoiled(r, c) if r.random() < SPOILED else c


def _spoiled(r, c: Combination) -> Combination:
    """The combination with one thing that cannot work, in one group that nobody leaves."""
    names = [name for name in spoils.SPOILS if name not in spoils.PACKED_ONLY | spoils.CHOSEN_ONLY | spoils.KNOWN]
    if c.mode == "packed":
        names = [name for name in names if name not in spoils.MATRIX_ONLY]
        names += sorted(spoils.PACKED_ONLY - spoils.KNOWN) * 2
    if c.mode in ("linear", "packed"):
        names += sorted(spoils.CHOSEN_ONLY - spoils.KNOWN)
    name = r.choice(names)
    spoil, options, groups = spoils.SPOILS[name], dict(c.options), ({},)
    given = {**(spoil.options or {}), **(spoil.pack or {})}
    pack = {key: value for key, value in c.pack.items() if key != "budget_rank"}
    if "density" in given:
        options.pop("budget_rank", None)  # It takes precedence.
    sizes = {key: value for key, value in (spoil.options or {}).items() if key in ("rank", "density", "budget_rank")}
    if sizes:
        groups = (sizes,)  # Groups of pack_gradients have their own.
    if "selection" in given:
        options.pop("refresh_drift", None)
        pack["selection"], options["refresh_interval"], options["refresh_schedule"] = "magnitude", None, "all"
    choice = {key: value for key, value in c.choice.items() if key == "freeze_rest"}
    c = replace(
        c,
        spoil=name,
        groups=groups,
        cold=None,
        touches=-1,
        late=None,
        joins=-1,
        frozen=None,
        resume=None,
        choice=choice,
    )
    return replace(c, pack=pack, options=options, zero="optimizer", scaler=None, closure=False, tensor_lr=False)


def _draw_blocks(r, width, side, main, mixed, mode) -> tuple[Block, ...]:
    blocks: list[Block] = []
    kinds = ["linear"] * 5 + ["conv1d", "sub", "norm", "attention", "unused", "experts", "tied"]
    for _ in range(r.randint(1, 4)):
        kind = r.choice(kinds)
        dtype = r.choice(["fp32", "bf16", "fp16"]) if mixed else main
        if kind == "norm" and r.random() < 0.1:
            dtype = "fp64"
        if kind == "tied":
            blocks += [Block("linear", width, r.random() < 0.5, dtype), Block("tied", width, False, dtype)]
            continue
        out = width if kind in KEEPS_WIDTH else side()
        blocks.append(Block(kind, out, r.random() < 0.6, dtype, zero=r.random() < 0.03))
        width = width if kind == "unused" else out
    if not any(block.kind in ("linear", "conv1d", "tied") for block in blocks):
        blocks.append(Block("linear", side(), r.random() < 0.5, main))
    return tuple(blocks)


def _draw_training(r, c, main, mixed) -> dict[str, Any]:
    out: dict[str, Any] = dict(steps=r.randint(2, 6), batches=r.choice([1, 1, 2, 3]))
    out["zero"] = r.choice(["optimizer", "optimizer", "model", "fill", "none"])
    out["closure"] = r.random() < 0.15
    if not out["closure"] and r.random() < 0.25:
        out["scaler"] = r.choice(["plain", "unscale"])
        out["overflow"] = r.choice([-1, r.randrange(out["steps"])])
    out["autocast"] = r.random() < 0.15
    out["scheduler"] = r.choice([None, None, None, "manual", "step", "cycle"])
    out["tensor_lr"] = r.random() < 0.15
    out["refreshes"] = tuple(sorted(r.sample(range(out["steps"]), r.choice([0, 0, 0, 1, 2]))))
    choice: dict[str, Any] = {}
    if c.mode in ("linear", "packed"):
        choice["freeze_rest"] = r.random() < 0.4
        if len(c.blocks) > 1 and r.random() < 0.2:
            choice["exclude"] = rf"^blocks\.{r.randrange(len(c.blocks))}\."
        elif r.random() < 0.1:
            choice["include"] = r"^blocks\."
        if c.mode == "packed" and r.random() < 0.6:
            if any(block.kind == "experts" for block in c.blocks):
                number = next(i for i, block in enumerate(c.blocks) if block.kind == "experts")
                choice["extra"] = rf"^blocks\.{number}\.weight"
            elif any(block.kind == "attention" for block in c.blocks):
                choice["extra"] = "in_proj_weight"
    out["choice"] = choice
    if r.random() < 0.5:
        out["resume"] = r.choice(["state_dict", "state_dict", "checkpoint", "deepcopy", "pickle"])
        out["resumes"] = r.randrange(out["steps"] + 1)
    out["unpack"] = c.mode == "packed" and r.random() < 0.7
    return out


def _chosen(c: Combination, shapes: dict[str, torch.Size]) -> list[str]:
    """Names of the linear weights that may be left out at first and join later."""
    kinds = {"linear", "conv1d", "sub"}
    names = [name for name in shapes if re.match(r"blocks\.\d+\.weight$", name)]
    names = [name for name in names if c.blocks[int(name.split(".")[1])].kind in kinds]
    tied = {i - 1 for i, block in enumerate(c.blocks) if block.kind == "tied"}
    names = [name for name in names if int(name.split(".")[1]) not in tied]
    include, exclude = c.choice.get("include"), c.choice.get("exclude")
    return [name for name in names if include is None and exclude is None or c.mode in ("named", "unnamed")]


def _draw_selection(r, mode) -> str:
    names = ["principal"] * 5 + ["magnitude", "random", "random", "callable"]
    return r.choice(names if mode == "packed" else [*names, "gradient", "gradient"])


def _draw_size(r, smallest) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if r.random() < 0.6:
        out["density"] = r.choice([0.05, 0.1, 0.3, 0.7, 1.0, 1e-6, 0.25])
    if r.random() < 0.15:
        out["budget_rank"] = r.choice([1, 1, 2, 1000])
    if r.random() < 0.6:
        out["rank"] = r.choice([None, 1, r.randint(1, smallest), smallest])
    return out


def _draw_group(r, c, selection, smallest, halves) -> dict[str, Any]:
    """Options that may differ from group to group."""
    out = _draw_size(r, smallest) if r.random() < 0.7 else {}
    if r.random() < 0.6:
        out["lr"] = r.choice([1e-3, 0.01, 0.1, 0.0])
    if r.random() < 0.5:
        out["weight_decay"] = r.choice([0.0, 0.1, 1.0])
    if r.random() < 0.5:
        out["betas"] = r.choice([(0.9, 0.999), (0.9, 0.95), (0.0, 0.9), (0.8, 0.5)])
    if r.random() < 0.3:
        out["eps"] = r.choice([1e-8, 1e-6, 1e-3])
    if r.random() < 0.7:
        out["refresh_interval"] = r.choice([None, 1, 1, 2, 2, 3, 4])
    if r.random() < 0.3:
        out["refresh_schedule"] = r.choice(["all", "spread"])
    if selection == "principal" and r.random() < 0.35:
        out["refresh_drift"] = r.choice([0, 0, 0.03, 0.3, 1.0])
    if r.random() < 0.4:
        out["bias_correction"] = r.choice(["global", "per_entry"])
    if r.random() < 0.3:
        out["state_dtype"] = r.choice([torch.float32, torch.bfloat16])
    if r.random() < 0.2:
        out["maximize"] = True
    if r.random() < 0.15:
        out["capturable"] = True
    if c.mode != "packed" and r.random() < 0.3:
        out["master"] = None
        if halves:
            out["rounding"] = r.choice(["nearest", "stochastic", "stochastic"])
    if c.mode in ("named", "unnamed") and r.random() < 0.3:
        out["lift"] = True
    return out


def _draw_options(r, c, selection, smallest, halves) -> dict[str, Any]:
    out = _draw_group(r, c, selection, smallest, halves)
    out.pop("lift", None)
    out.setdefault("lr", 0.01)
    out["selection"] = selection
    if r.random() < 0.5:
        out["max_grad_norm"] = r.choice([1e-3, 0.1, 1.0, 100.0])
    out["backend"] = r.choice([None, "reference", "native-cpu"])
    out["seed"] = r.choice([0, 1, 12345, 2**31 - 1])
    if r.random() < 0.2:
        out["warm_start"] = r.choice(["cpu", None])
    if r.random() < 0.2:
        out["mask_method"] = r.choice(["gram", "svd", "chebyshev"])
    return out


def _consistent(c: Combination) -> Combination:
    """The combination without what cannot go together in any training loop."""
    if c.resume and c.touches >= c.resumes:
        c = replace(c, touches=-1)  # A weight that differs from a loaded state is refused.
    if c.closure and (c.scaler or c.zero == "none"):
        c = replace(c, scaler=None, zero="optimizer")
    if c.resume in ("deepcopy", "pickle") and c.scheduler in ("step", "cycle"):
        c = replace(c, resume="state_dict")  # torch's schedulers hold on to the optimizer that they were made for.
    if c.scheduler == "cycle":
        c = replace(c, groups=tuple({k: v for k, v in g.items() if k != "betas"} for g in c.groups))
    if c.scaler == "unscale" and any(block.dtype == "fp16" for block in c.blocks):
        c = replace(c, scaler="plain")  # torch refuses to unscale fp16 gradients.
    if c.options["selection"] == "gradient":
        c = replace(c, overflow=-1)  # An overflow makes no mask then, which the simulation does not know.
        if c.freezes >= 0 or c.cold or any(b.kind == "unused" for b in c.blocks):
            return replace(c, options={**c.options, "selection": "magnitude"})
    return c
