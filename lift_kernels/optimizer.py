"""LiftAdamW: AdamW on the principal weights of matrices, as an ordinary torch optimizer."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import dispatch, ops, options
from .checks import check_finite, check_gradient, check_index_list, require
from .dense import dense_adamw_
from .masks import principal_indices, random_indices
from .packed import PackedState
from .state_dict import check_state_dict, compact

logger = logging.getLogger("lift_kernels")


class LiftAdamW(Optimizer):
    """AdamW whose update and moments live on the k principal weights of each matrix (LIFT, arXiv 2506.00772).

    Matrices are trained sparsely; other parameters, and groups with ``lift=False``, get ordinary dense AdamW. The first mask is
    made at the first ``step`` or `refresh`, later ones after every ``refresh_interval`` steps.

    Args:
        params: parameters, (name, parameter) pairs or groups, as for every torch optimizer; see `lift_param_groups`.
        lr, betas, eps, weight_decay: as torch.optim.AdamW; ``lr`` may be a tensor. Decay acts on selected entries only.
        rank: LRA rank r of the approximation whose largest entries are trained; None: 64 or the smaller side.
        density: share of a matrix that is trained, in (0, 1]; unused when ``budget_rank`` is given: k = (m + n) * budget_rank.
        refresh_interval: steps between masks; None keeps the first one.
        bias_correction: ``"global"`` counts a matrix's steps (the paper), ``"per_entry"`` those since an entry came in.
        master: ``"fp32"`` keeps packed fp32 masters for bf16/fp16 weights; None rounds the weight itself.
        rounding: ``"nearest"`` or, with ``master=None``, ``"stochastic"``.
        state_dtype: of the moments, torch.float32 or torch.bfloat16.
        max_grad_norm: clips the norm over all trained entries of all groups; no host synchronization.
        capturable: as in torch: the step may be captured in a CUDA graph. Refresh between replays.
        selection: ``"principal"``, ``"random"`` (same k) or a callable ``(weight, k) -> sorted int32 indices``.
        seed: of random masks and of stochastic rounding.
        backend: one of `lift_kernels.backends`, None for the fastest usable one.

    Raises ValueError or TypeError, naming the parameter and the value, for options and parameters that cannot work.
    """

    _arenas: dict[tuple, PackedState]  # by device, dtypes and form of state
    _places: dict[Tensor, tuple[PackedState, int]]  # where each matrix lies
    _skipped: dict[int, Tensor | int]  # by id of the group: steps that found_inf skipped, not yet settled
    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf, no host synchronization

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        density: float = 0.05,
        budget_rank: int | None = None,
        refresh_interval: int | None = 200,
        bias_correction: str = "global",
        master: str | None = "fp32",
        rounding: str = "nearest",
        state_dtype: torch.dtype = torch.float32,
        max_grad_norm: float | None = None,
        capturable: bool = False,
        maximize: bool = False,
        selection: str | Callable[[Tensor, int], Tensor] = "principal",
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        require(callable(selection) or selection in options.SELECTIONS,
                f"selection must be one of {', '.join(options.SELECTIONS)} or a callable, got {selection!r}")  # fmt: skip
        require(max_grad_norm is None or max_grad_norm > 0, f"max_grad_norm must be positive or None, got {max_grad_norm}")
        require(backend is None or backend in dispatch.NAMES,
                f"unknown backend {backend!r}; choose one of {', '.join(dispatch.NAMES)}")  # fmt: skip
        self.max_grad_norm, self.selection, self.seed, self.backend = max_grad_norm, selection, seed, backend
        self.grad_norm: Tensor | None = None  # norm over trained entries at the last step, when it was needed for clipping
        self._reset_arenas()
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, rank=rank, density=density, budget_rank=budget_rank,
            refresh_interval=refresh_interval, bias_correction=bias_correction, master=master, rounding=rounding,
            state_dtype=state_dtype, capturable=capturable, maximize=maximize, lift=None, steps_since_refresh=0,
        )  # fmt: skip
        super().__init__(params, defaults)

    # ---- parameters -------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its matrices get their first mask at the next step. Raises, and adds nothing, when it cannot work."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            options.check_group(group)
            for parameter, name in self._named(group):
                if options.is_sparse(parameter, group):
                    if self.backend is not None:
                        dispatch.choose(self.backend, parameter.device, "sparse_adamw_")
                    options.check_lift_parameter(parameter, group, name)
                    if group["lift"] is None and options.looks_like_embedding(name):
                        logger.warning("%s looks like an embedding or a head, which LIFT leaves out; use lift_param_groups(model), "
                                       "or say lift=True or lift=False in its group", name)  # fmt: skip
        except (ValueError, TypeError, RuntimeError):
            self.param_groups.pop()
            raise

    def _named(self, group: dict[str, Any]) -> list[tuple[Tensor, str]]:
        """The group's parameters with names for messages."""
        at = next(i for i, g in enumerate(self.param_groups) if g is group)
        names = group.get("param_names") or [f"parameter {i} of group {at}" for i in range(len(group["params"]))]
        return list(zip(group["params"], names))

    def _sparse_parameters(self) -> list[tuple[Tensor, dict[str, Any], str]]:
        return [(p, g, name) for g in self.param_groups for p, name in self._named(g) if options.is_sparse(p, g)]

    # ---- the step ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss.

        Raises before anything is changed when a gradient cannot be used.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        self._make_first_masks()
        jobs = self._sparse_jobs()
        for arena, _, rows in jobs:
            arena.check_weights(rows)
        dense = [
            (g, [p for p in g["params"] if p.grad is not None and not options.is_sparse(p, g)]) for g in self.param_groups
        ]
        found_inf = getattr(self, "found_inf", None)
        inv_scale = self._gradient_factor(jobs, dense)
        for arena, group, rows in jobs:
            self._step_sparse(arena, group, rows, inv_scale, found_inf)
        for group, parameters in dense:
            if parameters:
                dense_adamw_(parameters, self.state, group, inv_scale, found_inf)
        self._count_step([group for _, group, _ in jobs], found_inf)
        return loss

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            for p, name in self._named(group):
                if p.grad is not None:
                    check_gradient(p.grad, p, name, sparse=options.is_sparse(p, group))

    @staticmethod
    def _arguments(arena: PackedState, rows: list[int]) -> tuple[list[Tensor], list[int], list[int]]:
        """Gradients, offsets and counts of the matrices ``rows``."""
        grads: list[Any] = [arena.weights[row].grad for row in rows]
        return grads, [arena.offsets[row] for row in rows], [arena.counts[row] for row in rows]

    def _sparse_jobs(self) -> list[tuple[PackedState, dict[str, Any], list[int]]]:
        """The launches of a step: matrices that share an arena, a group and the dtype of their gradients."""
        jobs: dict[tuple, tuple[PackedState, dict[str, Any], list[int]]] = {}
        for group_number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p in self._places and p.grad is not None:
                    arena, row = self._places[p]
                    jobs.setdefault((id(arena), group_number, p.grad.dtype), (arena, group, []))[2].append(row)
        return list(jobs.values())

    def _gradient_factor(self, jobs, dense) -> Tensor | None:
        """What gradients are multiplied by: GradScaler's inverse scale times the clipping factor, or None for one."""
        scale = getattr(self, "grad_scale", None)
        inv_scale = None if scale is None else scale.reshape(()).reciprocal().float()
        if self.max_grad_norm is None:
            return inv_scale
        norms = []
        for arena, _, rows in jobs:
            grads, offsets, counts = self._arguments(arena, rows)
            norms.append(ops.packed_l2_norm(grads, arena.indices, offsets, counts, backend=self.backend))
        norms += [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for _, ps in dense for p in ps]
        if not norms:
            return inv_scale
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, non_blocking=True) for n in norms]))
        self.grad_norm = norm if inv_scale is None else norm * inv_scale.to(norm.device, non_blocking=True)
        factor = (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        return factor if inv_scale is None else factor * inv_scale.to(norm.device, non_blocking=True)

    def _step_sparse(self, arena: PackedState, group, rows: list[int], inv_scale, found_inf) -> None:
        device = arena.indices.device
        inv_scale, found_inf = (None if t is None else t.to(device, non_blocking=True).reshape(()) for t in (inv_scale, found_inf))
        arena.regather_masters(rows)
        steps = arena.next_steps(rows, found_inf)
        grads, offsets, counts = self._arguments(arena, rows)
        ops.sparse_adamw_(
            [arena.weights[row] for row in rows], grads, arena.indices, offsets, counts, arena.exp_avg, arena.exp_avg_sq, steps,
            group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"], master=arena.master,
            births=arena.births, inv_scale=inv_scale, found_inf=found_inf, maximize=group["maximize"],
            stochastic=group["rounding"] == "stochastic", seed=self.seed, backend=self.backend,
        )  # fmt: skip
        arena.written(rows, steps)

    # ---- masks ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute every mask anew from the present weights and carry the state over.

        Raises ValueError, naming the parameter, for non-finite weights; no mask is changed then.
        """
        self._settle_skipped()
        if not self._make_first_masks():
            self._refresh(self.param_groups)

    def _refresh(self, groups: Sequence[dict[str, Any]]) -> None:
        chosen = {id(group) for group in groups}
        rows: dict[int, tuple[PackedState, list[int], list[Tensor]]] = {}
        for number, (p, group, name) in enumerate(self._sparse_parameters()):
            if id(group) in chosen:
                arena, row = self._places[p]
                _, numbers, lists = rows.setdefault(id(arena), (arena, [], []))
                numbers.append(row)
                lists.append(self._mask(number, p, group, name))
        for arena, numbers, lists in rows.values():
            arena.regather_masters(numbers)
            arena.migrate(numbers, lists, backend=self.backend)
        for group in groups:
            group["steps_since_refresh"] = 0
        self._publish()

    def _mask(self, number: int, p: Tensor, group: dict[str, Any], name: str) -> Tensor:
        k = options.trained_entries(p, group, name)
        if self.selection == "principal":
            return principal_indices(p, options.rank_of(p, group), k, name=name)
        check_finite(p, name)
        if self.selection == "random":
            return random_indices(p.numel(), k, self.seed + number, p.device)
        assert callable(self.selection)
        indices = self.selection(p.detach(), k)
        check_index_list(indices, p.numel(), name, p.device)
        return indices

    def _make_first_masks(self) -> bool:
        """Masks for matrices that have none; whether every matrix was one of them."""
        missing = [(i, *entry) for i, entry in enumerate(self._sparse_parameters()) if entry[0] not in self._places]
        everything = not self._places
        if missing:
            self._adopt([(p, group, name, {"indices": self._mask(i, p, group, name)}) for i, p, group, name in missing])
        return everything

    def _adopt(self, entries: list[tuple[Tensor, dict[str, Any], str, dict[str, Tensor]]]) -> None:
        """Put matrices with their index lists, and perhaps moments, into the arenas of their kind."""
        kinds = defaultdict(list)
        for p, group, name, entry in entries:
            master = group["master"] is not None and p.dtype != torch.float32
            kind = (p.device, p.dtype, group["state_dtype"], master, group["bias_correction"] == "per_entry")
            kinds[kind].append((p, entry, name))
        for kind, members in kinds.items():
            if kind not in self._arenas:
                self._arenas[kind] = PackedState(kind[0], kind[2], master=kind[3], births=kind[4])
            arena = self._arenas[kind]
            first = len(arena.weights)
            parameters, lists, names = zip(*members)
            arena.append(parameters, lists, names)
            self._places.update({p: (arena, first + i) for i, p in enumerate(parameters)})
        self._publish()

    def _publish(self) -> None:
        """Show the arenas' present slices as ``optimizer.state[p]``."""
        for p, (arena, row) in self._places.items():
            self.state[p] = arena.views(row)

    def _count_step(self, groups: list[dict[str, Any]], found_inf: Tensor | None) -> None:
        """Advance the refresh schedule; a step that found_inf skipped does not count."""
        groups = list({id(g): g for g in groups}.values())
        for group in groups:
            group["steps_since_refresh"] += 1
            if found_inf is not None:  # GradScaler adds up the flags of all devices
                self._skipped[id(group)] = self._skipped.get(id(group), 0) + (found_inf != 0).int()
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return  # a graph replays kernels, not this schedule: refresh by hand between replays
        if any(self._due(group) for group in groups):
            self._settle_skipped()
            due = [group for group in groups if self._due(group)]
            if due:
                self._refresh(due)

    @staticmethod
    def _due(group: dict[str, Any]) -> bool:
        return group["refresh_interval"] is not None and group["steps_since_refresh"] >= group["refresh_interval"]

    def _settle_skipped(self) -> None:
        """Take skipped steps off the schedule: the one place that reads found_inf back, when a refresh or a save is due."""
        for group in self.param_groups:
            group["steps_since_refresh"] -= int(self._skipped.pop(id(group), 0))

    # ---- state ------------------------------------------------------------------------------------------------------------

    def state_bytes(self) -> int:
        """Bytes of every tensor storage the optimizer holds, index lists, masters and padding included."""
        tensors = [t for arena in self._arenas.values() for t in (*arena.arenas().values(), arena.steps)]
        tensors += [t for entry in self.state.values() for t in entry.values() if isinstance(t, Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    def state_dict(self) -> dict[str, Any]:
        """As every torch optimizer's, with compact copies that share no storage and keep their dtypes."""
        self._settle_skipped()
        packed = super().state_dict()
        shapes = {number: p.shape for number, p in enumerate(self._all_parameters()) if p in self._places}
        packed["state"] = {i: compact(entry, shapes.get(i)) for i, entry in packed["state"].items()}
        for group in packed["param_groups"]:
            group["seed"] = self.seed  # in the groups, which is what every tool that moves optimizer state about keeps
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`; the masks in it replace any mask made before.

        Raises ValueError, naming the parameter, for the state of another model or version; nothing is changed then.
        """
        parameters = self._all_parameters()
        sparse = [options.is_sparse(p, g) for g in self.param_groups for p in g["params"]]
        names = [name for g in self.param_groups for _, name in self._named(g)]
        check_state_dict(state_dict, parameters, sparse, names)
        # torch would cast floating state to the parameter's dtype, so only dense entries go its way.
        dense = {i: entry for i, entry in state_dict["state"].items() if not sparse[i]}
        super().load_state_dict({**state_dict, "state": dense})
        for group in self.param_groups:
            self.seed = group.pop("seed", self.seed)
        groups = [g for g in self.param_groups for _ in g["params"]]
        self._reset_arenas()
        self._adopt([
            (parameters[i], groups[i], names[i], entry) for i, entry in state_dict["state"].items() if sparse[i]
        ])  # fmt: skip

    def _all_parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _reset_arenas(self) -> None:
        self._arenas, self._places, self._skipped = {}, {}, {}

    def __getstate__(self) -> dict[str, Any]:
        self._settle_skipped()
        config = {key: getattr(self, key) for key in ("max_grad_norm", "selection", "seed", "backend")}
        state = defaultdict(dict, {p: compact(entry) for p, entry in self.state.items()})
        return {**super().__getstate__(), **config, "state": state, "grad_norm": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "defaults" in state:  # pickle and deepcopy; load_state_dict passes only state and groups, and adopts by itself
            self._reset_arenas()
            self._adopt([(p, g, name, self.state[p]) for p, g, name in self._sparse_parameters() if self.state.get(p)])
