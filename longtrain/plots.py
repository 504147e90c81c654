"""Pictures as PNG files: of a run the loss over the steps and by position, and recall; of a benchmark its speeds.

Matplotlib is imported when a picture is drawn, without pyplot: no window, no global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longtrain.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart in grey and with colour-blind eyes.
_BLUE, _RED, _GREY, _DARK = "#33658a", "#d1495b", "#8d99ae", "#2b2d42"
_MARKERS = "osD^v<>PX*h"


def plot_loss(metrics_path: Path, png_path: Path) -> None:
    """Draw the training loss of every step, its running mean, and the held-out losses, from a metrics.jsonl."""
    records = read_metrics(metrics_path)
    steps = np.array([record["step"] for record in records], dtype=np.float64)
    # While layers are matched the loss is another one.
    losses = _numbers([record.get("loss") if "objective" not in record else None for record in records])
    held_out = _numbers([record.get("held_out_loss") for record in records])

    figure = _figure(height=4.0)
    axes = figure.subplots()
    axes.plot(steps, losses, color=_GREY, alpha=0.45, linewidth=0.8, label="training, each step")
    axes.plot(steps, _running_mean(losses), color=_BLUE, linewidth=1.8, label="training, running mean")
    there = np.isfinite(held_out)
    axes.plot(steps[there], held_out[there], "o-", color=_RED, markersize=4.5, linewidth=1.0, label="held out")
    _dress(axes, title="Loss", x="step", y="nats per token")
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    figure.savefig(png_path)


def plot_loss_by_position(
    positions: Sequence[int], losses: Sequence[float], counts: Sequence[int], png_path: Path
) -> None:
    """Draw the held-out loss over the position in the document, and how many tokens stand behind each value.

    positions [N]: the lowest position in each bucket, rising, counted from 0.
    losses [N]: mean loss of the bucket's tokens, nats; NaN where there is none. counts [N]: its tokens.
    What a model makes of a long document shows here: the line falls as long as more text still helps.
    """
    low = np.asarray(positions, dtype=np.float64) + 1  # counted from 1, because zero has no place on this axis
    # A bucket ends where the next begins; the last one is taken to be as wide as the one before it.
    ratio = low[-1] / low[-2] if len(low) > 1 else 2.0
    edges = np.append(low, low[-1] * ratio)
    tokens = np.asarray(counts, dtype=np.float64)
    values = np.where(tokens > 0, np.asarray(losses, dtype=np.float64), np.nan)
    middles = np.sqrt(edges[:-1] * (edges[1:] - 1))  # between a bucket's first and last position, on this axis

    figure = _figure(height=5.0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    there = np.isfinite(values)
    above.plot(middles[there], values[there], "o-", color=_BLUE, markersize=4.5, linewidth=1.8)
    _dress(above, title="Held-out loss by position in the document", x="", y="nats per token")
    below.bar(edges[:-1] - 0.5, tokens, width=np.diff(edges), align="edge", color=_GREY, alpha=0.7, edgecolor="white")
    _dress(below, title="", x="position in the document, tokens from its start", y="tokens")
    below.set_xscale("log", base=2)
    below.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    below.set_yscale("log")
    below.set_ylim(bottom=0.8)
    below.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.align_ylabels()
    figure.savefig(png_path)


def plot_accuracy_by_pairs(curves: Mapping[str, Mapping[int, float]], png_path: Path) -> None:
    """Draw held-out accuracy over the number of pairs to remember, a line for each model.

    curves: for each model's name its accuracy, from 0 to 1, by number of pairs.
    """
    figure = _figure(height=4.0)
    axes = figure.subplots()
    ticks = sorted({pairs for curve in curves.values() for pairs in curve})
    styles = (("o-", _RED), ("s--", _BLUE), ("^:", _DARK), ("D-.", _GREY))
    for number, (name, curve) in enumerate(curves.items()):
        style, color = styles[number % len(styles)]
        pairs = sorted(curve)
        shares = [100 * curve[count] for count in pairs]
        axes.plot(pairs, shares, style, color=color, markersize=5.5, linewidth=1.8, label=name, clip_on=False)
    _dress(axes, title="Recall: held-out answers that are right", x="key-value pairs in a sequence", y="right, %")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(png_path)


@dataclass(frozen=True)
class Panel:
    """Lines of one plot: name -> tokens per second by sequence length T, tokens."""

    title: str
    speeds: Mapping[str, Mapping[int, float]]


def plot_speeds(panels: Sequence[Sequence[Panel]], png_path: Path, *, beside: str | None) -> None:
    """Draw tokens per second by T, rows of panels that each share their lines' names; beside: drawn as the rival."""
    from matplotlib.ticker import LogLocator

    columns = max(map(len, panels))
    figure = _figure(height=3.4 * len(panels) + 0.2, width=3.1 * columns + 1.9)
    grid = figure.subplots(len(panels), columns, squeeze=False, sharex=True, sharey="row")
    for row, axes_of_row in zip(panels, grid, strict=True):
        names = list(dict.fromkeys(name for panel in row for name in panel.speeds))
        shown: dict[str, Any] = {}
        for panel, axes in zip(row, axes_of_row, strict=False):
            for place, name in enumerate(names):
                if not panel.speeds.get(name):
                    continue
                lengths, speeds = zip(*sorted(panel.speeds[name].items()), strict=True)
                rival = name == beside
                (shown[name],) = axes.plot(
                    lengths,
                    speeds,
                    "--" if rival else "-",
                    color="black" if rival else f"C{place % 10}",
                    marker=_MARKERS[place % len(_MARKERS)],
                    markersize=3.5,
                    linewidth=1.8 if rival else 1.2,
                )
            _dress(axes, title=panel.title, x="T, tokens" if row is panels[-1] else "", y="")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}K")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            # Between powers of ten: labels where they do not crowd.
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:,.0f}")
        axes_of_row[0].set_ylabel("tokens per second")
        there = [name for name in names if name in shown]
        axes_of_row[len(row) - 1].legend(
            [shown[name] for name in there], there, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1)
        )
    figure.savefig(png_path)


def plot_scaling(curves: Mapping[str, Mapping[int, float]], png_path: Path) -> None:
    """Draw tokens per second and device over the number of devices: name of a line -> speed by devices."""
    figure = _figure(height=4.0)
    axes = figure.subplots()
    ticks = sorted({count for curve in curves.values() for count in curve})
    for place, (name, curve) in enumerate(curves.items()):
        counts = sorted(curve)
        style = {"marker": _MARKERS[place % len(_MARKERS)], "color": f"C{place % 10}", "linewidth": 1.5}
        axes.plot(counts, [curve[count] for count in counts], label=name, **style)
    _dress(axes, title="Training speed by devices", x="devices", y="tokens per second and device")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(png_path)


def _figure(*, height: float, width: float = 7.2) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _dress(axes: Axes, *, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a fortieth of the run, centred on each step so that it does not lag, down to half of that at the ends.

    What is not finite is left out; where nothing else is near there is a gap.
    """
    there = np.isfinite(values)
    sums = np.append(0.0, np.cumsum(np.where(there, values, 0.0)))
    counts = np.append(0, np.cumsum(there))
    place = np.arange(len(values))
    reach = np.clip(np.minimum(place, place[::-1]), len(values) // 160, len(values) // 80)
    first, stop = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[stop] - sums[first]) / (counts[stop] - counts[first])
