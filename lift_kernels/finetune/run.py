"""Fine-tune a causal language model on question/answer problems and report what changed and what it
cost.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import TrainingArguments

from ..checkpoint.atomic_file import write_atomic
from ..errors import UserError
from ..optim.lift_adamw import LiftAdamW
from . import evaluation, prompts, report, run_dir
from .config import DTYPES, Settings
from .data import SHOTS, choose_problems, fitting, training_sequences
from .methods import CLIP_NORM, prepare, state_bytes, trained_entries
from .model_io import find_model, load_model
from .run_dir import make_folder
from .timing import Clock
from .trainer import AnswerTrainer

WARMUP = 0.03  # share of the steps
EVAL_BATCH = 32
GENERATION_BATCH = 100  # decoding is bound by reading the weights, so a large batch costs little more than a small one


def measure(model, tokenizer, heldout, encoded, prefix: list[int], when: str) -> tuple[dict[str, Any], list[str]]:
    """Losses and exact match under keys that end in ``when``, and the answers that the model
    gave.
    """
    longest = max(sum(label != prompts.IGNORE for label in e["labels"]) for e in encoded)
    alone = [prompts.join(tokenizer, [example]) for example in encoded]
    loss = evaluation.mean_loss(model, tokenizer, alone, EVAL_BATCH, f"held-out loss {when}")
    neutral = evaluation.mean_loss(
        model, tokenizer, evaluation.neutral_examples(tokenizer), EVAL_BATCH, f"neutral loss {when}"
    )
    questions = [problem.question for problem in heldout]
    answers = evaluation.greedy_answers(
        model, tokenizer, questions, prefix, longest + 8, GENERATION_BATCH, f"answers {when}"
    )
    correct = sum(evaluation.same_number(a, p.answer) for a, p in zip(answers, heldout, strict=True))
    low, high = evaluation.wilson_interval(correct, len(heldout))
    results = {
        "heldout_loss": loss,
        "neutral_loss": neutral,
        "exact_match": correct / len(heldout),
    }
    figures = {f"{key}.{when}": value for key, value in results.items()}
    return figures | {f"exact_match.{when}_low": low, f"exact_match.{when}_high": high}, answers


def train(
    model, tokenizer, optimizer, sequences, rows, settings: Settings, folder: Path, clock: Clock, identity, checkpoint
):
    """Run transformers' Trainer up to ``settings.steps`` steps, from the start or a checkpoint;
    returns the training losses.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=rows,
        train_sampling_strategy="group_by_length",
        learning_rate=optimizer.param_groups[0]["lr"],
        lr_scheduler_type="linear",
        warmup_steps=max(1, round(WARMUP * settings.steps)),
        # LiftAdamW clips by the norm over its own entries; a norm over dense gradients would clip
        # harder.
        max_grad_norm=0.0 if isinstance(optimizer, LiftAdamW) else CLIP_NORM,
        logging_steps=10,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=model.device.type == "cuda",
        use_cpu=model.device.type == "cpu",
        seed=settings.seed,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process drives one GPU: DataParallel would give every replica its own weights
    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=sequences,
        data_collator=lambda batch: prompts.collate(batch, tokenizer.pad_token_id),
        optimizers=(optimizer, None),
        clock=clock,
    )
    trainer.identity = identity
    try:
        trainer.train_from(checkpoint)
    except UserError:
        trainer.callback_handler.on_train_end(arguments, trainer.state, trainer.control)  # closes the progress bar
        raise
    return trainer.losses


def run(settings: Settings, resumed: bool = False) -> report.Report:
    """Fine-tune, write ``<output>/<name>/`` and return the report; raises UserError for input that
    cannot be used.

    ``resumed`` goes on with the interrupted run in that directory; see `run_dir.settings_of`.
    """
    started = time.perf_counter()
    seconds: dict[str, float] = {}

    def phase(name: str, message: str) -> None:
        now = seconds[name] = time.perf_counter() - started
        print(f"[{now:5.0f} s] {message}", flush=True)

    phase("load", "loading the model")
    source = find_model(settings.model)
    problems, heldout, shots, data = choose_problems(settings)
    transformers.set_seed(settings.seed)
    model, tokenizer = load_model(source, DTYPES[settings.dtype])
    device = "cuda" if settings.device == "auto" and torch.cuda.is_available() else settings.device
    model.to(torch.device("cpu" if device == "auto" else device))  # type: ignore[arg-type]
    print(f"model: {source.description}, {settings.dtype}, on {model.device}\ndata: {data}")
    _, examples = fitting(tokenizer, problems, settings.max_length, "training")
    heldout, encoded = fitting(tokenizer, heldout, settings.max_length, "held-out")
    _, shown = fitting(tokenizer, shots, settings.max_length, "few-shot")
    longest = (SHOTS + 1) * max(len(e["input_ids"]) for e in [*examples, *encoded, *shown])
    limit = getattr(model.config, "max_position_embeddings", None) or longest
    if longest > limit:
        raise UserError(f"a few-shot prompt may need {longest} tokens, the model takes {limit}; lower --max-length")
    clock = Clock(model.device)
    sequences, batch_rows = training_sequences(tokenizer, examples, settings.batch_size)
    folder = Path(settings.output) / str(settings.name) if resumed else make_folder(settings)
    if resumed:
        run_dir.clean(folder)
    else:
        run_dir.begin(folder, settings)

    phase("mask", f"preparing method {settings.method}")
    try:
        model, optimizer, covered = prepare(model, settings, clock)
        identity = run_dir.identity(model, sequences)
        checkpoint = run_dir.find_checkpoint(folder, identity) if resumed else None
        if checkpoint is not None:
            print(f"resuming after step {checkpoint['step']}", flush=True)
    except ValueError as error:  # an option that does not fit this model's matrices, or weights that are not finite
        raise UserError(str(error)) from error

    phase("before", "measuring the model before training")
    prefix = prompts.join(tokenizer, shown)["input_ids"]
    noted = folder / run_dir.BEFORE
    if noted.exists():
        before, answers_before = json.loads(noted.read_text())
    else:
        before, answers_before = measure(model, tokenizer, heldout, encoded, prefix, "before")
        write_atomic(noted, json.dumps([before, answers_before]))

    phase("train", f"training {settings.steps} steps of {settings.batch_size} problems")
    losses = train(model, tokenizer, optimizer, sequences, batch_rows, settings, folder, clock, identity, checkpoint)
    clock.separate_refreshes()

    phase("after", "measuring the model after training")
    after, answers_after = measure(model, tokenizer, heldout, encoded, prefix, "after")

    phase("save", f"saving to {folder}")
    entries, weights = trained_entries(optimizer), sum(p.numel() for p in covered)
    state, lift = state_bytes(optimizer), isinstance(optimizer, LiftAdamW)
    if settings.method == "lora":
        model = model.merge_and_unload()
    run_dir.save_once(model, tokenizer, folder)
    phase("end", "done")

    names = list(seconds)
    spans = {a: seconds[b] - seconds[a] for a, b in zip(names, names[1:], strict=False)}
    results: report.Report = {
        "method": settings.method,
        "model.name": source.gguf_file or source.location,
        "model.description": source.description,
        "data.description": data,
        **dict(sorted((before | after).items())),
        "exact_match.problems": len(heldout),
        "entries": entries,
        "covered_weights": weights,
        "density": entries / weights,
        "optimizer_state_bytes.measured": state,
        "optimizer_state_bytes.dense": 8 * weights,  # two fp32 moments
        "gradient_bytes.measured": clock.gradient_bytes,
        "gradient_bytes.dense": sum(p.nbytes for p in covered),
        # Index lists, values or masters, moments and gradients: all that comes on top of the frozen
        # model.
        "extra_bytes.measured": state + clock.gradient_bytes,
        "extra_bytes.an_entry": (state + clock.gradient_bytes) / entries if lift else None,
        "refreshes": len(clock.refreshes),
        "seconds.forward_backward": median(clock.forward_backward),
        "seconds.step": median(clock.steps),
        "seconds.refresh": median(clock.refreshes.values()) if clock.refreshes else 0.0,
        **{f"seconds.{name}": span for name, span in spans.items()},
        "seconds.total": seconds["end"],
        **{f"settings.{key}": value for key, value in asdict(settings).items()},
        "settings.lr": optimizer.defaults["lr"],
        "versions.torch": torch.__version__,
        "versions.transformers": transformers.__version__,
    }
    rows = zip(heldout, answers_before, answers_after, strict=True)
    report.write_answers(
        folder / "answers.jsonl",
        [{"question": p.question, "expected": p.answer, "before": b, "after": a} for p, b, a in rows],
    )
    report.plot_losses(results, losses, list(clock.refreshes), folder / "loss.png")
    report.write_json(results, folder / run_dir.REPORT)  # last: it says that the run is finished
    run_dir.finish(folder)
    print(f"\n{report.table(results)}\n\nwritten to {folder}: report.json, answers.jsonl, loss.png, model/")
    return results
