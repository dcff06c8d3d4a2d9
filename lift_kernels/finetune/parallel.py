"""The ranks of a run: their process group, and how they share work, results and errors.

Every rank runs the same code. Only the first one prints and writes files.
"""

from __future__ import annotations

import gc
import hashlib
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import transformers

from ..errors import UserError
from .config import Settings

T = TypeVar("T")

LINGER_S = 10.0
"""Seconds that a silent rank with an error waits before it ends. A launcher ends all ranks when one
ends, and the error has to be printed before that.
"""

POLL_S = 0.01


class SaidElsewhere(UserError):
    """An error that another rank prints."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, as one of them sees them. Without a group there is only this one.

    Attributes:
        group: process group of all ranks, or None.
        restarted: whether a launcher has started the ranks again after a failure.
    """

    group: dist.ProcessGroup | None = None
    restarted: bool = False

    @property
    def number(self) -> int:
        """The number of this rank, from 0."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def count(self) -> int:
        """How many ranks there are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items that this rank works on; `merge` puts the results in order again."""
        return items[self.number :: self.count]

    def merge(self, results: Sequence[T]) -> list[T]:
        """Return the results of the items of all ranks, in the order of the items."""
        parts = self.gather(list(results))
        return [parts[i % self.count][i // self.count] for i in range(sum(map(len, parts)))]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by their number."""
        values: list[Any] = [value] * self.count
        if self.group is not None:
            dist.all_gather_object(values, value, self.group)
        return values

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of the tensors of all ranks, the same bits on each."""
        total = value.detach().clone()
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total

    def together(self, work: Callable[[], T]) -> T:
        """Return this rank's result of ``work``, once all ranks have theirs.

        Raises:
            UserError: on every rank, when ``work`` raises it on one.
        """
        if self.group is None:
            return work()
        result, message = _outcome(work)
        for number, other in enumerate(self.gather(message)):
            if other is not None:
                raise UserError(f"rank {number}: {other}" if number else other)
        return result  # type: ignore[return-value]

    def first(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns on the first rank. No other rank calls it.

        Raises:
            UserError: on every rank, when ``work`` raises it.
        """
        if self.group is None:
            return work()
        outcome = [_outcome(work) if self.number == 0 else None]
        dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        result, message = outcome[0]  # type: ignore[misc]
        if message is not None:
            raise UserError(message)
        return result  # type: ignore[return-value]


def _outcome(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return the result of ``work``, or the message of its UserError."""
    try:
        return work(), None
    except UserError as error:
        return None, str(error)


@contextmanager
def joined(settings: Settings) -> Iterator[Ranks]:
    """Join the process group of a run, and leave it at the end.

    Ranks other than the first are silent meanwhile, unless they fail alone.

    Raises:
        UserError: when a node has fewer CUDA devices than ranks.
    """
    if settings.parallel == "none":
        yield Ranks()
        return
    with ExitStack() as stack:
        if settings.device != "cpu" and torch.cuda.is_available():
            own, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if own >= devices:
                raise UserError(f"this node has {devices} CUDA devices and more ranks; start {devices} ranks on it")
            torch.cuda.set_device(own)
            options: dict[str, Any] = {"backend": "nccl", "device_id": torch.device("cuda", own)}
        else:
            options = {"backend": "gloo"}
        store, rank, world = next(dist.rendezvous("env://"))
        dist.init_process_group(store=fresh_part(store, rank, world), rank=rank, world_size=world, **options)
        stack.callback(_leave)
        group = dist.group.WORLD
        # The agent of a node counts the failures of its own ranks alone.
        restarts = Ranks(group).gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
        ranks = Ranks(group, restarted=any(restarts))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # by the name that accelerate gives
        if ranks.number > 0:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(silence))
            stack.enter_context(redirect_stderr(silence))
            stack.callback(transformers.logging.set_verbosity, transformers.logging.get_verbosity())
            transformers.logging.set_verbosity_error()
        with said_once(_is_first_to_say):
            yield ranks


def _leave() -> None:
    """Leave the process group, and let go of the models that hold it.

    A thread of Gloo may still have a tensor of the last exchange to free, for which it needs the
    interpreter. At the interpreter's end that would abort the process. The group ends its threads
    when nothing holds it any more, and DistributedDataParallel is part of a reference cycle.
    """
    dist.destroy_process_group()
    gc.collect()


def fresh_part(store: dist.Store, rank: int, world: int) -> dist.Store:
    """Return a part of a store that holds nothing of ranks that have ended; the same on every rank.

    torchrun keeps its store when it starts ranks again, and they would try to connect to the
    addresses of the ended ones. So each rank draws a token, and the tokens together name the part.
    A rank goes on when every rank shows that it has read the same tokens.
    """
    store = dist.PrefixStore("lift_kernels/joined", store)
    store.set(f"token/{rank}", uuid.uuid4().hex)
    patience = dist.constants.default_pg_timeout.total_seconds()
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        tokens = b"".join(store.get(f"token/{other}") for other in range(world))
        name = hashlib.sha256(tokens).hexdigest()
        store.set(f"name/{rank}", name)
        names = [f"name/{other}" for other in range(world)]
        if store.check(names) and all(store.get(key) == name.encode() for key in names):
            return dist.PrefixStore(name, store)
        time.sleep(POLL_S)
    raise RuntimeError(f"not all of {world} ranks have joined within {patience:.0f} s")


@contextmanager
def said_once(speaks: Callable[[str], bool]) -> Iterator[None]:
    """Turn a UserError into a `SaidElsewhere` a little later, unless this rank ``speaks``."""
    try:
        yield
    except UserError as error:
        if isinstance(error, SaidElsewhere) or speaks(str(error)):
            raise
        time.sleep(LINGER_S)
        raise SaidElsewhere(str(error)) from error


def _is_first_to_say(message: str) -> bool:
    """Return whether no other rank has said this before, by the store of the process group."""
    try:
        return dist.distributed_c10d._get_default_store().add(f"lift_kernels/said/{message}", 1) == 1
    except RuntimeError:  # The store has ended with another rank: better twice than never.
        return True


def speaks_for_node(message: str) -> bool:
    """Return whether this process is the first of its node, before there is a group."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
