"""A training step of a random Llama in plain torch, by LIFT and by other methods.

There is one of 1.1 B and one of 6.7 B, LLaMA-2-7B's size. The others are full fine-tuning, that of
the linear layers alone, LoRA and SHiRA, of which the larger model leaves some out. The adapters are
peft's, with about as many trained entries as LIFT and all else as peft chooses it. So they are fp32
on a bf16 model, and run under autocast, as in a Trainer with bf16. LIFT trains from dense (matrix
mode) and from packed gradients, with masks of 5 % clustered by rows and no refresh. A step is
forward pass, loss, backward pass and optimizer, in bf16. All methods but full fine-tuning freeze
embeddings, head and norms.

Roofline: FLOPs for each token. 4 for each weight of the linear layers and of the head, and 2 more
where its gradient is formed. SHiRA and LIFT form that of every linear layer. LoRA has 6 for each
entry of its factors, counted at the rate of bf16. Attention is not counted.

Checked before the timing, after three steps, for all but full fine-tuning: the loss fell. With
LIFT, nothing outside the masks of the first block changed and something inside did. With the
others, no frozen weight changed. A method that is not installed or cannot run leaves a row that
says so.

``peak_gb``: allocated at most in a step, with the model. ``state_gb``: of the optimizer.
``trained``: entries. ``ratio``: against full fine-tuning.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.common import training_methods as methods
from bench.common.arenas import clustered_indices
from bench.common.baselines import attribute
from bench.gpu_parts.models import BF16, DENSITY
from bench.gpu_parts.runner import Run
from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients


class Size(NamedTuple):
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    length: int


SIZE = Size(2048, 5632, 22, 32, 4, 32000, 8, 2048)  # 1.1 B parameters; with fewer tokens the host is the limit
LARGE = Size(4096, 11008, 32, 32, 32, 32000, 2, 2048)  # 6.7 B parameters, LLaMA-2-7B's
TINY = Size(64, 96, 2, 4, 2, 97, 2, 16)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions on (batch, heads, length, width)."""
    length, width = x.shape[-2:]
    rates = 10000.0 ** -(torch.arange(0, width, 2, device=x.device).float() / width)
    angle = torch.arange(length, device=x.device).float()[:, None] * rates
    cosine, sine = (t.to(x.dtype).repeat(1, 2) for t in (angle.cos(), angle.sin()))
    return x * cosine + torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1) * sine


class Block(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.heads, self.kv_heads = size.heads, size.kv_heads
        kv = size.hidden // size.heads * size.kv_heads
        self.norm1, self.norm2 = nn.RMSNorm(size.hidden), nn.RMSNorm(size.hidden)
        self.q, self.o = (nn.Linear(size.hidden, size.hidden, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(size.hidden, kv, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(size.hidden, size.mlp, bias=False) for _ in range(2))
        self.down = nn.Linear(size.mlp, size.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            t.unflatten(-1, (h, -1)).transpose(1, 2)
            for t, h in ((self.q(y), self.heads), (self.k(y), self.kv_heads), (self.v(y), self.kv_heads))
        )
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (rotated(k), v))
        y = F.scaled_dot_product_attention(rotated(q), k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(-2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.hidden)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden)
        self.lm_head = nn.Linear(size.hidden, size.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of predicting each next token."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.norm(x))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def clustered(weight: Tensor, k: int) -> Tensor:
    """A selection for LiftAdamW that costs no refresh."""
    return clustered_indices(*weight.shape, DENSITY, 0, weight.device.type)[:k]


def lift_dense(model: nn.Module) -> torch.optim.Optimizer:
    groups = lift_param_groups(model, freeze_rest=True)
    return LiftAdamW(groups, lr=1e-3, betas=(0.9, 0.95), density=DENSITY, refresh_interval=None, selection=clustered)


def lift_packed(model: nn.Module) -> torch.optim.Optimizer:
    groups = pack_gradients(model, density=DENSITY, freeze_rest=True, selection=clustered)
    return LiftAdamW(groups, lr=1e-3, betas=(0.9, 0.95), refresh_interval=None)


def shira(model: nn.Module) -> torch.optim.Optimizer:
    """SHiRA with the masks that peft draws from seed 0 on the CPU, one for each shape.

    The same seed gives all layers of a shape the same mask. To draw each of them takes half a
    minute.
    """
    draw = attribute("peft", "peft.tuners.shira.mask_functions", "random_mask")
    masks: dict[torch.Size, Tensor] = {}

    def mask(layer: nn.Linear, rank: int, **options: Any) -> Tensor:
        shape = layer.weight.shape
        if shape not in masks:
            masks[shape] = draw(layer, rank, **options)
        return masks[shape]

    optimizer = methods.adapter("ShiraConfig", mask_fn=mask, random_seed=0)(model)
    masks.clear()
    return optimizer


LIFT = (methods.MATRIX, methods.PACKED)
LORA, SHIRA = ADAPTERS = "LoRA (peft), AdamW fused", "SHiRA (peft), AdamW fused"
METHODS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    methods.FULL: methods.full,
    methods.LINEAR: methods.full_linear,
    LORA: methods.adapter("LoraConfig", lora_dropout=0.0),
    SHIRA: shira,
    methods.MATRIX: lift_dense,
    methods.PACKED: lift_packed,
}


def training_problem(name: str, model: Llama, step: Callable[[], Tensor]) -> str:
    """What is wrong after three steps, or an empty string."""
    layers, frozen = [], []
    if name in LIFT:
        linear = [m for m in model.blocks[0].children() if hasattr(m, "bias")]  # packed or not
        layers = [(layer, layer.weight.detach().clone()) for layer in linear]
    else:
        frozen = [(at, p, p.detach().clone()) for at, p in model.named_parameters() if not p.requires_grad]
    first = float(step())
    step()
    last = float(step())
    if not last < first:
        return f"the loss went from {first:.4g} to {last:.4g}"
    for i, (layer, old) in enumerate(layers):
        changed = (layer.weight.detach() != old).view(-1)
        chosen = clustered(old, round(DENSITY * old.numel())).long()
        if not bool(changed[chosen].any()):
            return f"matrix {i}: no selected entry changed"
        changed[chosen] = False
        if bool(changed.any()):
            return f"matrix {i}: {int(changed.sum())} entries outside the mask changed"
    return next((f"{at} is frozen but changed" for at, p, old in frozen if not torch.equal(p, old)), "")


def trained_entries(optimizer: torch.optim.Optimizer) -> int:
    """The number of entries that an optimizer changes, after its first step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, LiftAdamW):
        return sum(optimizer.state[p]["indices"].numel() for p in parameters)
    return sum(p.numel() for p in parameters)


def flops(name: str, linear: int, head: int, trained: int) -> float:
    """FLOPs of a step for each token. ``linear``, ``head``: their weights, without adapters."""
    forward_and_inputs = 4.0 * (linear + head)
    if name == LORA:
        return forward_and_inputs + 6.0 * trained
    return forward_and_inputs + 2.0 * linear + (2.0 * head if name == methods.FULL else 0.0)


def work(run: Run) -> None:
    time_methods(run, TINY if run.dry else SIZE, tuple(METHODS))


def large(run: Run) -> None:
    time_methods(run, TINY if run.dry else LARGE, (methods.FULL, LORA, *LIFT))


def time_methods(run: Run, size: Size, names: tuple[str, ...]) -> None:
    """A row for each method, in the same order, against full fine-tuning."""
    generator = torch.Generator(run.device).manual_seed(0)
    tokens = torch.randint(size.vocabulary, (size.batch, size.length), generator=generator, device=run.device)
    against = None
    for name in names:
        try:
            taken = time_method(run, name, size, tokens, against)
        except Exception as error:  # a package is missing, or memory: the other methods go on
            traceback.print_exc()
            run.add(name, op="training step", status=methods.failed(name, error))
            taken = None
        if name == methods.FULL and taken is not None:
            against = (name, taken)
        run.free()


def time_method(run: Run, name: str, size: Size, tokens: Tensor, against: tuple[str, float] | None) -> float | None:
    """Check and time a method on a model of its own, which nothing holds afterwards."""
    torch.manual_seed(0)
    with torch.device(run.device):
        model = Llama(size).to(BF16)
    linear, head = sum(weight.numel() for weight in methods.matrices(model)), model.lm_head.weight.numel()
    optimizer = METHODS[name](model)

    def step() -> Tensor:
        with torch.autocast(run.device, BF16, enabled=name in ADAPTERS):
            loss = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    problem = None if name == methods.FULL else training_problem(name, model, step)
    memory = {} if problem else measured_memory(run, step, optimizer)
    trained = trained_entries(optimizer)
    return run.time(
        name,
        step,
        problem=problem,
        against=against,
        flops=tokens.numel() * flops(name, linear, head, trained),
        repeats=3 if run.dry else 8,
        op="training step",
        model=f"random Llama, {(linear + 2 * head) / 1e9:.2g} B",
        dtype="bf16",
        shape=f"{size.batch} x {size.length} tokens",
        derived={"tokens_per_s": lambda s: tokens.numel() / s},
        trained=trained,
        **memory,
        **({} if name in LIFT else {"backend": "torch"}),
    )


def measured_memory(run: Run, step: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> dict:
    if run.dry:
        return {}
    step()  # the first one makes the optimizer's state
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    if isinstance(optimizer, LiftAdamW):
        state = optimizer.state_bytes()
    else:
        state = sum(t.nbytes for entry in optimizer.state.values() for t in entry.values() if isinstance(t, Tensor))
    return {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3), "state_gb": round(state / 1e9, 3)}
