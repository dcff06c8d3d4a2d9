"""LiftAdamW in a plain loop, in accelerate and in Trainer gives the same weights.

The tests also cover Trainer's features and the logs of LiftCallback.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from accelerate import Accelerator
from helpers.bits import BF16, FP32, bits
from helpers.language_model import METHOD, Tokens, make_model
from helpers.optimizers import assert_same, snapshot
from torch.utils.data import DataLoader
from transformers import (
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from lift_kernels import LiftAdamW, apply_delta, lift_param_groups, pack_gradients, revert_delta, save_delta, unpack
from lift_kernels.integrations.transformers import LiftCallback

STEPS, BATCH, WARMUP = 6, 4, 2
OPTIONS = METHOD | {"max_grad_norm": 0.5, "refresh_interval": 2}


MASK = {"rank": 4, "density": 0.1}


def make_experts():
    """A mixture of experts for the vocabulary of `Tokens`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=64, num_hidden_layers=1, **sizes, **heads))


def parts(dtype=FP32, **changes):
    model = make_model(dtype)
    return model, LiftAdamW(lift_param_groups(model, freeze_rest=True), **OPTIONS | changes)


def make_trainer(folder, model, optimizer=None, callbacks=(), trainer=Trainer, **arguments):
    defaults = dict(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        lr_scheduler_type="linear",
        warmup_steps=WARMUP,
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        seed=3,
        learning_rate=OPTIONS["lr"],
    )
    return trainer(
        model=model,
        args=TrainingArguments(**defaults | arguments),
        train_dataset=Tokens(),
        eval_dataset=Tokens(),
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )


def by_loop(dtype=FP32, accelerator=None, **changes):
    """Train in a hand-written loop, with or without accelerate."""
    model, optimizer = parts(dtype, **changes)
    scheduler = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    loader = DataLoader(Tokens(), batch_size=BATCH)
    if accelerator is not None:
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    model.train()
    for batch in loader:
        loss = model(**batch).loss
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model if accelerator is None else accelerator.unwrap_model(model)


def by_trainer(folder, dtype=FP32, changes=None, **arguments):
    model, optimizer = parts(dtype, **changes or {})
    trainer = make_trainer(folder, model, optimizer, **arguments)
    trainer.train()
    return model


def assert_same_weights(actual, expected) -> None:
    for (name, a), (_, e) in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(bits(a.detach()), bits(e.detach())), name


def distance(actual, expected) -> float:
    """The largest difference, relative to the largest change by training."""
    start = dict(make_model(FP32).named_parameters())
    pairs = list(zip(actual.named_parameters(), expected.parameters(), strict=True))
    moved = max((e - start[name]).abs().max().item() for (name, _), e in pairs)
    return max((a - e).abs().max().item() for (_, a), e in pairs) / moved


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_loop_accelerate_and_trainer_give_the_same_weights(tmp_path, dtype):
    loop = by_loop(dtype)
    assert not torch.equal(
        loop.model.layers[0].mlp.up_proj.weight, make_model(dtype).model.layers[0].mlp.up_proj.weight
    )
    assert_same_weights(by_loop(dtype, Accelerator(cpu=True)), loop)
    assert_same_weights(by_trainer(tmp_path, dtype), loop)


FEATURES = {
    "activation checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 2},
    "saved": {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features_that_change_no_weight(tmp_path, feature):
    model = by_trainer(tmp_path, **FEATURES[feature])
    assert distance(model, by_loop()) < (1e-5 if feature == "compiled" else 1e-9)
    if feature == "saved":
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_gradient_accumulation_equals_a_large_batch(tmp_path):
    """There are four micro-batches of one.

    Gradients are added in another order, so the weights agree up to rounding.
    """
    model = by_trainer(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=BATCH)
    assert distance(model, by_loop()) < 1e-3


def test_bf16_autocast_trains_trained_entries_only(tmp_path):
    model, optimizer = parts(refresh_interval=None)
    make_trainer(tmp_path, model, optimizer, bf16=True).train()
    start = dict(make_model(FP32).named_parameters())
    for name, p in model.named_parameters():
        entry = optimizer.state.get(p, {})
        changed = (p.detach() != start[name]).flatten().nonzero().flatten().int()
        assert torch.isin(changed, entry.get("indices", changed[:0])).all(), name
        assert not entry or len(changed) > 0.9 * len(entry["indices"])
    assert 1e-6 < distance(model, by_loop(refresh_interval=None)) < 1


def test_fp16_with_a_grad_scaler_in_accelerate_style():
    """fp16 autocast needs a GPU, but the scaler runs anywhere.

    Scaled gradients give the weights of unscaled ones.
    """
    model, optimizer = parts()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scheduler = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    for batch in DataLoader(Tokens(), batch_size=BATCH):
        scaler.scale(model(**batch).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
    assert distance(model, by_loop()) < 1e-4


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("form", ["bf16 master", "random", "stochastic"])
def test_trainer_resumes_just_before_at_and_after_a_refresh(tmp_path, form, at):
    """The second step refreshes.

    The checkpoint and the random order are Trainer's own. The new start has other seeds.
    """
    changes = {
        "bf16 master": {"bias_correction": "per_entry"},
        "random": {"selection": "random", "seed": 4},
        "stochastic": {"master": None, "rounding": "stochastic", "seed": 5},
    }[form]
    arguments = {"save_strategy": "steps", "save_steps": at, "train_sampling_strategy": "random"}
    model, optimizer = parts(BF16, **changes)
    make_trainer(tmp_path, model, optimizer, **arguments).train()
    other, other_optimizer = parts(BF16, **changes | ({"seed": 0} if "seed" in changes else {}))
    torch.manual_seed(123)
    resumed = make_trainer(tmp_path, other, other_optimizer, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert_same_weights(other, model)
    assert_same(snapshot(other_optimizer), snapshot(optimizer))


def experts_run(folder, model):
    """A Trainer of a mixture of experts with packed gradients."""
    groups = pack_gradients(model, extra="experts", freeze_rest=True, **MASK)
    optimizer = LiftAdamW(groups, lr=1e-2, refresh_interval=None, **MASK)
    return make_trainer(folder, model, optimizer, save_strategy="steps", save_steps=2, max_steps=4)


def test_trainer_refuses_to_resume_from_the_experts_of_the_base(tmp_path):
    """transformers saves experts one by one, and Trainer does not stack them when it resumes.

    A model that is made from the checkpoint has them, and goes on to the bits of the whole run.
    """
    checkpoint = str(tmp_path / "checkpoint-2")
    model = make_experts()
    experts_run(tmp_path, model).train()
    again = make_experts()
    trainer = experts_run(tmp_path / "again", again)
    with pytest.raises(
        RuntimeError, match=r"2 of 6 matrices differ, first model\.layers\.0\.mlp\.experts\.gate_up_proj"
    ):
        trainer.train(resume_from_checkpoint=checkpoint)
    base = make_experts()
    assert torch.equal(
        bits(again.model.layers[0].mlp.experts.down_proj), bits(base.model.layers[0].mlp.experts.down_proj)
    )
    right = Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=FP32)
    experts_run(tmp_path / "right", right).train(resume_from_checkpoint=checkpoint)
    assert_same_weights(unpack(right), unpack(model))


def test_a_run_that_ends_with_its_best_model_resumes_from_its_last_one(tmp_path):
    """load_best_model_at_end writes weights after the last step. Checkpoints stay what they are."""
    arguments = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "greater_is_better": True,  # the loss, so the first checkpoint is the best
        "metric_for_best_model": "loss",
    }
    model, optimizer = parts(BF16)
    trainer = make_trainer(tmp_path, model, optimizer, **arguments)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    other, other_optimizer = parts(BF16)
    resumed = make_trainer(tmp_path / "again", other, other_optimizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_weights(other, by_loop(BF16))


def test_accelerate_saves_and_loads_its_state_exactly(tmp_path):
    """`save_state` after the third step and `load_state` into a new start give the same bits."""

    def steps(model, optimizer, batches):
        for batch in batches:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

    batches, results = list(DataLoader(Tokens(), batch_size=BATCH)), []
    for resumed in (False, True):
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(*parts(BF16, selection="random", seed=0 if resumed else 6))
        if resumed:
            accelerator.load_state(str(tmp_path / "state"))
        else:
            steps(model, optimizer, batches[:3])
            accelerator.save_state(str(tmp_path / "state"))
        steps(model, optimizer, batches[3:])
        results.append((accelerator.unwrap_model(model), snapshot(optimizer.optimizer)))
    assert_same_weights(results[1][0], results[0][0])
    assert_same(results[1][1], results[0][1])


class Ema(TrainerCallback):
    """Average the weights and swap the average in for evaluation, as EMA callbacks do."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.mean = [p.detach().clone() for p in model.parameters()]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for mean, p in zip(self.mean, model.parameters()):
            mean.lerp_(p.detach(), 0.1)
        self.own = [p.detach().clone() for p in model.parameters()]
        self.swap(model, self.mean)
        self.swap(model, self.own)

    @staticmethod
    def swap(model, values):
        with torch.no_grad():
            for p, value in zip(model.parameters(), values):
                p.copy_(value)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_an_ema_swap_changes_nothing(tmp_path, dtype):
    """The average is swapped in and out between two steps.

    Masters that still round to the weights are kept.
    """
    assert_same_weights(by_trainer(tmp_path, dtype, callbacks=[Ema()]), by_loop(dtype))


class Reporter(TrainerCallback):
    """Stands for TensorBoard or W&B; it is added before any callback of the user."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(copy.deepcopy(logs))


def test_lift_callback_logs_to_every_reporter_and_changes_no_weight(tmp_path, caplog):
    reporter = Reporter()
    model, optimizer = parts(max_grad_norm=None, refresh_interval=3)
    trainer = make_trainer(tmp_path, model, optimizer, callbacks=[reporter])
    LiftCallback.attach(trainer)
    weights, moved = [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            weights[:] = [p.detach().clone() for p in model.parameters()]

        def on_optimizer_step(self, args, state, control, **kwargs):
            squares = [(p.detach() - w).square().sum() for p, w in zip(model.parameters(), weights)]
            moved.append(torch.stack(squares).sum().sqrt().item())
            watched.append(
                {n: optimizer.state[p]["indices"].clone() for n, p in model.named_parameters() if p in optimizer.state}
            )

    watched = []
    trainer.add_callback(Watch())
    trainer.train()
    logs = [entry for entry in reporter.logs if "loss" in entry]
    assert len(logs) == STEPS and logs == [
        {k: v for k, v in e.items() if k != "step"} for e in trainer.state.log_history[:STEPS]
    ]
    matrices = [p for p in model.parameters() if p in optimizer.state]
    density = sum(optimizer.state[p]["indices"].numel() for p in matrices) / sum(p.numel() for p in matrices)
    assert all(entry["lift_density"] == density for entry in logs)
    for i, entry in enumerate(logs):
        assert ("lift_mask_overlap" in entry) == ("lift_refresh_seconds" in entry) == (i >= 2)
        assert entry["lift_grad_norm"] > 0
        if i:  # before the first step there is no mask
            assert entry["lift_update_norm"] == pytest.approx(moved[i], rel=1e-4)
    for at in (2, 5):
        new, old = watched[at], watched[at - 1]
        shared = sum(torch.isin(new[n], old[n]).sum().item() for n in new)
        assert logs[at]["lift_mask_overlap"] == pytest.approx(shared / sum(len(m) for m in new.values()))
    assert 0.5 < logs[2]["lift_mask_overlap"] < 1
    assert not caplog.records
    assert_same_weights(model, by_loop(max_grad_norm=None, refresh_interval=3))


def test_lift_callback_logs_what_was_skipped(tmp_path):
    """Two refreshes are skipped. A figure about overlap with an old mask needs a new one."""
    reporter = Reporter()
    model, optimizer = parts(refresh_interval=3, refresh_drift=1.0)
    trainer = make_trainer(tmp_path, model, optimizer, callbacks=[reporter])
    LiftCallback.attach(trainer)
    trainer.train()
    logs = [entry for entry in reporter.logs if "loss" in entry]
    assert [entry["lift_refresh_skipped"] for entry in logs] == [0, 0, *[1] * (STEPS - 2)]
    predicted = [entry.get("lift_predicted_overlap") for entry in logs]
    assert predicted[:2] == [None, None] and 0.2 < predicted[5] < predicted[2] < 1
    assert predicted[5] == optimizer.last_refresh.predicted_overlap
    assert not any("lift_mask_overlap" in entry for entry in logs)


def test_lift_callback_warns_about_dense_clipping_and_refuses_other_optimizers(tmp_path, caplog):
    model, optimizer = parts()
    with caplog.at_level(logging.WARNING, logger="lift_kernels"):
        make_trainer(tmp_path, model, optimizer, callbacks=[LiftCallback()], max_grad_norm=1.0, max_steps=1).train()
    assert "set it to 0 and give max_grad_norm to LiftAdamW" in caplog.text
    with pytest.raises(ValueError, match=r"needs LiftAdamW as optimizer, got AdamW; give Trainer optimizer_cls"):
        make_trainer(tmp_path, make_model(FP32), callbacks=[LiftCallback()]).train()


def test_a_delta_of_a_trainer_run(tmp_path):
    """Trainer saves the model.

    The delta is made against the base in memory, applied and reverted.
    """
    model = by_trainer(tmp_path, BF16)
    model.save_pretrained(tmp_path / "model")
    save_delta(tmp_path / "model", make_model(BF16), tmp_path / "delta")
    copied = make_model(BF16)
    apply_delta(copied, tmp_path / "delta")
    assert_same_weights(copied, model)
    revert_delta(copied, tmp_path / "delta")
    assert_same_weights(copied, make_model(BF16))
