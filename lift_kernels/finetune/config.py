"""Options of a fine-tuning run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import check_settings

SPARSE = ("lift", "magnitude", "gradient", "random", "off_principal", "blocks", "runs", "random_runs")
"""Methods that train chosen entries of each matrix with LiftAdamW.

The last three choose blocks of 4 x 4 and runs of 16 entries, for comparisons (`masks`).
"""
ADAPTERS = ("lora", "shira")
"""Methods of peft, whose adapters are merged into the saved model."""
METHODS = (*SPARSE, "full", *ADAPTERS)
FIXED = ("gradient", "random", "random_runs")
"""Sparse methods that keep their first masks. Later ones would be the same, or need gradients."""
USED_BY = {
    "density": (*SPARSE, "shira"),
    "budget_rank": (*SPARSE, "shira"),
    "rank": ("lift", "off_principal", "blocks", "runs"),
    "refresh_interval": tuple(method for method in SPARSE if method not in FIXED),
    "refresh_drift": ("lift",),
    "gradients": SPARSE,
    "state_dtype": SPARSE,
    "master": SPARSE,
    "grad_dtype": SPARSE,
    "offload": SPARSE,
}
"""Which methods use an option. All use the others, and ``extra`` is refused where it has no use."""
LEARNING_RATES = dict.fromkeys(METHODS, 1e-3) | {"full": 1e-4}
"""Default peak learning rate of each method."""
BETAS = (0.9, 0.95)  # as in the LIFT paper
CLIP_NORM = 1.0  # largest norm of the gradient over the trained entries
GRADIENTS = ("packed", "dense")
STATE_DTYPES: dict[str, torch.dtype | str] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": "8bit"}
MASTERS = {"fp32": "fp32", "split": "split", "none": None}
PARALLEL = ("none", "ddp")
PROBLEMS = ("plain", "hard")
LOSSES = ("answers", "all")
METRICS = ("number", "exact", "choice", "none")
STEPS = 60
REFRESH_DRIFT = 0.03
"""Default of ``refresh_drift``; docs/guide.md says what it was measured on."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHOICES: dict[str, tuple[str | None, ...]] = {
    "method": METHODS,
    "gradients": GRADIENTS,
    "state_dtype": tuple(STATE_DTYPES),
    "master": tuple(MASTERS),
    "grad_dtype": ("float32", "bfloat16"),
    "offload": ("none", "cpu"),
    "dtype": tuple(DTYPES),
    "device": ("auto", "cpu", "cuda"),
    "parallel": PARALLEL,
    "problems": PROBLEMS,
    "loss": LOSSES,
    "metric": (None, *METRICS),
}


@dataclass(frozen=True)
class Settings:
    """Options of a fine-tuning run; ``python -m lift_kernels finetune --help`` lists them too.

    Attributes:
        model: directory, GGUF file or hub id; None is the bundled model.
        data: files, folders and hub ids that hold the samples; none generates word problems.
        split: split of data that has several, such as that of the hub.
        problems: level of the generated word problems, one of PROBLEMS.
        loss: one of LOSSES: on answers only, or on all tokens.
        shots: worked examples in front of a question, and the most samples that a training sequence
            joins; None takes 4 for question/answer data whose answers are numbers, else 0.
        packing: join samples into sequences of max_length tokens that do not see each other.
        truncate: cut samples that have more than max_length tokens, in place of leaving them out.
        metric: one of METRICS; None chooses one from the answers.
        neutral: text files whose loss is measured beside the built-in neutral text.
        method: one of METHODS.
        gradients: one of GRADIENTS, for the methods of SPARSE.
        state_dtype: of the moments of the methods of SPARSE, a key of STATE_DTYPES.
        master: masters of weights that are not float32, a key of MASTERS, for the methods of
            SPARSE.
        grad_dtype: of packed gradients, float32 or bfloat16.
        offload: cpu keeps the state of the methods of SPARSE in host memory, or none.
        density: share of each matrix that is trained, by the methods of SPARSE and shira.
        rank: rank of the approximation that selects the entries.
        budget_rank: train (rows + columns) x budget_rank entries per matrix, in place of density.
        include, exclude: regular expressions that are searched in the names of weights. Weights of
            linear layers and stacks of matrices are trained where include matches, or it is None,
            and exclude does not. For method full they choose among all weights.
        extra: regular expression; weights outside linear layers whose names match are trained too,
            by the methods of SPARSE. None trains stacks of matrices (3-D), such as experts, by
            the same rules; "" trains none. A stack that it names needs no match of include.
        refresh_interval: steps between mask refreshes; 0 for none.
        refresh_drift: a mask is refreshed when this share of its entries would change, by
            prediction; 0 refreshes every mask. For method lift alone.
        steps: optimizer steps; None takes 60, or as many as epochs need.
        epochs: passes over the training data, in place of steps; 0.5 is half of it.
        lr: peak learning rate; None takes the method's default.
        batch_size: samples per step.
        accumulation: backward passes per step; each sees its part of the batch.
        checkpointing: compute activations again in the backward pass, in place of keeping them.
        max_length: longest sample in tokens.
        dtype: dtype of the weights, a key of DTYPES.
        autocast: run forward passes in bfloat16 where the operations allow it; weights, gradients
            and the optimizer stay float32.
        device: auto, cpu or cuda.
        seed: seed of problems, order and random masks.
        eval_problems: number of held-out problems.
        save_steps: steps between checkpoints; 0 for none.
        name: directory of the run inside output; None takes method and time.
        output: directory of all runs.
        parallel: one of PARALLEL. "ddp" shares each batch out among the ranks that a launcher, such
            as torchrun, has started.
        report_to: a tracker that transformers knows, such as tensorboard, or none.

    Raises:
        UserError: for a value that is not allowed.
    """

    model: str | None = None
    data: tuple[str, ...] = ()
    split: str = "train"
    problems: str = "plain"
    loss: str = "answers"
    shots: int | None = None
    packing: bool = False
    truncate: bool = False
    metric: str | None = None
    neutral: tuple[str, ...] = ()
    method: str = "lift"
    gradients: str = "packed"
    state_dtype: str = "float32"
    master: str = "fp32"
    grad_dtype: str = "float32"
    offload: str = "none"
    density: float = 0.05
    rank: int = 64
    budget_rank: int | None = None
    include: str | None = None
    exclude: str | None = None
    extra: str | None = None
    refresh_interval: int = 25
    refresh_drift: float = REFRESH_DRIFT
    steps: int | None = None
    epochs: float | None = None
    lr: float | None = None
    batch_size: int = 8
    accumulation: int = 1
    checkpointing: bool = False
    max_length: int = 512
    dtype: str = "float32"
    autocast: bool = False
    device: str = "auto"
    seed: int = 0
    eval_problems: int = 100
    save_steps: int = 20
    name: str | None = None
    output: str = "runs"
    parallel: str = "none"
    report_to: str = "none"

    def __post_init__(self) -> None:
        for field in ("data", "neutral"):  # one name may come alone, and JSON has lists
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value or ()))
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", STEPS)
        check_settings(self, CHOICES, SPARSE)
