"""100 combinations of options: each trains right or is refused well.

More by hand with ``make fuzz``, and one alone with ``make fuzz ARGS="--seed 123"``.
"""

from __future__ import annotations

import collections

import pytest
import torch
from fuzz.combination import draw
from fuzz.outcome import outcome

OUTCOMES: collections.Counter[str] = collections.Counter()


@pytest.fixture(autouse=True)
def one_thread():
    """Threads take longer than these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("seed", range(100), ids=lambda seed: f"seed-{seed}")
def test_a_combination_trains_right_or_is_refused(seed):
    c = draw(seed)
    print(c)  # pytest shows it with a failure
    OUTCOMES[outcome(c).split(":")[0]] += 1


def test_most_combinations_train():
    total = sum(OUTCOMES.values())
    assert OUTCOMES["trained"] >= 0.6 * total and (total < 100 or OUTCOMES["refused"] >= 10), OUTCOMES
