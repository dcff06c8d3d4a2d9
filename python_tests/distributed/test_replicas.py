"""When an optimizer compares its masks with those of other ranks, and what it announces before."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist

from lift_kernels import LiftAdamW
from lift_kernels.distributed.digest_exchange import DigestExchange
from lift_kernels.distributed.replicas import Replicas


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
    """Make this process look like one rank of two, and record what is compared."""
    compared = []

    class Noted(DigestExchange):
        def compare(self, digests, ranks, patience):
            compared.append((sorted(digests), patience))

    exchange = Noted(store := dist.HashStore(), 0, 2)
    monkeypatch.setattr(DigestExchange, "of_default_group", classmethod(lambda cls: exchange))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    yield compared
    del store


def test_every_new_mask_is_compared_once(one_rank):
    """First masks, refreshes, a spread refresh and a loaded state are compared.

    Other steps compare nothing.
    """
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
    captured.refresh()  # a replayed graph would not run this
    assert [names for names, _ in one_rank] == [names] * 2 and steps(captured, 2) == []


LISTS = {"w": [torch.arange(3, dtype=torch.int32)]}


def test_slow_masks_are_given_time(one_rank):
    replicas = Replicas()
    replicas.announce(LISTS)
    replicas.compare(LISTS, masks_took=100.0)
    replicas.compare(LISTS, masks_took=1.0)
    assert [patience for _, patience in one_rank] == [1000.0, 60.0]


def test_others_are_waited_for_when_names_are_new(monkeypatch):
    """The process group came after the optimizer, or was replaced.

    The rank announces all names and then waits for those of the others.
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
    for _ in range(3):  # announced late, already known, in another process group
        optimizer.compare(LISTS)
    pickle.loads(pickle.dumps(optimizer)).compare(LISTS)  # its names are announced already
    optimizer.compare({"new": LISTS["w"]})
    assert waited == [["v", "w"], ["v", "w"], ["new", "v", "w"]]


def test_names_of_a_loaded_state_are_announced(one_rank, monkeypatch):
    """An optimizer without names takes those of the state.

    Names are announced before the step that compares them. This holds for copies too.
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
    assert [names for names, _ in one_rank] == [["deep.weight"], ["deep.weight"]]
    assert {name for names, _ in one_rank for name in names} <= set(announced)


def test_masks_older_than_the_process_group_are_compared(one_rank, monkeypatch):
    """A step and a refresh come before init_process_group.

    Their lists are compared at the first step after it.
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
