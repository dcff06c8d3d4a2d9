"""Things that cannot work, one in a combination, and what the refusal must say."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Spoil:
    """One thing that cannot work.

    Attributes:
        says: regular expressions that the message must match, all of them.
        options, pack, choice: options of LiftAdamW, pack_gradients, or the choice of parameters.
        model: changes the model before anything is called.
        midway: is called with the run before the last step, and makes a call that must be refused.
        may_work: whether training right is fine, too.
    """

    says: tuple[str, ...]
    options: dict[str, Any] | None = None
    pack: dict[str, Any] | None = None
    choice: dict[str, Any] | None = None
    model: Callable[[nn.Module], object] | None = None
    midway: Callable[[Any], object] | None = None
    may_work: bool = False


def not_sorted(weight: Tensor, k: int) -> Tensor:
    return torch.arange(k, dtype=torch.int32).flip(0)


def wide_indices(weight: Tensor, k: int) -> Tensor:
    return torch.arange(k)


def far_indices(weight: Tensor, k: int) -> Tensor:
    return torch.arange(k, dtype=torch.int32) + weight.numel()


def no_indices(weight: Tensor, k: int) -> None:
    return None


def _said(value: Any) -> str:
    return re.escape(str(value).strip("()")[:8])


WRONG: dict[str, tuple[Any, ...]] = {
    "lr": (-0.1, NAN, INF, "0.1", None, (0.1,)),
    "betas": ((0.9,), (0.9, 1.0), (-0.1, 0.9), 0.9, None, ("a", "b"), (0.9, NAN)),
    "eps": (-1e-8, NAN, "1e-8", None),
    "weight_decay": (-0.1, INF, "0.1", None),
    "rank": (0, -1, 2.5, "4", NAN, (4,)),
    "density": (0.0, -0.5, 1.5, NAN, "0.1", (0.1,)),
    "budget_rank": (0, -3, 1.5, "2", NAN),
    "refresh_interval": (0, -1, 2.5, "10"),
    "refresh_schedule": ("often", None, 3),
    "refresh_drift": (-0.1, 1.5, NAN, "0.03", True),
    "bias_correction": ("local", None, 1),
    "master": ("fp64", torch.float32, 1),
    "rounding": ("up", None),
    "state_dtype": (torch.float16, torch.float64, "bfloat16", None),
    "max_grad_norm": (0.0, -1.0, NAN, "1.0", (1.0,)),
    "selection": ("largest", None, 3),
    "mask_method": ("qr", None, 3),
    "warm_start": ("gpu", 3),
    "backend": ("cuda", 3, "native-cuda"),
    "seed": ("a", None, 1.5, (1,)),
    "maximize": ("yes", None),
    "capturable": ("yes", None),
    "process_group": (3, "all"),
}
"""Wrong values by option of LiftAdamW."""
OF_PACK = ("rank", "density", "budget_rank", "selection", "seed", "backend")
MATRIX = r"blocks\.\d+\b|parameter \d+ of group|embed"


def _first_weight(model: nn.Module) -> tuple[nn.Module, nn.Parameter]:
    kinds = ("Linear", "Conv1D")
    layer = next(m for m in model.modules() if type(m).__name__ in kinds and getattr(m, "weight", None) is not None)
    return layer, layer.weight


def _with(change: Callable[[Tensor], Tensor], required: bool = True) -> Callable[[nn.Module], None]:
    """A change of a model's first weight, also of layers that are tied to it."""

    def spoil(model: nn.Module) -> None:
        _, weight = _first_weight(model)
        new = nn.Parameter(change(weight.detach()), requires_grad=required)
        for module in model.modules():
            if getattr(module, "weight", None) is weight:
                module.weight = new

    return spoil


def _number(value: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        weight = weight.clone()
        weight.view(-1)[-1] = value
        return weight

    return change


def _strided(weight: Tensor) -> Tensor:
    return weight.repeat_interleave(2, dim=1)[:, ::2] if weight.numel() > 1 else weight.expand(2, 1)[::2]


def _replace_forward(model: nn.Module) -> None:
    layer, _ = _first_weight(model)
    layer.forward = layer.forward


def _sparse_trained(run: Any) -> Any:
    return next(t for t in run.trained if t.sparse)


def _nan_at_refresh(run: Any) -> None:
    t = next(t for t in run.trained if t.sparse)
    with torch.no_grad():
        t.matrix.view(-1)[-1] = NAN
    run.clear()
    run.attempt(run.optimizer.refresh)


def _other_shape(run: Any) -> None:
    state = copy.deepcopy(run.optimizer.state_dict())
    entry = next(e for e in state["state"].values() if "indices" in e)
    entry["matrix_shape"][0] += 1
    run.attempt(lambda: run.optimizer.load_state_dict(state))


def _changed_entry(key: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def spoil(run: Any) -> None:
        state = copy.deepcopy(run.optimizer.state_dict())
        entry = next(e for e in state["state"].values() if "indices" in e)
        entry[key] = change(entry[key])
        run.attempt(lambda: run.optimizer.load_state_dict(state))

    return spoil


def _fewer_groups(run: Any) -> None:
    state = copy.deepcopy(run.optimizer.state_dict())
    group = state["param_groups"][0]
    group["params"] = group["params"][1:]
    if "param_names" in group:
        group["param_names"] = group["param_names"][1:]
    state["state"].pop(0, None)
    run.attempt(lambda: run.optimizer.load_state_dict(state))


def _no_group_option(run: Any) -> None:
    state = copy.deepcopy(run.optimizer.state_dict())
    del state["param_groups"][0]["density"]
    run.attempt(lambda: run.optimizer.load_state_dict(state))


def _other_dtype(run: Any) -> None:
    t = _sparse_trained(run)
    run.clear()
    run.model.to(torch.float16 if t.matrix.dtype != torch.float16 else torch.bfloat16)
    p = t.p if not t.layers else t.layers[0].values
    p.grad = torch.zeros_like(p)
    run.attempt(run.optimizer.step)


def _sparse_gradient(run: Any) -> None:
    t = next((t for t in run.trained if t.sparse and not t.packed), None) or _sparse_trained(run)
    run.clear()
    t.p.grad = torch.zeros_like(t.p).to_sparse()
    run.attempt(run.optimizer.step)


def _bad_group(run: Any) -> None:
    group = {"params": [nn.Parameter(torch.ones(3, 4))], "density": 1.5, "budget_rank": None, "rounding": "nearest"}
    if run.named:
        group["params"] = [("blocks.9.weight", group["params"][0])]
    run.attempt(lambda: run.optimizer.add_param_group(group))


def _twice(run: Any) -> None:
    p = run.trained[0].p
    run.attempt(lambda: run.optimizer.add_param_group({"params": [("again", p)] if run.named else [p]}))


SPOILS: dict[str, Spoil] = {}
for _option, _values in WRONG.items():
    for _i, _value in enumerate(_values):
        _says = (rf"\b{_option}\b", _said(_value))
        SPOILS[f"{_option} {_i}"] = Spoil(_says, options={_option: _value})
        if _option in OF_PACK:
            SPOILS[f"pack {_option} {_i}"] = Spoil(_says, pack={_option: _value})
SPOILS |= {
    "rank huge": Spoil(("rank", "1000"), options={"rank": 1000}, pack={"rank": 1000}, may_work=True),
    "rank True": Spoil(("rank", "True"), options={"rank": True}, may_work=True),
    "triton": Spoil(("triton",), options={"backend": "triton"}),
    "pack triton": Spoil(("triton",), pack={"backend": "triton"}),
    "stochastic": Spoil(("rounding", "stochastic"), options={"rounding": "stochastic"}, may_work=True),
    "drift of random": Spoil(("refresh_drift", "0.1"), options={"refresh_drift": 0.1, "selection": "random"}),
    "not sorted": Spoil((MATRIX, "sorted"), options={"selection": not_sorted, "density": 1.0}),
    "int64": Spoil((MATRIX, "int32", "int64"), options={"selection": wide_indices}),
    "far": Spoil((MATRIX, "out of range"), options={"selection": far_indices}),
    "no list": Spoil((MATRIX, "NoneType"), options={"selection": no_indices}),
    "pack not sorted": Spoil((MATRIX, "sorted"), pack={"selection": not_sorted, "density": 1.0}),
    "pack int64": Spoil((MATRIX, "int32", "int64"), pack={"selection": wide_indices}),
    "include and exclude": Spoil(("include", "exclude", "blocks"), choice={"include": "blocks", "exclude": "blocks"}),
    "include nothing": Spoil(("include", "nowhere"), choice={"include": "nowhere"}),
    "include no expression": Spoil(("include", r"\("), choice={"include": "("}),
    "include a number": Spoil(("include", "3"), choice={"include": 3}),
    "exclude everything": Spoil(("exclude",), choice={"exclude": "."}),
    "extra nothing": Spoil(("extra", "nowhere"), choice={"extra": "nowhere"}),
    "extra no expression": Spoil(("extra", r"\("), choice={"extra": "("}),
    "extra bias": Spoil(("embed|norm|bias", "shape|extra"), choice={"extra": r"bias"}),
    "nan": Spoil((MATRIX, "finite"), model=_with(_number(NAN))),
    "inf": Spoil((MATRIX, "finite"), model=_with(_number(INF))),
    "strided": Spoil((MATRIX, "contiguous"), model=_with(_strided), may_work=True),  # n x 1 is contiguous
    "fp64": Spoil((MATRIX, "float64"), model=_with(lambda w: w.double())),
    "meta": Spoil((MATRIX, "meta"), model=_with(lambda w: w.to("meta"))),
    "int8": Spoil((MATRIX, "int8"), model=_with(lambda w: w.to(torch.int8), required=False)),
    "complex": Spoil((MATRIX, "complex64"), model=_with(lambda w: w.to(torch.complex64))),
    "empty": Spoil((MATRIX, "entries"), model=_with(lambda w: w[:0])),
    "forward": Spoil((MATRIX, "forward"), model=_replace_forward),
    "nan at a refresh": Spoil((MATRIX, "finite"), midway=_nan_at_refresh),
    "state of another shape": Spoil((MATRIX, "shape"), midway=_other_shape),
    "state without density": Spoil(("density",), midway=_no_group_option),
    "state of fewer": Spoil(("parameters",), midway=_fewer_groups),
    "state not sorted": Spoil((MATRIX, "index"), midway=_changed_entry("indices", lambda t: t.flip(0) - 2**30)),
    "state of int64": Spoil((MATRIX, "int32"), midway=_changed_entry("indices", lambda t: t.long())),
    "state too short": Spoil((MATRIX, "exp_avg"), midway=_changed_entry("exp_avg", lambda t: t[1:])),
    "state with a list": Spoil((MATRIX, "exp_avg_sq"), midway=_changed_entry("exp_avg_sq", lambda t: t.tolist())),
    "state in fp64": Spoil((MATRIX, "exp_avg", "float64"), midway=_changed_entry("exp_avg", lambda t: t.double())),
    "other dtype": Spoil((MATRIX, "float16"), midway=_other_dtype),
    "sparse gradient": Spoil((MATRIX, "layout"), midway=_sparse_gradient),
    "bad group": Spoil((MATRIX, "density", "1.5"), midway=_bad_group),
    "twice": Spoil(("param",), midway=_twice),
}
KNOWN = {"pack triton"}
"""Not drawn: the model may move to a GPU before it trains, so only the backward pass refuses it."""
PACKED_ONLY = {name for name, s in SPOILS.items() if s.pack or name.startswith("extra") or name == "forward"}
MATRIX_ONLY = {name for name, s in SPOILS.items() if s.options and callable(s.options.get("selection"))}
CHOSEN_ONLY = {name for name, s in SPOILS.items() if s.choice and name not in PACKED_ONLY}
