"""Small configurations of three architectures, and the measured peak of their training."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients
from lift_kernels.nn.param_groups import pattern_of, stacked_weights
from lift_kernels.nn.weight_kinds import LINEAR, weights_of
from lift_kernels.planning.live_storages import LiveStorages

VOCABULARY, BATCH, SEQ = 2000, 1, 128
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 640}
SIZES |= {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "pad_token_id": 0}
GEMMA = {"head_dim": 64, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 6}


def config_of(name: str) -> transformers.PreTrainedConfig:
    """A Llama of 7 layers, a Gemma of 12 in pairs, or a mixture of 6 with 4 experts."""
    if name == "llama":
        return transformers.LlamaConfig(**SIZES, num_hidden_layers=7)
    if name == "gemma":
        return transformers.Gemma3TextConfig(**SIZES, **GEMMA, num_hidden_layers=12)
    return transformers.MixtralConfig(**SIZES, num_hidden_layers=6, num_local_experts=4, num_experts_per_tok=2)


def prepare(model, kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer, as `finetune` makes them, without refreshes."""
    if kind in ("dense", "packed"):
        groups_of = pack_gradients if kind == "packed" else lift_param_groups
        groups = groups_of(model, extra=pattern_of(stacked_weights(model)) or None, freeze_rest=True)
        return model, LiftAdamW(groups, lr=1e-4, warm_start=None, refresh_interval=None)
    if kind != "full":
        from peft import LoraConfig, ShiraConfig, get_peft_model

        linear = [w for w in weights_of(model) if w.kind == LINEAR]
        targets = [w.name.removesuffix(".weight") for w in linear]
        entries, sides = sum(w.numel for w in linear), sum(sum(w.parameter.shape) for w in linear)
        lora, shira = LoraConfig(r=16, target_modules=targets), ShiraConfig(r=round(0.05 * entries / sides))
        shira.target_modules = set(targets)
        model = get_peft_model(model, lora if kind == "lora" else shira)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-4, fused=True)


def measured(config, kind: str, dtype: torch.dtype, checkpointing: bool) -> tuple[int, int]:
    """Bytes that are kept between steps, and the most that are alive during one, the second."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model, optimizer = prepare(model, kind)
    ids = torch.randint(0, VOCABULARY, (BATCH, SEQ))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    live = LiveStorages()
    live.hold([*model.parameters(), *model.buffers()])
    for entry in optimizer.state.values():
        live.hold(value for value in entry.values() if torch.is_tensor(value))
    for module in model.modules():
        live.hold(getattr(module, "shira_indices", {}).values())
    kept = live.alive
    with live:
        step()
    return kept, live.peaks[1.0]
