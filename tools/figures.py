"""Figures: drawing only. Each function takes arrays and a path without its ending, and writes PATH.png and PATH.svg.

All figures are WIDTH inches wide, so that their text is legible at half the width of a README. Colours are those of
Okabe and Ito (2008), which the colour-blind can tell apart, and never the only difference between two lines. A figure
with error bars or bands says below its axes what they are. Axes and colours span a `Range` at least, so that small
differences look small.

Shape key, as in poly.py: t tasks, s skills, h heads.
"""

import functools
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox, ScaledTranslation
from scipy.cluster.hierarchy import dendrogram, leaves_list, linkage

from tools.measures import constant

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, LINES = "osD^vPX", ("-", "--", "-.", ":")
WIDTH = 5.0  # inches
ROW = 0.125  # inches of height for the name of a task
ROUND = (1, 2, 5, 10)  # first digits of the numbers at an axis
SMALL = 8  # points: the smallest text but for names of tasks
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "lines.linewidth": 1.6, "lines.markersize": 4.5, "legend.frameon": False, "figure.facecolor": "white",
    "figure.constrained_layout.use": True, "svg.hashsalt": "figures",
}  # fmt: skip


def save(fig: Figure, stem: str | Path):
    """Write stem.png (150 dpi) and stem.svg; the same figure gives the same bytes."""
    fig.savefig(f"{stem}.png", dpi=150)
    fig.savefig(f"{stem}.svg", metadata={"Date": None})


def drawing(function):
    """Decorator: draw in the style of this file, whatever the user's own matplotlib settings."""

    @functools.wraps(function)
    def styled(*args, **kwargs):
        with matplotlib.style.context(["default", STYLE]):
            return function(*args, **kwargs)

    return styled


def styles(labels) -> dict[str, dict]:
    """A colour, marker and line for each label, the same for the same labels in the same order."""
    return {
        label: dict(color=COLOURS[k % 7], marker=MARKERS[(k + k // 7) % 7], linestyle=LINES[k % 4])
        for k, label in enumerate(labels)
    }


def note(fig: Figure, text: str):
    """Write a small text below everything else; the figure grows by its height."""
    lines = textwrap.wrap(text, int(16 * fig.get_figwidth()))
    height = 0.145 * len(lines) + 0.03
    fig.set_figheight(fig.get_figheight() + height)
    share = height / fig.get_figheight()
    fig.get_layout_engine().set(rect=(0, share, 1, 1 - share))
    fig.text(0.05 / fig.get_figwidth(), 0.05 / fig.get_figheight(), "\n".join(lines), fontsize=SMALL, color="0.3")


def deviation(counts) -> str:
    """What error bars say, for values with these numbers of seeds."""
    low, high = min(counts), max(counts)
    if high == 1:
        return "One seed: no bars."
    seeds = f"{high} seeds" if low == high else f"{low} to {high} seeds" + (", none for one seed" if low == 1 else "")
    return f"Bars: ± one standard deviation over {seeds}."


# --- Axes -------------------------------------------------------------------------------------------------------------


class Range(NamedTuple):
    """What an axis or a colour shows at least: `span` around the values, and nothing below low or above high if the
    values are between them."""

    span: float
    low: float
    high: float

    def around(self, low: float, high: float) -> tuple[float, float]:
        """The limits for values from low to high."""
        if high - low >= self.span:
            return low, high
        start = max((low + high - self.span) / 2, min(self.low, low))
        start = min(start, max(self.high, high) - self.span)
        return start, start + self.span


PERCENT = Range(20, -1, 101)
UNIT = Range(1.06, -0.03, 1.03)  # all from 0 to 1
COSINE = Range(0.2, -1, 1)
SIMILARITY = Range(0.2, 0, 1)
PARAMETERS = Range(1, 0, 15)  # decades
LOSS = Range(0.7, -9, 9)  # decades


def linear_axis(ax, name: str, least: Range):
    """Let the axis "x" or "y" of drawn values show `least`, with few and round numbers."""
    ax.set(**{f"{name}lim": least.around(*getattr(ax, f"get_{name}lim")())})
    getattr(ax, f"{name}axis").set_major_locator(MaxNLocator(7, steps=ROUND))


def log_axis(ax, name: str, least: Range):
    """Make the axis "x" or "y" of drawn values logarithmic; every span of `least` decades has two numbers or more,
    of less than one decade four."""
    ax.set(**{f"{name}scale": "log"})
    low, high = least.around(*np.log10(getattr(ax, f"get_{name}lim")()))
    ax.set(**{f"{name}lim": (10**low, 10**high)})
    of = getattr(ax, f"{name}axis")
    span, most = high - low, 2.6 if name == "x" else 4  # numbers above each other need less room
    subs = (1, 3) if span < most else (1,)
    subs = (1, 1.5, 2, 3, 5, 7) if span < 0.99 else (1, 2, 5) if span < 1.6 else subs
    of.set_major_locator(LogLocator(10, subs, numticks=99 if len(subs) > 1 else None))
    of.set_major_formatter(lambda x, _: in_short(x))
    of.set_minor_locator(NullLocator())


def in_short(number: float) -> str:
    """0.5, 200, 3k, 2M, 1B."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:g}{letter}"
    return f"{number:g}"


# --- What Z learned ---------------------------------------------------------------------------------------------------


@drawing
def allocation(one: np.ndarray, layer: str, every: np.ndarray, tasks: list[str], tree: np.ndarray, stem):
    """Heat maps of Z: one router, and all routers side by side, tasks in the order of the tree.

    one: (t, s) or (t, h, s), probabilities. layer: the first that this router serves. every: (t, n), all routers, heads
    and skills, drawn with similar columns side by side. tree: a scipy linkage of the tasks.
    """
    order, t = leaves_list(tree), len(tasks)
    heads = one.shape[1] if one.ndim == 3 else 1
    columns = one.shape[-1] * heads
    fig = Figure(figsize=(WIDTH, 1.9 + ROW * max(t, 6)))
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=(max(0.8, min(1.0, 0.14 * columns)), 1.6))
    style = dict(cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    left.imshow(one.reshape(t, -1)[order], **style)
    for k in range(1, heads):
        left.axvline(k * one.shape[-1] - 0.5, color="black", linewidth=0.6)
    left.set_title(f"one router:\n{short(layer)}", fontsize=SMALL)
    wide, count = (1, columns) if heads == 1 else (one.shape[-1], heads)
    shown = range(0, count, 1 if count <= 8 else -(-count // 6))  # few enough not to overlap
    left.set_xticks([(k + 0.5) * wide - 0.5 for k in shown], [k + 1 for k in shown])
    left.set_xlabel("skill" if heads == 1 else "head\n(its skills)")
    left.set_yticks(range(t), [shortened(tasks[k]) for k in order], fontsize=7)
    image = right.imshow(every[order][:, by_likeness(every)], **style)
    right.set_title(f"all routers:\n{every.shape[1]:,} probabilities", fontsize=SMALL)
    right.set_xticks([])
    right.set_xlabel("router, head, skill:\nlike ones together" if heads > 1 else "router, skill:\nlike ones together")
    for ax in (left, right):
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    share = 0.12 / (ROW * max(t, 6))  # of the height that the bar has
    bar = fig.colorbar(image, ax=(left, right), location="bottom", fraction=share, aspect=30, pad=share / 2)
    bar.set_label("probability that the task uses the skill")
    bar.outline.set_visible(False)
    save(fig, stem)


def shortened(name: str, length: int = 32) -> str:
    """A name that is too long for a figure, with an ellipsis in its middle."""
    return name if len(name) <= length else f"{name[: length // 2]}…{name[1 - length + length // 2 :]}"


def by_likeness(columns: np.ndarray) -> np.ndarray:
    """An order of the columns of (t, n) with similar ones side by side: the leaves of their tree."""
    if columns.shape[1] < 2:
        return np.arange(columns.shape[1])
    return leaves_list(linkage(columns.T, "average", optimal_ordering=columns.shape[1] <= 500))


@drawing
def task_tree(tree: np.ndarray, tasks: list[str], stem):
    """The dendrogram of tasks (Polytropon figure 6). Two branches join at 1 - their mean similarity."""
    fig = Figure(figsize=(WIDTH, 0.8 + ROW * len(tasks)))
    ax = fig.subplots()
    labels = [shortened(name) for name in tasks]
    with matplotlib.rc_context({"lines.linewidth": 1.0}):
        dendrogram(
            tree, ax=ax, orientation="left", labels=labels, leaf_font_size=7, color_threshold=0,
            above_threshold_color=COLOURS[0],
        )  # fmt: skip
    ax.set_xlim(SIMILARITY.around(0, 1.05 * tree[:, 2].max())[::-1])
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
    if constant(tree[:, 2]):
        note(fig, "All pairs of tasks are equally similar, so their order means nothing.")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("1 − cosine similarity of allocations")
    save(fig, stem)


@drawing
def matrices(panels: dict[str, np.ndarray], stem, label: str, signed: bool = False):
    """Square heat maps (t, t) of pairs of tasks side by side, each with its own scale. panels: {title: matrix}.

    The diagonal, a task with itself, is grey. signed: values around 0, which is then white. A matrix with one value for
    all pairs is not drawn: its panel says so.
    """
    width = WIDTH if len(panels) > 1 else 0.7 * WIDTH
    fig = Figure(figsize=(width, width / len(panels) + 1.2))
    for ax, (title, matrix) in zip(np.atleast_1d(fig.subplots(1, len(panels))), panels.items(), strict=True):
        ax.set_title(title, fontsize=SMALL)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        others = matrix[~np.eye(len(matrix), dtype=bool)]
        if constant(others):
            words = f"not drawn:\n{others[0]:.3f}\nfor all pairs of tasks"
            ax.text(0.5, 0.5, words, ha="center", va="center", transform=ax.transAxes, fontsize=SMALL)
            ax.set(box_aspect=1, facecolor="0.95")
            continue
        low, high = SIMILARITY.around(others.min(), others.max())
        if signed:
            high = max(abs(others).max(), COSINE.span)
            low = -high
        colours = matplotlib.colormaps["PuOr_r" if signed else "Blues"].with_extremes(bad="0.8")
        shown = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)
        image = ax.imshow(shown, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        ax.set_xlabel("tasks in the order of their tree", fontsize=SMALL)
        bar = fig.colorbar(image, ax=ax, location="bottom", fraction=0.05, aspect=25, ticks=MaxNLocator(4, steps=ROUND))
        bar.set_label(label, fontsize=SMALL)
        bar.outline.set_visible(False)
    save(fig, stem)


@drawing
def by_layer(measures: dict[str, list[float | None]], layers: list[str], stem):
    """Measures between 0 and 1 of each layer (Polytropon figure 7), with encoder, decoder and blocks marked.

    measures: {name: a value for each layer, None where it is undefined}. layers: their names, in model order.
    """
    fig = Figure(figsize=(WIDTH, 3.2))
    ax = fig.subplots()
    size = 3 if len(layers) < 100 else 1.5
    for name, style in styles(measures).items():
        if any(value is not None for value in measures[name]):
            values = np.array(measures[name], float)
            ax.plot(values, label=name, **style | dict(markersize=size, linewidth=0.8, linestyle="-"))
    blocks = [block(layer) for layer in layers]
    starts = [k for k in range(len(blocks)) if k == 0 or blocks[k] != blocks[k - 1]]
    for k in starts:
        if k == 0 or blocks[k][0] != blocks[k - 1][0]:
            ax.text(k, 1.05, blocks[k][0], fontsize=SMALL)
            ax.axvline(k - 0.5, color="black", linewidth=1, zorder=0)
        else:
            ax.axvline(k - 0.5, color="0.88", linewidth=0.8, zorder=0)
    middles = [(a + b - 1) / 2 for a, b in zip(starts, [*starts[1:], len(layers)], strict=True)]
    every = -(-len(starts) // 16)  # few enough numbers of blocks not to overlap
    ax.set_xticks(middles[::every], [blocks[k][1] for k in starts[::every]])
    ax.tick_params(axis="x", length=0)
    ax.set(ylim=UNIT[1:], xlim=(-0.5, len(layers) - 0.5), xlabel="block; one point a router", ylabel="measure of Z")
    fig.legend(loc="outside upper center", ncols=3)
    save(fig, stem)


def block(layer: str) -> tuple[str, str]:
    """(stack: encoder, decoder or "", number of the block) from a layer's full name."""
    parts = layer.split(".")
    stack = next((part for part in parts if part in ("encoder", "decoder")), "")
    return stack, next((part for part in parts if part.isdecimal()), "")


def short(layer: str) -> str:
    """A layer's name without its path: "encoder 0\nSelfAttention.q" for encoder.block.0.layer.0.SelfAttention.q."""
    stack, number = block(layer)
    return f"{stack or 'block'} {number}\n" + ".".join(layer.split(".")[-2:])


# --- Over steps, and over methods -------------------------------------------------------------------------------------


@drawing
def over_steps(panels: dict[str, dict], stem, ylabel: str, least: Range, xlabel: str = "training steps"):
    """Lines over steps, in panels side by side. panels: {title: {label: [(steps, values) of each seed]}}.

    All panels have the same labels. least: what the y axis shows at least; LOSS: it is logarithmic.
    """
    fig = Figure(figsize=(WIDTH, 3.0))
    axes = np.atleast_1d(fig.subplots(1, len(panels), sharey=True))
    for ax, (title, series) in zip(axes, panels.items(), strict=True):
        lines(ax, series)
        last = ax.dataLim.x1
        ax.set(title=title, xlabel=xlabel, xlim=(-0.05 * last, 1.05 * last))
        ax.xaxis.set_major_locator(MaxNLocator(2 + 4 // len(panels), steps=ROUND, integer=True))
        ax.xaxis.set_major_formatter("{x:,.0f}")
    if least is LOSS:
        log_axis(axes[0], "y", least)
    else:
        linear_axis(axes[0], "y", least)
    axes[0].set_ylabel(ylabel)
    legend(fig)
    note(fig, deviation([len(seeds) for series in panels.values() for seeds in series.values()]))
    save(fig, stem)


@drawing
def over_sizes(series: dict[str, list[tuple]], stem, ylabel: str, least: Range, xlabel: str):
    """Lines over sizes that double: skills, heads. series: {label: [(sizes, values) of each seed]}.

    least: what the y axis shows at least.
    """
    fig = Figure(figsize=(WIDTH, 3.0))
    ax = fig.subplots()
    lines(ax, series)
    ax.set_xscale("log", base=2)
    linear_axis(ax, "y", least)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    sizes = sorted({size for seeds in series.values() for x, _ in seeds for size in x})
    ax.set_xticks(sizes, sizes)
    legend(fig)
    note(fig, deviation([len(seeds) for seeds in series.values()]))
    save(fig, stem)


@drawing
def differences(series: dict[str, list[tuple]], stem, xlabel: str, ylabel: str, marks: dict[float, str]):
    """Mean differences with their 95 % intervals over ratios that double. series: {label: [(x, mean, low, high)]}.

    marks: {x: what is there}, dotted lines that say so above.
    """
    fig = Figure(figsize=(WIDTH, 3.2))
    ax = fig.subplots()
    for k, (label, style) in enumerate(styles(series).items()):
        x, mean, low, high = np.array(series[label]).T
        bars = dict(yerr=(mean - low, high - mean), capsize=2.5, elinewidth=1)
        move_aside(ax.errorbar(x, mean, label=label, **bars, **style), k, len(series), step=4.0)
    ax.axhline(0, color="0.4", linewidth=0.8)
    ax.set_xscale("log", base=2)
    for at in marks:
        ax.axvline(at, color="0.4", linewidth=0.8, linestyle=":")
        ax.text(at, 1.01, f"{marks[at]}: {at:g}", transform=ax.get_xaxis_transform(), ha="center", va="bottom")
    ticks = sorted({point[0] for points in series.values() for point in points})
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    legend(fig)
    note(fig, "Bars: 95 % interval of the mean over seeds.")
    save(fig, stem)


def lines(ax, series: dict[str, list[tuple]]):
    """Draw lines: {label: [(x, values) of each seed]}.

    Several seeds are drawn as their mean with bars of one standard deviation, at the x that all of them have. So that
    bars do not cover each other, a line of few points stands a little beside the others', and one of many has about 8
    bars, each line at other points. If labels have different numbers of seeds, each says its own.
    """
    alike = len({len(seeds) for seeds in series.values()}) == 1
    for k, (label, style) in enumerate(styles(series).items()):
        steps = sorted(set.intersection(*(set(x) for x, _ in series[label])))
        values = np.array([[dict(zip(x, y, strict=True))[step] for step in steps] for x, y in series[label]])
        bars = dict(yerr=values.std(0, ddof=1), capsize=2, elinewidth=1) if len(values) > 1 else {}
        every = -(-len(steps) // 8)
        which = (k * every // len(series), every) if len(steps) > every else 1
        seeds = f" ({len(values)} seeds)" if len(values) > 1 and not alike else ""
        look = bars | style | dict(label=label + seeds, errorevery=which, markevery=which)
        drawn = ax.errorbar(steps, values.mean(0), **look)
        if every == 1 and bars:
            move_aside(drawn, k, len(series))
    ax.grid(axis="y", color="0.9", linewidth=0.6)


def move_aside(bars, k: int, count: int, step: float = 3.0):
    """Move the k-th of some drawn lines `step` points of type away from the next, less if there are many."""
    points = (k - (count - 1) / 2) * min(step, 12 / count)
    aside = ScaledTranslation(points / 72, 0, bars[0].figure.dpi_scale_trans)
    for artist in bars.get_children():
        artist.set_transform(artist.get_transform() + aside)


def legend(fig: Figure):
    """A legend of the first panel's labels above all panels, in as many columns as fit."""
    handles, labels = fig.axes[0].get_legend_handles_labels()
    handles = [handle[0] for handle in handles]  # without the bars
    columns = max(1, min(3, len(labels), 60 // max(map(len, labels))))
    fig.legend(handles, labels, loc="outside upper center", ncols=columns)


@drawing
def performance(panels: dict[str, dict], stem, ylabel: str, when: str = "for a new task"):
    """Score in percent against trained parameters (MHR figures 2 and 3, right), in panels side by side.

    panels: {title: {label: {mark: (parameters, values of its seeds)}}}. when: what the parameters are trained for. A
    curve of one point has its label beside it. Longer curves have theirs in a legend, and a mark at each point.
    """
    fig = Figure(figsize=(WIDTH, 3.6))
    axes = np.atleast_1d(fig.subplots(1, len(panels), sharey=True))
    every = styles([label for curves in panels.values() for label in curves])
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        draw_curves(ax, curves, every)
        ax.set(title=title, xlabel=f"trained parameters{' ' if len(panels) == 1 else chr(10)}{when}")
        ax.margins(0.18, 0.15)
        log_axis(ax, "x", PARAMETERS)
        ax.grid(color="0.92", linewidth=0.6)
        ax.set_axisbelow(True)
    linear_axis(axes[0], "y", PERCENT)
    axes[0].set_ylabel(ylabel)
    long = [bars for ax in axes for bars in ax.containers if len(bars[0].get_xdata()) > 1]
    if long:
        names = [bars.get_label() for bars in long]
        columns = max(1, min(3, 60 // max(map(len, names))))
        fig.legend([bars[0] for bars in long], names, loc="outside upper center", ncols=columns)
    note(fig, deviation([len(p[1]) for curves in panels.values() for curve in curves.values() for p in curve.values()]))
    fig.draw_without_rendering()
    for ax, curves in zip(axes, panels.values(), strict=True):
        place_labels(ax, [[label] if len(curve) == 1 else list(curve) for label, curve in curves.items()])
    save(fig, stem)


def draw_curves(ax, curves: dict[str, dict[str, tuple]], every: dict[str, dict]):
    """Draw the curves of a panel of `performance`; longer ones stand a little beside each other."""
    long = [label for label, curve in curves.items() if len(curve) > 1]
    for label, curve in curves.items():
        x, (mean, std) = [p[0] for p in curve.values()], np.array([mean_std(p[1]) for p in curve.values()]).T
        bars = dict(yerr=std, capsize=2.5, elinewidth=1) if std.any() else {}
        look = every[label] | dict(markersize=5, linewidth=1)
        drawn = ax.errorbar(x, mean, label=label, **bars, **look)
        if label in long:
            move_aside(drawn, long.index(label), len(long))


def mean_std(values) -> tuple[float, float]:
    """The mean and the standard deviation (n - 1) over seeds; 0 for one seed."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def place_labels(ax, names: list[list[str]]):
    """Write names beside the drawn points of a laid out panel, where they cover no point, bar, line or other name.

    names: of each curve, one for each point. Of 24 places the first is taken that covers nothing, else the one that
    covers least. A name that is not close gets a thin line to its point.
    """
    frame, dots = ax.get_window_extent(), ax.figure.dpi / 72
    taken = [box for bars in ax.containers for box in boxes_of(bars, dots)]
    for k, (bars, marks) in enumerate(zip(ax.containers, names, strict=True)):
        line, to_pixels, alone = bars[0], bars[0].get_transform(), len(marks) == 1
        for at, mark in enumerate(marks):
            point, (low, high) = line.get_xydata()[at], ends_of(bars, at)
            x, y = to_pixels.transform(point)
            draft = ax.text(0, 0, mark, fontsize=SMALL)
            size = draft.get_window_extent()
            draft.remove()
            first = "right" if alone or not mark.isdecimal() else "below" if k % 2 else "above"
            spots = places(size.width, size.height, high - y, y - low, dots, first)
            boxes = [
                Bbox.from_bounds(x + dx - size.width / 2, y + dy - size.height / 2, size.width, size.height)
                for dx, dy in spots
            ]
            outside = [not (frame.contains(*box.p0) and frame.contains(*box.p1)) for box in boxes]
            covered = [box.count_overlaps(taken) + 1000 * out for box, out in zip(boxes, outside, strict=True)]
            best = int(np.argmin(covered))
            ax.annotate(
                mark, point, np.array(spots[best]) / dots, to_pixels, "offset points", ha="center", va="center",
                color="black" if alone else line.get_color(), fontsize=SMALL, zorder=5, in_layout=False,
                arrowprops=dict(arrowstyle="-", color="0.5", linewidth=0.6, shrinkA=0) if best >= 8 else None,
            )  # fmt: skip
            taken.append(boxes[best])


def places(width: float, height: float, up: float, down: float, dots: float, first: str) -> list[tuple[float, float]]:
    """24 places for the middle of a text, in pixels from its point, close ones first.

    up, down: how far the bar reaches. dots: pixels of a point of type. first: "right", "above" or "below".
    """
    found = []
    for far in (1, 2.5, 4):
        x, y = width / 2 + 6 * dots * far, height / 2 + 3 * dots * far
        beside = {"right": (x, 0), "left": (-x, 0), "above": (0, up + y), "below": (0, -down - y)}
        found += ({first: beside[first]} | beside).values()
        found += [(a * x, b * y) for b in (1, -1) for a in (1, -1)]
    return found


def ends_of(bars, at: int) -> tuple[float, float]:
    """Where the error bar of a drawn point ends, in pixels: (low, high), its own height if it has none."""
    line, _, drawn = bars
    ends = drawn[0].get_segments()[at] if drawn else line.get_xydata()[[at, at]]
    return tuple(line.get_transform().transform(ends)[:, 1])


def boxes_of(bars, dots: float) -> list[Bbox]:
    """What a drawn curve covers, in pixels: its points, its bars, and its line in steps. dots: pixels of a point."""
    points, boxes = bars[0].get_transform().transform(bars[0].get_xydata()), []
    for at, (x, y) in enumerate(points):
        low, high = ends_of(bars, at)
        boxes.append(Bbox.from_extents(x - 3 * dots, y - 3 * dots, x + 3 * dots, y + 3 * dots))
        boxes.append(Bbox.from_extents(x - 2.5 * dots, low - dots, x + 2.5 * dots, high + dots))
    for start, end in zip(points, points[1:], strict=False):
        steps = start + np.linspace(0, 1, 20)[:, None] * (end - start)
        boxes += [Bbox.from_bounds(x, y, 1, 1) for x, y in steps]
    return boxes


@drawing
def by_method(
    values: dict[str, list[float]], stem, xlabel: str, least: Range, reference: str = "", bars: dict | None = None,
    says: str = "",
):  # fmt: skip
    """One line per method: its seeds as dots, below them their mean and standard deviation.

    values: {method: [value of each seed]}. least: what the x axis shows at least. reference: a method whose mean is
    drawn through the whole figure, to compare the others with. bars: {method: (low, high)}, drawn instead of the
    standard deviation; says: what all bars of the figure then are.
    """
    fig = Figure(figsize=(WIDTH, 0.7 + 0.27 * len(values)))
    ax = fig.subplots()
    for k, (method, seeds) in enumerate(values.items()):
        mean, std = mean_std(seeds)
        low, high = (bars or {}).get(method, (mean - std, mean + std))
        span = [[mean - low], [high - mean]] if high > low else None
        ax.plot(seeds, [k - 0.22] * len(seeds), "o", color="0.55", markersize=3.5, markeredgewidth=0)
        ax.errorbar(mean, k + 0.1, xerr=span, fmt="D", color=COLOURS[0], capsize=3, markersize=5, elinewidth=1.4)
    if reference:
        ax.axvline(np.mean(values[reference]), color=COLOURS[1], linewidth=1, linestyle="--", zorder=0, label=reference)
        fig.legend(loc="outside upper right")
    linear_axis(ax, "x", least)
    ax.set_yticks(range(len(values)), list(values), fontsize=9)
    ax.set_ylim(len(values) - 0.5, -0.5)  # downwards
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_xlabel(xlabel)
    note(fig, f"Dots: seeds; diamonds: means. {says or deviation([len(seeds) for seeds in values.values()])}")
    save(fig, stem)


@drawing
def by_episodes(panels: dict[str, dict[str, list[np.ndarray]]], stem, window: int):
    """Success by episodes (Polytropon figure 2): a row of panels for each level, a column for each method.

    In a panel: the method's mean over seeds in a band from the lowest to the highest seed, and in grey the means of the
    other methods. panels: {level: {method: [running mean of success over `window` episodes, of each seed]}}. A method's
    line ends where its shortest seed does.
    """
    methods = list(next(iter(panels.values())))
    fig = Figure(figsize=(max(WIDTH, 0.6 + len(methods)), 0.7 + 1.05 * len(panels)))
    axes = fig.subplots(len(panels), len(methods), squeeze=False, sharex="row", sharey=True)
    for row, (level, of) in zip(axes, panels.items(), strict=True):
        shared = {method: min(map(len, seeds)) for method, seeds in of.items()}
        drawn = {method: np.arange(0, n, max(1, n // 100)) for method, n in shared.items()}
        rates = {method: np.array([rate[drawn[method]] for rate in of[method]]) for method in of}
        for ax, method in zip(row, methods, strict=True):
            ax.axhline(0.99, color="0.5", linewidth=0.8, linestyle=":")  # what counts as solved
            for other in (*(m for m in methods if m != method), method):  # its own line above the others
                look = dict(color="0.75", linewidth=0.6) if other != method else dict(color=COLOURS[0], linewidth=1.3)
                ax.plot(drawn[other] + window, rates[other].mean(0), label=other, **look)
            low, high = rates[method].min(0), rates[method].max(0)
            ax.fill_between(drawn[method] + window, low, high, color=COLOURS[0], alpha=0.3, linewidth=0)
            ax.xaxis.set_major_locator(MaxNLocator(2))
            ax.xaxis.set_major_formatter(lambda x, _: in_short(x))
        row[0].set(ylim=(0, 1.03), yticks=(0, 0.5, 1), xlim=(0, None))
        row[0].set_ylabel(level, fontsize=SMALL)
    for ax, method in zip(axes[0], methods, strict=True):
        ax.set_title(method.replace(" ", "\n"), fontsize=SMALL)
    axes[-1, len(methods) // 2].set_xlabel("episodes")
    fig.supylabel(f"success (mean of {window:,} episodes)", fontsize=9)
    low, high = (f(len(seeds) for of in panels.values() for seeds in of.values()) for f in (min, max))
    over = f"mean over {low} to {high} seeds" if low < high else f"mean over {high} seeds"
    says = "Blue: one seed." if high == 1 else f"Blue: {over}; band: from the lowest to the highest seed."
    grey = " Grey: means of the other columns." if len(methods) > 1 else ""
    note(fig, f"{says}{grey} Dotted: 0.99.")
    save(fig, stem)
