"""MatrixTable: which matrices an optimizer trains, and where the state of each is."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..masks.principal import Mask
from ..masks.selection import warm_part
from ..nn import trainable, weight_sample
from ..ops import dispatch
from ..validation import require
from . import drift
from .coverage import packing_problem
from .hyperparameters import is_sparse
from .mask_options import MaskOptions
from .matrix_ref import DenseRef, MatrixRef, names_of
from .offload import HostState
from .packed_state import PackedState
from .several_ranks import Replicas, compare_lists


class MatrixTable:
    """The parameters of an optimizer, those that LIFT trains with their state.

    Attributes:
        refs: the matrices, in the order of the groups.
        parameters, packed: those of ``refs``, and whether their ``grad`` is packed.
        hooked: those of ``refs`` whose gradient a hook packs.
        dense: the other parameters.
        missing: matrices that have no mask yet.
        unseen: matrices with an index list that other ranks have not seen, as keys.
        loaded: matrices whose index list came with a state or packed gradients, until ranks have
            compared it.
        hook_agreed: whether ranks have compared these before `trained_entries_hook` used them.
        partial: matrices whose gradient `trained_entries_hook` has averaged in part, until it is
            used, or cleared where masks are made from gradients.
        lost: which parameter packing has taken from the optimizer (`packing_problem`), or empty.
        samples: of the weights of loaded states and first masks (`weight_sample`), until they are
            compared with the present weights.
        arenas: by device, dtypes, form and place of state.
        version: numbers that rise when any of these change, or the layout of an arena.
    """

    def __init__(self) -> None:
        self.refs: list[MatrixRef] = []
        self.parameters: list[Tensor] = []
        self.packed: list[bool] = []
        self.hooked: list[MatrixRef] = []
        self.dense: list[DenseRef] = []
        self.missing: list[MatrixRef] = []
        self.unseen: dict[MatrixRef, None] = {}
        self.loaded: dict[MatrixRef, None] = {}
        self.hook_agreed = False
        self.partial: set[MatrixRef] = set()
        self.lost = ""
        self.samples: dict[MatrixRef, Tensor] = {}
        self.arenas: dict[tuple, PackedState] = {}
        self._changes = 0
        self._known: dict[Tensor, MatrixRef] = {}
        self._groups: list[tuple[dict[str, Any], bool | None, list[Tensor]]] = []  # what the lists were made from
        self._layers: list[Any] = []  # a packed layer of each matrix that has some, and its weight then
        self._weights: list[Tensor | None] = []
        self._kinds = -1  # `trainable.version` then
        self._shown: tuple[int, ...] = ()  # the version that `publish` has shown
        self._masks_took = 0.0  # seconds, the last time

    @property
    def version(self) -> tuple[int, ...]:
        # Arenas count by themselves, so an error in the midst of a change hides nothing.
        return self._changes, *[arena.layout for arena in self.arenas.values()]

    def follow(self, groups: Sequence[dict[str, Any]]) -> None:
        """Build the lists again if groups, their parameters or the kinds of these changed."""
        if trainable.version == self._kinds and len(groups) == len(self._groups):
            if all(map(_is_unchanged, groups, self._groups)) and all(map(operator.is_, self._present(), self._weights)):
                return
        self.refs, self.dense = [], []
        for number, group in enumerate(groups):
            for p, name in zip(group["params"], names_of(group, number)):
                kind = trainable.trainable_of(p)
                if is_sparse(kind, group):
                    self._take(p, group, name, kind)
                else:
                    self.dense.append(DenseRef(p, group, name))
        self.parameters, self.packed = [ref.parameter for ref in self.refs], [ref.trainable.packed for ref in self.refs]
        self.hooked = [ref for ref in self.refs if ref.trainable.hooked]
        self.missing = [ref for ref in self.refs if ref.arena is None]
        self.lost = packing_problem([*self.refs, *self.dense])
        self._layers = [layer for ref in self.refs for layer in ref.trainable.layers[:1]]
        self._weights = self._present()
        self._kinds, self._changes = trainable.version, self._changes + 1
        self._groups = [(group, group["lift"], list(group["params"])) for group in groups]

    def _present(self) -> list[Tensor | None]:
        """Present weights of layers. Tools replace them in ``_parameters``, past all methods."""
        return [layer._parameters.get("weight") for layer in self._layers]

    def _take(self, p: Tensor, group: dict[str, Any], name: str, kind: trainable.Trainable) -> None:
        ref = self._known.setdefault(p, MatrixRef(0, p, group, name, kind))
        if ref.arena is not None and kind.layers:
            ref.arena.weights[ref.row] = kind.matrix  # load_state_dict(assign=True) brings a new one.
        if ref.arena is not None and kind.indices is not None:
            own, present = ref.views()["indices"], kind.indices
            require(
                present.device != own.device or present.data_ptr() == own.data_ptr(),
                f"{name} got packed gradients after the optimizer had chosen its entries, by pack_gradients or from "
                "another LiftAdamW, and these may be others; call pack_gradients first and make one optimizer from the "
                "groups that it returns",
                RuntimeError,
            )
        for layer in kind.layers:
            require(
                layer._parameters.get("weight") is kind.layers[0]._parameters.get("weight"),
                f"{name}: {layer.lift_name or 'a layer'} shared its weight with {kind.layers[0].lift_name or 'another'}"
                ", and now has one of its own, which this optimizer would not train; tie both again",
                RuntimeError,
            )
        ref.number, ref.group, ref.name, ref.trainable = len(self.refs), group, name, kind
        ref.draw_number = ref.number if kind.draw_number is None else kind.draw_number
        self.refs.append(ref)

    def make_first_masks(
        self, options: MaskOptions, state: dict[Tensor, Any], *, only_given: bool = False
    ) -> tuple[list[MatrixRef], list[Mask]]:
        """Give every matrix without a mask its first one, and show it in ``state``.

        Packed gradients have brought theirs along. ``only_given`` leaves the other matrices without
        one. Returns the other matrices, and their masks.
        """
        missing = [ref for ref in self.missing if not only_given or ref.trainable.indices is not None]
        new = [ref for ref in missing if not (ref.trainable.packed or ref.trainable.hooked)]
        masks = options.make(new) if new else []
        made = {ref: mask._asdict() for ref, mask in zip(new, masks)}
        entries = [made[ref] if ref in made else ref.trainable.initial_state() for ref in missing]
        try:
            self.adopt(missing, entries, options.warm_start)
            for ref in new:
                self.loaded.pop(ref, None)
        finally:
            drift.note([ref for ref in missing if ref.arena is not None])
            self.publish([ref for ref in missing if ref.arena is not None], state)
        self._masks_took = sum(mask.seconds for mask in masks)
        return new, masks

    def check_renewable(self, drop_gradients: bool) -> None:
        """Raise, naming the matrix, if one must not get a new mask."""
        if self.lost:
            raise RuntimeError(self.lost)
        for ref in self.refs:
            ref.check_renewable(drop_gradients)
        if not drop_gradients:
            self._check_whole(self.refs)

    def _check_whole(self, refs: Sequence[MatrixRef]) -> None:
        for ref in [ref for ref in refs if ref in self.partial]:
            require(
                ref.parameter.grad is None,
                f"{ref.name} has a gradient of which trained_entries_hook has averaged the entries of the present mask "
                "alone; refresh after step() and zero_grad(), or by refresh(drop_gradients=True). With "
                "selection='gradient' let refresh_interval= make the masks: the hook averages whole gradients before",
                RuntimeError,
            )

    def forget_gradients(self) -> None:
        """Note that gradients were cleared, and drop those that hooks have packed."""
        self.partial.clear()
        for ref in self.hooked:
            ref.trainable.clear()

    def drop_gradients(self) -> None:
        """Drop those that belong to the entries of present masks: packed and partial ones."""
        for ref in self.refs:
            ref.trainable.clear()
        for ref in self.partial:
            ref.parameter.grad = None
        self.partial.clear()

    def renew(
        self, refs: Sequence[MatrixRef], options: MaskOptions, state: dict[Tensor, Any]
    ) -> tuple[list[Mask], list[Tensor]]:
        """New masks for matrices that have one, and how many of their entries were in the old.

        Packed gradients are dropped: they have been used, and they belong to the old entries. They
        go first, because masks take memory.
        """
        if options.selection == "gradient":  # A changed interval may ask for masks that the hook did not expect.
            self._check_whole(refs)
        for ref in refs:
            ref.trainable.clear()
        masks = options.make(refs)
        try:
            kept = self.migrate(refs, masks, options.warm_start, options.backend)
        finally:
            self.publish(refs, state)
        self._masks_took = sum(mask.seconds for mask in masks)
        return masks, kept

    def adopt(self, refs: Sequence[MatrixRef], entries: Sequence[dict[str, Any]], warm_start: str | None) -> None:
        """Put matrices into the arenas of their kind, with their index lists and moments if given.

        Args:
            entries: of `PackedState.append`, with lists that need no check.
            warm_start: where bases are kept, an option of LiftAdamW.
        """
        kinds = defaultdict(list)
        for ref, entry in zip(refs, entries):
            kinds[ref.kind()].append((ref, entry))
        for kind, members in kinds.items():
            device, _, state_dtype, master, births, offload = kind
            make = HostState if offload else PackedState
            arena = self.arenas.get(kind) or make(device, state_dtype, master=master, births=births)
            matrices, lists = [ref.trainable.matrix for ref, _ in members], [entry for _, entry in members]
            first = len(arena.weights)
            arena.append(matrices, lists, [ref.name for ref, _ in members], validate=False)
            self.arenas[kind] = arena
            for row, (ref, entry) in enumerate(members, start=first):
                ref.arena, ref.row = arena, row
                ref.warm = warm_part(entry, ref.parameter, _warm_place(ref, warm_start))
                if weight_sample.KEY in entry:
                    self.samples[ref] = entry[weight_sample.KEY].to(device, copy=True)
        self.missing = [ref for ref in self.refs if ref.arena is None]
        self.unseen.update(dict.fromkeys(refs))
        self.loaded.update(dict.fromkeys(refs))
        self._changes += 1

    def restore(
        self,
        groups: Sequence[dict[str, Any]],
        entries: Mapping[Tensor, dict[str, Any]],
        warm_start: str | None,
        state: dict[Tensor, Any],
    ) -> None:
        """Take the matrices of ``groups`` that have an entry (`adopt`); show it in ``state``."""
        self.follow(groups)
        refs = [ref for ref in self.refs if entries.get(ref.parameter)]
        self.adopt(refs, [entries[ref.parameter] for ref in refs], warm_start)
        for ref in refs:
            ref.drift = drift.saved_part(ref, entries[ref.parameter])
        self.publish(refs, state)

    def migrate(
        self, refs: Sequence[MatrixRef], masks: Sequence[Mask], warm_start: str | None, backend: str | None
    ) -> list[Tensor]:
        """Give matrices new masks, which need no check.

        Returns for each how many entries of the new mask were in the old one, 0-dim on its device.
        """
        kept: dict[int, Tensor] = {}
        members = {id(arena): [i for i, ref in enumerate(refs) if ref.arena is arena] for arena in self.arenas.values()}
        arenas = [arena for arena in self.arenas.values() if members[id(arena)]]
        for arena in arenas:  # A weight that cannot be used raises before any arena is changed.
            arena.regather_masters([refs[i].row for i in members[id(arena)]])
        drift.forget(refs)
        for arena in arenas:
            places = members[id(arena)]
            rows, lists = [refs[i].row for i in places], [masks[i].indices for i in places]
            kept.update(zip(places, arena.migrate(rows, lists, validate=False, backend=backend).unbind()))
        for ref, mask in zip(refs, masks):
            ref.warm = warm_part(mask._asdict(), ref.parameter, _warm_place(ref, warm_start))
        drift.note(refs)
        self.unseen.update(dict.fromkeys(refs))
        return [kept[i] for i in range(len(refs))]

    def publish(self, refs: Iterable[MatrixRef], state: dict[Tensor, Any]) -> None:
        """Show the state of matrices with a new mask as ``optimizer.state[p]``.

        Views stay right while the layout of the arenas does, unless the user replaced them.
        """
        same, current = self._shown == self.version, self._kinds == trainable.version
        for ref in refs if same else self._known.values():
            entry = state.get(ref.parameter, {})
            if same and "indices" in entry and ref.trainable.is_bound(entry):
                for key in ("basis", "threshold", *drift.STATE_KEYS):
                    entry.pop(key, None)
                entry.update(ref.warm | ref.drift)
            elif ref.arena is not None:
                entry = state.setdefault(ref.parameter, {})
                entry.clear()
                entry.update(ref.views() | ref.warm | ref.drift)
                ref.trainable.bind(entry)
        self._shown = self.version
        if current:
            self._kinds = trainable.version  # Lists that were bound here are news to other optimizers alone.

    def compare_ranks(self, replicas: Replicas) -> None:
        """Raise on every replica if their new index lists differ.

        Lists that differed are compared again at the next step.
        """
        if not self.unseen or dispatch.capturing():
            return
        if replicas.active():
            compare_lists(self.unseen, replicas, self._masks_took)
            self.unseen.clear()
        self.loaded.clear()

    def matrix_of(self, parameter: Tensor) -> MatrixRef | None:
        """The matrix that is trained by a parameter, which may have left its group."""
        ref = self._known.get(parameter)
        return ref if ref is not None and self.refs[ref.number : ref.number + 1] == [ref] else None

    def has_mask(self, parameter: Tensor) -> bool:
        """Whether the state of a parameter is that of a matrix with a mask."""
        ref = self._known.get(parameter)
        return ref is not None and ref.arena is not None

    def weight_samples(self, parameters: Sequence[Tensor]) -> dict[int, Tensor]:
        """Samples of the matrices with a mask, by the places of their parameters.

        Where a loaded state was not compared yet, the sample is that of the weight it belongs to.
        """
        refs = {i: self._known.get(p) for i, p in enumerate(parameters)}
        return {
            i: self.samples[ref]
            if ref in self.samples
            else weight_sample.sample_of(ref.trainable.matrix, ref.views()["indices"])
            for i, ref in refs.items()
            if ref is not None and ref.arena
        }

    def tensors(self) -> list[Tensor]:
        """All buffers of the arenas."""
        return [t for arena in self.arenas.values() for t in (*arena.buffers().values(), arena.steps)]


def _warm_place(ref: MatrixRef, warm_start: str | None) -> str | None:
    return "pinned" if warm_start and ref.group.get("offload") else warm_start


def _is_unchanged(group: dict[str, Any], then: tuple[dict[str, Any], bool | None, list[Tensor]]) -> bool:
    old, lift, parameters = then
    same = group is old and group["lift"] is lift and len(group["params"]) == len(parameters)
    return same and all(map(operator.is_, group["params"], parameters))
