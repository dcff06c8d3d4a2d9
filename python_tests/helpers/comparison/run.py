"""Stand-in of `run`: the training loop and what comes after it.

Who calls `main` sets `print_verbose` first.
"""

import torch
from data import SAMPLES, get_train_samples
from utils import (
    TrainResult,
    TrainStatus,
    get_accuracy,
    get_file_size,
    get_model,
    get_optimizer_and_scheduler,
    get_tokenizer,
    get_train_config,
    log_results,
)


def evaluate(model, tokenizer, template: str) -> float:
    predictions = []
    with torch.inference_mode():
        for sample in SAMPLES:
            batch = tokenizer(template.format(query=sample["query"]), return_tensors="pt")
            output = model.generate(**batch, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            predictions.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return get_accuracy(predictions=predictions, responses=[s["response"] for s in SAMPLES])


def train(*, model, tokenizer, config) -> TrainResult:
    optimizer, scheduler = get_optimizer_and_scheduler(
        model,
        optimizer_type=config.optimizer_type,
        max_steps=config.max_steps,
        lr_scheduler_arg="cosine",
        **config.optimizer_kwargs,
    )
    trainable = total = model.num_parameters()
    if hasattr(model, "get_nb_trainable_parameters"):
        trainable, total = model.get_nb_trainable_parameters()
    samples, losses, status, error = get_train_samples(tokenizer, config.query_template), [], TrainStatus.SUCCESS, ""
    try:
        for step in range(config.max_steps):
            chosen = [samples[(step * config.batch_size + i) % len(samples)] for i in range(config.batch_size)]
            batch = tokenizer.pad({"input_ids": chosen}, return_tensors="pt")
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            optimizer.zero_grad()
            loss = model(**batch, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_norm_clip)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        model.eval()
        accuracy = evaluate(model, tokenizer, config.query_template)
        metrics = [{"step": config.max_steps, "test accuracy": accuracy, "train loss": losses[-1]}]
    except Exception as exception:
        status, error, metrics = TrainStatus.CANCELED, str(exception), []
    return TrainResult(status, losses, metrics, trainable, total, error)


def main(*, path_experiment: str, experiment_name: str, clean: bool, bucket_name: str | None) -> None:
    torch.manual_seed(0)
    config = get_train_config(f"{path_experiment}/training_params.json")
    model = get_model(config.model_id)
    result = train(model=model, tokenizer=get_tokenizer(config.model_id), config=config)
    print_verbose(f"losses: {result.losses}")  # noqa: F821
    size = get_file_size(model, peft_config=None, clean=clean, print_fn=print_verbose)  # noqa: F821
    log_results(
        experiment_name=experiment_name,
        train_result=result,
        accelerator_memory_init=0,
        time_total=0.0,
        file_size=size,
        model_info=None,
        datasets_info={},
        start_date="2026-01-01T00:00:00+00:00",
        train_config=config,
        peft_config=None,
        print_fn=print_verbose,  # noqa: F821
    )
