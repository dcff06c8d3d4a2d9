"""A whole run on packed chats, interrupted and resumed."""

import json

from helpers.data_rows import make_chat_tokenizer, rows_of
from helpers.finetune_runs import assert_same_end, make_runs_cheap, make_settings
from helpers.interrupted_runs import interrupted
from helpers.tiny_llama import save_tiny

from lift_kernels.finetune.run import run
from lift_kernels.finetune.run_dir import settings_of


def test_a_run_on_packed_chats_resumes_to_the_same_bits(tmp_path, monkeypatch):
    make_runs_cheap(monkeypatch.setattr)
    tiny = save_tiny(tmp_path / "tiny", num_hidden_layers=1)
    make_chat_tokenizer().save_pretrained(tiny)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of("messages")))
    options = {"data": str(data), "packing": True, "max_length": 200}
    run(make_settings(tiny, tmp_path / "whole", **options))
    interrupted(monkeypatch, make_settings(tiny, tmp_path, **options), 5)
    run(settings_of(tmp_path / "run"), resumed=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole" / "run")
