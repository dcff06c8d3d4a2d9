"""Tiny random models of many architectures, with the byte-level tokenizer of `tiny_llama`."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from .tiny_llama import ALPHABET, SPECIAL, make_tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
KV = {"num_key_value_heads": 2, "intermediate_size": 48}
LONG = {"max_position_embeddings": 4096}
MIXTURE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}

ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 4096}),
    "gpt_neox": ("GPTNeoXConfig", SIZES | LONG | {"intermediate_size": 48}),
    "opt": ("OPTConfig", SIZES | LONG | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi3": ("Phi3Config", SIZES | KV | LONG),
    "gemma3": ("Gemma3TextConfig", SIZES | KV | LONG | {"head_dim": 8, "sliding_window": 64}),
    "mixtral": ("MixtralConfig", SIZES | KV | LONG | {"num_local_experts": 4}),
    "falcon": ("FalconConfig", SIZES | LONG),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", SIZES | KV | LONG | MIXTURE),
    "qwen3_next": (
        "Qwen3NextConfig",
        SIZES
        | KV
        | LONG
        | MIXTURE
        | {
            "head_dim": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "gpt_oss": (
        "GptOssConfig",
        SIZES
        | KV
        | LONG
        | {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
"""By name: the class of the configuration and its options."""


def make_model(name: str) -> PreTrainedModel:
    """A tiny random model, always with the same weights."""
    config_class, options = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(
        vocab_size=len(SPECIAL) + len(ALPHABET),
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        **options,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def save_architecture(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model and its tokenizer; returns the folder."""
    make_model(name).to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
