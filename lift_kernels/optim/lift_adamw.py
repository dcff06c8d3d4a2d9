"""LiftAdamW: AdamW on the principal weights of matrices, as an ordinary torch optimizer."""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._storage import storage_bytes
from ..distributed.replicas import Replicas
from ..masks.lowrank import METHODS
from ..masks.principal import Mask
from ..masks.selection import SelectionRequest, check_selection, make_masks, warm_part
from ..nn import trainable
from ..ops import dispatch
from ..validation import check_gradient, require
from . import hyperparameters
from .bucket import Bucket, any_infinite, clipping
from .dense_adamw import dense_adamw_
from .packed_state import PackedState
from .refresh import MatrixRef, RefreshReport, RefreshSchedule, report_on
from .state_dict import check_state_dict, compact, in_own_order

logger = logging.getLogger("lift_kernels")
_SETTINGS = (  # optimizer-wide, not of a group
    "max_grad_norm",
    "selection",
    "seed",
    "backend",
    "mask_method",
    "warm_start",
    "last_refresh",
    "_replicas",
)


class LiftAdamW(Optimizer):
    """AdamW on the k principal weights of each matrix (LIFT, arXiv 2506.00772).

    Matrices are trained sparsely. Other parameters, and groups with ``lift=False``, get ordinary
    dense AdamW. The first mask is made at the first ``step`` or `refresh`, later ones after every
    ``refresh_interval`` steps. Parameters with packed gradients (`lift_kernels.pack_gradients`)
    bring their first mask along.

    Args:
        params: parameters, (name, parameter) pairs or groups, as for every torch optimizer; see
            `lift_param_groups`.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW. ``lr`` may be a tensor. Decay acts on
            selected entries only.
        rank: LRA rank r of the approximation whose largest entries are trained. None: 64, or the
            smaller side where that is less.
        density: share of a matrix that is trained, in (0, 1].
        budget_rank: k = (m + n) * budget_rank entries of a matrix are trained. Given, it takes
            precedence over ``density``.
        refresh_interval: steps between masks. None keeps the first mask.
        refresh_schedule: ``"all"`` renews every mask after an interval. ``"spread"`` renews a few
            at each step, so that no step stalls.
        bias_correction: ``"global"`` counts the steps of a matrix (the paper). ``"per_entry"``
            counts those since an entry came in.
        master: ``"fp32"`` keeps packed fp32 masters for bf16/fp16 weights. None rounds the weight
            itself.
        rounding: ``"nearest"`` or, with ``master=None``, ``"stochastic"``.
        state_dtype: of the moments, torch.float32 or torch.bfloat16.
        max_grad_norm: clips the norm over all trained entries of all groups, without host
            synchronization.
        capturable: as in torch: the step may be captured in a CUDA graph. Refresh between replays.
        selection: ``"principal"`` (the paper). For comparison ``"magnitude"``, ``"gradient"``
            (largest when the mask is made) or ``"random"``, all with the same k, or a callable
            ``(weight, k) -> sorted int32 indices``.
        mask_method: method of `low_rank_factors`.
        warm_start: where bases for warm starts are kept, ``"device"`` or ``"cpu"``. None: every
            refresh starts cold.
        seed: of random masks and of stochastic rounding.
        backend: one of `lift_kernels.backends`, None for the fastest usable one.
        process_group: the ranks that hold replicas and so must train the same entries, as a torch
            process group. None: the ranks of the default group that train a parameter of the same
            name. ``"independent"``: ranks are meant to differ. Index lists are compared at the
            first step after each mask. A difference is a RuntimeError on every rank.

    Attributes:
        last_refresh: `RefreshReport` of the last masks, None before the first.
        grad_norm: 0-dim norm over all trained entries at the last step that clipped, else None.

    Raises ValueError or TypeError, naming the parameter and the value, for options and parameters
    that cannot work.
    """

    _arenas: dict[tuple, PackedState]  # by device, dtypes and form of state
    _places: dict[Tensor, tuple[PackedState, int]]  # arena and row of each matrix
    _kept: dict[Tensor, dict[str, Tensor]]  # basis and threshold of each matrix's last mask, for a warm start
    _layers: dict[Tensor, Any]  # the packed layer that owns each ``values`` in an arena
    _uncompared: dict[Tensor, None]  # parameters whose index lists the other ranks have not seen
    _schedule: RefreshSchedule
    writes_weights = True  # not only the values of packed layers
    _step_supports_amp_scaling = True  # GradScaler passes grad_scale and found_inf without host synchronization

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
        refresh_schedule: str = "all",
        bias_correction: str = "global",
        master: str | None = "fp32",
        rounding: str = "nearest",
        state_dtype: torch.dtype = torch.float32,
        max_grad_norm: float | None = None,
        capturable: bool = False,
        maximize: bool = False,
        selection: str | Callable[[Tensor, int], Tensor] = "principal",
        mask_method: str = "auto",
        warm_start: str | None = "device",
        seed: int = 0,
        backend: str | None = None,
        process_group: torch.distributed.ProcessGroup | str | None = None,
    ) -> None:
        check_selection(selection)
        require(
            max_grad_norm is None or max_grad_norm > 0, f"max_grad_norm must be positive or None, got {max_grad_norm}"
        )
        require(
            backend is None or backend in dispatch.NAMES,
            f"unknown backend {backend!r}; choose one of {', '.join(dispatch.NAMES)}",
        )
        require(mask_method in METHODS, f"unknown mask_method {mask_method!r}; choose one of {', '.join(METHODS)}")
        require(
            warm_start in ("device", "cpu", None), f"warm_start must be 'device', 'cpu' or None, got {warm_start!r}"
        )
        self.max_grad_norm, self.selection, self.seed, self.backend = max_grad_norm, selection, seed, backend
        self.mask_method, self.warm_start = mask_method, warm_start
        self.last_refresh: RefreshReport | None = None
        self.grad_norm: Tensor | None = None
        self._replicas = Replicas(process_group)
        self._reset_arenas()
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            rank=rank,
            density=density,
            budget_rank=budget_rank,
            refresh_interval=refresh_interval,
            refresh_schedule=refresh_schedule,
            bias_correction=bias_correction,
            master=master,
            rounding=rounding,
            state_dtype=state_dtype,
            capturable=capturable,
            maximize=maximize,
            lift=None,
            steps_since_refresh=0,
        )
        super().__init__(params, defaults)

    # ---- parameters ------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Its matrices get their first mask at the next step.

        Raises, and adds nothing, when the group cannot work.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            hyperparameters.check_group(group)
            for parameter, name in self._named(group):
                if hyperparameters.is_sparse(parameter, group):
                    if self.backend is not None:
                        dispatch.choose(self.backend, parameter.device, "sparse_adamw_")
                    matrix = trainable.matrix_of(parameter)
                    hyperparameters.check_lift_parameter(matrix, group, name)
                    require(
                        matrix is parameter or group["master"] is not None,
                        f"{name}: values of a packed layer are kept in fp32, so master=None cannot work; "
                        "use matrix mode",
                    )
                    if group["lift"] is None and hyperparameters.looks_like_embedding(name):
                        logger.warning(
                            "%s looks like an embedding or a head, which LIFT leaves out; use "
                            "lift_param_groups(model), or say lift=True or lift=False in its group",
                            name,
                        )
                else:
                    require(
                        trainable.matrix_of(parameter) is parameter and not trainable.is_hooked(parameter),
                        f"{name} has packed gradients, which lift=False cannot train; unpack(model) first",
                    )
        except (ValueError, TypeError, RuntimeError):
            self.param_groups.pop()
            raise
        self._replicas.announce(name for p, name in self._named(group) if hyperparameters.is_sparse(p, group))

    def _named(self, group: dict[str, Any]) -> list[tuple[Tensor, str]]:
        """The group's parameters with names for messages."""
        at = next(i for i, g in enumerate(self.param_groups) if g is group)
        names = group.get("param_names") or [
            trainable.name_of(p) or f"parameter {i} of group {at}" for i, p in enumerate(group["params"])
        ]
        return list(zip(group["params"], names))

    def _sparse_parameters(self) -> list[tuple[Tensor, dict[str, Any], str]]:
        return [
            (p, g, name) for g in self.param_groups for p, name in self._named(g) if hyperparameters.is_sparse(p, g)
        ]

    # ---- the step --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, and return the closure's loss.

        Raises before anything is changed when a gradient cannot be used.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        self._make_first_masks()
        self._compare_ranks()
        buckets = self._buckets()
        for bucket in buckets:
            bucket.arena.check_weights(bucket.rows)
        dense = [
            (g, [p for p in g["params"] if p.grad is not None and not hyperparameters.is_sparse(p, g)])
            for g in self.param_groups
        ]
        found_inf = any_infinite(
            buckets, getattr(self, "found_inf", None), getattr(self, "grad_scale", None), self.backend
        )
        inv_scale = self._gradient_factor(buckets, [p for _, parameters in dense for p in parameters])
        for bucket in buckets:
            self._step_sparse(bucket, inv_scale, found_inf)
        for group, parameters in dense:
            if parameters:
                dense_adamw_(parameters, self.state, group, inv_scale, found_inf)
        self._count_step([bucket.group for bucket in buckets], found_inf)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, packed gradients ``p.lift_grad`` too. A step has cleared these
        already.
        """
        super().zero_grad(set_to_none)
        for p in self._all_parameters():
            if trainable.hooked_gradient(p) is not None:
                trainable.clear_gradient(p)

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            for p, name in self._named(group):
                trainable.check_hooked_gradient(p, name)
                if p.grad is not None:
                    check_gradient(p.grad, p, name, sparse=hyperparameters.is_sparse(p, group))

    def _follow_layers(self) -> None:
        """Take the present weights of packed layers: load_state_dict(assign=True) brings new
        ones.
        """
        for p, layer in self._layers.items():
            arena, row = self._places[p]
            arena.weights[row] = layer.weight

    def _buckets(self) -> list[Bucket]:
        """The launches of a step."""
        self._follow_layers()
        buckets: dict[tuple, Bucket] = {}
        for group_number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p not in self._places:
                    continue
                layer = self._layers.get(p)
                grad, packed = trainable.gradient_of(p, layer)
                if grad is None:
                    continue
                arena, row = self._places[p]
                key = id(arena), group_number, grad.dtype, packed
                bucket = buckets.setdefault(key, Bucket(arena, group, packed, [], [], []))
                bucket.rows.append(row)
                bucket.parameters.append(p)
                bucket.grads.append(grad)
        return list(buckets.values())

    def _gradient_factor(self, buckets: Sequence[Bucket], dense: list[Tensor]) -> Tensor | None:
        """The factor of all gradients: GradScaler's inverse scale times the clipping factor.

        None stands for 1.
        """
        scale = getattr(self, "grad_scale", None)
        inv_scale = None if scale is None else scale.reshape(()).reciprocal().float()
        if self.max_grad_norm is None:
            return inv_scale
        factor, norm = clipping(buckets, dense, inv_scale, self.max_grad_norm, self.backend)
        self.grad_norm = self.grad_norm if norm is None else norm
        return factor

    def _step_sparse(self, bucket: Bucket, inv_scale: Tensor | None, found_inf: Tensor | None) -> None:
        arena, rows = bucket.arena, bucket.rows
        device = arena.indices.device
        inv_scale, found_inf = (
            None if t is None else t.to(device, non_blocking=True).reshape(()) for t in (inv_scale, found_inf)
        )
        arena.regather_masters(rows)
        steps = arena.next_steps(rows, found_inf)
        bucket.step(steps, inv_scale, found_inf, self.seed, self.backend)
        arena.end_step(rows, steps)
        for p in bucket.parameters:
            if p in self._layers:
                torch.autograd.graph.increment_version(p)  # p is a view of the master with its own counter.
            elif bucket.packed:
                trainable.clear_gradient(p)  # model.zero_grad() would not clear it.

    # ---- masks -----------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self, *, drop_gradients: bool = False) -> None:
        """Compute every mask again from the present weights, and migrate the state.

        Entries that stay keep their moments. Entries that enter start at zero (paper section 3).

        Args:
            drop_gradients: drop packed gradients, which belong to the entries of the old masks.

        Raises ValueError, naming the parameter, for non-finite weights. Raises RuntimeError for
        packed gradients that wait for a step and for values that another optimizer trains. No mask
        is changed then.
        """
        self._check_packed(drop_gradients)
        self._schedule.subtract_skipped(self.param_groups)
        if not self._make_first_masks():
            self._refresh(self.param_groups)
        if any(group["capturable"] for group in self.param_groups):
            self._compare_ranks()  # A captured step is replayed without this code.

    def _check_packed(self, drop_gradients: bool) -> None:
        """Raise if a packed gradient or another optimizer forbids new masks."""
        for p, _, name in self._sparse_parameters():
            other = next((layer.stepped_by for layer in trainable.layers_of(p) if layer.stepped_by), None)
            require(
                other is None,
                f"{name} is trained by {other} too, whose state would belong to other entries after a refresh; "
                "train it by LiftAdamW alone",
                RuntimeError,
            )
            require(
                drop_gradients or not trainable.holds_packed_gradient(p),
                f"{name} has a packed gradient, whose entries a refresh would exchange; call step() or zero_grad() "
                "first, or refresh(drop_gradients=True)",
                RuntimeError,
            )
        self._follow_layers()
        if drop_gradients:
            for p, _, _ in self._sparse_parameters():
                trainable.clear_gradient(p)

    def _compare_ranks(self) -> None:
        """Raise on every replica if their new index lists differ.

        Lists that differed are compared again at the next step.
        """
        if not self._uncompared or not self._replicas.active() or dispatch.capturing():
            return
        lists = defaultdict(list)
        for p in self._uncompared:
            arena, row = self._places[p]
            lists[arena.names[row]].append(arena.views(row)["indices"])
        self._replicas.compare(lists, 0.0 if self.last_refresh is None else self.last_refresh.seconds)
        self._uncompared.clear()

    def _refresh(self, groups: Sequence[dict[str, Any]]) -> None:
        chosen = {id(group) for group in groups}
        self._renew([due for due in self._matrices() if id(due.group) in chosen])
        for group in groups:
            group["steps_since_refresh"] = 0

    def _matrices(self) -> list[MatrixRef]:
        return [MatrixRef(i, *entry) for i, entry in enumerate(self._sparse_parameters())]

    def _renew(self, due: list[MatrixRef]) -> None:
        """New masks for matrices that have one."""
        masks = self._masks(due)
        rows: dict[int, tuple[PackedState, list[int], list[Tensor]]] = {}
        for (_, p, _, _), mask in zip(due, masks):
            arena, row = self._places[p]
            _, numbers, lists = rows.setdefault(id(arena), (arena, [], []))
            numbers.append(row)
            lists.append(mask.indices)
        stayed = [
            self._places[d.parameter][0].count_kept(self._places[d.parameter][1], m.indices, self.backend)
            for d, m in zip(due, masks)
        ]
        for arena, numbers, lists in rows.values():
            arena.regather_masters(numbers)
            arena.migrate(numbers, lists, backend=self.backend)
        self._kept.update(
            {d.parameter: warm_part(mask._asdict(), d.parameter, self.warm_start) for d, mask in zip(due, masks)}
        )
        self.last_refresh = report_on(due, masks, stayed)
        self._uncompared.update({d.parameter: None for d in due})
        self._publish()

    def _masks(self, due: list[MatrixRef]) -> list[Mask]:
        return make_masks(
            [self._selection_request(d) for d in due],
            selection=self.selection,
            seed=self.seed,
            method=self.mask_method,
            backend=self.backend,
        )

    def _selection_request(self, due: MatrixRef) -> SelectionRequest:
        number, p, group, name = due
        matrix = trainable.matrix_of(p).detach()
        rank, k = hyperparameters.rank_of(matrix, group), hyperparameters.entries_of(matrix, group, name)
        grad = p.grad if p.shape == matrix.shape else None
        return SelectionRequest(matrix, grad, rank, k, name, number, self._kept.get(p, {}))

    def _make_first_masks(self) -> bool:
        """Make masks for matrices that have none. Returns whether no matrix had one before."""
        missing = [due for due in self._matrices() if due.parameter not in self._places]
        everything = not self._places
        if missing:
            self._adopt(
                [
                    (d.parameter, d.group, d.name, entry)
                    for d in missing
                    if (entry := trainable.initial_state(d.parameter)) is not None
                ]
            )
            due = [d for d in missing if d.parameter not in self._places]
            masks = self._masks(due)
            self._adopt(
                [
                    (
                        d.parameter,
                        d.group,
                        d.name,
                        {"indices": mask.indices, **warm_part(mask._asdict(), d.parameter, self.warm_start)},
                    )
                    for d, mask in zip(due, masks)
                ]
            )
            self.last_refresh = report_on(due, masks, None)
        return everything

    def _adopt(self, entries: list[tuple[Tensor, dict[str, Any], str, dict[str, Tensor]]]) -> None:
        """Put matrices with their index lists, and moments if given, into the arenas of their
        kind.
        """
        kinds = defaultdict(list)
        for p, group, name, entry in entries:
            matrix = trainable.matrix_of(p)
            # The values of a packed layer are the master, in fp32 as well.
            master = matrix is not p or (group["master"] is not None and p.dtype != torch.float32)
            kind = (p.device, matrix.dtype, group["state_dtype"], master, group["bias_correction"] == "per_entry")
            kinds[kind].append((p, matrix, entry, name))
        for kind, members in kinds.items():
            if kind not in self._arenas:
                self._arenas[kind] = PackedState(kind[0], kind[2], master=kind[3], births=kind[4])
            arena = self._arenas[kind]
            first = len(arena.weights)
            parameters, matrices, lists, names = zip(*members)
            arena.append(matrices, lists, names)
            self._kept.update({p: warm_part(entry, p, self.warm_start) for p, entry in zip(parameters, lists)})
            self._places.update({p: (arena, first + i) for i, p in enumerate(parameters)})
            self._layers.update({p: layer for p in parameters for layer in trainable.layers_of(p)[:1]})
            self._uncompared.update(dict.fromkeys(parameters))
        self._publish()

    def _publish(self) -> None:
        """Show the arenas' present slices as ``optimizer.state[p]``."""
        for p, (arena, row) in self._places.items():
            self.state[p] = arena.views(row) | self._kept.get(p, {})
            trainable.bind(p, self.state[p])

    def _count_step(self, groups: list[dict[str, Any]], found_inf: Tensor | None) -> None:
        """Advance the refresh schedule, and renew the masks that are due."""
        groups = list({id(g): g for g in groups}.values())
        self._schedule.count_step(groups, found_inf)
        if dispatch.capturing():
            return  # A graph replays kernels and not this schedule. The user refreshes between replays.
        turn = [due for group in groups for due in self._schedule.turn(group, self._placed(group))]
        if turn:
            self._renew(turn)
            for d in turn:
                trainable.clear_gradient(d.parameter)  # It was used, and it belongs to the old entries.
        due = self._schedule.due_groups(groups)
        if due:
            self._refresh(due)
            for p in (p for group in due for p in group["params"]):
                trainable.clear_gradient(p)

    def _placed(self, group: dict[str, Any]) -> list[MatrixRef]:
        """The matrices of a group that have a mask; none unless it spreads its refreshes."""
        if group["refresh_schedule"] != "spread":
            return []
        return [ref for ref in self._matrices() if ref.group is group and ref.parameter in self._places]

    # ---- state -----------------------------------------------------------------------------------

    def state_bytes(self) -> int:
        """Bytes of all tensors that the optimizer holds: moments, index lists, masters, padding."""
        tensors = [t for arena in self._arenas.values() for t in (*arena.buffers().values(), arena.steps)]
        tensors += [t for entry in self.state.values() for t in entry.values() if isinstance(t, Tensor)]
        return storage_bytes(tensors)

    def state_dict(self) -> dict[str, Any]:
        """The state dict of torch's optimizers, with compact copies.

        The copies share no storage with the optimizer and keep their dtypes.
        """
        self._schedule.subtract_skipped(self.param_groups)
        packed = super().state_dict()
        shapes = {i: trainable.matrix_of(p).shape for i, p in enumerate(self._all_parameters()) if p in self._places}
        packed["state"] = {i: compact(entry, shapes.get(i)) for i, entry in packed["state"].items()}
        for group in packed["param_groups"]:
            if "param_names" in group:
                group["param_names"] = list(group["param_names"])  # torch shares the list with the optimizer.
            group["seed"] = self.seed  # Tools that move optimizer state keep what is in the groups.
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`. Its masks replace all masks made before.

        Parameters are matched by name where both sides have names, else by position. All state goes
        to its parameter's device.

        Raises ValueError, naming the parameter, for the state of another model or version. Nothing
        is changed then.
        """
        state_dict = state_dict.copy()
        hooks: tuple[Any, Any] = (self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks)
        for hook in hooks[0].values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        state_dict = in_own_order(state_dict, self.param_groups)
        parameters = self._all_parameters()
        sparse = [hyperparameters.is_sparse(p, g) for g in self.param_groups for p in g["params"]]
        names = [name for g in self.param_groups for _, name in self._named(g)]
        check_state_dict(state_dict, [trainable.matrix_of(p) for p in parameters], sparse, names)
        for p, name, was, group in zip(
            parameters, names, sparse, (g for g in state_dict["param_groups"] for _ in g["params"])
        ):
            require(
                hyperparameters.is_sparse(p, group) == was,
                f"{name}: lift={group['lift']} in the state dict, but this optimizer trains it "
                f"{'sparsely' if was else 'densely'}; build the optimizer with the groups that were saved",
            )
        # torch would cast floating state to the parameter's dtype. So it loads dense entries only.
        # The hooks have run already, or run when the state is complete.
        dense = {i: entry for i, entry in state_dict["state"].items() if not sparse[i]}
        self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks = (
            OrderedDict(),
            OrderedDict(),
        )
        try:
            super().load_state_dict({**state_dict, "state": dense})
        finally:
            self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks = hooks
        for (
            p,
            entry,
        ) in self.state.items():  # torch leaves the step on the device it was loaded to; the fused step needs it here
            if "step" in entry:
                entry["step"] = torch.as_tensor(entry["step"], dtype=torch.float32, device=p.device).reshape(())
        for group in self.param_groups:
            self.seed = group.pop("seed", self.seed)
        groups = [g for g in self.param_groups for _ in g["params"]]
        self._reset_arenas()
        for p in parameters:
            trainable.clear_gradient(p)  # It belongs to other entries.
        self._adopt(
            [(parameters[i], groups[i], names[i], entry) for i, entry in state_dict["state"].items() if sparse[i]]
        )
        self._replicas.announce(name for _, _, name in self._sparse_parameters())  # The state may have brought names.
        for hook in hooks[1].values():
            hook(self)

    def _all_parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _reset_arenas(self) -> None:
        self._arenas, self._places, self._kept, self._layers = {}, {}, {}, {}
        self._schedule = RefreshSchedule()
        self._uncompared = {}

    def __getstate__(self) -> dict[str, Any]:
        self._schedule.subtract_skipped(self.param_groups)
        config = {key: getattr(self, key) for key in _SETTINGS}
        state = defaultdict(dict, {p: compact(entry) for p, entry in self.state.items()})
        layers = {p: layers for p in self._all_parameters() if (layers := trainable.layers_of(p))}
        return {**super().__getstate__(), **config, "state": state, "grad_norm": None, "_packed_layers": layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if (
            "defaults" in state
        ):  # pickle and deepcopy; load_state_dict passes only state and groups, and adopts by itself
            self._reset_arenas()
            for p, layers in self.__dict__.pop("_packed_layers", {}).items():
                for layer in layers:
                    trainable.register(p, layer)  # a copied parameter does not know
            named = self._sparse_parameters()
            self._replicas.announce(name for _, _, name in named)  # a loaded state may have brought other names
            self._adopt([(p, g, name, self.state[p]) for p, g, name in named if self.state.get(p)])
