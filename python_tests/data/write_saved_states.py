"""Write the state dicts, checkpoints and deltas that every later version must load.

This was run once, by the version before the layout changed: ``python
python_tests/data/write_saved_states.py``. `test_saved_states.py` reads the files. They also hold
the gradients and the states that follow, because only elementwise updates give the same bits on
every machine.
"""

import itertools
from pathlib import Path

import torch
from torch import nn

from lift_kernels import LiftAdamW, pack_gradients, save_delta
from lift_kernels.checkpoint.training_state import save_checkpoint

HERE = Path(__file__).parent
STEPS_BEFORE, STEPS_AFTER = 4, 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def new_model(dtype: torch.dtype) -> nn.Module:
    """Two matrices and some dense parameters."""
    return nn.Sequential(nn.Linear(20, 24), nn.LayerNorm(24), nn.Linear(24, 18)).to(dtype)


def options_of(case: str) -> dict:
    """Options of LiftAdamW for a case such as ``matrix-bf16-global-fp32-spread``."""
    _, dtype, bias_correction, master, schedule = case.split("-")
    options = {
        "lr": 1e-2,
        "betas": (0.9, 0.95),
        "weight_decay": 0.1,
        "bias_correction": bias_correction,
        "master": None if master == "none" else "fp32",
        "refresh_interval": 100,
        "refresh_schedule": schedule,
        "seed": 7,
    }
    if master == "none" and dtype != "fp32" and schedule == "spread":
        options["rounding"] = "stochastic"
    if dtype == "bf16" and schedule == "spread":
        options["state_dtype"] = torch.bfloat16
    return options


def new_optimizer(case: str, model: nn.Module) -> LiftAdamW:
    """The optimizer of a case, over all parameters of the model."""
    masks = {"rank": 4, "density": 0.1}
    if case.startswith("packed"):
        groups = pack_gradients(model, **masks)
    else:
        groups = [{"params": [(n, p) for n, p in model.named_parameters() if p.dim() == 2], "lift": True, **masks}]
    taken = {id(p) for group in groups for _, p in group["params"]}
    rest = [(n, p) for n, p in model.named_parameters() if id(p) not in taken and p.requires_grad]
    return LiftAdamW([*groups, {"params": rest, "lift": False, "weight_decay": 0.0}], **options_of(case))


def gradients(optimizer: LiftAdamW, generator: torch.Generator) -> list[torch.Tensor]:
    """One gradient for every parameter, in the order of the groups."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in parameters]


def step(optimizer: LiftAdamW, grads: list[torch.Tensor]) -> None:
    """A step with these gradients."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p, grad in zip(parameters, grads):
        p.grad = grad.clone()
    optimizer.step()
    optimizer.zero_grad()


def cases() -> list[str]:
    """All combinations of form, dtype, bias correction, master and schedule that are allowed."""
    forms = itertools.product(
        ("matrix", "packed"), DTYPES, ("global", "per_entry"), ("fp32", "none"), ("all", "spread")
    )
    return ["-".join(form) for form in forms if form[0] == "matrix" or form[3] == "fp32"]


def checkpointed() -> list[str]:
    """The cases that the checkpoint holds too: both forms and all dtypes."""
    return [case for case in cases() if case.endswith("per_entry-fp32-all")]


def written(case: str) -> dict:
    """Train a case and return what the files hold.

    This is the model and the optimizer after a few steps, the gradients that follow, and both after
    these.
    """
    torch.manual_seed(cases().index(case))
    generator = torch.Generator().manual_seed(cases().index(case))
    model = new_model(DTYPES[case.split("-")[1]])
    optimizer = new_optimizer(case, model)
    for number in range(STEPS_BEFORE):
        step(optimizer, gradients(optimizer, generator))
        if number == 1:
            optimizer.refresh()
    saved = {"model": copied(model.state_dict()), "optimizer": copied(optimizer.state_dict())}
    saved["gradients"] = [gradients(optimizer, generator) for _ in range(STEPS_AFTER)]
    for grads in saved["gradients"]:
        step(optimizer, grads)
    return saved | {"model_after": copied(model.state_dict()), "optimizer_after": copied(optimizer.state_dict())}


def copied(value):
    """The same containers with tensors of their own."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return type(value)(map(copied, value)) if isinstance(value, (list, tuple)) else value


def main() -> None:
    """Write all files beside this one."""
    states = {case: written(case) for case in cases()}
    torch.save(states, HERE / "saved_states.pt")
    save_checkpoint(HERE / "saved_states.checkpoint", {case: states[case] for case in checkpointed()})
    for name in DTYPES:
        case = states[f"matrix-{name}-global-fp32-all"]
        base, tuned = new_model(DTYPES[name]), new_model(DTYPES[name])
        base.load_state_dict(case["model"])
        tuned.load_state_dict(case["model_after"])
        save_delta(tuned, base, HERE / f"saved_{name}.delta", settings={"density": 0.1})


if __name__ == "__main__":
    main()
