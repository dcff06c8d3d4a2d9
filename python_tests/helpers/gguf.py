"""A small GGUF file."""

from __future__ import annotations

import gguf
import numpy as np
from helpers.tiny_llama import ALPHABET, LAYERS, SPECIAL, tiny_config


def write_gguf(path) -> None:
    """Write a tiny Llama with quantized matrices, as llama.cpp would."""
    tokens = [*SPECIAL, *ALPHABET, "Ġa"]  # a merge, because the format needs at least one
    config = tiny_config(vocab_size=len(tokens))
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width, inner = config.hidden_size, config.intermediate_size
    narrow = width // heads * groups
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    shapes = {"token_embd": (config.vocab_size, width), "output": (config.vocab_size, width), "output_norm": (width,)}
    for i in range(LAYERS):
        block = {
            "attn_q": (width, width),
            "attn_k": (narrow, width),
            "attn_v": (narrow, width),
            "attn_output": (width, width),
        }
        block |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
        block |= {"attn_norm": (width,), "ffn_norm": (width,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32) * 0.2
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.abs(values) + 1)
        else:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
