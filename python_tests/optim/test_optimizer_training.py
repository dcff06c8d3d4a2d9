"""LiftAdamW in accelerate's `prepare` and in transformers' Trainer, with a resume."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from helpers.bits import BF16, FP32, bits
from helpers.language_model import METHOD, Tokens, make_model
from helpers.optimizers import OPTIONS, assert_same, make_weights, set_gradients, snapshot, train
from transformers import Trainer, TrainingArguments

from lift_kernels import LiftAdamW, lift_param_groups


def make_trainer(folder, dtype, **arguments):
    model = make_model(dtype)
    optimizer = LiftAdamW(lift_param_groups(model, freeze_rest=True), **METHOD)
    defaults = dict(
        output_dir=str(folder),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=4,
        lr_scheduler_type="linear",
        warmup_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        logging_steps=1,
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**defaults | arguments),
        train_dataset=Tokens(),
        eval_dataset=Tokens(),
        optimizers=(optimizer, None),
    )
    return trainer, model, optimizer


def test_trainer_one_liner_gives_the_same_weights(tmp_path):
    """The README's ``optimizer_cls_and_kwargs`` builds the optimizer that one builds by hand."""
    by_hand, model, _ = make_trainer(tmp_path, FP32, save_strategy="no")
    by_hand.train()
    other = make_model(FP32)
    groups = lift_param_groups(other, freeze_rest=True)
    one_liner = Trainer(
        model=other,
        args=by_hand.args,
        train_dataset=Tokens(),
        optimizer_cls_and_kwargs=(LiftAdamW, {"params": groups} | METHOD),
    )
    one_liner.train()
    own, others = dict(model.named_parameters()), dict(other.named_parameters())
    assert all(torch.equal(own[name], others[name]) for name in own)
    assert not torch.equal(
        others["model.layers.0.mlp.up_proj.weight"], make_model(FP32).model.layers[0].mlp.up_proj.weight
    )


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_trainer_resumes_to_the_same_bits(tmp_path, dtype):
    """Six steps at once equal three steps and three more from a checkpoint.

    The fourth step refreshes.
    """
    trainer, model, optimizer = make_trainer(tmp_path, dtype)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = trainer.train()
    assert result.global_step == 6 and optimizer.param_groups[0]["steps_since_refresh"] == 2
    resumed, other, other_optimizer = make_trainer(tmp_path, dtype)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    own, others = dict(model.named_parameters()), dict(other.named_parameters())
    assert all(torch.equal(bits(own[name].detach()), bits(others[name].detach())) for name in own)
    assert_same(snapshot(other_optimizer), snapshot(optimizer))
    moved = {name for name in own if not torch.equal(own[name], start[name])}
    assert all(torch.equal(own[name], value) for name, value in frozen.items()) and moved == set(own) - set(frozen)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    again = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert losses == again and len(losses) == 6


def test_trainer_keeps_the_best_model(tmp_path):
    """`load_best_model_at_end` changes the weights without the optimizer.

    Training continues from them.
    """
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "learning_rate": 1.0}
    trainer, model, optimizer = make_trainer(tmp_path, BF16, **evaluation)
    trainer.train()
    best = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.param_groups[0]["lr"] = 0.0
    set_gradients((p for p in model.parameters() if p.requires_grad), 0)
    optimizer.step()
    assert all(torch.equal(p.detach(), best[name]) for name, p in model.named_parameters())


def test_accelerate_prepare():
    """Prepared for the CPU it takes the same steps, also accumulated ones.

    Its state dict passes through.
    """
    weights, copies = make_weights(), make_weights()
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(LiftAdamW(weights, **OPTIONS, refresh_interval=3))
    plain = LiftAdamW(copies, **OPTIONS, refresh_interval=3)
    for step in range(5):
        set_gradients(weights, step)
        prepared.step()
        prepared.zero_grad()
    train(plain, range(5))
    assert all(torch.equal(w, t) for w, t in zip(weights, copies))
    prepared.load_state_dict(prepared.state_dict())
    set_gradients(weights, 5)
    prepared.step()
    train(plain, [5])
    assert_same(snapshot(prepared.optimizer), snapshot(plain))
