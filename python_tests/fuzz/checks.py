"""Every step and every refresh of a run, compared with the simulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from helpers.bits import bits
from torch import Tensor

from lift_kernels import LiftAdamW

from . import simulation
from .combination import Combination, by_column
from .models import Model
from .simulation import Entries, Hyper
from .spoils import SPOILS
from .trained import Trained

CALLABLES = {"callable": by_column}
"""Selections of a user by the name that stands for them in a combination."""


@dataclass
class Before:
    """What a step finds."""

    weights: dict[str, Tensor]
    grads: dict[str, Tensor | None]
    lrs: dict[int, tuple[float, tuple[float, float]]]
    scale: float


class Checks:
    """The simulated state of a run, and what it must equal.

    Attributes:
        c: the combination.
        model, optimizer, scaler: of the run.
        twin: a plain model, whose dense gradients are right.
        trained: the parameters of the optimizer.
        masters: by name, the fp32 masters of the entries of a mask.
        touched: names of weights that changed from outside; their masters follow at the next step.
        counts: by number of the group, its steps since the last refresh.
    """

    c: Combination
    model: Model
    twin: Model
    optimizer: LiftAdamW
    scaler: Any
    checked: bool
    trained: list[Trained]
    masters: dict[str, Tensor]
    touched: set[str]
    counts: dict[int, int]

    def start_twin(self) -> None:
        """Give the twin the present weights and gradients."""
        self.twin.load_state_dict(self.model.state_dict())
        held = {t.name: t.dense_gradient() for t in self.trained}
        for name, p in self.twin.named_parameters():
            grad = held.get(name)
            p.grad = None if grad is None else grad.to(p.dtype, copy=True).view(p.shape)

    def check_gradients(self) -> None:
        dtypes = {b.dtype for b in self.c.blocks}
        tolerance = 0.06 if self.c.autocast or "bf16" in dtypes else 0.02 if "fp16" in dtypes else 1e-4
        twins = dict(self.twin.named_parameters())
        largest = max(
            (float(p.grad.nan_to_num(0, 0, 0).abs().max()) for p in twins.values() if p.grad is not None), default=0.0
        )
        for t in self.trained:
            dense, expected = t.dense_gradient(), twins[t.name].grad
            if not t.p.requires_grad:
                continue
            assert (dense is None) == (expected is None), f"{t.name}: gradient {dense}, expected {expected}"
            if dense is not None:
                expected = expected.flatten().double()
                error = (dense.double() - expected).abs()
                if t.packed:
                    error = error[t.mask.long()] if t.mask is not None else error
                finite = expected.isfinite().all()
                bound = tolerance * (float(expected.abs().max()) + 0.03 * largest) + 1e-6
                assert not finite or float(error.max()) <= bound, f"{t.name}: the gradient is wrong by {error.max()}"

    # ---- a step against the simulation

    def before(self, t: int) -> Before:
        weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        grads = {x.name: None if x.gradient() is None else x.gradient().clone() for x in self.trained}
        lrs = {id(g): (float(g["lr"]), g["betas"]) for g in self.optimizer.param_groups}
        scale = self.scaler.get_scale() if self.c.scaler == "plain" else 1.0
        return Before(weights, grads, lrs, scale)

    def after(self, b: Before) -> None:
        if not self.checked:
            return
        state = self.optimizer.state
        grads = {name: g for name, g in b.grads.items() if g is not None}
        skipped = self.scaler is not None and any(not bool(g.isfinite().all()) for g in grads.values())
        for t in self.trained:
            if t.sparse and t.mask is None:
                self.check_first_mask(t, state[t.p]["indices"], b.weights[t.name], b.grads[t.name])
        factor, error = self.factor(b, grads)
        due = self.count_step(grads, skipped)
        untouched = dict(self.model.named_parameters())
        for t in self.trained:
            untouched.pop(t.name)
            lr, betas = b.lrs[id(t.group)]
            o = t.group
            h = Hyper(lr, betas, o["eps"], o["weight_decay"], o["maximize"], factor, error)
            stepped = t.name in grads and not skipped
            before = b.weights[t.name].flatten()
            if t.sparse:
                self.check_sparse(t, before, grads.get(t.name), h, stepped, t in due)
            else:
                self.check_dense(t, before, grads.get(t.name), h, stepped)
        for name, p in untouched.items():
            if not name.endswith(".values"):
                assert torch.equal(bits(p.detach()), bits(b.weights[name])), f"{name} is not trained, but changed"
        for t in self.trained:
            g = t.gradient()
            assert g is None or not t.hooked, f"{t.name}: a packed gradient was used, but stays"
            if not t.packed and t.name in grads:
                assert g is not None and torch.equal(bits(g), bits(grads[t.name])), f"{t.name}: gradient changed"

    def factor(self, b: Before, grads: dict[str, Tensor]) -> tuple[float, float]:
        """What multiplies all gradients, and how far that may be off."""
        limit = self.c.options.get("max_grad_norm")
        if limit is None or not grads:
            return 1.0 / b.scale, 0.0
        total = 0.0
        for t in self.trained:
            if t.name in grads:
                g = grads[t.name].double()
                g = g[t.mask.long()] if t.sparse and not t.packed else g
                total += float(g.square().sum())
        norm = total**0.5 / b.scale
        if not norm < float("inf"):
            return 1.0, 0.0
        reported = float(self.optimizer.grad_norm)
        assert abs(reported - norm) <= 1e-5 * norm + 1e-30, f"grad_norm is {reported}, expected {norm}"
        return min(1.0, limit / (norm + 1e-6)) / b.scale, 2e-6

    def count_step(self, grads: dict[str, Tensor], skipped: bool) -> list[Trained]:
        """The matrices that are due for a new mask at the end of this step."""
        due: list[Trained] = []
        for number, group in enumerate(self.optimizer.param_groups):
            own = [t for t in self.trained if t.group is group and t.sparse]
            if not any(t.name in grads for t in own):
                continue
            spread, interval = group["refresh_schedule"] == "spread", group["refresh_interval"]
            self.counts[number] = count = self.counts.get(number, 0) + (spread or not skipped)
            if interval is None:
                continue
            if spread:
                due += own[len(own) * (count - 1) // interval : len(own) * count // interval]
                self.counts[number] = count % interval
            elif count >= interval:
                due += own
                self.counts[number] = 0
        return due

    def check_sparse(self, t: Trained, before: Tensor, g: Tensor | None, h: Hyper, stepped: bool, due: bool) -> None:
        entry = self.optimizer.state[t.p]
        old, now, name = t.mask.long(), t.matrix.flatten(), t.name
        new = entry["indices"].long()
        if stepped:
            t.steps += 1
        assert float(entry["step"]) == t.steps, f"{name}: step is {entry['step']}, expected {t.steps}"
        assert entry["exp_avg"].dtype == t.group["state_dtype"], f"{name}: {entry['exp_avg'].dtype}"
        master = entry.get("master")
        keeps = bool(t.layers) or (t.group["master"] is not None and now.dtype != torch.float32)
        assert (master is not None) == keeps, f"{name}: master is {master}"
        if stepped or due:
            self.follow(t, before)
        outside = torch.ones(now.numel(), dtype=torch.bool)
        outside[old] = False
        assert torch.equal(bits(now)[outside], bits(before)[outside]), f"{name}: an entry outside the mask changed"
        w = self.masters[name] if name in self.masters and keeps else before[old]
        truth, bound = Entries(w.double(), t.m[old], t.v[old]), None
        previous = Entries(w, t.m[old], t.v[old])
        per_entry = t.group["bias_correction"] == "per_entry"
        if stepped:
            g = g if t.packed else g[old]
            age = t.steps - t.births[old] if per_entry else torch.tensor(float(t.steps))
            truth, bound = simulation.adamw(previous, g, age, h)
            stochastic = t.group["rounding"] == "stochastic"
            spread = 2 * simulation.EPS * truth.w.abs() if keeps else 0.0  # the master's own rounding
            simulation.check_rounded(now[old], truth.w, bound.w + spread, f"{name}: weight", stochastic)
        else:
            assert torch.equal(bits(now), bits(before)), f"{name} had no gradient, but changed"
        if not due:
            assert torch.equal(old, new), f"{name}: the mask changed, but no refresh was due"
        elif not t.group["refresh_drift"] or not torch.equal(old, new):  # A bound of 0 keeps none.
            self.check_mask(t, entry["indices"], t.matrix, None if t.packed else self.grad_of(t))
        else:
            k = simulation.promised_entries(t.matrix.shape, t.group["density"], t.group["budget_rank"])
            assert len(new) == k * (len(t.matrix) if t.matrix.dim() == 3 else 1), f"{name}: kept, but too short"
        # Where each entry of the new mask was in the old one.
        at = torch.full((now.numel(),), -1)
        at[old] = torch.arange(len(old))
        place = at[new]
        stays, place = place >= 0, place[place >= 0]
        for key, want, error in (("exp_avg", truth.m, bound and bound.m), ("exp_avg_sq", truth.v, bound and bound.v)):
            have = entry[key]
            assert not bool(have[~stays].any()), f"{name}: {key} of an entry that came in is not zero"
            error = torch.zeros_like(want) if error is None else error
            simulation.check_rounded(have[stays], want[place], error[place], f"{name}: {key}")
        if keeps and name not in self.touched:
            error = torch.zeros_like(truth.w) if bound is None else bound.w
            simulation.check_rounded(master[stays], truth.w[place], error[place], f"{name}: master")
            assert torch.equal(bits(master.to(now.dtype)), bits(now[new])), f"{name}: a weight is not its master"
            entered = now[new][~stays].float()
            assert torch.equal(bits(master[~stays]), bits(entered)), f"{name}: master of an entry that came in"
        if stepped and self.c.options["backend"] == "reference" and h.factor == 1.0 and not per_entry:
            self.check_reference(t, previous, g, h, entry, now, place, stays)
        self.adopt(t, entry, stays)

    def check_reference(self, t, previous, g, h, entry, now, place, stays) -> None:
        """In fp32 the reference equals torch's AdamW bit for bit."""
        wide = t.group["state_dtype"] == torch.float32 and previous.w.dtype == torch.float32
        if not wide or g.dtype != torch.float32:
            return
        start = Entries(previous.w, previous.m.float(), previous.v.float())
        want = simulation.torch_step(start, g, t.steps, h)
        have = {"exp_avg": want.m, "exp_avg_sq": want.v, "master": want.w}
        for key in have.keys() & entry.keys():
            assert torch.equal(bits(entry[key][stays]), bits(have[key][place])), f"{t.name}: {key} is not torch's"
        if "master" not in entry:
            assert torch.equal(bits(now[t.mask.long()]), bits(want.w)), f"{t.name}: the weight is not torch's"

    def adopt(self, t: Trained, entry: dict[str, Tensor], stays: Tensor) -> None:
        """Go on from what was found right."""
        new, births = entry["indices"].long(), t.births.clone()
        for mine in (t.m, t.v, t.births):
            mine.zero_()
        t.m[new], t.v[new] = entry["exp_avg"].double(), entry["exp_avg_sq"].double()
        t.births[new] = torch.where(stays, births[new], float(t.steps))
        if t.group["bias_correction"] == "per_entry":
            assert torch.equal(entry["births"].double(), t.births[new]), f"{t.name}: births"
        t.mask = entry["indices"].clone()
        self.masters.pop(t.name, None)
        if "master" in entry:
            self.masters[t.name] = entry["master"].detach().clone()

    def check_dense(self, t: Trained, before: Tensor, g: Tensor | None, h: Hyper, stepped: bool) -> None:
        entry, now, name = self.optimizer.state.get(t.p, {}), t.matrix.flatten(), t.name
        if not stepped:
            assert torch.equal(bits(now), bits(before)), f"{name} had no gradient, but changed"
            return
        t.steps += 1
        assert float(entry["step"]) == t.steps, f"{name}: step is {entry['step']}, expected {t.steps}"
        rounds = h.factor != 1.0 or h.factor_error > 0  # in a copy of the gradient's dtype
        narrow = torch.finfo(g.dtype) if rounds and g.dtype.itemsize == 2 else None
        truth, bound = simulation.adamw(Entries(before, t.m, t.v), g, torch.tensor(float(t.steps)), h, narrow)
        for key, have in (("m", entry["exp_avg"]), ("v", entry["exp_avg_sq"]), ("w", now)):
            label = f"{name}: {key} of a dense parameter"
            simulation.check_rounded(have.flatten(), getattr(truth, key), getattr(bound, key), label)
        t.m, t.v = (entry[key].flatten().to(torch.float64, copy=True) for key in ("exp_avg", "exp_avg_sq"))

    # ---- masks

    def grad_of(self, t: Trained) -> Tensor | None:
        return None if t.p.grad is None else t.p.grad.detach()

    def check_packed_masks(self) -> None:
        if not self.checked:
            return
        for t in self.trained:
            if t.packed:
                size = self.c.pack | ((SPOILS[self.c.spoil].pack or {}) if self.c.spoil else {})
                self.check_mask(t, t.mask, self.twin.get_parameter(t.name).detach(), None, size)
                self.note_masters(t, t.matrix.flatten())

    def check_first_mask(self, t: Trained, indices: Tensor, weight: Tensor, grad: Tensor | None) -> None:
        self.check_mask(t, indices, weight, grad)
        t.mask = indices.clone()
        t.births[t.mask.long()] = t.steps
        self.note_masters(t, weight.flatten())

    def follow(self, t: Trained, weight: Tensor) -> None:
        """Masters that do not round to a weight from outside take its value; the others stay."""
        if t.name in self.touched and t.name in self.masters:
            now, master = weight[t.mask.long()], self.masters[t.name]
            self.masters[t.name] = torch.where(master.to(now.dtype) != now, now.float(), master)
        self.touched.discard(t.name)

    def note_masters(self, t: Trained, weight: Tensor) -> None:
        self.masters[t.name] = weight[t.mask.long()].float()

    def check_mask(
        self, t: Trained, indices: Tensor, weight: Tensor, grad: Tensor | None, size: dict[str, Any] | None = None
    ) -> None:
        """The mask of a weight, by the options of its group or those of pack_gradients."""
        size = t.group if size is None else size
        name, selection = t.name, self.c.options["selection"]
        matrices = weight.view(-1, *weight.shape[-2:])
        k = simulation.promised_entries(weight.shape, size.get("density", 0.05), size.get("budget_rank"))
        simulation.check_mask(indices, matrices, k, f"{name}: mask")
        if selection == "principal":
            rank = min(int(size.get("rank") or 64), *weight.shape[-2:])
            for i, matrix in enumerate(matrices):
                product, slack = simulation.low_rank(matrix, rank)
                own = indices[i * k : (i + 1) * k].long() - i * matrix.numel()
                if self.c.options.get("mask_method") == "chebyshev" and size is t.group:
                    share = float(product.flatten()[own].sum()) / max(
                        float(product.flatten().topk(k).values.sum()), 1e-30
                    )
                    assert share > 0.8 or not float(product.sum()), f"{name}: the mask captures {share}"
                else:
                    simulation.check_largest(own, product[None], k, f"{name}: principal mask", slack)
        elif selection == "magnitude":
            simulation.check_largest(indices, matrices.abs(), k, f"{name}: largest weights")
        elif selection == "gradient":
            simulation.check_largest(indices, grad.view(matrices.shape).abs(), k, f"{name}: largest gradients")
        elif selection == "callable":
            want = torch.cat([by_column(m, k) + i * m.numel() for i, m in enumerate(matrices)])
            assert torch.equal(indices, want), f"{name}: not what the callable chose"
        elif t.mask is not None and len(t.mask) == len(indices):
            assert torch.equal(indices, t.mask), f"{name}: a random mask changed"

    def check_refresh(self, weights: dict[str, Tensor], had: set[str]) -> None:
        """After a refresh by hand, which makes the masks of packed layers again, too.

        ``weights`` are those before. Those in ``had`` had a mask of the optimizer.
        """
        for t in self.trained:
            assert torch.equal(bits(t.matrix), bits(weights[t.name])), f"{t.name}: a refresh changed it"
            if not t.sparse:
                continue
            entry, flat = self.optimizer.state[t.p], t.matrix.flatten()
            if t.name not in had and not t.packed:
                self.check_first_mask(t, entry["indices"], t.matrix, self.grad_of(t))
                continue
            if t.name in had:
                self.follow(t, flat)
            self.check_mask(t, entry["indices"], t.matrix, self.grad_of(t))
            old, new = t.mask.long(), entry["indices"].long()
            at = torch.full((flat.numel(),), -1)
            at[old] = torch.arange(len(old))
            stays, place = at[new] >= 0, at[new][at[new] >= 0]
            for key, mine in (("exp_avg", t.m), ("exp_avg_sq", t.v)):
                assert torch.equal(entry[key][stays].double(), mine[new][stays]), f"{t.name}: {key} at a refresh"
                assert not bool(entry[key][~stays].any()), f"{t.name}: {key} of an entry that came in is not zero"
            if "master" in entry and t.name not in self.touched:
                want = flat[new].float()
                want[stays] = self.masters[t.name][place]
                assert torch.equal(bits(entry["master"]), bits(want)), f"{t.name}: master at a refresh"
            self.adopt(t, entry, stays)
