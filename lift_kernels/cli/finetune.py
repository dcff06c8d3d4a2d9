"""The command ``finetune``: start or resume a fine-tuning run."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from ..errors import UserError


def add_parser(commands: Any) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser(
        "finetune",
        allow_abbrev=False,  # an option that is cut short would be taken for another
        help="fine-tune a language model and report the result",
        description="Fine-tune a language model, measure it before and after, and write a report, a plot and the\n"
        "model. The defaults train SmolLM2-135M-Instruct on generated word problems.",
        usage="%(prog)s [options]",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    data = parser.add_argument_group("data")
    add_data(data)
    data.add_argument("--seed", type=int, help="seed of problems, order and random masks (default: 0)")
    _add_method(parser.add_argument_group("method", "what is trained"))
    _add_state(parser.add_argument_group("memory", "how the methods that choose entries keep their state"))
    training = parser.add_argument_group("training")
    add_training(training, steps=60)
    training.add_argument("--lr", type=float, help="peak learning rate (default: 1e-3; full: 1e-4)")
    training.add_argument(
        "--parallel", help="none, or ddp: share each batch out among the ranks of torchrun (default: none)"
    )
    training.add_argument(
        "--fit",
        metavar="SIZE",
        help="choose --accumulation, --checkpointing and --dtype, where they are not given, so that\n"
        "training fits into so much memory, such as 24GiB",
    )
    _add_measuring(parser.add_argument_group("measuring", "before and after training"))
    _add_output(parser.add_argument_group("output"))
    parser.set_defaults(run=run, input_errors=())


def add_data(group: Any) -> None:
    """Add the options that name model and data."""
    add = group.add_argument
    add(
        "--model",
        metavar="DIR|GGUF|ID",
        help="model directory, GGUF file or hub id (default: the bundled SmolLM2-135M)",
    )
    add(
        "--data",
        nargs="+",
        action="extend",
        metavar="FILE|DIR|ID",
        help="what to train on: files, folders, hub ids; at most a fifth is held out\n"
        "(default: generated word problems)",
    )
    add("--split", help="split of data that has several (default: train)")
    add("--problems", help="level of the generated word problems: plain or hard (default: plain)")
    add("--loss", help="train on the answers, or on all tokens: answers or all (default: answers)")
    add(
        "--shots",
        type=int,
        metavar="N",
        help="worked examples in front of a question, and the most samples that a training\nsequence joins (default: 4 "
        "for questions whose answers are numbers, else 0)",
    )
    add(
        "--packing",
        action="store_true",
        default=None,
        help="join samples into sequences of --max-length tokens; they do not see each other",
    )
    add("--max-length", type=int, metavar="TOKENS", help="leave out samples with more tokens (default: 512)")
    add(
        "--truncate",
        action="store_true",
        default=None,
        help="cut the ends of training samples that are too long; long held-out samples are left out all the same",
    )


METHODS = {
    "lift": "the largest entries of a low-rank approximation",
    "magnitude": "the largest weights",
    "gradient": "the largest gradients of the first batches; the masks stay",
    "random": "random entries; the masks stay",
    "off_principal": "the smallest entries of the approximation, without the largest weights",
    "blocks": "blocks of 4 x 4 with the largest sums of the approximation, to compare",
    "runs": "runs of 16 in a row with the largest sums, to compare",
    "random_runs": "random runs of 16, to compare",
    "full": "every weight",
    "lora": "adapters of rank 16 (peft), merged into the saved model",
    "shira": "random entries as an adapter of peft, merged into the saved model",
}
"""What each method trains, for the help."""


def _add_method(group: Any) -> None:
    group.add_argument("--method", help=f"default: lift\n{methods_help()}")
    add_masks(group)


def methods_help() -> str:
    """Return what each method trains, one a line."""
    width = max(map(len, METHODS))
    return "\n".join(f"{method:<{width}}  {what}" for method, what in METHODS.items())


def add_masks(group: Any) -> None:
    """Add the options that say which weights are trained, whatever the method."""
    add = group.add_argument
    add("--density", type=float, metavar="SHARE", help="share of each matrix that is trained (default: 0.05)")
    add(
        "--budget-rank",
        type=int,
        metavar="R",
        help="train (rows + columns) x R entries of each matrix, in place of --density",
    )
    add("--rank", type=int, help="rank of the approximation (default: 64)")
    add(
        "--include",
        metavar="REGEX",
        help="train the linear layers and experts that match by name, and no others; with full, the\n"
        "weights (default: all)",
    )
    add(
        "--exclude",
        metavar="REGEX",
        help="leave out the linear layers and experts, with full the weights, that match by name",
    )
    add(
        "--extra",
        metavar="REGEX",
        help="further matrices to train beside linear layers, by name; '' for none\n(default: stacked expert weights)",
    )
    add("--refresh-interval", type=int, metavar="STEPS", help="steps between mask refreshes, 0 for none (default: 25)")
    add(
        "--refresh-drift",
        type=float,
        metavar="SHARE",
        help="refresh a mask of lift only when this share of its entries would change, by\nprediction; 0 refreshes all "
        "(default: 0.03)",
    )
    add(
        "--gradients",
        help="packed or dense, for the methods that choose entries; packed: identical result, lower\nmemory "
        "(default: packed)",
    )


def _add_state(group: Any) -> None:
    """Add the options that say how gradients and optimizer state are kept, by the same methods."""
    add = group.add_argument
    add("--state-dtype", help="of the moments: float32, bfloat16 or 8bit (default: float32)")
    add(
        "--master",
        help="what is kept of the float32 values of bfloat16 weights: fp32, split (the low halves)\nor none "
        "(default: fp32)",
    )
    add("--grad-dtype", help="of packed gradients: float32 or bfloat16 (default: float32)")
    add("--offload", help="cpu: moments and masters in host memory, and the step on the CPU (default: none)")


def add_training(group: Any, steps: int) -> None:
    """Add the options of training; ``steps`` is their default number."""
    add = group.add_argument
    add("--steps", type=int, help=f"optimizer steps (default: {steps})")
    add("--epochs", type=float, help="passes over the training data, in place of --steps; 0.5 is half of it")
    add("--batch-size", type=int, metavar="SAMPLES", help="samples per step (default: 8)")
    add(
        "--accumulation",
        type=int,
        metavar="N",
        help="compute a step in N passes, each with a part of its samples: lower memory (default: 1)",
    )
    add(
        "--checkpointing",
        action="store_true",
        default=None,
        help="compute activations again in the backward pass: lower memory, a third slower",
    )
    add("--dtype", help="of the weights: float32, bfloat16 or float16 (default: float32)")
    add(
        "--autocast",
        action="store_true",
        default=None,
        help="forward passes in bfloat16; weights, gradients and the optimizer stay float32",
    )
    add("--device", help="auto, cpu or cuda (default: auto)")


def _add_measuring(group: Any) -> None:
    add = group.add_argument
    add("--eval-problems", type=int, metavar="SAMPLES", help="number of held-out samples (default: 100)")
    add(
        "--metric",
        help="how answers are scored: number, exact, choice or none (default: by the answers)",
    )
    add(
        "--neutral",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="further texts whose loss is measured: what the model should not forget",
    )


def _add_output(group: Any) -> None:
    add = group.add_argument
    add("--name", help="directory of the run inside --output (default: method and time)")
    add("--output", metavar="DIR", help="directory of all runs (default: runs)")
    add("--save-steps", type=int, metavar="STEPS", help="steps between checkpoints, 0 for none (default: 20)")
    add(
        "--report-to",
        metavar="TRACKER",
        help="send the losses to a tracker that transformers knows, such as tensorboard (default: none)",
    )
    add(
        "--resume",
        metavar="DIR",
        help="continue the interrupted run in this directory, bit-exactly; takes no other option",
    )


def run(options: argparse.Namespace) -> int:
    """Start a run, or resume an interrupted one.

    Raises:
        UserError: for invalid input.
    """
    from ..finetune import Settings, run, settings_of
    from ..finetune.config import METHODS, USED_BY
    from ..finetune.fit import fitted
    from ..finetune.parallel import SaidElsewhere, said_once, speaks_for_node

    given = {f.name: value for f in fields(Settings) if (value := getattr(options, f.name, None)) is not None}
    try:
        with said_once(speaks_for_node):
            if options.resume is not None and (given or options.fit):
                names = [*given, *["fit"] * bool(options.fit)]
                raise UserError(f"--resume takes all options from the interrupted run; leave out {', '.join(names)}")
            settings = Settings(**given) if options.resume is None else settings_of(options.resume)
            if options.fit:
                settings, choice = fitted(settings, given, options.fit)
                if speaks_for_node(""):
                    print(choice, flush=True)
        idle = [f"--{name.replace('_', '-')}" for name in given if settings.method not in USED_BY.get(name, METHODS)]
        if idle and speaks_for_node(""):
            print(f"method {settings.method} has no use for {', '.join(idle)}")
        run(settings, resumed=options.resume is not None)
    except SaidElsewhere:
        return 2
    return 0
