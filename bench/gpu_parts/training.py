"""A training step of a random Llama in plain torch, by full fine-tuning and by LIFT.

Full fine-tuning is by AdamW(fused=True), LIFT from dense and from packed gradients. A step is
forward pass, loss, backward pass and optimizer, in bf16, with masks of 5 % clustered by rows and no
refresh. LIFT freezes embeddings, head and norms as the paper does.

Roofline: FLOPs of the linear layers, 6 a weight and token where its gradient is formed, 4 where it
is not. Attention is not counted. Checked before the timing, after three steps: the loss fell and,
in the first block, nothing outside the masks changed and something inside did. ``peak_gb``:
allocated at most in a step. ``state_gb``: of the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.common.arenas import clustered_indices
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


SIZE = Size(2048, 5632, 22, 32, 4, 32000, 4, 1024)  # 1.1 B parameters
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


def full(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def clustered(weight: Tensor, k: int) -> Tensor:
    """A selection for LiftAdamW that costs no refresh."""
    return clustered_indices(*weight.shape, DENSITY, 0, weight.device.type)[:k]


def lift_dense(model: nn.Module) -> torch.optim.Optimizer:
    groups = lift_param_groups(model, freeze_rest=True)
    return LiftAdamW(groups, lr=1e-3, betas=(0.9, 0.95), density=DENSITY, refresh_interval=None, selection=clustered)


def lift_packed(model: nn.Module) -> torch.optim.Optimizer:
    groups = pack_gradients(model, density=DENSITY, freeze_rest=True, selection=clustered)
    return LiftAdamW(groups, lr=1e-3, betas=(0.9, 0.95), refresh_interval=None)


def trained_problem(model: Llama, step: Callable[[], Tensor]) -> str:
    """What is wrong after three steps of LIFT, or an empty string."""
    layers = [m for m in model.blocks[0].children() if hasattr(m, "bias")]  # linear ones, packed or not
    before = [layer.weight.detach().clone() for layer in layers]
    first = float(step())
    step()
    last = float(step())
    if not last < first:
        return f"the loss went from {first:.4g} to {last:.4g}"
    for i, (layer, old) in enumerate(zip(layers, before)):
        changed = (layer.weight.detach() != old).view(-1)
        chosen = clustered(old, round(DENSITY * old.numel())).long()
        if not bool(changed[chosen].any()):
            return f"matrix {i}: no selected entry changed"
        changed[chosen] = False
        if bool(changed.any()):
            return f"matrix {i}: {int(changed.sum())} entries outside the mask changed"
    return ""


def work(run: Run) -> None:
    size = TINY if run.dry else SIZE
    generator = torch.Generator(run.device).manual_seed(0)
    tokens = torch.randint(size.vocabulary, (size.batch, size.length), generator=generator, device=run.device)
    against = None
    methods = {"full, AdamW fused": full, "LIFT, dense gradients": lift_dense, "LIFT, packed gradients": lift_packed}
    for name, make in methods.items():
        torch.manual_seed(0)
        with torch.device(run.device):
            model = Llama(size).to(BF16)
        linear = sum(m.weight.numel() for block in model.blocks for m in block.children() if isinstance(m, nn.Linear))
        head, lift = model.lm_head.weight.numel(), make is not full
        optimizer = make(model)

        def step(model=model, optimizer=optimizer) -> Tensor:
            loss = model(tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        problem = run.problem(lambda model=model, step=step: trained_problem(model, step)) if lift else None
        memory = {} if problem else measured_memory(run, step, optimizer)
        taken = run.time(
            name,
            step,
            problem=problem,
            against=against,
            flops=tokens.numel() * (6.0 * linear + (4.0 if lift else 6.0) * head),
            repeats=3 if run.dry else 8,
            op="training step",
            model=f"random Llama, {(linear + 2 * head) / 1e9:.2g} B",
            dtype="bf16",
            shape=f"{size.batch} x {size.length} tokens",
            derived={"tokens_per_s": lambda s: tokens.numel() / s},
            **memory,
        )
        if make is full and taken is not None:
            against = (name, taken)
        del model, optimizer, step
        run.free()


def measured_memory(run: Run, step: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> dict:
    if run.dry:
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    if isinstance(optimizer, LiftAdamW):
        state = optimizer.state_bytes()
    else:
        state = sum(t.nbytes for entry in optimizer.state.values() for t in entry.values() if isinstance(t, Tensor))
    return {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3), "state_gb": round(state / 1e9, 3)}
