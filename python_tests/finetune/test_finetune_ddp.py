"""The fine-tuning command on several ranks: the results of one process, and one of everything."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from helpers.finetune_runs import assert_same_end
from helpers.forked_ranks import run_forked
from helpers.tiny_llama import save_tiny
from safetensors.torch import load_file

from lift_kernels.errors import UserError
from lift_kernels.finetune import word_problems
from lift_kernels.finetune.config import Settings
from lift_kernels.finetune.parallel import Ranks

METHODS = {"lift": [], "random": ["--gradients", "dense"], "lora": [], "full": ["--lr", "1e-3"]}
RANKS = {"lift": 2, "random": 3, "lora": 2, "full": 2}
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


@pytest.fixture(scope="module")
def runs(command, folder, tmp_path_factory):
    """The runs of all methods, by one process and by several ranks, and what each rank said."""
    commands = {}
    for method, more in METHODS.items():
        commands[method, 0] = command(0, "--method", method, "--name", f"{method}-0", *more)
        commands[method, 1] = command(RANKS[method], "--method", method, "--name", f"{method}-1", *more)
    said = run_forked(tmp_path_factory.mktemp("said"), list(commands.values()))
    for ranks in said:
        assert [code for code, _, _ in ranks] == [0] * len(ranks), ranks
    return dict(zip(commands, said))


@pytest.mark.parametrize("method", METHODS)
def test_several_ranks_train_the_model_of_one_process(runs, folder, method):
    """Two epochs, each with a last batch of one sequence."""
    one, several = folder / "runs" / f"{method}-0", folder / "runs" / f"{method}-1"
    expected = load_file(one / "model" / "model.safetensors")
    actual = load_file(several / "model" / "model.safetensors")
    start = load_file(folder / "tiny" / "model.safetensors")
    assert sum(not torch.equal(value, start[name]) for name, value in expected.items()) >= 7
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6 * value.abs().max().item(), msg=name)
    assert (several / "answers.jsonl").read_text() == (one / "answers.jsonl").read_text()
    a, e = (json.loads((run / "report.json").read_text()) for run in (several, one))
    assert a.keys() == e.keys()
    assert (a["ranks"], e["ranks"]) == (RANKS[method], 1)
    assert (a["settings.parallel"], e["settings.parallel"]) == ("ddp", "none")
    for key in ("heldout_loss", "neutral_loss"):
        for when in ("before", "after"):
            assert a[f"{key}.{when}"] == pytest.approx(e[f"{key}.{when}"], rel=1e-5), key
    for key in ("entries", "gradient_bytes.measured", "optimizer_state_bytes.measured", "exact_match.after"):
        assert a[key] == e[key], key
    assert [row["refreshed"] for row in a["refreshes.due"]] == [row["refreshed"] for row in e["refreshes.due"]]


@pytest.mark.parametrize("method", METHODS)
def test_the_first_rank_alone_speaks_and_writes(runs, folder, method):
    [(_, alone, _)], [(_, said, _), *others] = runs[method, 0], runs[method, 1]
    for _, out, error in others:
        assert out == "" and [line for line in error.splitlines() if "reducer.cpp" not in line] == []
    lines = [line for line in said.splitlines() if line.startswith("[")]  # phases
    assert [line.split("] ")[1].replace("-1", "-0") for line in lines] == [
        line.split("] ")[1] for line in alone.splitlines() if line.startswith("[")
    ]
    assert sorted(path.name for path in (folder / "runs" / f"{method}-1").iterdir()) == FILES


def test_the_losses_are_those_of_the_whole_batch(runs, folder):
    from lift_kernels.checkpoint import load_checkpoint

    several, one = (load_checkpoint(folder / "runs" / f"lift-{i}" / "checkpoint.safetensors") for i in (1, 0))
    assert several["progress"]["losses"] == pytest.approx(one["progress"]["losses"], rel=1e-5)
    assert len(one["progress"]["losses"]) == 6
    assert [len(run["random"]) for run in (several, one)] == [2, 1]


def test_a_rank_dies_and_its_restarted_command_ends_with_the_bits_of_an_undisturbed_run(
    runs, command, folder, tmp_path
):
    """The other rank stops with an error. Resuming takes the same number of ranks."""
    again = {"TORCHELASTIC_RESTART_COUNT": "1"}
    named, unnamed = ["--name", "killed"], ["--output", str(folder / "own")]
    resume = {"arguments": ["--resume", str(folder / "runs" / "killed")]}
    died, refused, resumed, nameless, restarted, finished = run_forked(
        tmp_path,
        [
            command(2, *named, kill=(1, 4)),
            {"ranks": 3, **resume},
            {"ranks": 2, **resume},
            command(2, *unnamed, kill=(0, 5)),
            command(2, *unnamed, environment=again),
            command(2, *named, environment=again),
        ],
    )
    assert died[1][0] == -9 and died[0][0] == 1 and "Connection" in died[0][2], died
    line = "error: the interrupted run had 2 ranks, and this one has 3; resume it on 2\n"
    assert [code for code, _, _ in refused] == [2, 2, 2]
    assert sum(line in error for _, _, error in refused) == 1, refused
    assert [code for code, _, _ in resumed] == [0, 0] and "resuming after step 4\n" in resumed[0][1]
    assert_same_end(folder / "runs" / "killed", folder / "runs" / "lift-1")
    assert [code for code, _, _ in nameless] == [-9, 1], nameless
    assert [code for code, _, _ in restarted] == [0, 0] and "resuming after step 5\n" in restarted[0][1], restarted
    [own] = (folder / "own").iterdir()
    assert_same_end(own, folder / "runs" / "lift-1")
    assert [code for code, _, _ in finished] == [2, 2]
    assert sum("killed already holds files; choose another --name" in error for _, _, error in finished) == 1


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
        "a batch of 8 problems makes 2 sequences, too few for 3 ranks; take at most 2 ranks, or --batch-size "
        "12": too_many,
        f"{folder}/taken/full already holds files; choose another --name or remove it": taken,
        "the loss is nan at step N; choose a lower --lr": diverged,
        "a launcher has started 2 processes, and each would do the whole run; share it out with --parallel ddp, or "
        "start one process": alone,
        "parallel is ddp, and no launcher has started ranks; run `torchrun --nproc-per-node N -m lift_kernels "
        "finetune --parallel ddp`, or with --resume DIR in place of --parallel ddp": launcherless,
    }
    for message, ranks in zip(commands, run_forked(tmp_path, list(commands.values()))):
        assert [code for code, _, _ in ranks] == [2] * len(ranks), ranks
        said = re.sub(r"at step \d", "at step N", "\n".join(error for _, _, error in ranks))
        assert [line for line in said.splitlines() if line.startswith("error: ")] == [f"error: {message}"]
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
