"""Ranks compare their plans before one of them acts, and all say the same about a difference."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from lift_kernels.distributed.agreement import Plan, difference
from lift_kernels.distributed.digest_exchange import DigestExchange

FIELDS = {"shape": "(12, 20)", "rank": "3", "weights": "ab"}
PLAN = Plan(Plan.MASKS, {"seed": 0}, [("a", FIELDS), ("b", FIELDS)])


def agree(*plans: Plan | None, world: int | None = None, timeout: float = 1e3, rounds: int = 1) -> list[str]:
    """What each rank, a thread, is told or raises. A rank with None does not take part."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=timeout))
    ranks = tuple(range(world or len(plans)))
    exchanges = [DigestExchange(store, rank, len(ranks)) for rank in ranks]

    def one(exchange: DigestExchange, plan: Plan | None) -> str:
        said = ""
        for _ in range(rounds if plan else 0):
            try:
                said = exchange.agree(plan, ranks)
            except RuntimeError as error:
                return f"raised: {error}"
        return said

    with ThreadPoolExecutor(len(ranks)) as pool:
        said = list(pool.map(one, exchanges, plans))
    kept = [key for key in store.list_keys() if "/plan/" in key or "/text/" in key]
    assert len(kept) <= 2 * len(ranks), f"old plans stay in the store: {kept}"
    return said


def with_field(what: str, value: str, matrix: int = 1) -> Plan:
    matrices = [
        (name, fields | {what: value} if i == matrix else fields) for i, (name, fields) in enumerate(PLAN.matrices)
    ]
    return replace(PLAN, matrices=matrices)


def test_equal_plans_pass_again_and_again():
    assert agree(PLAN, PLAN, PLAN, rounds=5) == ["", "", ""]


CASES = {
    "shape": (with_field("shape", "(12, 24)"), "shape of b is (12, 20) on rank 0 and (12, 24) on rank "),
    "rank": (with_field("rank", "4", 0), "rank of a is 3 on rank 0 and 4 on rank "),
    "weights": (with_field("weights", "cd"), "hold different weights of b; give every rank the same weights"),
    "options": (replace(PLAN, options={"seed": 1}), "seed is 0 on rank 0 and 1 on rank "),
    "a name less": (replace(PLAN, matrices=PLAN.matrices[:1]), "only rank 0 makes masks of b, not rank "),
    "no matrix": (replace(PLAN, matrices=()), "only rank 0 makes masks of a and 1 more, not rank "),
    "a name more": (replace(PLAN, matrices=[*PLAN.matrices, ("c", FIELDS)]), "makes masks of c, not rank 0"),
    "another order": (replace(PLAN, matrices=PLAN.matrices[::-1]), "matrix 0 is a on rank 0 and b on rank "),
    "another act": (Plan(Plan.LOADED), "rank 0 makes masks while rank "),
}


@pytest.mark.parametrize("odd", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_every_rank_says_what_differs(case, odd):
    other, expected = CASES[case]
    said = agree(*[other if rank == odd else PLAN for rank in range(3)])
    assert expected in said[0] and f"rank {odd}" in said[0].replace(f"ranks 0 and {odd}", f"rank {odd}")
    assert said[0] == said[1] == said[2] and said[0].count("; ") >= 1


def test_weights_of_many_matrices_are_counted():
    matrices = [(name, {"weights": name}) for name in "abcd"]
    others = [(name, {"weights": name.upper()}) for name in "abcd"]
    text = difference(0, Plan(Plan.MASKS, {}, matrices), 3, Plan(Plan.MASKS, {}, others))
    assert text.startswith("ranks 0 and 3 hold different weights of a and of 3 more matrices; give every rank")
    assert "DistributedDataParallel" in text


def test_a_problem_of_one_rank_reaches_all():
    said = agree(PLAN, replace(PLAN, problem="no memory"), PLAN)
    assert said == ["rank 1 cannot go on: no memory"] * 3


def test_a_problem_of_all_ranks_is_a_problem():
    assert agree(*[replace(PLAN, problem="no memory")] * 2) == ["rank 0 cannot go on: no memory"] * 2


def test_a_rank_that_never_comes_is_named():
    said = agree(PLAN, None, PLAN, None, timeout=0.05)
    for rank in (0, 2):
        expected = f"raised: rank {rank} makes masks of a and 1 more, and ranks 1, 3 of its process group did not"
        assert said[rank].startswith(expected) and "load_state_dict() and add_param_group()" in said[rank]


def test_a_plan_survives_its_text():
    assert Plan.of_text(PLAN.text()) == replace(PLAN, matrices=[list(pair) for pair in PLAN.matrices])
