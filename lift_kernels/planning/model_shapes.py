"""Models without numbers: read from a configuration, and what LIFT trains of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import UserError
from ..masks.budget import DEFAULT_RANK, mask_rank, trained_entries
from ..nn.param_groups import lift_param_groups, pattern_of, stacked_weights
from ..nn.weight_kinds import LINEAR, weights_of
from ..validation import ALIGNMENT

_ATTENTION = "sdpa_masked_by_length"


@dataclass(frozen=True)
class Matrix:
    """Matrices of a parameter that LIFT trains: one, or those of a stack.

    Attributes:
        name: of the parameter.
        shape: (m, n) of each matrix.
        count: how many matrices there are.
        rank: of the approximation that chooses the entries.
        k: trained entries of each matrix.
    """

    name: str
    shape: torch.Size
    count: int
    rank: int
    k: int

    @property
    def padded(self) -> int:
        """Entries of its segment in an arena."""
        return -(-self.count * self.k // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class ModelShapes:
    """A model without numbers, and what LIFT trains of it.

    Attributes:
        name: what the user called it.
        model: the model on the meta device.
        dtype: of its weights.
        matrices: what LIFT trains.
        linear: names of the weights of linear layers, which adapters change.
        config: its configuration.
    """

    name: str
    model: nn.Module = field(repr=False)
    dtype: torch.dtype
    matrices: tuple[Matrix, ...] = field(repr=False)
    linear: tuple[str, ...] = field(repr=False)
    config: Any = field(repr=False)

    @property
    def parameters(self) -> int:
        """Weights of the model."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def entries(self) -> int:
        """Entries that LIFT trains."""
        return sum(m.count * m.k for m in self.matrices)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and buffers."""
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))


def read_config(name: str) -> Any:
    """Read the configuration of a model; weights are neither needed nor read.

    Args:
        name: a folder with config.json or one GGUF file, a GGUF file, or a hub id.

    Raises:
        UserError: for a model that does not exist, that transformers does not know, or whose
            weights are quantized, and where transformers is missing.
    """
    location, gguf_file = _locate(name)
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise UserError("a plan needs the package transformers; run `pip install transformers`") from error
    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=False, **options)
    except Exception as error:  # damaged files and unknown configurations raise errors of many types
        reason = " ".join(str(error).split()).split(". ")[0][:300].rstrip(".") or type(error).__name__
        files = "give undamaged files of a causal language model that transformers has"
        here = f"there is no directory {name} here, so check the name and the network"
        raise UserError(f"cannot read the configuration of {name}: {reason}; {files if _exists(name) else here}") from (
            error
        )
    if getattr(config, "quantization_config", None) is not None and not gguf_file:
        raise UserError(f"{name} is quantized, and quantized weights cannot be trained; give the unquantized model")
    return config


def _exists(name: str) -> bool:
    return Path(name).expanduser().exists()


def _locate(name: str) -> tuple[str, str | None]:
    """Return where a configuration is: a directory or hub id, and a GGUF file in it or None."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            return str(path.parent), path.name
        raise UserError(f"{name} is not a GGUF file; give a .gguf file, a model directory or a hub id")
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path), None
        found = sorted(file.name for file in path.glob("*.gguf"))
        if len(found) != 1:
            raise UserError(
                f"{name} has no config.json and {len(found)} GGUF files; give one of them, or another model"
            )
        return str(path), found[0]
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) and path.suffix not in (".gguf", ".json", ".safetensors"):
        return name, None
    raise UserError(f"model {name!r} is neither an existing directory or file nor a hub id such as owner/name")


def model_shapes(
    model: Any,
    *,
    dtype: torch.dtype = torch.bfloat16,
    density: float = 0.05,
    budget_rank: int | None = None,
    rank: int | None = DEFAULT_RANK,
    include: str | None = None,
    exclude: str | None = None,
    extra: str | None = None,
) -> ModelShapes:
    """Build a model without numbers, and choose what LIFT trains of it.

    Args:
        model: what `read_config` takes, or a configuration of transformers.
        dtype: of the weights.
        density, budget_rank, rank: as in `LiftAdamW`.
        include, exclude: as in `lift_param_groups`. Stacks of matrices follow them too.
        extra: as in `lift_param_groups`; None takes stacks of matrices, such as experts, and ""
            takes none.

    Raises:
        UserError: for a model that cannot be read or built, and for options that do not fit it.
    """
    config = read_config(model) if isinstance(model, str) else model
    name = model if isinstance(model, str) else getattr(model, "name_or_path", "") or model.model_type
    built = _build(config, dtype, name)
    stacks = [
        stack
        for stack in stacked_weights(built)
        if (include is None or re.search(include, stack)) and not (exclude is not None and re.search(exclude, stack))
    ]
    try:
        group, *_ = lift_param_groups(
            built, include, exclude, extra=(pattern_of(stacks) if extra is None else extra) or None
        )
        matrices = tuple(
            Matrix(
                weight,
                p.shape[-2:],
                p.shape[:-2].numel(),
                mask_rank(p.shape, rank, weight),
                trained_entries(p.shape, density, budget_rank, weight),
            )
            for weight, p in group["params"]
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    linear = tuple(w.name for w in weights_of(built) if w.kind == LINEAR)
    return ModelShapes(name, built, dtype, matrices, linear, config)


def _build(config: Any, dtype: torch.dtype, name: str) -> nn.Module:
    """Return the model of a configuration on the meta device."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
        if model.config._attn_implementation == "sdpa":
            model.config._attn_implementation = _masked_by_length()
        return model
    except Exception as error:  # whatever the code of an architecture raises
        reason = " ".join(str(error).split()).split(". ")[0][:300].rstrip(".") or type(error).__name__
        raise UserError(f"{name} is no causal language model that transformers can build: {reason}") from error


def _masked_by_length() -> str:
    """Return the name of an attention that needs no numbers to see that sequences are whole.

    With real tensors transformers reads the positions: if one sequence follows another in a row, it
    needs a mask, which takes other kernels and more memory. Fake tensors cannot tell. Layers with a
    window that is shorter than the sequence need a mask in any case.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def mask(*, kv_length: int, local_size: int | None = None, **options: Any) -> Tensor | None:
        if local_size is None or kv_length < local_size:
            return None
        return sdpa_mask(kv_length=kv_length, local_size=local_size, **options)

    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(_ATTENTION, mask)
    return _ATTENTION


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make tensors without numbers that claim to be on the CPU."""
    with FakeTensorMode(allow_non_fake_inputs=True), _GroupedProducts():
        yield


class _GroupedProducts(TorchDispatchMode):
    """Lets products of experts take any dtype: on fake tensors torch knows those of bf16 alone."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
            return func(*args, **(kwargs or {}))
        out = func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **(kwargs or {}))
        return torch.empty_strided(out.shape, out.stride(), dtype=args[0].dtype)


def to_fake(model: nn.Module) -> nn.Module:
    """Move a model in place from the meta device to fake CPU tensors; shared ones stay shared.

    It must be called within `fake_tensors`. Meta tensors take other kernels of attention than real
    ones, and fake tensors take those of their device.
    """
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return made[id(tensor)]

    for module in model.modules():
        held: Any
        for held in (module._parameters, module._buffers, module.__dict__):
            for key, value in list(held.items()):
                if isinstance(value, Tensor):
                    held[key] = fake(value)
    return model
