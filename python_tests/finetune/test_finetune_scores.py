"""Runs on data of other kinds: what they measure, write and say."""

import json
import threading
from pathlib import Path

import pytest
import torch
from helpers.data_rows import make_chat_tokenizer, rows_of, turns
from helpers.finetune_runs import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from lift_kernels.finetune import measure, metrics, neutral, prompts
from lift_kernels.finetune.data import prepare_data
from lift_kernels.finetune.parallel import Ranks
from lift_kernels.finetune.run import run

FRUIT = ("apple", "pear", "cherry", "plum")


def labels(count: int = 40) -> list[dict]:
    """Questions with one of two answers."""
    return [{"question": f"Is {i} {FRUIT[i % 4]}s even?", "answer": ("yes", "not at all")[i % 2]} for i in range(count)]


def texts(count: int = 40) -> list[dict]:
    return [
        {"question": f"What of {i}?", "answer": f"{FRUIT[i % 4]} for {'bdfgklmn'[i % 8]}{'aeiou'[i // 8]} it is"}
        for i in range(count)
    ]


def chats(count: int = 40) -> list[dict]:
    return [
        {
            "messages": turns(
                f"Name {i}!", f"Oh,\nOh,\nOh,\n{FRUIT[i % 4]} and more of it by the dozen, {i} at most, I would say"
            )
        }
        for i in range(count)
    ]


@pytest.fixture
def job(settings, tmp_path):
    """A function that returns the settings of a run on rows."""

    def make(rows: list[dict], name: str, **changes):
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"data": str(data), "output": str(tmp_path), "name": name, "steps": 4, "batch_size": 4, "shots": 0}
        return settings(**(options | changes))

    return make


def answers_of(options) -> list[dict]:
    return [json.loads(line) for line in (Path(options.output) / options.name / "answers.jsonl").open()]


def rows_are_measured(options, report) -> list[dict]:
    """Check what all rows have in common, and return them."""
    rows = answers_of(options)
    assert len(rows) == report["heldout.samples"]
    changes = [row["loss_after"] - row["loss_before"] for row in rows]
    assert report["heldout_loss.change"] == pytest.approx(sum(changes) / len(changes), abs=1e-9)
    assert report["heldout_loss.change_low"] < report["heldout_loss.change"] < report["heldout_loss.change_high"]
    assert report["neutral_loss.change"] == pytest.approx(report["neutral_loss.after"] - report["neutral_loss.before"])
    assert (report["neutral.pieces"], report["neutral.tokens"]) == (4, 1024)
    assert all(row["where"].startswith(str(options.data[0])) for row in rows)
    return rows


def test_a_choice_is_the_answer_with_the_least_loss_of_its_whole_text(job, capsys):
    options = job(labels(), "labels", eval_problems=8)
    report = run(options)
    assert (report["metric"], report["exact_match.problems"]) == ("choice", 8)
    rows = rows_are_measured(options, report)
    folder = Path(options.output) / options.name
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for row in rows:
        losses = {}
        for choice in ("yes", "not at all"):
            e = prompts.encode(tokenizer, prompts.single_example(row["question"], choice), alone=True)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([e["input_ids"]])).logits[0].log_softmax(-1)
            losses[choice] = -sum(logits[i - 1, t].item() for i, t in enumerate(e["labels"]) if t != prompts.IGNORE)
            if choice == row["expected"]:
                count = sum(t != prompts.IGNORE for t in e["labels"])
                assert row["loss_after"] == pytest.approx(losses[choice] / count, rel=1e-4)
        assert row["after"] == min(losses, key=losses.__getitem__)
    for when in ("before", "after"):
        right = sum(row[when] == row["expected"] for row in rows)
        assert report[f"exact_match.{when}"] == right / 8
        bounds = report[f"exact_match.{when}_low"], report[f"exact_match.{when}_high"]
        assert bounds == metrics.wilson_interval(right, 8)
    said = capsys.readouterr().out
    assert "metric: choice, for there are 2 different answers, each repeated; --metric none skips it\n" in said
    assert "right choices, 8 problems (95 % interval)" in said
    assert "choice: of the held-out answers not at all | yes, the expected one" in said


def test_short_texts_are_compared_exactly(job, capsys):
    options = job(texts(), "texts", steps=60, lr=2e-2, density=1.0, rank=16)
    report = run(options)
    assert report["metric"] == "exact"
    rows = rows_are_measured(options, report)
    assert {row["before"] == row["expected"] for row in rows} == {False}
    assert report["exact_match.after"] == sum(metrics.same_text(r["after"], r["expected"]) for r in rows) / len(rows)
    assert any("it is" in row["after"] for row in rows), "training shows in the answers"
    assert "exact match, 6 problems (95 % interval)" in capsys.readouterr().out


def test_long_answers_of_chats_get_losses_alone_and_exact_where_asked(job, tiny, tmp_path, capsys):
    make_chat_tokenizer().save_pretrained(tmp_path / "chat")
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "chat")
    options = job(chats(), "losses", model=str(tmp_path / "chat"))
    report = run(options)
    assert (report["metric"], report["exact_match.problems"], report["exact_match.after"]) == ("none", None, None)
    assert report["heldout_loss.unit"] == "nats per answer token"
    rows = rows_are_measured(options, report)
    assert {(row["before"], row["after"]) for row in rows} == {(None, None)}
    said = capsys.readouterr().out
    assert "held-out loss (nats per answer token)" in said and "exact match" not in said
    assert "metric: none, for some answers have more than one line or" in said
    options = job(chats(), "exact", model=str(tmp_path / "chat"), metric="exact")
    assert run(options)["metric"] == "exact"
    assert all(isinstance(row["after"], str) for row in rows_are_measured(options, report))


def test_plain_texts_have_a_loss_of_every_token(job, capsys):
    options = job(rows_of("text", 40), "plain")
    report = run(options)
    assert (report["metric"], report["heldout_loss.unit"]) == ("none", "nats per token")
    rows_are_measured(options, report)
    assert "held-out loss (nats per token)" in capsys.readouterr().out


def test_lines_of_the_table_stay_short(job, capsys):
    run(job(labels(), "table", eval_problems=8))
    table = capsys.readouterr().out.split("\n\n")[-2]
    lines = table.splitlines()
    assert max(map(len, lines)) < 150
    [start] = [i for i, line in enumerate(lines) if line.startswith("neutral text")]
    column = lines[start].index("4 paragraphs")
    words = " ".join(line[column:] for line in lines[start:])
    assert words.endswith("language reference; 1,024 tokens")


@pytest.mark.parametrize("asked", ["number", "exact", "choice"])
def test_a_metric_without_answers_is_refused_before_the_run_has_a_directory(job, tiny, capsys, asked):
    options = job(rows_of("text", 40), "refused")
    arguments = ["--data", options.data[0], "--model", str(tiny), "--output", options.output, "--name", "refused"]
    line = refused(capsys, *arguments, "--metric", asked)
    assert line.startswith(f"error: {options.data[0]}") and line.endswith("use --metric none")
    assert not (Path(options.output) / "refused").exists()


def test_a_run_measured_on_other_texts_is_not_resumed(tmp_path, tokenizer, job):
    data = prepare_data(job(labels(), "x"), tokenizer, None)
    pieces = neutral.neutral_pieces(tokenizer)[1]
    path = tmp_path / "before.json"
    texts = measure.fingerprint(data, pieces)
    assert measure.read_saved(path, texts) is None
    measured = measure.Measurement({"a": 1.0}, ["yes"], [1.0], [2.0, 3.0])
    path.write_text(json.dumps({"texts": texts} | measured.saved()))
    assert measure.Measurement(**measure.read_saved(path, texts)) == measured
    with pytest.raises(metrics.UserError, match="^the held-out or the neutral texts are not those .* start a new run$"):
        measure.read_saved(path, measure.fingerprint(data, pieces[1:]))


class ThreadRanks(Ranks):
    """One of two ranks that are threads of this process."""

    shared: list = [None, None]
    barrier = threading.Barrier(2)

    def __init__(self, number: int):
        object.__setattr__(self, "group", None)
        object.__setattr__(self, "_number", number)

    number = property(lambda self: self._number)
    count = property(lambda self: 2)

    def gather(self, value):
        self.shared[self.number] = value
        self.barrier.wait(60)
        values = list(self.shared)
        self.barrier.wait(60)
        return values


@pytest.mark.parametrize("metric", ["choice", "exact", "none"])
def test_two_ranks_measure_what_one_measures(tiny, tokenizer, job, metric):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    data = prepare_data(job(labels(), "x", metric=metric, eval_problems=7), tokenizer, model)
    pieces = neutral.neutral_pieces(tokenizer)[1]
    one = measure.measure(model, tokenizer, data, pieces, Ranks(), "before")
    found = {}

    def work(number: int) -> None:
        found[number] = measure.measure(model, tokenizer, data, pieces, ThreadRanks(number), "before")

    threads = [threading.Thread(target=work, args=[number]) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for several in found.values():
        assert several.answers == one.answers and len(one.answers) == (0 if metric == "none" else 7)
        assert several.target == pytest.approx(one.target, rel=1e-5)
        assert several.neutral == pytest.approx(one.neutral, rel=1e-5)
        assert several.figures.keys() == one.figures.keys()
        for key, value in one.figures.items():
            assert several.figures[key] == (value if value is None else pytest.approx(value, rel=1e-5)), key
