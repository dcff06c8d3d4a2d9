"""LiftAdamW: AdamW on the principal weights of matrices, as an ordinary torch optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._storage import storage_bytes
from ..nn import grad_hooks, optimizer_hooks, trainable
from ..ops import dispatch
from .bucket import Sweep, any_infinite, check_scaler, gradient_factor
from .coverage import Coverage
from .dense_adamw import dense_adamw_
from .hyperparameters import check_group, check_masks, check_parameters, check_settings, warn_of_overridden
from .mask_options import MaskOptions
from .matrix_ref import names_of, parameters_of
from .matrix_table import MatrixTable
from .placeholders import announce, without_placeholders
from .refresh import RefreshReport, RefreshSchedule, renew, report_on
from .several_ranks import Replicas, average_hooked, check_group_of_hooked
from .state_dict import before_load, check_fits, compact, load_dense, saved_form
from .state_order import in_own_order
from .weight_check import check_loaded, differing, warn_of_stale_masks

_KEPT = "max_grad_norm selection seed backend mask_method warm_start last_refresh _replicas _coverage _stale_masks"
"""Attributes of the whole optimizer, and not of a group, that a copy keeps."""


class LiftAdamW(Optimizer):
    """AdamW on the k principal weights of each matrix (LIFT, arXiv 2506.00772).

    Matrices are trained sparsely. Other parameters, and groups with ``lift=False``, get ordinary
    dense AdamW. The first mask is made at the first ``step`` or `refresh`, later ones after every
    ``refresh_interval`` steps. Parameters with packed gradients (`lift_kernels.pack_gradients`)
    bring their first mask along.

    Args:
        params: parameters, (name, parameter) pairs or groups, as in torch; see `lift_param_groups`.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW. Decay acts on selected entries only.
        rank: LRA rank r of the approximation whose largest entries are trained, at most the smaller
            side of each matrix. None: 64.
        density: share of a matrix that is trained, in (0, 1].
        budget_rank: k = (m + n) * budget_rank. Given, it takes precedence over ``density``.
        refresh_interval: steps between masks. None keeps the first mask.
        refresh_schedule: ``"all"`` renews all masks after an interval, ``"spread"`` a few a step.
        refresh_drift: a matrix that is due keeps its mask while less than this share of its entries
            would change, by prediction. None: it is always refreshed (the paper).
        bias_correction: ``"global"`` counts the steps of a matrix (the paper). ``"per_entry"``
            counts those since an entry came in.
        master: of bf16/fp16 weights, ``"fp32"``, ``"split"`` (bf16: low bits beside them) or None.
        rounding: ``"nearest"`` or, with ``master=None``, ``"stochastic"``.
        state_dtype: of the moments: torch.float32, torch.bfloat16, or ``"8bit"`` for 8-bit codes.
        offload: ``"cpu"`` keeps moments, masters and bases in host memory, where steps are made.
        max_grad_norm: clips the norm over all trained entries of all groups.
        capturable: as in torch: the step may be captured in a CUDA graph. Refresh between replays.
        selection: ``"principal"`` (the paper), ``"off_principal"`` (the least |W_r| outside the 2k
            largest weights), ``"magnitude"``, ``"gradient"`` (largest when the mask is made) or
            ``"random"``, or a callable ``(weight, k) -> k sorted int32 indices``.
        mask_method: method of `low_rank_factors`.
        warm_start: where bases are kept, ``"device"`` or ``"cpu"``. None: refreshes start cold.
        seed: of random masks and of stochastic rounding.
        backend: one of `lift_kernels.backends`, None for the fastest usable one.
        process_group: the ranks that hold replicas and so must train the same entries, as a torch
            process group. They make masks together and average gradients that hooks pack. None:
            under accelerate and Trainer the ranks of DistributedDataParallel; else masks are made
            on each rank, and compared with those ranks that train a parameter of the same name.
            ``"independent"``: ranks may differ, which is a RuntimeError on every rank otherwise.

    Attributes:
        last_refresh: `RefreshReport` of the last masks, new and skipped, None before the first.
        grad_norm: 0-dim norm over all trained entries at the last step that clipped, else None.

    Raises ValueError or TypeError, naming the parameter and the value, for options and parameters
    that cannot work.
    """

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
        refresh_drift: float | None = None,
        bias_correction: str = "global",
        master: str | None = "fp32",
        rounding: str = "nearest",
        state_dtype: torch.dtype | str = torch.float32,
        offload: str | None = None,
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
        check_settings(selection, max_grad_norm, backend, mask_method, warm_start, seed)
        self.max_grad_norm, self.selection, self.seed, self.backend = max_grad_norm, selection, seed, backend
        self.mask_method, self.warm_start = mask_method, warm_start
        self.last_refresh: RefreshReport | None = None
        self.grad_norm: Tensor | None = None
        self._replicas, self._coverage = Replicas(process_group), Coverage()
        self._stale_masks: list[str] = []  # names of first masks that were made from other weights
        self._start_afresh()
        options: dict[str, Any] = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        options |= dict(rank=rank, density=density, budget_rank=budget_rank, refresh_interval=refresh_interval)
        options |= dict(refresh_schedule=refresh_schedule, refresh_drift=refresh_drift, bias_correction=bias_correction)
        options |= dict(master=master, rounding=rounding, state_dtype=state_dtype, capturable=capturable)
        options |= dict(offload=offload, lift=None, steps_since_refresh=0)
        super().__init__(params, options)
        warn_of_overridden(options, self.param_groups)

    def _start_afresh(self) -> None:
        """No state and no masks."""
        self._table, self._sweep, self._schedule = MatrixTable(), Sweep(), RefreshSchedule()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Its matrices get their first mask at the next step.

        Raises, and adds nothing, when the group cannot work.
        """
        given = dict(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            names = names_of(group, len(self.param_groups) - 1)
            sparse = check_parameters(group, names, self.backend)
            check_masks(group, self.selection, names)
            check_group_of_hooked(group["params"], names, self._replicas)
        except (ValueError, TypeError, RuntimeError):
            self.param_groups.pop()
            param_group.clear()  # torch has filled in options.
            param_group.update(given)
            raise
        announce(self.state, [group], self._mask_options())
        optimizer_hooks.claim(group["params"], self)
        self._replicas.announce(sparse)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, and return the closure's loss.

        The first step warns of parameters without a gradient.

        Raises before anything is changed when a gradient cannot be used. Raises RuntimeError in the
        same way at the first step after `load_state_dict`, when the model has other weights than
        those the state was saved with. A refresh that is due comes last: if it raises, the update
        is done and the masks are the old ones.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._update()
        except Exception:  # A GradScaler removes these after a step alone, and multiplies by those that it finds.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise
        finally:
            self._sweep.release()
        return loss

    def _update(self) -> None:
        table, sweep = self._table, self._sweep
        table.follow(self.param_groups)
        if table.lost:
            raise RuntimeError(table.lost)
        if table.hooked:
            average_hooked(table.hooked, self._replicas)
        sweep.collect(table)
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)  # of a GradScaler
        if found_inf is not None:
            check_scaler(table.hooked, found_inf, scale)
        if not self._coverage.done:
            self._coverage.report([*table.refs, *table.dense], sweep.trained())
        if table.samples and not dispatch.capturing():
            check_loaded(table.samples, self._replicas)
            table.samples.clear()
        if self.selection == "gradient" and found_inf is not None and bool(found_inf):
            return  # No mask can be made from these gradients, and the step would be skipped.
        if table.missing:
            self._make_first_masks()
        if self._stale_masks:
            warn_of_stale_masks(self._stale_masks, len(table.refs))  # empties the list
        if table.unseen and torch.distributed.is_available() and torch.distributed.is_initialized():
            table.compare_ranks(self._replicas)
        buckets, dense = sweep.buckets(table), sweep.dense()
        if not (buckets or dense):  # As after `unpack`, which leaves an optimizer nothing to train.
            self._coverage.report([*table.refs, *table.dense], sweep.trained())
        found_inf = None if found_inf is None else any_infinite(buckets, found_inf, self.backend)
        for bucket in buckets:
            bucket.begin(found_inf)
        factor, norm = gradient_factor(buckets, dense, scale, self.max_grad_norm, self.backend)
        self.grad_norm = self.grad_norm if norm is None else norm
        for bucket in buckets:
            bucket.step(factor, found_inf, self.seed, self.backend)
        if self.selection != "gradient":  # These masks are made from gradients, whose rest stays zero.
            table.partial.clear()
        for group, parameters in dense:
            dense_adamw_(parameters, self.state, group, factor, found_inf)
        groups = list({id(bucket.group): bucket.group for bucket in buckets}.values())
        if self._schedule.count_step(groups, found_inf) and not dispatch.capturing():  # A replay counts no steps.
            if due := self._schedule.due(groups, table.refs):
                self.last_refresh = renew(self._table, due, self._mask_options(), self.state)
            self._schedule.restart(groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, packed gradients ``p.lift_grad`` too, which a step has cleared."""
        super().zero_grad(set_to_none)
        self._table.follow(self.param_groups)
        self._table.forget_gradients()

    @torch.no_grad()
    def refresh(self, *, drop_gradients: bool = False) -> None:
        """Compute every mask again from the present weights, and migrate the state.

        Entries that stay keep their moments. Entries that enter start at zero (paper section 3).
        After `load_state_dict` the state goes on with the present weights, whatever they are.

        Args:
            drop_gradients: drop packed and partial gradients, which belong to the old entries.

        Raises ValueError, naming the parameter, for non-finite weights. Raises RuntimeError for
        such gradients and for values that another optimizer trains. No mask is changed then.
        """
        self._table.follow(self.param_groups)
        self._table.check_renewable(drop_gradients)
        self._schedule.subtract_skipped(self.param_groups)
        due = [ref for ref in self._table.refs if ref.arena is not None or ref.trainable.indices is not None]
        if self._table.missing:
            self._make_first_masks()
        self._stale_masks = []
        if due:
            self.last_refresh = renew(self._table, due, self._mask_options(), self.state, always=True)
            for group in self.param_groups:
                group["steps_since_refresh"] = 0
        self._table.samples.clear()  # The present weights are those that count.
        if drop_gradients:
            self._table.drop_gradients()
        if any(group["capturable"] for group in self.param_groups):
            self._table.compare_ranks(self._replicas)  # A replayed step does not call this.

    def _make_first_masks(self, only_given: bool = False) -> None:
        """Give every matrix a mask, or take only those that packed gradients have brought along.

        Notes which of these were made from another weight than the present one. The next step says
        so, if no refresh and no loaded state has replaced them.
        """
        table, loaded = self._table, self._table.samples.copy()
        new, masks = table.make_first_masks(self._mask_options(), self.state, only_given=only_given)
        if not only_given:
            self.last_refresh = report_on(new, masks, None)
        given = {ref: sample for ref, sample in table.samples.items() if ref not in loaded}
        table.samples = loaded
        comparable = self.selection != "random" and not dispatch.capturing()  # Random masks fit every weight.
        self._stale_masks += [ref.name for ref in differing(given)] if given and comparable else []

    def _settle(self) -> None:
        """Take the masks of packed gradients, and subtract skipped steps, before a copy is made."""
        self._table.follow(self.param_groups)
        if any(ref.trainable.indices is not None for ref in self._table.missing):
            self._make_first_masks(only_given=True)
        self._schedule.subtract_skipped(self.param_groups)

    def _mask_options(self) -> MaskOptions:
        return MaskOptions(self.selection, self.seed, self.mask_method, self.backend, self.warm_start, self._replicas)

    def state_bytes(self) -> int:
        """Bytes of all tensors that the optimizer holds: moments, index lists, masters, padding."""
        shown = (t for entry in self.state.values() for t in entry.values() if isinstance(t, Tensor))
        return storage_bytes([*self._table.tensors(), *shown])

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """A state dict as torch's: compact copies in host memory, with their dtypes."""
        self._settle()
        announce(self.state, self.param_groups, self._mask_options(), every=True)
        samples = self._table.weight_samples(parameters_of(self.param_groups))
        return saved_form(super().state_dict(), self.param_groups, samples, self._mask_options())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`. Its masks replace all masks made before.

        Parameters are matched by name where both sides have names, else by position. The model may
        be loaded before or after. The first step compares both, by the state's samples of weights.

        Raises ValueError, naming the parameter, for the state of another model or version. Nothing
        is changed then.
        """
        state_dict = without_placeholders(in_own_order(before_load(self, state_dict), self.param_groups))
        self._table.follow(self.param_groups)
        parameters = parameters_of(self.param_groups)
        check_fits(state_dict, parameters, self._table)
        load_dense(self, super().load_state_dict, state_dict)
        for group in self.param_groups:
            self.seed = group.get("seed", self.seed)
        self._table.drop_gradients()  # They belong to other entries.
        entries = {parameters[i]: entry for i, entry in state_dict["state"].items() if "indices" in entry}
        if any(float(entry["step"]) for entry in entries.values()):  # accelerate loads our own state before any step.
            self._stale_masks = []
        self._restore(entries)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _restore(self, entries: dict[Tensor, dict[str, Any]]) -> None:
        """Start again from the state of matrices, by parameter."""
        self._start_afresh()
        announce(self.state, self.param_groups, self._mask_options())
        self._table.restore(self.param_groups, entries, self.warm_start, self.state)
        self._replicas.announce(ref.name for ref in self._table.refs)  # The state may have brought names.

    @torch.no_grad()
    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        config = {key: getattr(self, key) for key in _KEPT.split()}
        state = defaultdict(dict, {p: compact(entry) for p, entry in self.state.items()})
        layers = {p: layers for p in parameters_of(self.param_groups) if (layers := trainable.layers_of(p))}
        hooked = {ref.parameter: (ref.draw_number, grad_hooks.dtype_of(ref.parameter)) for ref in self._table.hooked}
        packed = {"_packed_layers": layers, "_hooked": hooked}
        return {**super().__getstate__(), **config, "state": state, "grad_norm": None, **packed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "defaults" in state:  # from pickle and deepcopy; load_state_dict passes only state and groups
            for p, layers in self.__dict__.pop("_packed_layers", {}).items():
                for layer in layers:
                    trainable.register(p, layer)  # A copied parameter does not know.
            for p, options in self.__dict__.pop("_hooked", {}).items():
                grad_hooks.pack_on_accumulate(p, self.state[p]["indices"], *options)  # torch copies no hooks.
            optimizer_hooks.claim(parameters_of(self.param_groups), self)
            self._restore(self.state)
