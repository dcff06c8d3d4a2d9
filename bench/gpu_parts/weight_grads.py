"""Dense and packed weight gradients of a layer, as ops and in a backward pass.

As ops (`packed_weight_grad`): torch's dense products alone, the product into one shared buffer and
a gather (the default), and the fused product. Bytes of the roofline: factors read, results written.
FLOPs: 2 tokens m n a matrix.

In a backward pass, input gradients included: plain linear layers, LiftLinear (``values.grad``) and
a hook (``p.lift_grad``). FLOPs are twice as many. ``kept_mb``: what the pass leaves behind beside
the input gradients. ``peak_mb``: the most that it allocates at once.

Checked against fp32 products: no entry may be off by more than twice the largest error of torch's
own dense product. One call reads and writes several hundred megabytes, so inputs need not take
turns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.gpu_parts.models import BF16, LLAMA_2_7B, LLAMA_3_8B, Model
from bench.gpu_parts.runner import Call, Run
from lift_kernels import ops
from lift_kernels.nn.grad_hooks import pack_on_accumulate
from lift_kernels.nn.linear import LiftLinear


class Problem:
    """Factors of one layer's weight gradients, its masks, and the true entries.

    Also the largest error of torch's own products.
    """

    def __init__(self, run: Run, model: Model, tokens: int):
        self.model, self.tokens = model, tokens
        options = {"generator": torch.Generator(run.device).manual_seed(0), "device": run.device, "dtype": BF16}
        self.factors = [tuple(torch.randn(tokens, side, **options) for side in shape) for shape in model.layer]
        self.lists = model.masks(run.device, 1)
        self.truth, self.admitted = [], []
        for (grad_output, input), index in zip(self.factors, self.lists):
            self.truth.append((grad_output.float().t() @ input.float()).view(-1)[index.long()])
            error = (grad_output.t() @ input).view(-1)[index.long()].float() - self.truth[-1]
            self.admitted.append(2.0 * float(error.abs().max()))
        self.flops = 2.0 * tokens * model.layer_entries
        self.read = float(sum(t.nbytes for pair in self.factors for t in pair))
        self.entries = sum(map(len, self.lists))

    def wrong(self, results: list[Tensor]) -> str:
        """What is wrong with the entries of all matrices, or an empty string."""
        if any(got.shape != right.shape for got, right in zip(results, self.truth)):
            return "the results have other lengths than the index lists"
        errors = [float((got.float() - right).abs().max()) for got, right in zip(results, self.truth)]
        bad = [i for i, (error, most) in enumerate(zip(errors, self.admitted)) if not error <= most]
        return "; ".join(f"matrix {i} is off by {errors[i]:.3g}, admitted {self.admitted[i]:.3g}" for i in bad)

    def labels(self, op: str) -> dict:
        return {"op": op, "model": self.model.name, "dtype": "bf16", "shape": f"one layer, {self.tokens} tokens"}


def as_ops(run: Run, given: Problem) -> None:
    labels = given.labels("packed_weight_grad")

    def products() -> list[Tensor]:
        return [grad_output.t() @ input for grad_output, input in given.factors]

    moved = given.read + 2.0 * given.model.layer_entries
    dense = run.time("dense products alone", products, moved=moved, flops=given.flops, **labels)
    against = None if dense is None else ("dense products alone", dense)
    for name, options in {"product and gather": {}, "fused product": {"fused": True}}.items():
        if options and run.dry:
            continue  # a Triton kernel

        def packed(options=options) -> list[Tensor]:
            return [ops.packed_weight_grad(*pair, index, **options) for pair, index in zip(given.factors, given.lists)]

        run.time(
            name,
            packed,
            problem=run.problem(lambda packed=packed: given.wrong(packed())),
            against=against,
            moved=given.read + 4.0 * given.entries,
            flops=given.flops,
            **labels,
        )


class Held(nn.Module):
    """A linear layer in all but its class, as stacked experts are.

    Packed layers cannot replace it, but a hook can pack its gradient.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def plain(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


def lifted(weight: Tensor, index: Tensor) -> nn.Module:
    return LiftLinear.pack(plain(weight), index)


def hooked(weight: Tensor, index: Tensor) -> nn.Module:
    layer = Held(weight)
    pack_on_accumulate(layer.weight, index)
    return layer


class Backward:
    """A backward pass through one layer's matrices side by side."""

    def __init__(self, given: Problem, layers: list[nn.Module]):
        self.layers = layers
        self.inputs = [x.detach().requires_grad_(True) for _, x in given.factors]
        self.grad_outputs = [g for g, _ in given.factors]

    def ready(self) -> Call:
        """A new forward pass. What comes back is its backward pass."""
        for layer, x in zip(self.layers, self.inputs):
            x.grad = None
            for parameter in layer.parameters():
                parameter.grad = None
                if hasattr(parameter, "lift_grad"):
                    parameter.lift_grad = None
        outputs = [layer(x) for layer, x in zip(self.layers, self.inputs)]
        return lambda: torch.autograd.backward(outputs, self.grad_outputs)

    def packed(self) -> list[Tensor]:
        """The packed gradients after one pass."""
        self.ready()()
        return [layer.weight.lift_grad if isinstance(layer, Held) else layer.values.grad for layer in self.layers]

    def memory(self, run: Run) -> dict:
        """Megabytes that a pass leaves behind, without input gradients, and its peak."""
        if run.dry:
            return {}
        call = self.ready()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before - sum(x.nbytes for x in self.inputs)
        peak = torch.cuda.max_memory_allocated() - before
        return {"kept_mb": round(kept / 1e6, 1), "peak_mb": round(peak / 1e6, 1)}


def in_backward(run: Run, given: Problem) -> None:
    weights = given.model.matrices(run.device, BF16, 0.02, 1)
    methods = {
        "plain nn.Linear, dense gradients": plain,
        "LiftLinear, values.grad": lifted,
        "hook, p.lift_grad": hooked,
    }
    labels, against = given.labels("backward"), None
    for name, make in methods.items():
        layers = [make(w) if make is plain else make(w, index) for w, index in zip(weights, given.lists)]
        backward, problem, memory = Backward(given, layers), None, {}
        if make is plain:
            backward.ready()()
        else:
            problem = run.problem(lambda b=backward: given.wrong(b.packed()))
        if not problem:
            memory = backward.memory(run)
        taken = run.time(
            name, ready=backward.ready, problem=problem, against=against, flops=2 * given.flops, **labels, **memory
        )
        against = (name, taken) if make is plain and taken is not None else against
        del backward, layers
        run.free()


def work(run: Run) -> None:
    for model, tokens in ((LLAMA_2_7B, 2048), (LLAMA_2_7B, 16384), (LLAMA_3_8B, 2048)):
        given = Problem(run, model.on(run.device), tokens // 64 if run.dry else tokens)
        as_ops(run, given)
        if tokens == 2048:
            in_backward(run, given)
        del given
        run.free()
