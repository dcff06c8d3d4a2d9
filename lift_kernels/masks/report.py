"""Where a model's principal weights lie: figures of each matrix, a table and a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._progress import with_progress
from ..validation import require
from .budget import trained_entries
from .lowrank import low_rank_factors
from .principal import principal_indices
from .selection import largest_indices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOP = 0.1
"""Share of rows and columns whose part of the mask is reported. An even spread gives this share."""
PANELS = {
    "density": "share of the entries chosen",
    "overlap": "chosen entries that are among\nthe largest of W itself",
    "captured": "sum of |W_r| over the chosen\nentries / over all",
    "rows": f"part of the mask in the {TOP:.0%}\nof rows that hold most",
    "columns": f"part of the mask in the {TOP:.0%}\nof columns that hold most",
}


@dataclass(frozen=True)
class MatrixReport:
    """Figures of one matrix. `PANELS` says what they mean.

    All are from 0 to 1 but ``entries`` and ``layer``, which is None outside a stack of layers.
    """

    name: str
    layer: int | None
    projection: str
    entries: int
    density: float
    rows: float
    columns: float
    overlap: float
    captured: float


def matrix_report(name: str, weight: Tensor, rank: int, k: int) -> MatrixReport:
    """Figures of the k principal weights of a matrix.

    Raises ValueError, naming the matrix, for a rank that does not fit and for non-finite weights.
    """
    weight = weight.detach()
    left, right, *_ = low_rank_factors(weight, min(rank, *weight.shape), name=name)
    magnitude = (left @ right.T).abs_()
    chosen = largest_indices(magnitude, k).long()
    largest = largest_indices(weight.float().abs(), k).long()
    m, n = weight.shape
    mask = torch.zeros(m * n)
    mask[chosen] = 1
    counts = mask.view(m, n)
    found = re.search(r"\.(\d+)\.", f".{name}")
    return MatrixReport(
        name=name,
        layer=int(found[1]) if found else None,
        projection=re.sub(r"^\d+\.|(\.weight)?(\[\d+\])?$", "", name[found.end() - 1 :] if found else name),
        entries=k,
        density=k / (m * n),
        rows=_concentration(counts.sum(1)),
        columns=_concentration(counts.sum(0)),
        overlap=float(mask[largest].sum()) / k,
        captured=float(magnitude.view(-1)[chosen].double().sum() / magnitude.double().sum().clamp_min(1e-300)),
    )


def density_map(weight: Tensor, rank: int, k: int, size: int = 96) -> Tensor:
    """Share of chosen entries in each cell of a grid over a matrix, at most ``size`` x ``size``."""
    mask = torch.zeros(weight.numel())
    mask[principal_indices(weight, min(rank, *weight.shape), k).long()] = 1
    m, n = weight.shape
    return nn.functional.adaptive_avg_pool2d(mask.view(1, m, n), (min(size, m), min(size, n)))[0]


def report_of(
    weights: Mapping[str, Tensor], density: float, rank: int, budget_rank: int | None = None
) -> tuple[list[MatrixReport], Tensor]:
    """Figures of every matrix, and the `density_map` of the one with the most uneven mask.

    A 3-D stack counts as its matrices, named ``name[i]``.
    """
    require(0 < density <= 1, f"density is {density}; it must be above 0 and at most 1")
    require(rank >= 1, f"rank is {rank}; it must be at least 1")
    rows, matrices = [], _matrices(weights)
    for name, weight in with_progress(matrices.items(), "matrices"):
        k = trained_entries(weight.shape, density, budget_rank, name)
        rows.append(matrix_report(name, weight, rank, k))
    uneven = most_uneven(rows)
    return rows, density_map(matrices[uneven.name].detach(), rank, uneven.entries)


def _matrices(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All matrices by name, those of stacks one by one."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        stack = weight.dim() == 3
        found |= {f"{name}[{i}]": matrix for i, matrix in enumerate(weight)} if stack else {name: weight}
    return found


def most_uneven(rows: list[MatrixReport]) -> MatrixReport:
    """The matrix whose mask is concentrated most in few rows or columns."""
    return max(rows, key=lambda row: max(row.rows, row.columns))


def table(rows: list[MatrixReport]) -> str:
    """Means by projection, then over all matrices, as aligned text."""
    kinds = list(dict.fromkeys(row.projection for row in rows))
    groups = [(kind, [row for row in rows if row.projection == kind]) for kind in kinds] + [("all", rows)]
    width = max(len(kind) for kind, _ in groups)
    lines = [f"{'':<{width}}  matrices  " + "  ".join(f"{key:>8}" for key in PANELS)]
    for kind, members in groups:
        means = (sum(getattr(row, key) for row in members) / len(members) for key in PANELS)
        lines.append(f"{kind:<{width}}  {len(members):>8}  " + "  ".join(f"{mean:8.3f}" for mean in means))
    legend = [f"{key}: {' '.join(text.split())}" for key, text in PANELS.items()]
    return "\n".join([*lines, "", *legend])


def draw(rows: list[MatrixReport], picture: Tensor, title: str) -> Figure:
    """One map per figure of `PANELS`, and one matrix's mask itself.

    Layers go from left to right, projections from top to bottom. A cell is the mean of the matrices
    of a stack.
    """
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row.projection for row in rows))
    layers = sorted({-1 if row.layer is None else row.layer for row in rows})
    figure = Figure(
        figsize=(max(6.0, 1.5 + 0.22 * len(layers)) * 2, 1.6 + 3 * (0.9 + 0.28 * len(kinds))), layout="constrained"
    )
    figure.suptitle(title)
    panels = figure.subplots(3, 2, squeeze=False).flatten()
    for axes, (key, label) in zip(panels, PANELS.items()):
        values, counts = torch.zeros(2, len(kinds), len(layers))
        for row in rows:
            place = kinds.index(row.projection), layers.index(-1 if row.layer is None else row.layer)
            values[place] += getattr(row, key)
            counts[place] += 1
        values /= counts  # NaN, which is not drawn, where there is no matrix
        image = axes.imshow(values.numpy(), aspect="auto", cmap="viridis", vmin=0)
        axes.set_yticks(range(len(kinds)), kinds)
        every = max(1, len(layers) // 10)
        axes.set_xticks(range(0, len(layers), every), [str(layer) if layer >= 0 else "-" for layer in layers[::every]])
        axes.set_xlabel("layer")
        figure.colorbar(image, ax=axes).set_label(label, fontsize=8)
    image = panels[-1].imshow(picture.numpy(), aspect="auto", cmap="viridis", vmin=0)
    panels[-1].set(title=most_uneven(rows).name, xlabel="columns", ylabel="rows", xticks=[], yticks=[])
    figure.colorbar(image, ax=panels[-1]).set_label(
        "share of the entries chosen\nin each part of the matrix", fontsize=8
    )
    return figure


def _concentration(counts: Tensor) -> float:
    """The part of the mask that lies in the tenth of the lines that hold most of it."""
    lines = max(1, round(TOP * counts.numel()))
    return float(counts.topk(lines).values.sum() / counts.sum())
