"""TRL's SFTTrainer with LiftAdamW: the documented one-liner and its figures.

The weights are those of an optimizer that is made by hand.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from helpers.bits import bits
from helpers.tiny_llama import make_tokenizer, tiny_config
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from lift_kernels import LiftAdamW, lift_param_groups
from lift_kernels.finetune import word_problems
from lift_kernels.integrations.transformers import LiftCallback

OPTIONS = {"lr": 0.01, "rank": 4, "density": 0.1, "refresh_interval": 2, "max_grad_norm": 1.0}


def make_trainer(folder, by_hand: bool):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config())
    problems = word_problems.generate(16, "train")
    data = Dataset.from_list([{"prompt": p.question, "completion": f" {p.answer}"} for p in problems])
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        max_length=256,
        seed=1,
    )
    groups = lift_param_groups(model, freeze_rest=True)
    how = {"optimizers": (LiftAdamW(groups, **OPTIONS), None)} if by_hand else {}
    how |= {} if by_hand else {"optimizer_cls_and_kwargs": (LiftAdamW, {"params": groups, **OPTIONS})}
    return SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=make_tokenizer(), **how)


def test_sft_trainer_one_liner(tmp_path):
    trainer = make_trainer(tmp_path, by_hand=False)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    LiftCallback.attach(trainer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4 and logs[-1]["loss"] < logs[0]["loss"]
    for key in ("lift_density", "lift_mask_overlap", "lift_refresh_seconds", "lift_grad_norm", "lift_update_norm"):
        assert logs[-1][key] > 0, key
    assert "mean_token_accuracy" in logs[-1], "TRL's own figures stay in the same entry"
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if name.endswith("proj.weight")}
    other = make_trainer(tmp_path, by_hand=True)
    other.train()
    for (name, a), b in zip(trainer.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(bits(a.detach()), bits(b.detach())), name
