"""Noise on groups of entries against the loss, on a tiny model; the text that it is measured on."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lift_kernels import lift_param_groups, principal_indices
from lift_kernels.cli import main
from lift_kernels.errors import UserError
from lift_kernels.finetune import evaluation, origin, probe
from lift_kernels.finetune.evaluation import answer_loss
from lift_kernels.finetune.prompts import collate
from lift_kernels.masks.selection import SelectionRequest

TEXT = "The river rises in the hills. It flows to the sea, and the sea is wide.\n" * 4


@pytest.fixture(scope="module")
def trained(tiny, tokenizer):
    """The tiny model, trained on a text, and the text's examples."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    ids = tokenizer(TEXT)["input_ids"]
    examples = [{"input_ids": ids, "labels": [-100, *ids[1:]]}]
    batch, optimizer = collate(examples, tokenizer.pad_token_id), torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        (answer_loss(model, batch)[0] / len(ids)).backward()
        optimizer.step()
    return model.eval(), examples


def weights_of(model):
    return dict(lift_param_groups(model)[0]["params"])


def run(trained, **options):
    model, examples = trained
    return probe.probe(model, weights_of(model), examples, 1, **(dict(density=0.1, rank=4) | options))


def requests_of(model, k=50):
    return [
        SelectionRequest(w.detach(), None, 4, k, name, i, {}) for i, (name, w) in enumerate(weights_of(model).items())
    ]


def test_noise_of_size_zero_leaves_the_loss_to_the_bit(trained):
    found = run(trained, sizes=(0.0,))
    model, examples = trained
    with torch.no_grad():
        loss, count = answer_loss(model, collate(examples, 1))
    assert found.base == float(loss) / count and found.tokens == count == len(TEXT) - 1
    assert [(t.group, t.noise, t.seed, t.loss) for t in found.trials] == [
        (group, 0.0, 0, found.base) for group in ("principal", "largest", "smallest", "random")
    ]


def test_the_loss_rises_with_the_noise_and_every_weight_is_restored(trained):
    model, _ = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = run(trained, seeds=2)
    assert all(
        torch.equal(tensor.view(torch.int32), before[n].view(torch.int32)) for n, tensor in model.state_dict().items()
    )
    assert found.sizes() == [0.25, 0.5, 1.0, 2.0] and len(found.trials) == 32
    for group in probe.GROUPS:
        means = [float(found.losses(group, size).mean()) for size in found.sizes()]
        assert found.base < means[1] < means[2] < means[3]
        assert len(set(found.losses(group, 1.0).tolist())) == 2, "both seeds drew the same noise"
    assert len({trial.loss for trial in found.trials}) == 32
    assert run(trained, seeds=2) == found


def test_a_trial_is_the_loss_with_that_noise_added(trained):
    """The second matrix gets the second draw of the seed, on its principal weights."""
    model, examples = trained
    found = run(trained, sizes=(1.0,))
    changed, generator = AutoModelForCausalLM.from_config(model.config), torch.Generator().manual_seed(0)
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        for weight in weights_of(changed).values():
            chosen = principal_indices(weight, 4, density=0.1).long()
            noise = torch.randn(len(chosen), generator=generator) * weight.std(correction=0)
            weight.view(-1)[chosen] += noise
        loss, count = answer_loss(changed.eval(), collate(examples, 1))
    assert found.losses("principal", 1.0).item() == pytest.approx(float(loss) / count, rel=1e-6)


@pytest.mark.parametrize("group", list(probe.GROUPS))
def test_noise_changes_just_the_chosen_entries(trained, group):
    model, _ = trained
    requests = requests_of(model)
    before = [r.matrix.clone() for r in requests]
    chosen = probe._chosen(requests, probe.GROUPS[group])
    with pytest.raises(KeyError), probe._noise(chosen, 0.5, 3):
        generator = torch.Generator().manual_seed(3)
        for request, old, (_, indices, _) in zip(requests, before, chosen):
            changed = (request.matrix != old).flatten().nonzero().flatten()
            assert torch.equal(changed, indices) and len(indices) == 50
            noise = (request.matrix - old).flatten()[indices]
            expected = 0.5 * old.std(correction=0) * torch.randn(50, generator=generator)
            torch.testing.assert_close(noise, expected, rtol=1e-5, atol=1e-6)
        raise KeyError  # as an interrupt would
    assert all(torch.equal(r.matrix, old) for r, old in zip(requests, before))


def test_the_groups_are_what_they_are_called():
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    request = SelectionRequest(weight, None, 4, 50, "w", 0, {})
    found = {group: probe._chosen([request], selection)[0].indices for group, selection in probe.GROUPS.items()}
    assert torch.equal(found["principal"], principal_indices(weight, 4, 50).long())
    order = weight.abs().flatten().argsort()
    assert torch.equal(found["smallest"], order[:50].sort().values)
    assert torch.equal(found["largest"], order[-50:].sort().values)
    assert len(found["random"].unique()) == 50 and not torch.equal(found["random"], found["principal"])


def test_noise_on_a_stack_has_the_size_of_each_of_its_matrices():
    stack = torch.randn(2, 20, 30, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0]).view(
        2, 1, 1
    )
    (chosen,) = probe._chosen([SelectionRequest(stack, None, 4, 60, "experts", 0, {})], "magnitude")
    expected = [stack[0].std(correction=0)] * 60 + [stack[1].std(correction=0)] * 60
    torch.testing.assert_close(chosen.unit, torch.stack(expected))
    assert int((chosen.indices < 600).sum()) == 60


def test_batches_hold_all_examples_and_few_tokens():
    examples = [{"input_ids": list(range(2, n + 2)), "labels": [-100] * n} for n in (5, 500, 900, 30, 2000, 31)]
    batches = probe._batches(examples, 1, torch.device("cpu"))
    assert [tuple(b["input_ids"].shape) for b in batches] == [(1, 2000), (2, 900), (3, 31)]
    assert sum(int(b["attention_mask"].sum()) for b in batches) == 3466


def test_a_text_is_cut_into_pieces_that_the_model_takes(trained, tokenizer, tmp_path):
    model, _ = trained
    file = tmp_path / "text.txt"
    file.write_text("ab" * 520 + "c", encoding="utf-8-sig")
    examples = probe.text_examples(model, tokenizer, file)
    assert [len(e["input_ids"]) for e in examples] == [512, 512, 17]
    assert all(e["labels"] == [-100, *e["input_ids"][1:]] for e in examples)
    assert tokenizer.decode([i for e in examples for i in e["input_ids"]]) == "ab" * 520 + "c"
    assert probe.text_examples(model, tokenizer, None) == evaluation.neutral_examples(tokenizer)


def test_each_line_of_a_jsonl_file_is_a_text_of_its_own(trained, tokenizer, tmp_path):
    file = tmp_path / "text.jsonl"
    lines = [{"text": "A text of its own."}, {"question": " 1 + 1? ", "answer": "It is\n2\n", "id": 5}]
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    examples = probe.text_examples(trained[0], tokenizer, file)
    texts = [tokenizer.decode(e["input_ids"]) for e in examples]
    assert texts == ["A text of its own.", "Question: 1 + 1?\nAnswer: It is\n2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, r"cannot read \S*none.txt: No such file or directory; check --probe-text"),
        ("empty.txt", b"", r"empty.txt has 0 tokens to predict; give a --probe-text of at least 16"),
        ("short.txt", b"16 tokens, ohno!", r"short.txt has 15 tokens to predict"),
        ("latin.txt", "caf\xe9 and more of it".encode("latin-1"), r"latin.txt is not UTF-8 \(.* at byte 3\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": 3}\n', r'a.jsonl, line 1: needs an object with the string "text", or "question" and'),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_in_one_line(trained, tokenizer, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        probe.text_examples(trained[0], tokenizer, tmp_path / name)
    assert "\n" not in str(refused.value)


def test_the_table_the_csv_and_the_picture_hold_the_losses(trained):
    found = run(trained, seeds=2, sizes=(0.5, 2.0))
    rows = list(csv.DictReader(io.StringIO(probe.csv_of(found, {"rank": 4}))))
    same = {"tokens": str(found.tokens), "rank": "4"}
    assert rows[0] == {"entries": "none", "noise": "0.0", "seed": "", "loss": str(found.base)} | same
    assert all(same.items() <= row.items() for row in rows)
    assert [(r["entries"], float(r["noise"]), int(r["seed"]), float(r["loss"])) for r in rows[1:]] == found.trials
    lines = probe.table(found).splitlines()
    assert lines[0] == f"loss without noise: {found.base:.4f} nats per token, on {found.tokens} tokens"
    for group, line in zip(probe.GROUPS, lines[-4:]):
        of = [found.losses(group, size) for size in (0.5, 2.0)]
        assert line.split() == [group, *(p for x in of for p in (f"{x.mean():.4f}", "+-", f"{x.std():.4f}"))]
    axes = probe.draw(found, "a title").axes[0]
    base, *curves = axes.lines
    assert list(base.get_ydata()) == [found.base] * 2
    for group, curve in zip(probe.GROUPS, curves, strict=True):
        assert curve.get_label() == group and list(curve.get_xdata()) == [0.5, 2.0]
        assert list(curve.get_ydata()) == [float(found.losses(group, size).mean()) for size in (0.5, 2.0)]
    assert len(axes.collections) == 4  # bands over the seeds
    assert axes.get_legend().get_title().get_text() == "noise on\n(bands: range of 2 seeds)"


def test_the_command_writes_the_probe_beside_the_report(tiny, tokenizer, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    options = ["mask", str(tiny), "--density", "0.1", "--rank", "4", "--probe", "--probe-text", str(text)]
    assert main([*options, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == {"report.json", "report.png", "probe.csv", "probe.png"}
    assert f"written to {out}: probe.csv, probe.png, report.json, report.png" in printed
    model = AutoModelForCausalLM.from_pretrained(tiny)
    examples = probe.text_examples(model, tokenizer, text)
    expected = run((model, examples))
    settings = {"model": f"{tiny} (safetensors)", "density": 0.1, "rank": 4, "budget_rank": None}
    settings |= {"machine": origin.machine(model.device), "torch": torch.__version__, "commit": origin.commit()}
    assert (out / "probe.csv").read_text() == probe.csv_of(expected, settings)
    assert probe.table(expected) in printed and "captured: sum of |W_r|" in printed
    assert (out / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_refuses_in_one_line_and_writes_nothing(tiny, tmp_path, capsys):
    for arguments, message in [
        (["--probe-text", "text.txt"], "error: --probe-text text.txt needs --probe; add it"),
        (["--probe-seeds", "3"], "error: --probe-seeds 3 needs --probe; add it"),
        (["--probe", "--probe-seeds", "0"], "error: --probe-seeds is 0; it must be at least 1"),
        (["--probe", "--probe-text", str(tmp_path)], f"error: cannot read {tmp_path}: Is a directory"),
        (["--probe", "--density", "2"], "error: density is 2.0"),
    ]:
        assert main(["mask", str(tiny), *arguments, "--output", str(tmp_path / "out")]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and errors[0].startswith(message)
        assert not (tmp_path / "out").exists()
