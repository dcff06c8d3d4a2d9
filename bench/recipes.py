"""Memory and time of the paper's recipe on one card, for models of 1 B to 8 B parameters.

All is computed, not timed. The recipe is that of the paper's arithmetic runs (arXiv 2506.00772 and
the authors' scripts): MATH-10K, 3 epochs, 16 problems a step, bf16, 5 % of the entries.

Memory: 2 bytes a weight; 20 bytes a trained entry (fp32 value, gradient and two moments, int32
index); activations and logits of the tokens of one backward pass; 1 GB for CUDA and scratch.
Activations without checkpointing take a number of bytes for each token, layer and unit of (hidden
size + MLP size). It comes from the two training runs that were measured on an H200, the larger
number of both. With checkpointing each layer keeps its input, and one layer all of it. Logits are
taken as 10 bytes each. A card is said to be enough where 92 % of it holds the sum.

Time: tokens over the tokens/s that the H200 reached with the measured model of the nearest size,
times parameters over its parameters, and 4/3 of it with checkpointing. The masks are added, once
before training and every `INTERVAL` steps, at the measured time of a cold refresh per weight. Other
cards are scaled by their peak rate of dense bf16 products. Loading, evaluation and saving are not
counted. The measured runs had 4096 and 16384 tokens in a backward pass; short ones take longer.

    python -m bench.recipes [--csv bench/results/computed/recipes.csv]
"""

from __future__ import annotations

import argparse
import csv
import math
from dataclasses import dataclass
from pathlib import Path

from bench import ROOT
from bench.common import results

MEASURED = ROOT / "bench" / "results" / "nvidia-h200" / "gpu_time.csv"
DENSITY = 0.05
BATCH, EPOCHS, PROBLEMS, INTERVAL = 16, 3, 10_000, 400
TOKENS = 210
"""Tokens of a problem, as on average in MetaMathQA with Llama 3's tokenizer: PEFT's comparison
counts 4,198,051 in 20,000."""
WEIGHT, ENTRY, LOGIT = 2, 20, 10
"""Bytes."""
CONTEXT = 1e9
USABLE = 0.92
GIB = 2**30


@dataclass(frozen=True)
class Model:
    """Shape of a Llama, and what the authors' scripts choose for it.

    Attributes:
        keys: width of keys and of values.
        tied: whether embedding and head are one matrix.
        rank: of the approximation that selects entries.
    """

    name: str
    hidden: int
    mlp: int
    layers: int
    keys: int
    vocabulary: int
    tied: bool
    rank: int = 0
    lr: float = 0.0

    @property
    def linear(self) -> int:
        """Weights of the linear layers."""
        return self.layers * (2 * self.hidden * (self.hidden + self.keys) + 3 * self.hidden * self.mlp)

    @property
    def parameters(self) -> int:
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.linear + embeddings + (2 * self.layers + 1) * self.hidden

    @property
    def entries(self) -> int:
        return round(DENSITY * self.linear)


@dataclass(frozen=True)
class Card:
    """A card: its name in the CSV, GiB, and TFLOP/s of dense bf16 products by its data sheet."""

    name: str
    memory: int
    tflops: float


@dataclass(frozen=True)
class Setting:
    name: str
    accumulation: int
    checkpointing: bool


MODELS = (
    Model("Llama-3.2-1B", 2048, 8192, 16, 512, 128256, True, 32, 2e-4),
    Model("Llama-3.2-3B", 3072, 8192, 28, 1024, 128256, True, 64, 2e-4),
    Model("LLaMA-2-7B", 4096, 11008, 32, 4096, 32000, False, 64, 2e-4),
    Model("Llama-3-8B", 4096, 14336, 32, 1024, 128256, False, 128, 1e-4),
)
H200 = Card("h200", 141, 989)
CARDS = (H200, Card("a100", 80, 312), Card("l40s", 48, 362), Card("rtx_4090", 24, 165))
SETTINGS = (Setting("one backward pass a step", 1, False), Setting("4 passes, checkpointing", 4, True))
MEASURED_MODELS = {
    "training": (Model("1.1 B", 2048, 5632, 22, 256, 32000, False), 8 * 2048),
    "training 7B": (Model("6.7 B", 4096, 11008, 32, 4096, 32000, False), 2 * 2048),
}
"""By stage of bench/gpu_suite.py: the model, and the tokens of a backward pass."""
REFRESHED = MODELS[2]  # whose masks were timed


@dataclass(frozen=True)
class Rates:
    """What the H200 was measured at.

    Attributes:
        tokens: tokens/s by model.
        activation: bytes for each token, layer and unit of hidden size + MLP size.
        refresh: seconds of a cold refresh for each weight.
    """

    tokens: dict[Model, float]
    activation: float
    refresh: float


def measured(path: Path = MEASURED) -> Rates:
    """Read the rates from the results of bench/gpu_suite.py."""
    with path.open(newline="") as file:
        rows = {(row["stage"], row["variant"]): row for row in csv.DictReader(file)}
    tokens, activation = {}, 0.0
    for stage, (model, count) in MEASURED_MODELS.items():
        row = rows[stage, "LIFT, packed mode"]
        tokens[model] = float(row["tokens_per_s"])
        rest = 1e9 * (float(row["peak_gb"]) - float(row["state_gb"])) - WEIGHT * model.parameters
        kept = rest - count * LOGIT * model.vocabulary
        activation = max(activation, kept / (count * model.layers * (model.hidden + model.mlp)))
    seconds = float(rows["refresh", "cold, all matrices"]["median_ms"]) / 1e3
    return Rates(tokens, activation, seconds / REFRESHED.linear)


def activation_bytes(model: Model, setting: Setting, rates: Rates) -> float:
    """Bytes of activations and logits in one backward pass."""
    layer = rates.activation * (model.hidden + model.mlp)
    layers = model.layers * WEIGHT * model.hidden + layer if setting.checkpointing else model.layers * layer
    return BATCH * TOKENS / setting.accumulation * (layers + LOGIT * model.vocabulary)


def training_seconds(model: Model, setting: Setting, rates: Rates) -> float:
    """Seconds of training on the H200, with its masks."""
    near = min(rates.tokens, key=lambda other: abs(math.log(other.parameters / model.parameters)))
    rate = rates.tokens[near] * near.parameters / model.parameters
    steps = EPOCHS * PROBLEMS // BATCH
    refreshes = 1 + (steps - 1) // INTERVAL
    training = EPOCHS * PROBLEMS * TOKENS / rate * (4 / 3 if setting.checkpointing else 1)
    return training + refreshes * rates.refresh * model.linear


def row_of(model: Model, setting: Setting, rates: Rates) -> dict:
    """The CSV row of a model with a setting."""
    parts = {
        "weights_gb": WEIGHT * model.parameters,
        "entries_gb": ENTRY * model.entries,
        "activations_gb": activation_bytes(model, setting, rates),
    }
    total = sum(parts.values()) + CONTEXT
    enough = [card for card in CARDS if total <= USABLE * card.memory * GIB]
    seconds = training_seconds(model, setting, rates)
    return (
        {"model": model.name, "setting": setting.name, "rank": model.rank, "lr": model.lr}
        | {"steps": EPOCHS * PROBLEMS // BATCH, "parameters": model.parameters, "entries": model.entries}
        | {name: f"{number / 1e9:.3g}" for name, number in (parts | {"total_gb": total}).items()}
        | {"card_gb": min((card.memory for card in enough), default="")}
        | {
            f"minutes_{card.name}": f"{seconds / 60 * H200.tflops / card.tflops:.3g}" if card in enough else ""
            for card in CARDS
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="where to write the rows")
    options = parser.parse_args()
    rates = measured()
    rows = [row_of(model, setting, rates) for model in MODELS for setting in SETTINGS]
    results.show(rows, list(rows[0]))
    if options.csv:
        commit = results.environment()["commit"]
        results.write_csv(options.csv, [row | {"commit": commit} for row in rows])


if __name__ == "__main__":
    main()
