"""Trainer on two ranks, with its own clipping: LiftCallback registers the communication hook."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks

TESTS = Path(__file__).parents[1]
WORKER = """
import logging, os
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # accelerate wants them, and finds the ranks connected.
join()
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainerCallback, TrainingArguments
from helpers.language_model import METHOD, Tokens, make_model
from lift_kernels.integrations.transformers import LiftCallback

class Hooks(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        self.found = [hook.__name__ for hook, _ in trainer.model_wrapped._comm_hooks]

class Lines(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())

logging.getLogger("lift_kernels").addHandler(Lines())

def experts():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=64, num_hidden_layers=1, **sizes, **heads))

found = {}
for name, attached in {"attached": True, "plain": False, "packed": True}.items():
    lines, hooks = [], Hooks()
    packed = name == "packed"
    model = experts() if packed else make_model(torch.float32)
    model.lm_head.weight.data.mul_(300)  # Gradients are large enough to be clipped.
    if packed:
        groups = pack_gradients(model, extra="experts", freeze_rest=True, rank=4, density=0.1)
    else:
        groups = lift_param_groups(model, freeze_rest=True)
    arguments = TrainingArguments(
        folder, max_steps=6, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True, logging_steps=1,
        save_strategy="no", report_to="none", learning_rate=0.01,
    )
    options = METHOD | {"params": groups, "refresh_interval": 3}
    trainer = Trainer(model, arguments, train_dataset=Tokens(), optimizer_cls_and_kwargs=(LiftAdamW, options))
    trainer.add_callback(hooks)
    if attached:
        LiftCallback.attach(trainer)
    trainer.train()
    norms = [float(line["grad_norm"]) for line in trainer.state.log_history if "grad_norm" in line]
    found[name] = hooks.found, lines, norms, [p.detach() for p in model.parameters()]
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    limit = "MAX_GRAD_NORM = TrainingArguments('x', use_cpu=True).max_grad_norm\n"
    worker = f"import sys\nsys.path.insert(0, {str(TESTS)!r})\n" + WORKER.replace(
        "\nfound = {}", f"\n{limit}found = {{}}"
    )
    run_ranks(worker, 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_ranks_stay_equal_with_the_clipping_of_trainer(found):
    """Its default clips at 1.0 here, with a refresh in between."""
    for name in ("attached", "plain", "packed"):
        (_, _, norms, mine), (_, _, _, theirs) = (of_rank[name] for of_rank in found)
        assert all(map(torch.equal, mine, theirs)), name
    assert max(found[0]["attached"][2][1:]) > 1, "nothing was clipped after the first step"


@pytest.mark.slow
def test_the_callback_registers_the_hook_where_it_is_useful(found):
    """Then the norm that Trainer clips by is that of trained entries, so no line warns."""
    for of_rank in found:
        hooks, lines, norms, _ = of_rank["attached"]
        assert hooks == ["trained_entries_hook"]
        assert not any("clips by the norm of dense gradients" in line for line in lines)
        assert of_rank["plain"][0] == of_rank["packed"][0] == []
        assert norms[0] == of_rank["plain"][2][0] and norms[1] < 0.9 * of_rank["plain"][2][1]
