"""Digests of index lists and of plans, exchanged through the store of torch's default group.

No collective is used. So ranks that do something else are not needed, and a rank that never comes
is named after a while.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import time
import weakref
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist

from .agreement import Plan, difference

logger = logging.getLogger("lift_kernels")

LINGER_S = 10.0
"""Seconds that a rank with an error gives the others to see it. The store may end with its
process.
"""
POLL_S = 0.005
WAYS_OUT = (
    "name the ranks that hold replicas by LiftAdamW(process_group=...), or say process_group='independent' if ranks "
    "are meant to differ"
)
_DIFFERENT = (
    "ranks {low} and {high} would train different entries of {name}{more}: their masks were made from "
    "different weights, options or seeds. Give every rank the same weights before its first mask is made (seed them "
    f"alike, or broadcast rank 0's before pack_gradients and the first step); or {WAYS_OUT}"
)
_ABSENT = (
    "{ranks} trains {name} too, but has shown no new index list for {patience:.0f} s: it made no new mask, or "
    f"it stopped. Refresh on all ranks at the same step; or {WAYS_OUT}"
)
_NO_PLAN = (
    "rank {rank} {plan}, and {ranks} of its process group did not come to do the same within {s:.0f} s; call step(), "
    "refresh(), load_state_dict() and add_param_group() of the optimizer on all ranks alike"
)


class DigestExchange:
    """What all ranks of the default group have put into its store.

    The keys are:

    - ``names/RANK/I``: the I-th announcement of a rank, names of parameters.
    - ``lists/GROUP/RANK/N/NAME``: the digest of the index list in the N-th comparison of a name
      within a group. The ranks that train a parameter compare it equally often.
    - ``plan/GROUP/RANK/N`` and ``text/GROUP/RANK/N``: the digest and the text of the N-th plan of a
      rank within a group.
    - ``late/RANK/N`` and ``refused/RANK/N``: a rank announced names at a step, or raised, for the
      N-th time.

    A number that counts the process groups precedes all keys, because a store may outlive a group.
    """

    _current: DigestExchange | None = None

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self._of = weakref.ref(store)  # destroy_process_group must be able to end the store.
        self._rank, self._world = rank, world
        self._prefix = f"lift_kernels/{dist.PrefixStore('lift_kernels', store).add(f'lives/{rank}', 1)}"
        self._announced: set[str] = set()
        self._announcements = 0
        self._read = [0] * self._world  # announcements read, by rank
        self._holders: defaultdict[str, set[int]] = defaultdict(set)  # ranks that announced a name
        self._compared: Counter[tuple[str, str]] = Counter()  # by group and name
        self._agreed: Counter[str] = Counter()  # by group
        self._late = self._refused = 0
        self._absent: set[int] = set()  # ranks that were waited for in vain and have announced nothing

    @classmethod
    def of_default_group(cls) -> DigestExchange | None:
        """The exchange of this process, or None with a single rank."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        store = dist.distributed_c10d._get_default_store()
        if cls._current is None or cls._current._of() is not store:
            if store is None or dist.get_backend() in ("fake", "mpi"):
                _warn_once_of_no_store(dist.get_backend())
                return None
            cls._current = cls(store, dist.get_rank(), dist.get_world_size())
        return cls._current

    @property
    def _store(self) -> Any:
        store = self._of()
        assert store is not None, "the process group was destroyed"
        return dist.PrefixStore(self._prefix, store)

    def announce(self, names: Iterable[str]) -> bool:
        """Announce the names that are new, and return whether there was one."""
        new = sorted(set(names) - self._announced)
        if new:
            self._store.set(f"names/{self._rank}/{self._announcements}", zlib.compress(json.dumps(new).encode()))
            self._announced.update(new)
            self._announcements += 1
        return bool(new)

    def wait_for_late_ranks(self, patience: float) -> None:
        """Wait until every rank has announced names at a step as often as this one.

        A warning names the ranks that have not done so in time.
        """
        self._store.set(f"late/{self._rank}/{self._late}", "")
        self._read_announcements()
        others = set(range(self._world)) - self._absent
        missing = self._missing({rank: [f"late/{rank}/{self._late}"] for rank in others}, patience)
        self._late += 1
        self._absent.update(missing)
        if missing:
            logger.warning(
                "%s built no LiftAdamW within %.0f s of its first step here, so index lists are not compared with it. "
                "Build the optimizer after init_process_group, or %s",
                _ranks(missing),
                patience,
                WAYS_OUT,
            )

    def compare(self, digests: Mapping[str, str], ranks: tuple[int, ...] | None, patience: float) -> None:
        """Wait for the digests of all ranks that train these names, and compare them.

        Raises RuntimeError where they differ, or where a rank shows none in time.
        """
        self._read_announcements()
        group = "" if ranks is None else _label(ranks)

        def key(rank: int, name: str, back: int = 0) -> str:
            return f"lists/{group}/{rank}/{self._compared[group, name] - back}/{name}"

        shared: dict[int, list[str]] = defaultdict(list)  # names by rank
        for name in digests:
            for rank in self._holders[name] if ranks is None else ranks:
                if rank != self._rank:
                    shared[rank].append(name)
        digests = {name: digest for name, digest in digests.items() if any(name in names for names in shared.values())}
        if not digests:
            return  # No other rank trains these names.
        self._store.multi_set([key(self._rank, name) for name in digests], list(digests.values()))
        missing = self._missing({rank: [key(rank, name) for name in names] for rank, names in shared.items()}, patience)
        differing: dict[int, list[str]] = {}
        for rank in sorted(shared.keys() - set(missing)):
            theirs = self._store.multi_get([key(rank, name) for name in shared[rank]])
            if names := [name for name, digest in zip(shared[rank], theirs) if digest.decode() != digests[name]]:
                differing[rank] = names
        if differing:
            rank, names = next(iter(differing.items()))
            self._linger(list(shared))
        elif missing:
            raise RuntimeError(_ABSENT.format(ranks=_ranks(missing), name=shared[missing[0]][0], patience=patience))
        for name in digests:  # The next comparison has the next number, whatever came of this one.
            # All ranks have shown this digest, so they have read the one before.
            if self._compared[group, name] > 0 and not missing:
                self._store.delete_key(key(self._rank, name, 1))
            self._compared[group, name] += 1
        if differing:
            more = f" and of {len(names) - 1} more matrices" if len(names) > 1 else ""
            raise RuntimeError(
                _DIFFERENT.format(low=min(rank, self._rank), high=max(rank, self._rank), name=names[0], more=more)
            )

    def agree(self, plan: Plan, ranks: tuple[int, ...]) -> str:
        """Wait for the plans of all ``ranks``, and return why they cannot act together, or "".

        All ranks return the same text. Raises RuntimeError for a rank that shows no plan within the
        timeout of the process group.
        """
        group, text = _label(ranks), plan.text()
        number = self._agreed[group]
        self._agreed[group] += 1

        def key(what: str, rank: int, back: int = 0) -> str:
            return f"{what}/{group}/{rank}/{number - back}"

        # Most plans are equal, and then their digests are all that is read.
        digest = hashlib.sha256(text.encode()).hexdigest() + ("!" if plan.problem else "")
        own = [key("text", self._rank), key("plan", self._rank)]
        self._store.multi_set(own, [zlib.compress(text.encode()), digest])
        patience = self._store.timeout.total_seconds()
        missing = self._missing({rank: [key("plan", rank)] for rank in ranks}, patience)
        if missing:
            raise RuntimeError(_NO_PLAN.format(rank=self._rank, plan=plan, ranks=_ranks(missing), s=patience))
        digests = dict(zip(ranks, self._store.multi_get([key("plan", rank) for rank in ranks])))
        if number > 0:  # All ranks have shown this plan, so they have read the one before.
            self._store.delete_key(key("text", self._rank, 1))
            self._store.delete_key(key("plan", self._rank, 1))

        def plan_of(rank: int) -> Plan:
            return Plan.of_text(zlib.decompress(self._store.get(key("text", rank))).decode())

        first = ranks[0]
        stopped = next((rank for rank, found in digests.items() if found.endswith(b"!")), None)
        other = next((rank for rank, found in digests.items() if found != digests[first]), None)
        if stopped is not None:
            said = f"rank {stopped} cannot go on: {plan_of(stopped).problem}"
        elif other is not None:
            said = difference(first, plan_of(first), other, plan_of(other))
        else:
            return ""
        self._linger(list(ranks))
        return said

    def _read_announcements(self) -> None:
        for rank in range(self._world):
            while self._store.check([key := f"names/{rank}/{self._read[rank]}"]):
                for name in json.loads(zlib.decompress(self._store.get(key))):
                    self._holders[name].add(rank)
                self._read[rank] += 1
                self._absent.discard(rank)

    def _missing(self, keys: Mapping[int, list[str]], patience: float) -> list[int]:
        """Ranks whose keys are not all there after ``patience`` seconds.

        The keys are polled, because a wait would lock the store.
        """
        deadline = time.monotonic() + patience
        every = [key for of_rank in keys.values() for key in of_rank]
        while not self._store.check(every):
            if time.monotonic() > deadline:
                return [rank for rank in sorted(keys) if not self._store.check(keys[rank])]
            time.sleep(POLL_S)
        return []

    def _linger(self, ranks: list[int]) -> None:
        """Wait until the others have seen the difference too, at most `LINGER_S`."""
        self._store.set(f"refused/{self._rank}/{self._refused}", "")
        self._missing({rank: [f"refused/{rank}/{self._refused}"] for rank in ranks}, LINGER_S)
        self._refused += 1


def _label(ranks: tuple[int, ...]) -> str:
    """A short name of a group in keys."""
    return hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]


@functools.cache
def _warn_once_of_no_store(backend: str) -> None:
    logger.warning("a process group of backend %s has no store, so index lists are not compared among ranks", backend)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
