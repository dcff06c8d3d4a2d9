"""A tiny random Llama with a tokenizer of single bytes."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<eos>", "<pad>"]
LAYERS = 2


def tiny_config(**changes) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": len(SPECIAL) + len(ALPHABET),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 1,
        }
        | changes
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(SPECIAL + ALPHABET)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")


def save_tiny(folder: Path, **changes) -> Path:
    """Write the model, always with the same weights, and its tokenizer; returns the folder."""
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(**changes)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
