"""Ranks that train the same parameters must have the same masks: a difference is an error on every
one of them.

The comparison itself runs here in threads over one store; `test_replicas_ddp.py` has real ranks.
"""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from lift_kernels import LiftAdamW
from lift_kernels.distributed.checksums import index_digests
from lift_kernels.distributed.replicas import DigestExchange, Replicas

LONG, SHORT = 1e6, 0.05  # seconds: nobody may wait that long; nobody comes


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
        """All at once, each with its digests by name, None for a rank that does not take part: what
        each one says.
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
    for _ in range(3):  # what was refused is refused again
        said = ranks.compare(*[other if rank == odd else same for rank in range(3)])
        for rank, message in enumerate(said):
            assert "different entries of b and of 1 more matrices: " in message
            assert f"{rank}" in message[:14] and f"{odd}" in message[:14]
            for way in ("seed them alike", "before pack_gradients", "process_group=", "process_group='independent'"):
                assert way in message
    assert ranks.compare(other, other, other) == ["", "", ""]  # and passes when it is repaired


def test_nobody_waits_for_ranks_that_train_nothing_or_something_else():
    """Two stages of a pipeline with two replicas each, a critic and an inference rank."""
    ranks = Ranks(6)
    ranks.announce(["0.w"], ["0.w"], ["1.w"], ["1.w"], ["critic.w"], None)
    first, second = {"0.w": "1"}, {"1.w": "2"}
    assert ranks.compare(first, first, None, None, None, None)[:2] == ["", ""]
    assert ranks.compare(None, None, second, second, {"critic.w": "3"}, None) == [""] * 6
    said = ranks.compare(first, first, second, {"1.w": "4"}, None, None)
    assert said[:2] == ["", ""] and all("ranks 2 and 3 " in message for message in said[2:4])


def test_ranks_that_share_some_parameters_compare_those():
    """Experts of their own beside attention that all have."""
    ranks = Ranks(2)
    ranks.announce(["attention", "expert.0"], ["attention", "expert.1"])
    assert ranks.compare({"attention": "1", "expert.0": "2"}, {"attention": "1", "expert.1": "3"}) == ["", ""]
    said = ranks.compare({"attention": "1", "expert.0": "2"}, {"attention": "9", "expert.1": "3"})
    assert all("different entries of attention:" in message for message in said)


def test_two_optimizers_of_the_same_names_are_compared_in_turn():
    """An actor and a critic of one architecture, both on both ranks; one more that never steps
    changes nothing.
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
    """An actor shared with one rank and a critic of the same names shared with another."""
    ranks = Ranks(3)
    actor, critic = {"w": "1"}, {"w": "2"}
    assert ranks.compare(actor, actor, None, ranks=(0, 1)) == [""] * 3
    assert ranks.compare(critic, None, critic, ranks=(0, 2)) == [""] * 3


def test_a_rank_that_makes_no_new_mask_is_named():
    """One rank has refreshed by itself: nobody else will ever show a list."""
    ranks = Ranks(3)
    ranks.announce(*[["w"]] * 3)
    assert ranks.compare(*[{"w": "1"}] * 3) == [""] * 3
    said = ranks.compare({"w": "2"}, None, {"w": "2"}, patience=SHORT)
    for message in (said[0], said[2]):
        assert message.startswith("rank 1 trains w too, but has shown no new index list for 0 s: it made no new mask")
        assert "process_group='independent'" in message


def test_a_step_that_one_rank_makes_alone_is_no_comparison():
    """Before the others have built their optimizers: nothing is left that they could mistake for a
    replica's list.
    """
    ranks = Ranks(2)
    ranks.announce(["w"], None)
    assert ranks.compare({"w": "sanity"}, None) == ["", ""]
    ranks.announce(None, ["w"])
    assert ranks.compare({"w": "1"}, {"w": "1"}) == ["", ""]
    assert all("different entries of w" in message for message in ranks.compare({"w": "1"}, {"w": "2"}))


def test_a_store_may_outlive_its_process_group():
    """The next process group starts from zero: digests of the last one are not taken for new
    ones.
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
    """Optimizers older than the process group, for the first and the second time; a rank without
    one only once.
    """
    ranks = Ranks(3)
    first, second, without = ranks.exchanges
    second.announce(["early"])  # of another optimizer, which says nothing about this one

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
    )  # rank 1 came after all, rank 2 is given up
    waiting.start()
    second.wait_for_late_ranks(LONG)
    waiting.join()
    assert not caplog.text


def digest_of(*lists):
    return index_digests({"w": [torch.tensor(entries, dtype=torch.int32) for entries in lists]})["w"]


def test_digests_tell_index_lists_apart():
    base = list(range(0, 4000, 7))
    seen = {digest_of(base)}
    for change in (
        [],
        base[:-1],
        base[1:],
        [*base[:-1], base[-1] + 1],
        [*base, 2**31 - 1],
        [base[0], base[1] + 1, *base[2:]],
    ):
        seen.add(digest_of(change))
    seen |= (
        {digest_of([i]) for i in range(2000)} | {digest_of([i, i + 1]) for i in range(2000)} | {digest_of(base, base)}
    )
    assert len(seen) == 7 + 4000 + 1
    assert digest_of([1, 2], [3]) != digest_of([1], [2, 3])


def test_digests_are_exact_sums_in_chunks(monkeypatch):
    """Pieces of any size give the same digest, and it is the sum modulo 2^64 that plain integers
    give.
    """
    from lift_kernels.distributed import checksums

    generator = torch.Generator().manual_seed(0)
    indices = torch.randperm(2**20, generator=generator)[:3001].sort().values.int()
    whole = index_digests({"w": [indices]})["w"]
    for chunk in (1, 7, 3001, 5000):
        monkeypatch.setattr(checksums, "_CHUNK", chunk)
        assert index_digests({"w": [indices]})["w"] == whole
    total = 0
    for entry in indices.tolist():
        for factor in checksums._FACTORS:
            entry = (entry + 1) * factor % 2**64
            shifted = entry >> 32 if entry < 2**63 else (entry - 2**64) >> 32
            entry ^= shifted % 2**64
        total += entry
    assert whole == f"{3001:x}.{total % 2**64:016x};"


def parameter():
    torch.manual_seed(0)
    return torch.nn.Parameter(torch.randn(12, 20))


@pytest.mark.parametrize(
    ("group", "error"), [("all", TypeError), (3, TypeError), (dist.GroupMember.NON_GROUP_MEMBER, ValueError)]
)
def test_process_group_is_checked(group, error):
    with pytest.raises(error, match="process_group"):
        LiftAdamW([parameter()], process_group=group)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_what_is_compared(copied):
    for group in (None, "independent"):
        p = parameter()
        optimizer = LiftAdamW([p], rank=3, density=0.2, process_group=group)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert copied(optimizer)._replicas._independent == (group == "independent")


@pytest.fixture
def one_rank(monkeypatch):
    """This process as a rank of two by the look of it; what is compared is noted."""
    compared = []

    class Noted(DigestExchange):
        def compare(self, digests, ranks, patience):
            compared.append((sorted(digests), patience))

    exchange = Noted(store := dist.HashStore(), 0, 2)
    monkeypatch.setattr(DigestExchange, "of_default_group", classmethod(lambda cls: exchange))
    yield compared
    del store


def test_every_new_mask_is_compared_once(one_rank):
    """First masks, refreshes, a spread refresh, a loaded state; nothing in the steps between."""
    weights = [parameter() for _ in range(3)]

    def steps(optimizer, count):
        del one_rank[:]
        for _ in range(count):
            for w in weights:
                w.grad = torch.ones_like(w)
            optimizer.step()
        return [names for names, _ in one_rank]

    named = [(f"{i}.weight", w) for i, w in enumerate(weights)]
    names = [name for name, _ in named]
    optimizer = LiftAdamW(named, rank=3, density=0.2, refresh_interval=3)
    assert steps(optimizer, 8) == [names, names, names]
    optimizer.refresh()
    assert steps(optimizer, 1) == [names]
    optimizer.load_state_dict(optimizer.state_dict())
    assert steps(optimizer, 1) == [names]
    spread = LiftAdamW(named, rank=3, density=0.2, refresh_interval=3, refresh_schedule="spread")
    assert steps(spread, 5) == [names, names[:1], names[1:2], names[2:], names[:1]]
    assert steps(LiftAdamW(named, rank=3, density=0.2, process_group="independent"), 2) == []
    captured = LiftAdamW(named, rank=3, density=0.2, refresh_interval=None, capturable=True)
    steps(captured, 1)
    captured.refresh()  # a replayed graph would not come by here
    assert [names for names, _ in one_rank] == [names] * 2 and steps(captured, 2) == []


LISTS = {"w": [torch.arange(3, dtype=torch.int32)]}


def test_slow_masks_are_given_time(one_rank):
    replicas = Replicas()
    replicas.announce(LISTS)
    replicas.compare(LISTS, masks_took=100.0)
    replicas.compare(LISTS, masks_took=1.0)
    assert [patience for _, patience in one_rank] == [1000.0, 60.0]


def test_others_are_waited_for_when_names_are_new(monkeypatch):
    """Where the process group came later, or a new one did: all names are announced, then the
    others' are waited for.
    """
    waited = []

    class Waiting(DigestExchange):
        def wait_for_late_ranks(self, patience):
            waited.append(sorted(self._announced))

    store, second = dist.HashStore(), dist.HashStore()
    first, other = Waiting(store, 0, 2), Waiting(second, 0, 2)
    now = iter([None, first, first, other, other, other])
    monkeypatch.setattr(DigestExchange, "of_default_group", classmethod(lambda cls: next(now)))
    optimizer = Replicas()
    optimizer.announce(["v", "w"])
    for _ in range(3):  # announced late, known, another process group
        optimizer.compare(LISTS)
    pickle.loads(pickle.dumps(optimizer)).compare(LISTS)  # a copy trains what was announced
    optimizer.compare({"new": LISTS["w"]})
    assert waited == [["v", "w"], ["v", "w"], ["new", "v", "w"]]


def test_names_of_a_loaded_state_are_announced(one_rank, monkeypatch):
    """An optimizer without names takes those of the state: what it compares was announced before
    the step, copies included.
    """
    named = LiftAdamW([("deep.weight", parameter())], rank=3, density=0.2)
    named.refresh()
    told = []
    announce = Replicas.announce
    monkeypatch.setattr(
        Replicas, "announce", lambda self, names: announce(self, told.append(names := list(names)) or names)
    )
    p = parameter()
    unnamed = LiftAdamW([p], rank=3, density=0.2)
    unnamed.load_state_dict(named.state_dict())
    copied, q = copy.deepcopy((unnamed, p))
    announced = sum(told, [])
    for optimizer, weight in ((unnamed, p), (copied, q)):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert [names for names, _ in one_rank] == [["parameter 0 of group 0"], ["deep.weight"]]
    assert {name for names, _ in one_rank for name in names} <= set(announced)


def test_masks_older_than_the_process_group_are_compared(one_rank, monkeypatch):
    """A step and a refresh before init_process_group: their lists are compared at the first step
    after it.
    """
    joined = []
    exchange = DigestExchange.of_default_group()
    monkeypatch.setattr(DigestExchange, "of_default_group", classmethod(lambda cls: exchange if joined else None))
    monkeypatch.setattr(DigestExchange, "wait_for_late_ranks", lambda exchange, patience: None)
    p = parameter()
    optimizer = LiftAdamW([("w", p)], rank=3, density=0.2, refresh_interval=None, capturable=True)

    def step():
        p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    optimizer.refresh()
    step()
    assert one_rank == []
    joined.append(True)
    step()
    step()
    assert [names for names, _ in one_rank] == [["w"]]
