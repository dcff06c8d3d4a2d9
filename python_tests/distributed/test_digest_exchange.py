"""Ranks that train the same parameters must have the same masks, or every rank raises an error.

The ranks here are threads over one store; `test_replicas_ddp.py` has real ones.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from lift_kernels.distributed.digest_exchange import DigestExchange

LONG, SHORT = 1e6, 0.05  # seconds; no rank may wait LONG, and SHORT is for ranks that never come


class Ranks:
    """Several ranks over one store."""

    def __init__(self, world: int) -> None:
        self.store = dist.HashStore()
        self.exchanges = [DigestExchange(self.store, rank, world) for rank in range(world)]

    def announce(self, *names_of_ranks) -> None:
        for exchange, names in zip(self.exchanges, names_of_ranks, strict=True):
            if names:
                exchange.announce(names)

    def compare(self, *digests_of_ranks, ranks=None, patience=LONG) -> list[str]:
        """Let all ranks compare at once, and return the error message of each.

        Each rank gives its digests by name. A rank with None does not take part.
        """

        def one(exchange, digests) -> str:
            if digests is None:
                return ""
            try:
                exchange.compare(digests, ranks, patience)
            except RuntimeError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(len(self.exchanges)) as pool:
            return list(pool.map(one, self.exchanges, digests_of_ranks))


def test_equal_lists_pass_again_and_again():
    ranks = Ranks(3)
    ranks.announce(*[["a", "b"]] * 3)
    for i in range(5):
        assert ranks.compare(*[{"a": f"{i}", "b": "1"}] * 3) == ["", "", ""]
    lists = [key for key in ranks.store.list_keys() if "lists/" in key]
    assert len(lists) <= 3 * 2 * 2, f"old digests stay in the store: {lists}"


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_difference_is_an_error_on_every_rank(odd):
    ranks = Ranks(3)
    ranks.announce(*[["a", "b", "c"]] * 3)
    same, other = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4", "c": "5"}
    assert ranks.compare(same, same, same) == ["", "", ""]
    for _ in range(3):  # it is refused again and again
        said = ranks.compare(*[other if rank == odd else same for rank in range(3)])
        for rank, message in enumerate(said):
            assert "different entries of b and of 1 more matrices: " in message
            assert f"{rank}" in message[:14] and f"{odd}" in message[:14]
            for way in ("seed them alike", "before pack_gradients", "process_group=", "process_group='independent'"):
                assert way in message
    assert ranks.compare(other, other, other) == ["", "", ""]  # once all agree, it passes


def test_nobody_waits_for_ranks_that_train_nothing_or_something_else():
    """There are two stages of a pipeline with two replicas each, a critic and an inference rank."""
    ranks = Ranks(6)
    ranks.announce(["0.w"], ["0.w"], ["1.w"], ["1.w"], ["critic.w"], None)
    first, second = {"0.w": "1"}, {"1.w": "2"}
    assert ranks.compare(first, first, None, None, None, None)[:2] == ["", ""]
    assert ranks.compare(None, None, second, second, {"critic.w": "3"}, None) == [""] * 6
    said = ranks.compare(first, first, second, {"1.w": "4"}, None, None)
    assert said[:2] == ["", ""] and all("ranks 2 and 3 " in message for message in said[2:4])


def test_ranks_that_share_some_parameters_compare_those():
    """Each rank has its own experts; all ranks have the attention."""
    ranks = Ranks(2)
    ranks.announce(["attention", "expert.0"], ["attention", "expert.1"])
    assert ranks.compare({"attention": "1", "expert.0": "2"}, {"attention": "1", "expert.1": "3"}) == ["", ""]
    said = ranks.compare({"attention": "1", "expert.0": "2"}, {"attention": "9", "expert.1": "3"})
    assert all("different entries of attention:" in message for message in said)


def test_two_optimizers_of_the_same_names_are_compared_in_turn():
    """An actor and a critic of one architecture are on both ranks.

    Another optimizer, which never steps, changes nothing.
    """
    ranks = Ranks(2)
    for names in (["w"], ["w"], ["v"], ["w", "u"]):
        ranks.announce(names, names)
    actor, critic = {"w": "1"}, {"w": "2"}
    for digests in (actor, critic, critic, actor):
        assert ranks.compare(digests, digests) == ["", ""]


def test_a_group_is_compared_alone():
    ranks = Ranks(4)
    ranks.announce(*[["w"]] * 4)
    one, other = {"w": "1"}, {"w": "2"}
    assert ranks.compare(one, one, None, None, ranks=(0, 1)) == [""] * 4
    assert ranks.compare(None, None, other, other, ranks=(2, 3)) == [""] * 4
    assert all("different entries" in message for message in ranks.compare(one, one, other, other))


def test_groups_that_overlap():
    """An actor is shared with one rank, and a critic of the same names with another."""
    ranks = Ranks(3)
    actor, critic = {"w": "1"}, {"w": "2"}
    assert ranks.compare(actor, actor, None, ranks=(0, 1)) == [""] * 3
    assert ranks.compare(critic, None, critic, ranks=(0, 2)) == [""] * 3


def test_a_rank_that_makes_no_new_mask_is_named():
    """One rank has refreshed by itself, so the others will never show a list."""
    ranks = Ranks(3)
    ranks.announce(*[["w"]] * 3)
    assert ranks.compare(*[{"w": "1"}] * 3) == [""] * 3
    said = ranks.compare({"w": "2"}, None, {"w": "2"}, patience=SHORT)
    for message in (said[0], said[2]):
        assert message.startswith("rank 1 trains w too, but has shown no new index list for 0 s: it made no new mask")
        assert "process_group='independent'" in message


def test_a_step_that_one_rank_makes_alone_is_no_comparison():
    """It steps before the others have built their optimizers.

    Nothing stays in the store that they could mistake for a replica's list.
    """
    ranks = Ranks(2)
    ranks.announce(["w"], None)
    assert ranks.compare({"w": "sanity"}, None) == ["", ""]
    ranks.announce(None, ["w"])
    assert ranks.compare({"w": "1"}, {"w": "1"}) == ["", ""]
    assert all("different entries of w" in message for message in ranks.compare({"w": "1"}, {"w": "2"}))


def test_a_store_may_outlive_its_process_group():
    """The next process group starts from zero.

    Digests of the last group are not taken for new ones.
    """
    ranks = Ranks(2)
    ranks.announce(["w"], ["w"])
    assert ranks.compare({"w": "1"}, {"w": "1"}) == ["", ""]
    ranks.exchanges = [DigestExchange(ranks.store, rank, 2) for rank in range(2)]
    ranks.announce(["w"], ["w"])
    said = ranks.compare({"w": "2"}, None, patience=SHORT)
    assert said[0].startswith("rank 1 trains w too, but has shown no new index list")
    assert ranks.compare({"w": "2"}, {"w": "2"}) == ["", ""]


def test_late_ranks_are_waited_for(caplog):
    """The optimizers are older than the process group.

    A rank that has no optimizer is waited for only once.
    """
    ranks = Ranks(3)
    first, second, without = ranks.exchanges
    second.announce(["early"])  # by another optimizer; this says nothing about the one below

    def late(exchange, patience):
        exchange.announce(["w"])
        exchange.wait_for_late_ranks(patience)

    with caplog.at_level(logging.WARNING, "lift_kernels"):
        late(first, SHORT)
    assert "ranks 1, 2 built no LiftAdamW within 0 s" in caplog.text and "process_group=" in caplog.text
    caplog.clear()
    late(second, SHORT)
    assert "rank 2 built no LiftAdamW" in caplog.text and "rank 0" not in caplog.text
    caplog.clear()
    waiting = threading.Thread(
        target=first.wait_for_late_ranks, args=(LONG,)
    )  # rank 1 came late, and rank 2 is not waited for again
    waiting.start()
    second.wait_for_late_ranks(LONG)
    waiting.join()
    assert not caplog.text
