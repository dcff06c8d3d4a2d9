"""The fine-tuning command on several ranks: the results of one process, and one of everything."""

from __future__ import annotations

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.architectures import save_architecture
from helpers.bits import HANG_S
from helpers.finetune_runs import assert_same_end
from helpers.forked_ranks import run_forked
from helpers.tiny_llama import save_tiny
from safetensors.torch import load_file
from torch.distributed import HashStore

from lift_kernels.checkpoint import load_checkpoint
from lift_kernels.errors import UserError
from lift_kernels.finetune import word_problems
from lift_kernels.finetune.config import Settings
from lift_kernels.finetune.parallel import Ranks, fresh_part

METHODS = {
    "lift": "--method lift",
    "random": "--method random --gradients dense",
    "lora": "--method lora",
    "full": "--method full --lr 1e-3",
    "experts": "--method lift --model {folder}/mixtral",
}
RANKS = {"lift": 2, "random": 3, "lora": 2, "full": 2, "experts": 2}
FILES = ["answers.jsonl", "before.json", "checkpoint.safetensors", "model", "report.json", "settings.json"]
"""What a run leaves. The helper keeps the files that only an interrupted run needs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and problems for four batches of 5 and one of 1, which several ranks share."""
    folder = tmp_path_factory.mktemp("ddp")
    save_tiny(folder / "tiny", num_hidden_layers=1)
    problems = word_problems.generate(21 + 4 + 5, "train")
    lines = [json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in problems]
    (folder / "data0.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def command(folder):
    """A function that returns a command of `run_forked`: a short run in folder/runs."""

    def make(ranks: int, *more: str, **options) -> dict:
        model = f"--model {folder}/tiny --data {folder}/data0.jsonl --output {folder}/runs --device cpu".split()
        short = "--batch-size 5 --steps 6 --eval-problems 5 --rank 4 --density 0.2 --refresh-interval 3".split()
        parallel = ["--parallel", "ddp"] if ranks else []
        arguments = [*model, *short, "--lr", "5e-3", "--save-steps", "1", *parallel, *more]
        return {"ranks": ranks, "arguments": arguments, **options}

    return make


def run_methods(command, model_folder, folder, *methods: str) -> dict:
    """Run methods by one process and by several ranks; return what each rank said."""
    commands = {}
    for method in methods:
        more = METHODS[method].format(folder=model_folder).split()
        commands[method, "one"] = command(0, *more, "--name", f"{method}-one")
        commands[method, "all"] = command(RANKS[method], *more, "--name", f"{method}-all")
    said = run_forked(folder, list(commands.values()))
    for ranks in said:
        assert [code for code, _, _ in ranks] == [0] * len(ranks), ranks
    return dict(zip(commands, said))


@pytest.fixture(scope="module")
def lift(command, folder, tmp_path_factory):
    return run_methods(command, folder, tmp_path_factory.mktemp("lift"), "lift")


@pytest.fixture(scope="module")
def others(command, folder, tmp_path_factory):
    save_architecture("mixtral", folder / "mixtral")
    return run_methods(command, folder, tmp_path_factory.mktemp("others"), "random", "lora", "full", "experts")


def assert_same_answers(several, one):
    """The answers are equal. Losses are rounded by their batches, which several ranks share out."""
    a, e = ([json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()] for run in (several, one))
    assert len(a) == len(e) > 0
    for left, right in zip(a, e):
        for key in ("loss_before", "loss_after"):
            assert left.pop(key) == pytest.approx(right.pop(key), rel=1e-5)
        assert left == right


PARAMETERS = [
    pytest.param("lift", "lift"),
    *(pytest.param(method, "others", marks=pytest.mark.slow) for method in ("random", "lora", "full", "experts")),
]


@pytest.mark.parametrize(("method", "said"), PARAMETERS)
def test_several_ranks_train_the_model_of_one_process(request, folder, method, said):
    """Two epochs, each with a last batch of one sequence. One rank alone writes and speaks."""
    said = request.getfixturevalue(said)
    one, several = folder / "runs" / f"{method}-one", folder / "runs" / f"{method}-all"
    assert_same_model(folder / ("mixtral" if method == "experts" else "tiny"), several, one)
    assert_same_report(several, one, RANKS[method])
    assert_same_answers(several, one)
    [(_, alone, _)], [(_, first, _), *silent] = said[method, "one"], said[method, "all"]
    assert phases(first.replace(f"{method}-all", f"{method}-one")) == phases(alone)
    for _, out, error in silent:
        assert out == "" and [line for line in error.splitlines() if "reducer.cpp" not in line] == []
    assert sorted(path.name for path in several.iterdir()) == FILES


def assert_same_model(start, actual, expected) -> None:
    start, actual, expected = (
        load_file(path / "model.safetensors") for path in (start, actual / "model", expected / "model")
    )
    assert sum(not torch.equal(value, start[name]) for name, value in expected.items()) >= 7
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6 * value.abs().max().item(), msg=name)


def assert_same_report(actual, expected, ranks: int) -> None:
    a, e = (json.loads((run / "report.json").read_text()) for run in (actual, expected))
    assert a.keys() == e.keys()
    assert (a["ranks"], e["ranks"]) == (ranks, 1)
    assert (a["settings.parallel"], e["settings.parallel"]) == ("ddp", "none")
    for key in ("heldout_loss", "neutral_loss"):
        for when in ("before", "after"):
            assert a[f"{key}.{when}"] == pytest.approx(e[f"{key}.{when}"], rel=1e-5), key
    for key in ("entries", "gradient_bytes.measured", "optimizer_state_bytes.measured", "exact_match.after"):
        assert a[key] == e[key], key
    assert [row["refreshed"] for row in a["refreshes.due"]] == [row["refreshed"] for row in e["refreshes.due"]]


def phases(said: str) -> list[str]:
    """The lines of phases, without their times."""
    return [line.split("] ")[1] for line in said.splitlines() if line.startswith("[")]


def test_losses_and_moments_are_those_of_the_whole_batch(lift, folder):
    """A constant factor of the gradients would change moments alone."""
    several, one = (
        load_checkpoint(folder / "runs" / f"lift-{name}" / "checkpoint.safetensors") for name in ("all", "one")
    )
    assert several["progress"]["losses"] == pytest.approx(one["progress"]["losses"], rel=1e-5)
    assert len(one["progress"]["losses"]) == 6
    for name, expected in one["optimizer"]["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            actual, largest = several["optimizer"]["state"][name][key], expected[key].abs().max().item()
            torch.testing.assert_close(actual, expected[key], rtol=1e-4, atol=1e-5 * largest, msg=f"{name} {key}")
    assert [len(run["random"]) for run in (several, one)] == [2, 1]


@pytest.mark.slow
def test_a_run_that_lost_a_rank_goes_on_to_the_bits_of_an_undisturbed_one(command, folder, tmp_path):
    """The other rank stops with an error. Resuming takes the same number of ranks.

    A command that a launcher has started again continues its own run. The model has dropout, so
    that each rank has a random state of its own.
    """
    again = {"TORCHELASTIC_RESTART_COUNT": "1"}
    model = ["--model", str(save_tiny(folder / "dropout", num_hidden_layers=1, attention_dropout=0.1))]
    named, unnamed = [*model, "--name", "killed"], [*model, "--output", str(folder / "own")]
    resume = {"arguments": ["--resume", str(folder / "runs" / "killed")]}
    undisturbed = folder / "runs" / "undisturbed"
    whole, died, refused, resumed, first_died, restarted, finished = run_forked(
        tmp_path,
        [
            command(2, *model, "--name", "undisturbed"),
            command(2, *named, kill=(1, 2)),
            {"ranks": 3, **resume},
            {"ranks": 2, **resume},
            command(2, *unnamed, kill=(0, 5)),
            command(2, *unnamed, environment=again),
            command(2, *named, environment=again),
        ],
    )
    assert codes(whole) == [0, 0]
    first, second = load_checkpoint(undisturbed / "checkpoint.safetensors")["random"]
    assert not torch.equal(first["torch"], second["torch"])
    first, second = load_checkpoint(undisturbed / "checkpoint.safetensors")["epoch_random"]
    assert torch.equal(first["torch"], second["torch"]), "each rank draws another order"
    assert codes(died) == [1, -9] and "Connection" in died[0][2], died
    assert codes(refused) == [2, 2, 2]
    assert errors(refused) == ["error: the interrupted run had 2 ranks, and this one has 3; resume it on 2"]
    assert codes(resumed) == [0, 0] and "resuming after step 2\n" in resumed[0][1]
    assert_same_end(folder / "runs" / "killed", undisturbed)
    assert codes(first_died) == [-9, 1] and "Connection" in first_died[1][2], first_died
    assert codes(restarted) == [0, 0] and "resuming after step 5\n" in restarted[0][1]
    [own] = (folder / "own").iterdir()
    assert_same_end(own, undisturbed)
    assert codes(finished) == [2, 2]
    assert errors(finished) == [f"error: {folder}/runs/killed already holds files; choose another --name or remove it"]


def codes(ranks) -> list[int]:
    return [code for code, _, _ in ranks]


def errors(ranks) -> list[str]:
    """The lines with an error that all ranks of a command have printed."""
    return [line for _, _, error in ranks for line in error.splitlines() if line.startswith("error: ")]


def test_an_error_of_one_rank_is_one_line_and_ends_all(command, folder, tmp_path):
    shutil.copy(folder / "data0.jsonl", folder / "data2.jsonl")
    (folder / "taken" / "full").mkdir(parents=True)
    (folder / "taken" / "full" / "file").touch()
    bad_options = command(2, "--steps", "0", "--name", "bad")
    missing = command(3, "--data", f"{folder}/data{{rank}}.jsonl", "--name", "missing")
    too_many = command(3, "--batch-size", "8", "--name", "many")
    taken = command(2, "--output", str(folder / "taken"), "--name", "full")
    diverged = command(2, "--lr", "1e30", "--refresh-interval", "0", "--name", "diverged")
    alone = command(2, "--parallel", "none", "--name", "alone")
    launcherless = command(0, "--parallel", "ddp", "--name", "launcherless")
    commands = {
        "steps is 0; it must be at least 1": bad_options,
        f"rank 1: cannot read {folder}/data1.jsonl: No such file or directory; check --data": missing,
        "a batch of 8 samples makes 2 sequences, too few for 3 ranks; take at most 2 ranks, or --batch-size "
        "12": too_many,
        f"{folder}/taken/full already holds files; choose another --name or remove it": taken,
        "the loss is nan at step N; choose a lower --lr": diverged,
        "a launcher has started 2 processes, and each would do the whole run; share it out with --parallel ddp, or "
        "start one process": alone,
        "parallel is ddp, and no launcher has started ranks; run `torchrun --nproc-per-node N -m lift_kernels "
        "finetune --parallel ddp`, or with --resume DIR in place of --parallel ddp": launcherless,
    }
    for message, ranks in zip(commands, run_forked(tmp_path, list(commands.values()))):
        assert codes(ranks) == [2] * len(ranks), ranks
        assert [re.sub(r"at step \d", "at step N", line) for line in errors(ranks)] == [f"error: {message}"]
    left = {path.name for path in (folder / "runs").iterdir()}
    assert not left & {"bad", "missing", "many", "alone", "launcherless"}


def test_settings_know_parallel(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Settings().parallel == "none" and Settings(parallel="ddp").parallel == "ddp"
    with pytest.raises(UserError, match="unknown parallel 'fsdp'; use one of none, ddp"):
        Settings(parallel="fsdp")


def test_a_single_process_works_alone():
    ranks = Ranks()
    assert (ranks.number, ranks.count, ranks.restarted) == (0, 1, False)
    assert ranks.own([1, 2, 3]) == [1, 2, 3] == ranks.merge([1, 2, 3]) and ranks.merge([]) == []
    assert ranks.gather("a") == ["a"] and ranks.first(lambda: 5) == 5 == ranks.together(lambda: 5)
    with pytest.raises(UserError, match="wrong"):
        ranks.together(lambda: (_ for _ in ()).throw(UserError("wrong")))


def test_ranks_that_start_again_meet_in_a_fresh_part_of_the_store():
    """The first rank finds the tokens of the attempt before, because the second one is late."""
    store, parts = HashStore(), []
    for attempt in range(3):
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(fresh_part, store, 0, 2)
            time.sleep(0.05 * bool(attempt))
            second = threads.submit(fresh_part, store, 1, 2)
            parts.append([first.result(HANG_S), second.result(HANG_S)])
        parts[-1][0].set("address", str(attempt))
        assert parts[-1][1].get("address") == str(attempt).encode()
        assert [part.get("address") for part, _ in parts] == [str(i).encode() for i in range(attempt + 1)]
