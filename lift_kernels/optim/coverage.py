"""Which parameters of an optimizer get no gradient: said once, or refused where packing is why."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from ..nn import trainable
from .matrix_ref import DenseRef, MatrixRef

logger = logging.getLogger("lift_kernels")


_NO_BACKWARD = (
    "call loss.backward() before step() and zero_grad() after it, or make the optimizer from the parameters that the "
    "model has now"
)
_UNUSED = (
    "that is right for experts that no token has reached, else look for a layer that the loss does not use, or for a "
    "parameter that was replaced in the model after the optimizer was made"
)


def packing_problem(refs: Sequence[MatrixRef | DenseRef]) -> str:
    """Which parameter lost its gradient when its model was packed or unpacked; empty if none did.

    Args:
        refs: all parameters of an optimizer.
    """
    held, values = {id(ref.parameter) for ref in refs}, trainable.packed_weights()
    for ref in refs:
        if id(ref.parameter) in values and id(values[id(ref.parameter)]) not in held:
            return (
                f"{ref.name} got packed gradients after the optimizer was made, which would train it no more; call "
                "pack_gradients first and make the optimizer from the groups that it returns"
            )
        if isinstance(ref, MatrixRef) and ref.trainable.matrix.dim() == 1:
            return (
                f"{ref.name} is no longer of a packed layer, because unpack was called or the model is gone; make "
                "another optimizer from the parameters that the model has now"
            )
    return ""


class Coverage:
    """Looks at the first step for which some parameter has a gradient, and at one where none has.

    Attributes:
        done: whether that step has come.
    """

    def __init__(self) -> None:
        self.done = False
        self._said_idle = False

    def report(self, refs: Sequence[MatrixRef | DenseRef], trained: Sequence[bool]) -> None:
        """Warn of the parameters without a gradient, in one line a kind.

        Args:
            refs: all parameters.
            trained: whether each has a gradient.
        """
        idle = not any(trained)
        self.done |= not idle or not refs
        if idle and self._said_idle:
            return
        self._said_idle = idle
        matrices = {id(_matrix(ref)) for ref in refs if _matrix(ref) is not ref.parameter}  # trained by their values
        looked_at = [(ref, has) for ref, has in zip(refs, trained) if id(ref.parameter) not in matrices]
        refs, missing = [ref for ref, _ in looked_at], [ref for ref, has in looked_at if not has]
        frozen = [ref for ref in missing if not ref.parameter.requires_grad]
        unused = [ref for ref in missing if ref.parameter.requires_grad]
        effect = "no parameter has a gradient, so this step changes nothing: " if idle else ""
        remedy = _NO_BACKWARD if idle else _UNUSED
        if frozen:
            logger.warning(
                "%s%d of %d parameters of LiftAdamW, with %.3g %% of their weights, are frozen (requires_grad=False) "
                "and stay as they are, e.g. %s; call requires_grad_(True) on them, or make the groups with "
                "lift_param_groups(model, freeze_rest=True)",
                effect,
                len(frozen),
                len(refs),
                100 * _weights(frozen) / max(1, _weights(refs)),
                frozen[0].name,
            )
        if unused:
            logger.warning(
                "%s%d of %d parameters of LiftAdamW, with %.3g %% of their weights, have no gradient at this step "
                "and stay as they are until they get one, e.g. %s; %s",
                effect,
                len(unused),
                len(refs),
                100 * _weights(unused) / max(1, _weights(refs)),
                unused[0].name,
                remedy,
            )


def _weights(refs: Sequence[MatrixRef | DenseRef]) -> int:
    """How many weights these parameters have; of ``values``, those of their matrix."""
    return sum(_matrix(ref).numel() for ref in refs)


def _matrix(ref: MatrixRef | DenseRef) -> Tensor:
    return ref.trainable.matrix if isinstance(ref, MatrixRef) else ref.parameter
