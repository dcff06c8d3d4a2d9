"""The plots of a card: lengths of bars, rooflines, numbers and titles from gpu_time.csv."""

from __future__ import annotations

import pytest
from helpers import card_rows
from matplotlib.colors import to_hex

from bench import plots
from bench.common.plot_panels import BLUE, DARK, GREY, PALE, YELLOW


def bars(axes) -> list[tuple[str, float, str]]:
    """Label, length and colour of each bar, from the top down."""
    names = [text.get_text() for text in axes.get_yticklabels()]
    rows = [(round(bar.get_y() + bar.get_height() / 2), bar) for bar in axes.patches]
    return [(names[at], bar.get_width(), to_hex(bar.get_facecolor()).upper()) for at, bar in rows]


def marks(axes) -> list[float]:
    return [float(line.get_xdata()[0]) for line in axes.lines]


def title(figure) -> str:
    return figure.texts[0].get_text()


@pytest.fixture
def folder(tmp_path):
    return card_rows.write(tmp_path)


def test_the_step(folder):
    """bf16 alone. The refused variant has no bar and stands in the caption."""
    figure = plots.make("gpu_step", folder)
    (axes,) = figure.axes
    assert bars(axes) == [
        ("AdamW fused, bf16", 40.0, DARK),
        ("LIFT, dense bf16 gradients, fp32 moments", 8.0, BLUE),
        ("LIFT, packed fp32 gradients, fp32 moments", 5.0, BLUE),
        ("AdamW fused on a packed vector, scattered", 16.0, GREY),
    ]
    assert marks(axes) == [32.0, 6.0, 4.0, 8.0]
    cells = [text.get_text() for text in axes.texts]
    assert cells[:6] == ["time", "speed", "of roofline", "40.0 ms", "–", "80 %"]
    assert cells[6:9] == ["8.00 ms", "5.00×", "75 %"]
    assert title(figure) == "LIFT's optimizer step on a card: 5.00 to 8.00 times as fast as AdamW fused, bf16"
    assert axes.get_title("left") == "LLaMA-2-7B, bf16, 224 matrices"
    caption = figure.texts[1].get_text()
    assert "A card 80GB · 16 threads · torch 2.11.0 · triton 3.6.0 · lift_kernels 0.1.0, abc" in caption
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][:3] == ["LIFT", "baseline", "other methods"]


def test_several_baselines_are_named(folder):
    """A second baseline, whose own rows follow. The title keeps to the first."""
    second = {"model": "LLaMA-2-7B", "dtype": "bf16", "baseline": "AdamW fused, fp32 state"}
    rows = [
        *card_rows.time_rows(),
        card_rows.timed("step LLaMA-2-7B", "AdamW fused, fp32 state", 80, 60, "", **second | {"baseline": ""}),
        card_rows.timed("step LLaMA-2-7B", "packed fp32 gradients, again", 4, 2, 20, **second),
    ]
    figure = plots.make("gpu_step", card_rows.write(folder, gpu_time=rows))
    cells = [text.get_text() for text in figure.axes[0].texts]
    assert cells[:8] == ["time", "speed", "against", "of roofline", "40.0 ms", "–", "–", "80 %"]
    assert cells[-4:] == ["4.00 ms", "20.0×", "AdamW fused, fp32 state", "50 %"]
    assert title(figure).endswith(": 5.00 to 8.00 times as fast as AdamW fused, bf16")
    assert bars(figure.axes[0])[-2] == ("AdamW fused, fp32 state", 80.0, DARK)


def test_a_step_without_its_baseline(folder):
    """As when AdamW did not fit into memory: no ratios, and nothing is said about speed."""
    given = {"model": "LLaMA-2-7B", "dtype": "bf16", "shape": "224 matrices"}
    rows = [
        card_rows.row("step LLaMA-2-7B", "AdamW fused, bf16", status="failed: OutOfMemoryError", **given),
        card_rows.row("step LLaMA-2-7B", "packed bf16 gradients", 5, **given),
    ]
    figure = plots.make("gpu_step", card_rows.write(folder, gpu_time=rows))
    assert bars(figure.axes[0]) == [("LIFT, packed bf16 gradients", 5.0, BLUE)]
    assert title(figure) == "LIFT's optimizer step on a card" and marks(figure.axes[0]) == []
    assert "Without a figure on this machine: AdamW fused, bf16." in figure.texts[1].get_text()


def test_training(folder):
    figure = plots.make("gpu_training", folder)
    rates, peaks = figure.axes
    assert bars(rates) == [
        ("Full fine-tuning, AdamW fused", 16384.0, DARK),
        ("LIFT, packed gradients", 20480.0, BLUE),
    ]
    assert marks(rates) == pytest.approx([16384 / 0.5, 20480 / 0.75])
    assert [text.get_text() for text in rates.texts][3:] == ["16,400", "–", "50 %", "20,500", "1.25×", "75 %"]
    assert [(length, shade) for _, length, shade in bars(peaks)] == [
        (4.4, YELLOW), (15.6, PALE), (0.5, YELLOW), (7.5, PALE),
    ]  # fmt: skip
    assert [text.get_text() for text in peaks.texts][2:] == ["20.0 GB", "4.40 GB", "8.00 GB", "0.500 GB"]
    assert title(figure) == "Training with LIFT on a card: 1.25 times as fast as Full fine-tuning, AdamW fused"
    assert rates.get_title("left") == "Random Llama, 1.1 B, bf16, 4 × 1024 tokens"


def test_training_of_the_larger_model(folder):
    """It takes the place of the smaller one, but not where it has no time."""
    small = card_rows.time_rows()
    large = [
        row | {"stage": "training 7B", "model": "random Llama, 6.7 B", "tokens_per_s": row["tokens_per_s"] / 4}
        for row in small
        if row["stage"] == "training"
    ]
    figure = plots.make("gpu_training", card_rows.write(folder, gpu_time=[*small, *large]))
    assert [length for _, length, _ in bars(figure.axes[0])] == [4096.0, 5120.0]
    assert figure.axes[0].get_title("left") == "Random Llama, 6.7 B, bf16, 4 × 1024 tokens"
    killed = [card_rows.row("training 7B", "(whole stage)", status="killed after 75 s")]
    figure = plots.make("gpu_training", card_rows.write(folder, gpu_time=[*small, *killed]))
    assert [length for _, length, _ in bars(figure.axes[0])] == [16384.0, 20480.0]


def test_other_methods_and_no_memory(folder):
    """A method that came later is drawn as it is called. The dry run measures no memory."""
    rows = [{k: v for k, v in row.items() if k not in ("peak_gb", "state_gb")} for row in card_rows.time_rows()]
    rows.append(rows[-1] | {"variant": "LoRA, r = 64", "tokens_per_s": 19000.0, "ratio": 1.16})
    figure = plots.make("gpu_training", card_rows.write(folder, gpu_time=rows))
    assert bars(figure.axes[0])[-1] == ("LoRA, r = 64", 19000.0, GREY) and bars(figure.axes[1]) == []
    assert "optimizer state" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_stages_that_have_not_run(folder, capsys):
    card_rows.write(folder, gpu_time=card_rows.time_rows()[:3])
    assert plots.main([str(folder)]) == 0
    assert not list(folder.glob("*.png"))
    said = capsys.readouterr().out
    assert "no figures for gpu_step.png" in said and "no figures for gpu_training.png" in said
