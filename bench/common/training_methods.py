"""Methods of fine-tuning a causal language model, for `bench_training` and `bench_memory`.

The adapters get about as many trained entries as LIFT: their rank is density * sum of m n / sum of
(m + n) over the matrices. LIFT, LoRA and SHiRA train the matrices of the linear layers but the
head. Full fine-tuning and GaLore train every parameter, and GaLore projects the matrices. Full
fine-tuning of the linear layers trains the matrices that LIFT trains.
"""

from __future__ import annotations

import concurrent.futures
import copy
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common.arenas import Arena
from bench.common.baselines import attribute
from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients

DENSITY, RANK = 0.05, 64
INTERVAL = 200  # steps between new masks, and between new projections of GaLore
HYPER = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
LOW, HIGH = 1e-4, 1e-3  # learning rates: of every weight, of few
FULL, MATRIX, PACKED = "full fine-tuning, AdamW fused", "LIFT, matrix mode", "LIFT, packed mode"
LINEAR = "full fine-tuning of the linear layers, AdamW fused"


def matrices(model: nn.Module) -> list[Tensor]:
    """The weights of the linear layers. No requires_grad is changed."""
    return [weight for _, weight in lift_param_groups(model)[0]["params"]]


def adapter_rank(model: nn.Module) -> int:
    shapes = [weight.shape for weight in matrices(model)]
    return max(1, round(DENSITY * sum(m * n for m, n in shapes) / sum(m + n for m, n in shapes)))


def full(model: nn.Module, **flags: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), LOW, **HYPER, **(flags or {"fused": True}))


def full_linear(model: nn.Module, **flags: bool) -> torch.optim.Optimizer:
    """Every weight of the linear layers; embeddings, norms and head are frozen."""
    model.requires_grad_(False)
    weights = [weight.requires_grad_(True) for weight in matrices(model)]
    return torch.optim.AdamW(weights, LOW, **HYPER, **(flags or {"fused": True}))


def galore(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = attribute("galore-torch", "galore_torch", "GaLoreAdamW")
    projected = matrices(model)
    rest = [p for p in model.parameters() if not any(p is weight for weight in projected)]
    low_rank = {"rank": RANK, "update_proj_gap": INTERVAL, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": rest, "lr": LOW}, {"params": projected, "lr": HIGH, **low_rank}]
    return optimizer(groups, **HYPER, no_deprecation_warning=True)


def adapter(config: str, mask_fn: Callable | None = None, **options: Any) -> Callable[..., torch.optim.Optimizer]:
    """An adapter of peft on the linear layers, put into the model. ``mask_fn``: SHiRA's."""

    def build(model: nn.Module) -> torch.optim.Optimizer:
        get_peft_model, form = attribute("peft", "peft", "get_peft_model"), attribute("peft", "peft", config)
        names = {name.split(".")[-2] for name, _ in lift_param_groups(model)[0]["params"]}
        rank = adapter_rank(model)
        scale = {"lora_alpha": 2 * rank} if config == "LoraConfig" else {}
        made = form(r=rank, target_modules=sorted(names), **scale, **options)
        if mask_fn is not None:
            made.mask_fn = mask_fn
        adapted = get_peft_model(model, made)
        return torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], HIGH, **HYPER, fused=True)

    return build


def lift(packed: bool) -> Callable[..., torch.optim.Optimizer]:
    """LIFT with its first masks. Each step makes a few new ones, at least one."""

    def build(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        if packed:
            groups = pack_gradients(model, density=DENSITY, freeze_rest=True)  # rank: 64 or the smaller side
        else:
            groups = lift_param_groups(model, freeze_rest=True)
        interval = min(INTERVAL, len(groups[0]["params"]))
        options = {"density": DENSITY, "refresh_interval": interval, "refresh_schedule": "spread"} | options
        optimizer = LiftAdamW(groups, HIGH, **HYPER, **options)
        optimizer.refresh()
        return optimizer

    return build


METHODS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    FULL: full,
    LINEAR: full_linear,
    "LoRA (peft), AdamW fused": adapter("LoraConfig", lora_dropout=0.0),
    "SHiRA (peft), AdamW fused": adapter("ShiraConfig", random_seed=0),
    f"GaLore, r = {RANK}": galore,
    MATRIX: lift(packed=False),
    PACKED: lift(packed=True),
}


def failed(name: str, error: BaseException) -> str:
    """The status of a method that cannot run here: a baseline is missing, LIFT is refused."""
    text = " ".join(str(error).split())[:160]
    text = text if isinstance(error, ImportError) else f"{type(error).__name__}: {text}"
    return f"{'refused' if name in (MATRIX, PACKED) else 'missing'}: {text}"


@dataclass
class Step:
    """Seconds of the parts of one training step.

    ``refresh``: of new masks, which ``optimizer`` does not count.
    """

    forward_backward: float
    optimizer: float
    refresh: float

    @property
    def total(self) -> float:
        return self.forward_backward + self.optimizer + self.refresh


@dataclass
class Trainer:
    """``model``, trained by one method on one batch.

    ``losses``: of each step before its update. ``setup``: seconds until training can start.
    """

    name: str
    model: nn.Module
    tokens: Tensor
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        start = self._now()
        self.optimizer = METHODS[self.name](self.model)
        self.setup = self._now() - start
        self.lists: list[Tensor] | None = None
        self._refresh = 0.0
        if isinstance(self.optimizer, LiftAdamW):
            self.lists = [self.optimizer.state[p]["indices"].clone() for p in self.trained()]
            table = self.optimizer._table
            self._renew, table.renew = table.renew, self._timed_renew

    def trained(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self) -> Step:
        self._refresh = 0.0
        start = self._now()
        loss = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        middle = self._now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = self._now()
        self.losses.append(loss.item())
        return Step(middle - start, end - middle - self._refresh, self._refresh)

    def _timed_renew(self, *arguments: Any) -> Any:
        start = self._now()
        result = self._renew(*arguments)
        self._refresh += self._now() - start
        return result

    def _now(self) -> float:
        if self.tokens.device.type != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()


def reference_losses(
    model: nn.Module,
    tokens: Tensor,
    steps: int,
    lists: Sequence[Tensor] | None = None,
    train: Callable[..., torch.optim.Optimizer] = full,
) -> list[float]:
    """Losses of plain torch code on a copy of ``model``.

    AdamW's for-loop goes over the weights that ``train`` trains, or over the entries in ``lists``.
    Those entries of the matrices are gathered as fp32 vectors, which are then the parameters.
    """
    model, losses = copy.deepcopy(model), []
    weights = matrices(model)
    flat = [index.long() for index in lists or []]
    values = [nn.Parameter(w.detach().view(-1)[i].float()) for w, i in zip(weights, flat)]
    plain = {"foreach": False, "fused": False}
    optimizer = train(model, **plain) if lists is None else torch.optim.AdamW(values, HIGH, **HYPER, **plain)
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        for weight, value, index in zip(weights, values, flat):
            value.grad = weight.grad.view(-1)[index].float()
        optimizer.step()
        with torch.no_grad():
            for weight, value, index in zip(weights, values, flat):
                weight.view(-1)[index] = value.to(weight.dtype)
        model.zero_grad()
        losses.append(loss.item())
    return losses


def flops(name: str, model: nn.Module, tokens: Tensor) -> float:
    """FLOPs of a step of ``name`` on the plain ``model``, as `bench_training` counts them."""
    config, count, length = model.config, tokens.numel(), tokens.shape[1]
    inside = sum(w.numel() for w in matrices(model))
    head = config.vocab_size * config.hidden_size
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = 6 * length * width * config.num_hidden_layers * count
    everything = name == FULL or name.startswith("GaLore")
    total = 4 * count * (inside + head) + attention + (2 * count * head if everything else 0)
    if name.startswith("LoRA"):
        return total + 6 * count * adapter_rank(model) * sum(m + n for m, n in (w.shape for w in matrices(model)))
    if name.startswith("GaLore"):
        total += sum(4 * min(RANK, *w.shape) * w.numel() for w in matrices(model))
    return total + 2 * count * inside


def optimizer_bytes(trainer: Trainer, model: nn.Module) -> float:
    """Bytes that the optimizer's step must move, as `bench_training` counts them."""
    weights, trained = matrices(model), sum(p.numel() for p in trainer.trained())
    width = weights[0].element_size()
    if trainer.lists is not None:
        arena, packed = Arena.of(trainer.lists), trainer.name == PACKED
        master = packed or width < 4
        return arena.line_bytes(width) * (2 if packed else 3) + arena.entries * (4 + 16 + 8 * master + 4 * packed)
    if trainer.name.startswith("GaLore"):
        inside = sum(w.numel() for w in weights)
        return width * (7 * (trained - inside) + 3 * inside)
    return sum(7 * p.numel() * p.element_size() for p in trainer.trained())


def llama_config(hidden: int, inner: int, layers: int, vocabulary: int) -> Any:
    from transformers import LlamaConfig

    heads = max(2, hidden // 64)
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


TINY = (32, 64, 2, 64)


def random_model(config: Any, dtype: torch.dtype, device: str) -> nn.Module:
    """A model of this form, always with the same weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).train()


def resident(kind: str) -> int:
    """``VmRSS``, or ``VmHWM``, its peak, of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {kind}; this system counts no peak of resident memory")


def restart_peak(device: str) -> None:
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> int:
    """Bytes since `restart_peak`."""
    return resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def random_tokens(vocabulary: int, shape: tuple[int, int], device: str) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(device)


def peak_memory(
    name: str, config: Any, dtype: torch.dtype, shape: tuple[int, int], device: str, threads: int
) -> list[int]:
    """Bytes of a random model, and the peaks of preparing it for ``name`` and of two steps.

    The peaks are counted beyond the model. This runs in a process of its own.
    """
    torch.set_num_threads(threads)
    trainer = Trainer(name, random_model(llama_config(*TINY), dtype, device), random_tokens(TINY[-1], shape, device))
    trainer.step()  # libraries, threads and their workspaces are there from here
    model = random_model(config, dtype, device)
    size = sum(p.untyped_storage().nbytes() for p in model.parameters())
    before = resident("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()
    restart_peak(device)
    trainer = Trainer(name, model, random_tokens(config.vocab_size, shape, device))
    preparing = peak(device) - before
    restart_peak(device)
    for _ in range(2):
        trainer.step()
    return [size, preparing, peak(device) - before]


def peaks(
    names: Sequence[str], config: Any, dtype: torch.dtype, shape: tuple[int, int], device: str
) -> dict[str, dict]:
    """`peak_memory` of each method in a process of its own, one at a time.

    Returns the columns of its row, or a status that says why there are none.
    """
    # A fork server imports once. Its children have no thread and no CUDA to inherit.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "peft", "lift_kernels"])
    found: dict[str, dict] = {}
    for name in names:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            arguments = (name, config, dtype, shape, device, torch.get_num_threads())
            try:
                model, preparing, steps = (
                    round(size / 2**20, 1) for size in pool.submit(peak_memory, *arguments).result()
                )
                found[name] = {
                    "model_mib": model,
                    "peak_over_model_mib": max(preparing, steps),
                    "steps_peak_mib": steps,
                }
            except Exception as error:  # whatever another package raises, or a process that was killed
                found[name] = {"memory_status": failed(name, error)}
    return found
