"""Stand-in of `utils`: training parameters, model, optimizer, size of a checkpoint, results."""

import json
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

HERE = Path(__file__).parent


class TrainStatus(Enum):
    SUCCESS = "success"
    CANCELED = "canceled"


@dataclass
class TrainConfig:
    model_id: str
    batch_size: int
    max_steps: int
    grad_norm_clip: float
    optimizer_type: str
    optimizer_kwargs: dict[str, Any]
    query_template: str

    def __post_init__(self) -> None:
        if not hasattr(torch.optim, self.optimizer_type):
            raise ValueError(f"Invalid optimizer_type: {self.optimizer_type}")


@dataclass
class TrainResult:
    status: TrainStatus
    losses: list[float]
    metrics: list[dict[str, Any]]
    num_trainable_params: int
    num_total_params: int
    error_msg: str


def get_train_config(path: str) -> TrainConfig:
    defaults = json.loads((HERE / "default_training_params.json").read_text())
    return TrainConfig(**{**defaults, **json.loads(Path(path).read_text())})


def get_tokenizer(model_id: str):
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    return tokenizer


def get_model(model_id: str):
    return AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.bfloat16)


def get_optimizer_and_scheduler(model, *, optimizer_type, max_steps, lr_scheduler_arg, **optimizer_kwargs):
    optimizer = getattr(torch.optim, optimizer_type)(model.parameters(), **optimizer_kwargs)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, max_steps // 10, max_steps)


def get_accuracy(*, predictions: list[str], responses: list[str]) -> float:
    answers = [[text.rpartition("The answer is: ")[2] for text in texts] for texts in (predictions, responses)]
    return sum(a == b for a, b in zip(*answers, strict=True)) / len(responses)


def get_file_size(model, *, peft_config, clean, print_fn) -> int:
    raise AssertionError("the size of a whole model; LIFT's entry has another")


def log_results(
    *, experiment_name, train_result, file_size, train_config, peft_config, print_fn, start_date, **others
) -> None:
    log = {
        "run_info": {
            "created_at": start_date,
            "experiment_name": experiment_name,
            "train_config": asdict(train_config),
            "peft_config": None if peft_config is None else peft_config.to_dict(),
            "error_msg": train_result.error_msg,
        },
        "train_info": {
            "file_size": file_size,
            "num_trainable_params": train_result.num_trainable_params,
            "num_total_params": train_result.num_total_params,
            "status": train_result.status.value,
            "metrics": train_result.metrics,
        },
    }
    file = HERE / "results" / f"{experiment_name.replace('/', '--')}.json"
    file.write_text(json.dumps(log))
    print_fn(f"Saved log to: {file}")
