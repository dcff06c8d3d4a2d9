"""How models of any architecture are called: arguments, padding, answers, and what is refused."""

import pytest
import torch
from helpers.architectures import ARCHITECTURES, make_model
from helpers.tiny_llama import make_tokenizer
from helpers.word_problem_examples import asked, encoded
from torch import nn
from transformers import BertConfig, BertLMHeadModel, RwkvConfig, RwkvForCausalLM

from lift_kernels.errors import UserError
from lift_kernels.finetune import decoding, evaluation, forward, prompts
from lift_kernels.finetune.prompts import IGNORE
from lift_kernels.finetune.word_problems import Problem

TOKENIZER = make_tokenizer()
SUMS = [Problem("1 + 1?", "2"), Problem("10 + 11?", "It is 21"), Problem("What is 100 + 1?", "101")]


def enlarged(model):
    """The model in evaluation mode, with matrices that make its answers differ."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(5)
    return model.eval()


def make_rwkv():
    """A recurrent model that ignores the attention mask: it reads padding as input."""
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2, bos_token_id=0, eos_token_id=0)
    return RwkvForCausalLM(config)


def model_of(name):
    return make_rwkv() if name == "rwkv" else make_model(name)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "rwkv"])
@torch.no_grad()
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(name):
    model = enlarged(model_of(name))
    examples = [encoded(TOKENIZER, p) for p in SUMS]
    assert len({len(e["input_ids"]) for e in examples}) == 3
    total, count = evaluation.answer_loss(model, prompts.collate(examples, TOKENIZER.pad_token_id))
    expected = 0.0
    for e in examples:
        logits = model(input_ids=torch.tensor([e["input_ids"]])).logits[0].log_softmax(-1)
        expected -= sum(logits[i - 1, t].item() for i, t in enumerate(e["labels"]) if t != IGNORE)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert count == sum(t != IGNORE for e in examples for t in e["labels"])
    assert forward.form_of(model).padding == (name != "rwkv")


CACHED = {
    "gpt2": True,
    "phi3": True,
    "gemma3": False,
    "bloom": False,
    "qwen3_next": False,
    "mamba": False,
    "rwkv": False,
}
"""Whether the worked examples run through the model once. Gemma's window is too short for them."""


@pytest.mark.parametrize("name", CACHED)
@torch.no_grad()
def test_answers_of_a_padded_batch_are_those_of_single_prompts(name):
    model = enlarged(model_of(name))
    prefix = prompts.join(TOKENIZER, [encoded(TOKENIZER, p) for p in SUMS])
    questions = ["4 + 4?", "What is 2 + 3?"]
    answers = decoding.greedy_answers(
        model, TOKENIZER, [asked(TOKENIZER, q) for q in questions], prefix["input_ids"], 6, 2, "answers"
    )
    for question, answer in zip(questions, answers, strict=True):
        ids = prefix["input_ids"] + TOKENIZER(prompts.prompt(question))["input_ids"]
        new: list[int] = []
        while len(new) < 6 and (not new or (new[-1] != 0 and "\n" not in TOKENIZER.decode(new[-1:]))):
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert answer == TOKENIZER.decode(new, skip_special_tokens=True).split("\n")[0].strip()
    cached = decoding._cache_prefix(model, forward.form_of(model), prefix["input_ids"], 100)
    assert (cached is not None) == CACHED[name]


@torch.no_grad()
def test_a_window_is_no_obstacle_while_it_holds_everything():
    model = make_model("gemma3").eval()
    form = forward.form_of(model)
    assert decoding._cache_prefix(model, form, [5] * 40, 24) is not None  # the window has 64 tokens
    assert decoding._cache_prefix(model, form, [5] * 40, 25) is None


def test_answers_leave_the_settings_of_generation_alone():
    """A model's own settings may penalize or sample. They count for no answer, and stay."""
    model = enlarged(make_model("bloom"))
    plain = decoding.greedy_answers(model, TOKENIZER, [asked(TOKENIZER, "1 + 1?")], [5], 6, 1, "answers")
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=9.0)
    settings = model.generation_config
    assert decoding.greedy_answers(model, TOKENIZER, [asked(TOKENIZER, "1 + 1?")], [5], 6, 1, "answers") == plain
    assert model.generation_config is settings and settings.repetition_penalty == 5.0


def test_layers_that_a_model_never_calls_are_found():
    state = torch.get_rng_state()
    mamba = make_model("mamba").eval()
    found = forward.bypassed_layers(mamba)
    assert found == [f"backbone.layers.{i}.mixer.dt_proj" for i in range(2)]
    assert not mamba.training and not any(m._forward_pre_hooks for m in mamba.modules())
    model = make_model("gpt2")
    state = torch.get_rng_state()
    assert forward.bypassed_layers(model.train()) == []
    assert model.training and torch.equal(torch.get_rng_state(), state), "dropout draws from a copy"


class Broken(nn.Module):
    """A model whose code raises an error of torch."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 4)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None):
        return self.embedding(input_ids) @ torch.zeros(3, 3)


def test_models_that_cannot_predict_the_next_token_are_refused():
    bert = BertLMHeadModel(
        BertConfig(vocab_size=258, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    )
    with pytest.raises(UserError, match="^BertLMHeadModel sees later tokens, .* give a causal language model$"):
        forward.form_of(bert)
    with pytest.raises(UserError, match=r"^Broken cannot be run as a causal language model \(RuntimeError\); give"):
        forward.form_of(Broken())
