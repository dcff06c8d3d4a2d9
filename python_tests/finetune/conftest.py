"""A tiny Llama, its tokenizer and settings of short runs.

The imports are inside the fixtures, because pytest reads this file even if it leaves out the tests
here.
"""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def short_neutral_text():
    """Runs are measured on a part of the neutral text."""
    from helpers.finetune_runs import NEUTRAL_TOKENS

    from lift_kernels.finetune import neutral

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neutral, "TOKENS", NEUTRAL_TOKENS)
        yield


@pytest.fixture(scope="module")
def tokenizer():
    from helpers.tiny_llama import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny random Llama."""
    from helpers.tiny_llama import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def settings(tiny, tmp_path_factory):
    """A function that returns the settings of a short run of the tiny model."""
    from lift_kernels.finetune.config import Settings

    output = tmp_path_factory.mktemp("runs")

    def make(**changes):
        base = dict(model=str(tiny), output=str(output), device="cpu", eval_problems=6, steps=12, rank=8, density=0.2)
        return Settings(**(base | {"refresh_interval": 5, "lr": 5e-3} | changes))

    return make
