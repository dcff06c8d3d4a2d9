"""Replicas must train the same entries: they compare digests of their index lists.

Averaged gradients of ranks with different index lists would mix different weights, without any
error. The comparison goes through torch's store. It uses no collective, because some ranks may have
no optimizer at all: another stage of a pipeline, a critic, an inference rank.

Each rank announces the parameters that it trains when its optimizer is built. Replicas average
gradients before a step, so every replica has announced itself by the first comparison. A rank waits
only for the ranks that train its parameters. An optimizer that is older than the process group is
announced at its first step. There every rank is waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .agreement import Plan
from .checksums import index_digests
from .digest_exchange import DigestExchange
from .groups import data_parallel_group, is_alive, ranks_of, same_ranks

PATIENCE_S = 60.0
"""Seconds to wait for a rank that trains the same parameters."""


class Replicas:
    """Which ranks train the same entries as this one, and the comparison of their index lists.

    Args:
        process_group: a torch process group, all of whose ranks hold replicas; None: the ranks of
            the default group that announce a parameter of the same name; ``"independent"``: no
            rank, and nothing is compared.

    Raises TypeError for anything else and ValueError for a group without this rank.
    """

    def __init__(self, process_group: Any = None) -> None:
        self._independent = process_group == "independent" if isinstance(process_group, str) else False
        self._ranks = None if process_group is None or self._independent else ranks_of(process_group)
        self._given = process_group if self._ranks else None
        self._names: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_given": None}  # A process group cannot be copied or pickled; its ranks can.

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share out the work on masks: the given group, or that of accelerate.

        None where each rank works by itself: without such a group, and with a single rank.
        """
        if self._independent or not (dist.is_available() and dist.is_initialized()):
            return None
        if self._ranks is None:
            group = data_parallel_group()
        else:
            group = self._given if is_alive(self._given) else same_ranks(self._ranks)
        return group if group is not None and dist.get_world_size(group) > 1 else None

    @property
    def known(self) -> bool:
        """Whether it is known which ranks hold replicas, if there are other ranks at all."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return True
        return self.group is not None or (self._ranks is not None and len(self._ranks) == 1)

    @property
    def ungrouped(self) -> bool:
        """Whether there are other ranks, and nobody says, or no longer, which hold replicas."""
        return not self._independent and not self.known

    def announce(self, names: Iterable[str]) -> None:
        """Tell the other ranks that this one trains these parameters.

        Before init_process_group nothing is sent.
        """
        self._names.update(names)
        exchange = None if self._independent or self._ranks is not None else DigestExchange.of_default_group()
        if exchange is not None:
            exchange.announce(self._names)

    def active(self) -> bool:
        """Whether there is another rank to compare with. False before init_process_group."""
        return not self._independent and DigestExchange.of_default_group() is not None

    def agree(self, plan: Plan, error: Exception | None = None) -> None:
        """Raise on every rank of `group`, before any of them acts, unless all have the same plan.

        Every rank of the group must call this. A rank that does not is waited for as long as its
        collectives would be.

        Args:
            error: why this rank cannot do what it plans. It is raised here, and a RuntimeError with
                its words on the other ranks.
        """
        exchange = None if self.group is None else DigestExchange.of_default_group()
        message = "" if exchange is None else exchange.agree(plan, ranks_of(self.group))
        if error is not None:
            raise error
        if message:
            raise RuntimeError(message)

    def compare(self, lists: Mapping[str, list[Tensor]], masks_took: float = 0.0) -> None:
        """Raise RuntimeError on every rank, naming a parameter, if index lists of replicas differ.

        Args:
            lists: the new index lists of each name, int32, on any device.
            masks_took: seconds that the masks took here. A rank ten times as slow is still waited
                for.
        """
        exchange = None if self._independent else DigestExchange.of_default_group()
        if exchange is None:
            return
        patience = max(PATIENCE_S, 10 * masks_took)
        self._names.update(lists)
        if self._ranks is None and exchange.announce(self._names):
            exchange.wait_for_late_ranks(patience)
        exchange.compare(index_digests(lists), self._ranks, patience)
