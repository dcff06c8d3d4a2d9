"""Which checkpoints the commands take: whole causal language models with plain weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from ..errors import UserError

_TEXT_CLASSES = ("forcausallm", "lmheadmodel", "modelwithlmhead", "bertgenerationdecoder")
"""How the names of transformers' causal language models end. Capitals differ in old checkpoints."""
_TEXT_MODEL = "give a causal language model for text"


def check_kind(config: PreTrainedConfig, description: str) -> None:
    """Refuse a model of another kind by its configuration, before its weights are read.

    Args:
        config: configuration of the checkpoint.
        description: the model's name for messages.

    Raises:
        UserError: for quantized weights, and for a model that is no causal language model for text.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
        raise UserError(
            f"{description} is quantized ({settings.get('quant_method', 'unknown method')}), and quantized weights "
            "cannot be trained; give the unquantized model, or save a dequantized copy of this one with "
            "transformers first"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{description} is an encoder-decoder ({config.model_type}); {_TEXT_MODEL}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{description} is a {config.model_type} model, which does not generate text; {_TEXT_MODEL}")
    if config.get_text_config() is not config:
        raise UserError(
            f"{description} is a {config.model_type} model, which takes more than text; {_TEXT_MODEL}, such as a copy "
            "of this one's language model that transformers saved"
        )
    stored = config.architectures or []
    if stored and not any(name.lower().endswith(_TEXT_CLASSES) for name in stored):
        raise UserError(f"{description} holds a {stored[0]}, which does not generate text; {_TEXT_MODEL}")


def check_weights(found: Any, description: str) -> None:
    """Refuse a checkpoint that lacks weights of the model, which would be random.

    Args:
        found: what ``from_pretrained(output_loading_info=True)`` says.
        description: the model's name for messages.

    Raises:
        UserError: naming one of the weights.
    """
    for name, stored, needed in sorted(found["mismatched_keys"]):
        raise UserError(
            f"{description}: {name} has the shape {tuple(stored)}, and its configuration asks for {tuple(needed)}; "
            "give weights and configuration of one model"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(
            f"{description} lacks {len(missing)} weights of the model, for example {missing[0]}; give the whole model"
        )


def check_tokens(
    model: Any, tokenizer: Any, examples: Iterable[Mapping[str, list[int]]], longest: int, together: int
) -> None:
    """Refuse a tokenizer that does not belong to the model, and texts that are too long for it.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        examples: encoded texts.
        longest: tokens of the longest sample.
        together: the most samples in a text that the model is to read.

    Raises:
        UserError: for a token without an embedding, and for too long a text.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.pad_token_id, *(max(e["input_ids"]) for e in examples))
    if largest >= rows:
        raise UserError(
            f"the tokenizer gives token {largest}, and the model has {rows} embeddings; give the model with its own "
            "tokenizer"
        )
    limit = position_limit(model.config)
    if limit is not None and longest * together > limit:
        raise UserError(
            f"a text may need {longest * together} tokens, and the model takes {limit}; lower --max-length to "
            f"{limit // together}, or give a model that takes more"
        )


def position_limit(config: PreTrainedConfig) -> int | None:
    """Return the most tokens that a model takes, or None where it has no limit."""
    for name in ("max_position_embeddings", "max_seq_len"):  # the second is MPT's
        if (getattr(config, name, None) or 0) > 0:  # -1 where there is none
            return getattr(config, name)
    return None
