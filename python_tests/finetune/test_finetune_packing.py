"""Packed samples: they do not see each other, and training on them is that on single samples."""

import json

import pytest
import torch
import trl  # noqa: F401  (for chats and packing)
from helpers.architectures import make_model
from helpers.data_rows import make_chat_tokenizer, rows_of
from helpers.short_training import trained
from helpers.tiny_llama import make_tokenizer, tiny_config
from transformers import LlamaForCausalLM

from lift_kernels.errors import UserError
from lift_kernels.finetune import evaluation, prompts
from lift_kernels.finetune.config import Settings
from lift_kernels.finetune.data import prepare_data
from lift_kernels.finetune.forward import check_packing
from lift_kernels.finetune.packing import pack
from lift_kernels.finetune.prompts import IGNORE
from lift_kernels.finetune.trainer import AnswerTrainer

TOKENIZER = make_chat_tokenizer()
LENGTHS = (9, 4, 30, 2, 17, 1, 5, 8)


def make_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config())


def examples_of(lengths=LENGTHS):
    """Samples of different tokens; some are learned from the second token on."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 250, (n,), generator=generator).tolist() for n in lengths]
    return [
        {"input_ids": x, "labels": [IGNORE, *(t if i % 2 or j % 3 else IGNORE for j, t in enumerate(x[1:]))]}
        for i, x in enumerate(ids)
    ]


def parts(sequence):
    """The samples of a packed sequence."""
    starts = [i for i, position in enumerate(sequence["position_ids"]) if position == 0]
    ends = [*starts[1:], len(sequence["input_ids"])]
    return [{key: sequence[key][a:b] for key in ("input_ids", "labels")} for a, b in zip(starts, ends, strict=True)]


def test_packing_keeps_every_sample_whole_and_fills_sequences():
    packed = pack(examples_of(), 30)
    found = [part for sequence in packed for part in parts(sequence)]
    assert sorted(found, key=str) == sorted(examples_of(), key=str)
    assert [len(sequence["input_ids"]) for sequence in packed] == [30, 30, 16], "best fit, decreasing"
    assert packed == pack(examples_of(), 30)


MODELS = {"llama": make_llama, **{name: lambda name=name: make_model(name) for name in ("gpt2", "phi3", "gemma3")}}


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_a_packed_batch_is_that_of_its_samples(name):
    """Sequences differ in length, so that there is padding too."""
    model = MODELS[name]().eval()
    check_packing(model)
    packed = pack(examples_of(), 30)
    batch = prompts.collate(packed, TOKENIZER.pad_token_id)
    losses, counts = evaluation.row_losses(model, batch)
    for sequence, loss, count in zip(packed, losses, counts, strict=True):
        alone = [evaluation.answer_loss(model, prompts.collate([part], 1)) for part in parts(sequence)]
        assert loss.item() == pytest.approx(sum(total.item() for total, _ in alone), rel=1e-5)
        assert count == sum(number for _, number in alone)
    one = evaluation.row_losses(model, prompts.take_rows(batch, [2]))[0]
    assert one.item() == pytest.approx(losses[2].item(), rel=1e-5)
    assert prompts.take_rows(batch, [2])["input_ids"].shape == (1, len(packed[2]["input_ids"]))


@pytest.mark.parametrize("name", MODELS)
def test_models_of_low_precision_may_pack(name):
    check_packing(MODELS[name]().to(torch.bfloat16))


def test_gradients_of_a_packed_batch_are_those_of_its_samples():
    grads = []
    for rows in (pack(examples_of(), 30), examples_of()):
        model = make_llama()
        total, count = evaluation.answer_loss(model, prompts.collate(rows, TOKENIZER.pad_token_id))
        (total / count).backward()
        grads.append([p.grad for p in model.parameters()])
    for packed, alone in zip(*grads, strict=True):
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mamba", "bloom", "qwen3_next"])
def test_models_that_see_earlier_samples_are_refused(name, dtype):
    """Also with weights of low precision, for which small effects look like rounding."""
    model = make_model(name).to(dtype)
    with pytest.raises(UserError, match=f"^{type(model).__name__} does not keep packed samples apart; leave out --pac"):
        check_packing(model)
    assert model.training


def write(folder, form, count=40):
    path = folder / f"{form}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(form, count)))
    return str(path)


def test_a_batch_of_packed_data_counts_sequences(tmp_path):
    options = {"device": "cpu", "data": write(tmp_path, "messages"), "max_length": 200, "packing": True}
    data = prepare_data(Settings(**options, batch_size=3), TOKENIZER, make_llama())
    single = prepare_data(Settings(**options | {"packing": False}, batch_size=3), TOKENIZER)
    assert sorted((part for s in data.sequences for part in parts(s)), key=str) == sorted(single.sequences, key=str)
    assert data.rows == 3 and data.encoded == single.encoded and data.asked == single.asked
    assert max(len(s["input_ids"]) for s in data.sequences) <= 200
    count = len(data.sequences)
    assert count < 20 and data.description.endswith(f"; packed into {count} sequences, 3 in a batch")
    with pytest.raises(UserError, match=f"32 training samples are packed into {count} sequences of 200 tokens, which"):
        prepare_data(Settings(**options, batch_size=30), TOKENIZER, make_llama())


def test_packed_word_problems_follow_no_worked_examples():
    settings = Settings(device="cpu", packing=True, steps=2, batch_size=2, eval_problems=2)
    data = prepare_data(settings, make_tokenizer(), make_llama())
    assert (data.prefix, data.lines, data.metric) == ([], False, "number") and len(data.sequences) >= 4
    with pytest.raises(ValueError, match="needs the model"):
        prepare_data(settings, make_tokenizer())


def test_training_on_packed_samples_resumes_to_the_same_bits(tiny, tmp_path, monkeypatch):
    data = write(tmp_path, "completion")
    settings = Settings(
        model=str(tiny), data=data, device="cpu", packing=True, max_length=80, batch_size=2, save_steps=1
    )
    whole, expected, used = trained(settings, TOKENIZER, tmp_path, 8)
    assert 5 < len(used.sequences) < 16, "more than an epoch"
    original = AnswerTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if len(self.losses) == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AnswerTrainer, "compute_loss", compute_loss)
        trained(settings, TOKENIZER, tmp_path, 8)
    resumed, losses, _ = trained(settings, TOKENIZER, tmp_path, 8, resumed=True)
    assert losses == expected and len(losses) == 8
    for (name, p), q in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q), name
