"""A small language model and its training data, the same for every loop."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

METHOD = {"lr": 0.01, "rank": 4, "density": 0.1, "refresh_interval": 4, "bias_correction": "per_entry"}


class Tokens(Dataset):
    """Fixed random sequences."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        ids = torch.randint(0, 50, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def make_model(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).to(dtype)
