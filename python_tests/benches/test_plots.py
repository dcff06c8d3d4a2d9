"""`bench.plots`: every plot is drawn from the CSVs, fits a page, and can be read."""

from __future__ import annotations

import csv
import itertools
import re
import shutil

import pytest
from helpers import card_rows

from bench import plots
from bench.common import plot_labels

FOLDER = plots.DEFAULT
NAMES = [name for name in plots.FIGURES if name != "masks"]  # the committed masks.png came before its CSV
KEYS = re.compile(r"smollm2|minilm|warm_start|_ms\b|_mib\b|float32|bfloat16|grads|published|floor|peer|status")
FAILURES = re.compile(r"Error|missing|refused|not offered|CUDA device")
EXPONENT = re.compile(r"\de[+-]?\d")


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """A card's folder, of few rows."""
    return card_rows.write(tmp_path_factory.mktemp("card"))


def folder_of(name: str, card):
    return card if name.startswith("gpu_") else FOLDER


@pytest.fixture(scope="module")
def figures(card) -> dict:
    """Every figure of the committed CSVs, and those of a card, laid out."""
    found = {name: plots.make(name, folder_of(name, card)) for name in NAMES}
    for figure in found.values():
        figure.draw_without_rendering()
    return found


def texts(figure) -> list:
    """The texts that a reader sees, those of the axes and of the legend included."""
    return [text for text in figure.findobj(is_text) if text.get_visible() and text.get_text().strip()]


def is_text(artist) -> bool:
    from matplotlib.text import Text

    return isinstance(artist, Text)


def boxes(figure) -> list[tuple[str, object]]:
    """Each text and its box in pixels. Ticks outside the limits of their axis are not drawn."""
    hidden = {
        id(text)
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in [*axis.majorTicks, *axis.minorTicks]
        for text in (tick.label1, tick.label2)
        if not within(tick.get_loc(), axis.get_view_interval())
    }
    return [(text.get_text(), text.get_window_extent()) for text in texts(figure) if id(text) not in hidden]


def within(value: float, ends) -> bool:
    return min(ends) <= value <= max(ends)


def lines(figure) -> list:
    """The boxes of the rules and of the roofline's marks."""
    return [line.get_window_extent().padded(1) for axes in figure.axes for line in axes.lines]


def overlap(one, other) -> bool:
    return one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1 and other.y0 < one.y1


@pytest.mark.parametrize("name", NAMES)
def test_no_text_meets_another_text_or_a_mark_or_the_border(figures, name):
    found = boxes(figures[name])
    assert len(found) > 20
    for (text, box), (other, second) in itertools.combinations(found, 2):
        assert not overlap(box, second), f"{text!r} overlaps {other!r}"
    marks = lines(figures[name])
    assert marks or name == "memory"
    width, height = figures[name].canvas.get_width_height()
    for text, box in found:
        assert not any(overlap(box, mark) for mark in marks), f"a mark crosses {text!r}"
        assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height, f"{text!r} is cut off"


def test_the_boxes_bite(figures):
    """A number moved onto its neighbour, or onto the rule, is seen."""
    figure = plots.make("headline", FOLDER)
    axes = figure.axes[1]
    cell = next(text for text in axes.texts if text.get_text() == "1.00×")
    cell.xyann = (cell.xyann[0], cell.xyann[1] - 20)
    moved = axes.text(1, 1, "on the rule", ha="center")
    figure.draw_without_rendering()
    found = dict(boxes(figure))
    assert any(overlap(found["1.00×"], box) for text, box in found.items() if text != "1.00×")
    assert any(overlap(found[moved.get_text()], mark) for mark in lines(figure))


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_fits_a_page(figures, name):
    width, height = figures[name].canvas.get_width_height()
    assert 300 < width <= 1400 and 300 < height <= 1100
    assert all(len(axes.get_yticks()) <= 12 for axes in figures[name].axes)


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_for_people(figures, card, name):
    """No key of a CSV, no failure's words, no exponent; the machine is named."""
    words = "\n".join(text.get_text() for text in texts(figures[name]))
    for pattern in (KEYS, FAILURES, EXPONENT):
        assert not pattern.search(words), pattern.search(words)
    with (folder_of(name, card) / f"{plots.FIGURES[name][1][0]}.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["device"] in words


@pytest.mark.parametrize("name", NAMES)
def test_every_bar_has_a_label(figures, name):
    """A bar's label is a text of the label table, but for files and the variants of a card."""
    known = {*plot_labels.LABELS.values(), "Whole model", "Delta file"}
    if name == "gpu_step":
        known = {"AdamW fused, bf16", "LIFT, dense bf16 gradients, fp32 moments"}
        known |= {"LIFT, packed fp32 gradients, fp32 moments", "AdamW fused on a packed vector, scattered"}
    shown = {text.get_text() for axes in figures[name].axes for text in axes.get_yticklabels()} - {""}
    assert shown and shown <= known


def test_dropped_variants_are_not_drawn(figures):
    words = " ".join(text.get_text() for text in texts(figures["sparse_adamw"]))
    assert "stochastic" not in words and "cold" not in words


def test_methods_without_a_figure_are_named_and_have_no_bar(figures):
    words = [text.get_text() for text in texts(figures["memory"])]
    (caption,) = [text for text in words if "Machine:" in text]
    assert "Without a figure on this machine: FlashAdamW (flashoptim)." in caption
    assert "FlashAdamW (flashoptim)" not in words
    speeds = figures["headline"].axes[1]
    assert "LoRA (peft)" not in [text.get_text() for text in speeds.get_yticklabels()]


@pytest.mark.parametrize(
    ("value", "text"),
    [("1270.0", "1,270"), (1269.0, "1,270"), ("12.0", "12.0"), (0.6247, "0.625"), (9.996, "10.0"), ("0.0", "0"),
     (2e-5, "0.0000200"), (1.5e7, "15,000,000"), ("", "–")],
)  # fmt: skip
def test_numbers(value, text):
    assert plot_labels.number(value) == text


def test_shares_ratios_and_sets():
    ratios = ["4.54", "0.997", "0.0523", "22.97", ""]
    assert [plot_labels.times(ratio) for ratio in ratios] == ["4.54×", "1.00×", "0.052×", "23.0×", "–"]
    assert plot_labels.percent("0.4924") == "49 %" and plot_labels.percent("") == "–"
    assert plot_labels.label("4096x11008, bfloat16") == "4096 × 11008, bf16"
    assert plot_labels.label("random Llama, 33.7 M, float32, 2 x 64 tokens") == (
        "Random Llama, 33.7M parameters, fp32, 2 × 64 tokens"
    )
    assert plot_labels.label("a new method") == "a new method"


def test_the_command_draws_what_a_folder_has(tmp_path, capsys):
    """Plots whose CSVs are there and have figures; the masks' curves from theirs."""
    shutil.copy(FOLDER / "packed_ops.csv", tmp_path)
    first, second = (FOLDER / "delta.csv").read_text().splitlines()[:2]
    (tmp_path / "delta.csv").write_text(f"{first}\n{second.replace(',ok,', ',refused because it is wrong,')}\n")
    (tmp_path / "masks_by_passes.csv").write_text(
        "set,variant,passes,overlap_mean,status,device,threads,torch,lift_kernels,commit\n"
        + "".join(f'smollm2,"Chebyshev, l = 2r",{n},{1 - 1 / n},ok,A machine,2,2.13,0.1,abc\n' for n in (3, 5, 7))
    )
    assert plots.main([str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["masks.png", "packed_ops.png"]
    assert "no figures for delta.png" in capsys.readouterr().out
    drawn = plots.make("masks", tmp_path)
    drawn.draw_without_rendering()
    assert "SmolLM2-135M: Chebyshev, l = 2r" in [text.get_text() for text in texts(drawn)]
