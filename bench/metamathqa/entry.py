"""Makes PEFT's comparison train with LiftAdamW on packed gradients, and says so in its results.

Their modules `utils`, `data` and `run` do everything: data, training loop, evaluation, results.
`enter` puts LIFT in three places of `run`:

- the optimizer, where an experiment's ``optimizer_type`` is LiftAdamW;
- the size of the checkpoint, which is that of a delta file;
- the method's name and options in the result, where an adapter has its configuration.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

import lift_kernels
from lift_kernels import LiftAdamW, pack_gradients, save_delta

FOLDER = Path("method_comparison") / "MetaMathQA"
COMMIT = "5d602fdbf"  # of PEFT, which this was written for
MODULES = ("utils", "data", "run")
"""In an order in which each imports the earlier ones."""
REPLACED = ("get_optimizer_and_scheduler", "get_file_size", "log_results")
OF_MASKS = ("density", "budget_rank", "rank", "selection", "seed")
"""Options of both `pack_gradients` and `LiftAdamW`."""
OF_PACKING = ("include", "exclude")


class ComparisonError(Exception):
    """PEFT's comparison cannot be used; one line says why and what helps."""


def load_comparison(peft: Path) -> ModuleType:
    """Import the comparison of a checkout of PEFT.

    Args:
        peft: directory of the checkout.

    Returns:
        Their module `run`.

    Raises:
        ComparisonError: for a directory without it, a package or a card that it lacks, or one that
            has changed.
    """
    for name in MODULES:
        file = peft / FOLDER / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None or not file.is_file():
            raise ComparisonError(f"{file} is missing; give --peft a checkout of github.com/huggingface/peft")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # the others import it by this name
        try:
            spec.loader.exec_module(module)
        except (ImportError, RuntimeError) as error:
            raise ComparisonError(f"cannot import {file}: {error}; see bench/metamathqa/README.md") from error
    missing = [name for name in ("main", *REPLACED) if not callable(getattr(module, name, None))]
    if missing:
        raise ComparisonError(f"{file} has no {', '.join(missing)}; check out commit {COMMIT} of PEFT")
    return module


def lift_optimizer(model: nn.Module, **options: Any) -> LiftAdamW:
    """Pack the gradients of a model and make its optimizer. Everything else is frozen.

    Args:
        model: plain model with the pretrained weights.
        options: of `LiftAdamW`, and ``include`` and ``exclude`` of `pack_gradients`.
    """
    masks = {name: options[name] for name in OF_MASKS if name in options}
    packing = {name: options.pop(name) for name in OF_PACKING if name in options}
    return LiftAdamW(pack_gradients(model, freeze_rest=True, **packing, **masks), **options)


def base_directory(name: str) -> Path:
    """Return the directory of a model that was loaded by its hub id or its path."""
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(name, local_files_only=True))


def enter(run: ModuleType, delta: Path) -> list[str]:
    """Put LIFT into their module `run`.

    Args:
        run: of `load_comparison`.
        delta: file that gets what training has changed.

    Returns:
        A list to which a run adds its status, "success" where it went well.
    """
    statuses: list[str] = []
    theirs: dict[str, Callable[..., Any]] = {name: getattr(run, name) for name in REPLACED}
    torch.optim.LiftAdamW = LiftAdamW  # experiments name an optimizer of torch.optim

    def get_optimizer_and_scheduler(model: nn.Module, **options: Any) -> tuple[LiftAdamW, Any]:
        weights = model.num_parameters()
        torch.optim.LiftAdamW = lambda parameters, **given: lift_optimizer(model, **given)
        try:
            optimizer, scheduler = theirs["get_optimizer_and_scheduler"](model, **options)
        finally:
            torch.optim.LiftAdamW = LiftAdamW
        entries = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        model.get_nb_trainable_parameters = lambda: (entries, weights)
        return optimizer, scheduler

    def get_file_size(model: nn.Module, *, print_fn: Callable[..., None], **unused: Any) -> int:
        delta.parent.mkdir(parents=True, exist_ok=True)
        info = save_delta(model, base_directory(model.config.name_or_path), delta)
        print_fn(f"{info.entries:,} entries changed; saved in {delta}")
        return delta.stat().st_size

    def log_results(*, train_config: Any, train_result: Any, peft_config: None, **others: Any) -> None:
        described = {"peft_type": "LIFT", "lift_kernels_version": lift_kernels.__version__}
        config = SimpleNamespace(to_dict=lambda: described | train_config.optimizer_kwargs)
        statuses.append(train_result.status.value)
        theirs["log_results"](train_config=train_config, train_result=train_result, peft_config=config, **others)

    replacements = (get_optimizer_and_scheduler, get_file_size, log_results)
    for name, replacement in zip(REPLACED, replacements):
        setattr(run, name, replacement)
    return statuses
