"""A run of a combination: it makes model and optimizer, trains, saves and loads."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers.bits import bits
from torch import Tensor, nn

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients, unpack
from lift_kernels.checkpoint import load_checkpoint, save_checkpoint

from .checks import CALLABLES, Checks
from .combination import Combination
from .refusal import Refused, check_refusal, check_words
from .spoils import SPOILS
from .trained import Trained, assert_same, snapshot

TORCH_OPTIM = str(Path(torch.optim.__file__).parent)


class Run(Checks):
    """Trains as a combination says.

    Args:
        checked: compare every step with the simulation.
        interrupted: save and load in the midst, where the combination says so.
    """

    def __init__(self, c: Combination, checked: bool = True, interrupted: bool = True) -> None:
        self.c, self.checked, self.interrupted = c, checked, interrupted
        self.trained: list[Trained] = []
        self.spoil = SPOILS.get(c.spoil)
        self.named = c.mode != "unnamed"
        self.model = c.model()
        if self.spoil and self.spoil.model:
            self.spoil.model(self.model)
        self.plain = {name: (type(m), m) for name, m in self.model.named_modules()}
        self.twin = copy.deepcopy(self.model).requires_grad_(True) if not self.spoil else copy.deepcopy(self.model)
        self.required = {name: p.requires_grad for name, p in self.model.named_parameters()}
        self.joined = False
        self.masters: dict[str, Tensor] = {}
        self.touched: set[str] = set()
        self.masked: set[str] = set()  # whose masks a step or a refresh has taken or made
        self.counts: dict[int, int] = {}
        self.optimizer: LiftAdamW | None = None
        self.optimizer = self.make_optimizer(self.model)
        self.scheduler = self.make_scheduler()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2) if c.scaler else None

    # ---- making things

    def attempt(self, call: Callable[[], Any]) -> Any:
        """Call the package. A refusal must be a good one and change nothing."""
        before = snapshot(self.model, self.optimizer) if self.checked else None
        try:
            return call()
        except Exception as error:
            check_refusal(error)
            if before is not None:
                assert_same(before, snapshot(self.model, self.optimizer), f"refused ({error}), but changed: ")
            raise Refused(f"{type(error).__name__}: {error}") from error

    def make_optimizer(self, model: nn.Module) -> LiftAdamW:
        c = self.c
        choice, late = c.choice | ((self.spoil and self.spoil.choice) or {}), c.late
        if c.mode in ("linear", "packed"):
            if late is not None:
                choice["exclude"] = "^" + late.replace(".", r"\.") + "$"
            if c.mode == "packed":
                pack = {"seed": c.options["seed"], **c.pack}
                pack["selection"] = CALLABLES.get(pack["selection"], pack["selection"])
                pack |= (self.spoil and self.spoil.pack) or {}
                start = self.attempt(lambda: pack_gradients(model, **choice, **pack))
            else:
                start = self.attempt(lambda: lift_param_groups(model, **choice))
            pairs, rest = start[0]["params"], {k: v for k, v in start[0].items() if k != "params"}
        else:
            pairs, rest = [(n, p) for n, p in model.named_parameters() if n != late], {}
        groups = [{**rest, **options, "params": []} for options in c.groups]
        for i, (name, p) in enumerate(pairs):
            fitting = [g for g in groups if fits(p, g, c.mode)]
            if not fitting:
                groups.append({**rest, "lift": False, "params": []})
                fitting = groups[-1:]
            fitting[i % len(fitting)]["params"].append(p if c.mode == "unnamed" else (name, p))
        groups = [self.with_tensor_lr(g) for g in groups if g["params"]]
        return self.attempt(lambda: LiftAdamW(groups, **self.with_tensor_lr(self.options())))

    def options(self) -> dict[str, Any]:
        options = dict(self.c.options)
        options["selection"] = CALLABLES.get(options["selection"], options["selection"])
        return options | ((self.spoil and self.spoil.options) or {})

    def with_tensor_lr(self, options: dict[str, Any]) -> dict[str, Any]:
        return options | ({"lr": torch.tensor(options["lr"])} if self.c.tensor_lr and "lr" in options else {})

    def join(self, model: nn.Module, optimizer: LiftAdamW) -> None:
        p = model.get_parameter(self.c.late)
        p.requires_grad_(True)
        entry = p if self.c.mode == "unnamed" else (self.c.late, p)
        # Groups without a tensor lr of their own share that of the defaults until a resume.
        group = self.with_tensor_lr({"params": [entry], "lift": True, "lr": 0.02})
        self.attempt(lambda: optimizer.add_param_group(group))

    def refuse_group(self) -> None:
        """A group that cannot work is not added."""
        try:
            SPOILS["bad group"].midway(self)
        except Refused as refused:
            check_words(str(refused), "bad group")
        else:
            raise AssertionError("bad group: nothing was refused")

    def make_scheduler(self) -> Any:
        if self.c.scheduler == "step":
            return torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.5)
        if self.c.scheduler == "cycle":
            return torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.02, total_steps=self.c.steps + 2)
        return None

    def look(self) -> None:
        """Find the parameters of the optimizer again."""
        known = {t.name: t for t in self.trained}
        names = {id(p): name for name, p in self.model.named_parameters()}
        layers: dict[int, list[nn.Module]] = {}
        weights: dict[int, str] = {}
        for name, module in self.model.named_modules():
            if "values" in module._parameters:
                layers.setdefault(id(module.values), []).append(module)
                weights.setdefault(id(module.values), f"{name}.weight")
        self.trained = []
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                name = weights.get(id(p)) or names[id(p)]
                t = Trained(p, name, group, layers.get(id(p), []))
                if name in known:
                    old = known[name]
                    t.mask, t.m, t.v, t.births, t.steps = old.mask, old.m, old.v, old.births, old.steps
                else:
                    t.m, t.v, t.births = torch.zeros(3, t.matrix.numel(), dtype=torch.float64).unbind()
                    if t.packed:
                        t.mask = (t.layers[0].indices if t.layers else p.lift_indices).clone()
                self.trained.append(t)

    # ---- the loop

    def run(self) -> Run:
        c = self.c
        self.look()
        self.check_packed_masks()
        if self.checked and not self.spoil:
            self.refuse_group()
        for t in range(c.steps):
            self.events(t)
            if t == c.steps - 1 and self.spoil and self.spoil.midway:
                self.spoil.midway(self)
            self.step(t)
        self.events(c.steps)
        self.optimizer.state_dict()  # takes given masks, as a resume does
        if c.unpack:
            self.unpack()
        return self

    def events(self, t: int) -> None:
        c = self.c
        if t in (c.freezes, c.thaws) and c.frozen is not None:
            p = self.model.get_parameter(c.frozen)
            if c.frozen != c.late or self.joined:
                p.requires_grad_(t != c.freezes)
                p.grad = None
        if t == c.joins:
            self.join(self.model, self.optimizer)
            self.joined = True
            self.look()
        if t == c.resumes:
            self.clear()
            if self.interrupted and c.resume is not None:
                self.resume()
        if t == c.touches:
            self.touch()
        if t in c.refreshes and c.options["selection"] != "gradient" and not self.pending():
            self.refresh()
        elif self.unseen_masks() and c.options["selection"] != "gradient" and not self.pending():
            self.refresh()

    @torch.no_grad()
    def touch(self) -> None:
        """Change some entries of all trained weights. Their masters must follow, and no others."""
        for t in self.trained:
            if t.sparse and not any(entry.get("step") for p, entry in self.optimizer.state.items() if p is t.p):
                continue  # A matrix without a gradient keeps an old master until it gets one.
            (t.layers[0].weight if t.layers else t.p).view(-1)[::3].mul_(1.25)
            self.touched.add(t.name)

    def pending(self) -> bool:
        return any(t.packed and t.gradient() is not None for t in self.trained)

    def unseen_masks(self) -> bool:
        """Whether a first mask would be replaced in the step that makes it."""
        fast = any(g["refresh_interval"] == 1 or g["refresh_schedule"] == "spread" for g in self.optimizer.param_groups)
        return fast and any(t.sparse and t.name not in self.masked for t in self.trained)

    def clear(self) -> None:
        self.model.zero_grad()
        self.optimizer.zero_grad()

    def backward(self, model: nn.Module, t: int, overflow: bool = False) -> Tensor:
        total = torch.zeros(())
        for batch in range(self.c.batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.c.autocast):
                loss = model.loss(1000 * self.c.seed + 10 * t + batch)
            total = total + loss.detach()
            if not loss.requires_grad:
                continue
            (self.scaler.scale(loss) if self.scaler else loss).backward()
        return total

    def step(self, t: int) -> None:
        c, optimizer = self.c, self.optimizer
        if c.closure:
            return self.step_with_closure(t)
        if self.checked:
            self.start_twin()
        self.backward(self.model, t)
        if self.checked:
            self.backward(self.twin, t)
            self.check_gradients()
        if self.scaler and all(t.p.grad is None for t in self.trained):
            return  # torch's scaler wants some gradient.
        if t == c.overflow and self.scaler:
            with torch.no_grad():
                grads = [t.p.lift_grad if t.hooked else t.p.grad for t in self.trained]
                next(g for g in grads if g is not None).view(-1)[0] = torch.inf
        gradient_refresh = t in c.refreshes or self.unseen_masks()
        if c.options["selection"] == "gradient" and gradient_refresh and t != c.overflow:
            self.refresh()
        if self.scaler and c.scaler == "unscale":
            self.scaler.unscale_(optimizer)
        before = self.before(t)
        if self.scaler:
            self.attempt(lambda: self.scaler.step(optimizer))
            self.scaler.update()
        else:
            self.attempt(optimizer.step)
        self.after(before)
        self.schedule(t)
        if c.zero == "model":
            self.model.zero_grad()
        elif c.zero != "none":
            optimizer.zero_grad(set_to_none=c.zero != "fill")

    def step_with_closure(self, t: int) -> None:
        found: list[Any] = []

        def closure():
            self.optimizer.zero_grad()
            if self.checked:
                self.start_twin()
            loss = self.backward(self.model, t)
            if self.checked:
                self.backward(self.twin, t)
                self.check_gradients()
            found.extend([self.before(t), loss])
            return loss

        if self.c.options["selection"] == "gradient" and self.unseen_masks():
            self.backward(self.model, t)
            self.refresh()
        returned = self.attempt(lambda: self.optimizer.step(closure))
        assert torch.equal(returned, found[1]), "the loss of the closure is not returned"
        self.after(found[0])
        self.schedule(t)

    def schedule(self, t: int) -> None:
        self.masked |= {t.name for t in self.trained}
        if self.scheduler is not None:
            self.scheduler.step()
        elif self.c.scheduler == "manual":
            for group in self.optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(0.01 / (t + 1))
                else:
                    group["lr"] = 0.01 / (t + 1)

    # ---- gradients against a plain model

    def refresh(self) -> None:
        """By hand: every mask is made again."""
        weights = {t.name: t.matrix.clone() for t in self.trained}
        had = {t.name for t in self.trained if t.sparse and self.optimizer.state.get(t.p)}
        self.attempt(self.optimizer.refresh)
        self.masked |= {t.name for t in self.trained}
        if had or any(t.packed for t in self.trained):
            self.counts = {}
        if self.checked:
            self.check_refresh(weights, had)

    # ---- resuming and unpacking

    def resume(self) -> None:
        self.optimizer.state_dict()  # counts skipped steps off
        c, saved = self.c, snapshot(self.model, self.optimizer)
        if c.resume in ("deepcopy", "pickle"):
            pair = self.model, self.optimizer
            self.model, self.optimizer = self.attempt(
                lambda: copy.deepcopy(pair) if c.resume == "deepcopy" else pickle.loads(pickle.dumps(pair))
            )
        else:
            state = self.through_file()
            fresh = replace(c, seed=c.seed + 1).model()
            self.model = fresh
            self.optimizer = None
            other = {"seed": c.options["seed"] ^ 1, "lr": 0.5}
            self.c = replace(c, options=c.options | other)  # The state brings its own.
            self.optimizer = self.make_optimizer(fresh)
            self.c = c
            if self.joined:
                self.join(fresh, self.optimizer)
            for name, p in fresh.named_parameters():
                p.requires_grad_(name not in state["frozen"])
            self.scheduler = self.make_scheduler()
            loads = [lambda: fresh.load_state_dict(state["model"]), lambda: self.load(state["optimizer"])]
            for load in loads[:: 1 if c.seed % 2 else -1]:
                load()
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            if self.scaler is not None:
                self.scaler = torch.amp.GradScaler("cpu")
                self.scaler.load_state_dict(state["scaler"])
        self.look()
        if self.checked:
            assert_same(saved, snapshot(self.model, self.optimizer), "after a resume: ", ("grad ", "required ", "id "))

    def load(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    def through_file(self) -> dict[str, Any]:
        frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        state = {"model": dict(self.model.state_dict()), "optimizer": self.optimizer.state_dict(), "frozen": frozen}
        state["scheduler"] = self.scheduler.state_dict() if self.scheduler else None
        state["scaler"] = self.scaler.state_dict() if self.scaler else None
        if self.c.resume == "state_dict":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            return torch.load(file, weights_only=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "last.safetensors"
            save_checkpoint(path, state)
            return load_checkpoint(path)

    def unpack(self) -> None:
        weights = {name: t.clone() for name, t in self.model.state_dict().items()}
        packed = {t.name for t in self.trained if t.layers}
        self.attempt(lambda: unpack(self.model))
        if not self.checked:
            return
        assert {n: type(m) for n, m in self.model.named_modules()} == {n: kind for n, (kind, _) in self.plain.items()}
        for name, p in self.model.named_parameters():
            if name in packed:
                assert p.requires_grad == self.required[name], f"{name}: requires_grad is {p.requires_grad}"
        after = dict(self.model.state_dict())
        assert list(after) == list(weights)
        for name, t in after.items():
            assert torch.equal(bits(t), bits(weights[name])), f"{name}: unpack changed it"
        assert not [n for n, _ in self.model.named_parameters() if n.endswith(".values")]
        self.twin.load_state_dict(self.model.state_dict())
        if self.model.loss(3).requires_grad:
            self.model.zero_grad()
            self.twin.zero_grad()
            self.model.loss(3).backward()
            self.twin.loss(3).backward()
            twins = dict(self.twin.named_parameters())
            for name, p in self.model.named_parameters():
                if p.requires_grad:
                    same = p.grad is None and twins[name].grad is None or torch.equal(p.grad, twins[name].grad)
                    assert same, f"{name}: the gradient after unpack is not the plain model's"


def fits(p: Tensor, group: dict[str, Any], mode: str) -> bool:
    lift = group.get("lift")
    if mode in ("linear", "packed"):
        return True
    half = group.get("rounding") != "stochastic" or p.dtype != torch.float32
    if lift is True:
        return p.dim() in (2, 3) and half and p.dtype != torch.float64
    return True
