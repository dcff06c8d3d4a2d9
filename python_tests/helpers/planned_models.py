"""Small configurations of three architectures, and the measured peak of their training."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients
from lift_kernels.finetune.config import DTYPES, STATE_DTYPES
from lift_kernels.nn.param_groups import pattern_of, stacked_weights
from lift_kernels.nn.weight_kinds import LINEAR, weights_of
from lift_kernels.planning.forms import Form
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


def prepare(model, form: Form) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer, as `finetune` makes them, without refreshes."""
    if form.lift:
        rules = {"extra": pattern_of(stacked_weights(model)) or None, "freeze_rest": True}
        if form.kind == "packed":
            groups = pack_gradients(model, **rules, grad_dtype=DTYPES[form.grad_dtype])
        else:
            groups = lift_param_groups(model, **rules)
        state = {"state_dtype": STATE_DTYPES[form.state_dtype], "master": form.master, "offload": form.offload}
        return model, LiftAdamW(groups, lr=1e-4, warm_start=None, refresh_interval=None, **state)
    if form.kind != "full":
        from peft import LoraConfig, ShiraConfig, get_peft_model

        linear = [w for w in weights_of(model) if w.kind == LINEAR]
        targets = [w.name.removesuffix(".weight") for w in linear]
        entries, sides = sum(w.numel for w in linear), sum(sum(w.parameter.shape) for w in linear)
        lora, shira = LoraConfig(r=16, target_modules=targets), ShiraConfig(r=round(0.05 * entries / sides))
        shira.target_modules = set(targets)
        model = get_peft_model(model, lora if form.kind == "lora" else shira)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-4, fused=True)


def training(config, form: Form, dtype: torch.dtype, checkpointing: bool, device: str = "cpu"):
    """The model, its optimizer, and a function that takes a whole step."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train().to(device)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model, optimizer = prepare(model, form)
    ids = torch.randint(0, VOCABULARY, (BATCH, SEQ)).to(device)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def measured(config, form: Form, dtype: torch.dtype, checkpointing: bool) -> tuple[int, int]:
    """Bytes that are kept between steps, and the most that are alive during one, the second."""
    model, optimizer, step = training(config, form, dtype, checkpointing)
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
