"""Figures: drawing only. Each function takes arrays and a path without its ending, and writes PATH.png and PATH.svg.

All figures are WIDTH inches wide, so that their text is legible at half the width of a README. Colours are those of
Okabe and Ito (2008), which the colour-blind can tell apart, and never the only difference between two lines.

Shape key, as in poly.py: t tasks, s skills, h heads.
"""

import functools
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox
from scipy.cluster.hierarchy import dendrogram, leaves_list, linkage

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, LINES = "osD^vPX", ("-", "--", "-.", ":")
WIDTH = 5.0  # inches
ROW = 0.125  # inches of height for the name of a task
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
    fig = Figure(figsize=(WIDTH, 1.2 + ROW * t))
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=(min(1.0, 0.14 * columns), 1.6))
    style = dict(cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    left.imshow(one.reshape(t, -1)[order], **style)
    for k in range(1, heads):
        left.axvline(k * one.shape[-1] - 0.5, color="black", linewidth=0.6)
    left.set_title(f"router, first layer:\n{short(layer)}", fontsize=8)
    wide, count = (1, columns) if heads == 1 else (one.shape[-1], heads)
    shown = range(0, count, -(-count // 8))  # few enough not to overlap
    left.set_xticks([(k + 0.5) * wide - 0.5 for k in shown], [k + 1 for k in shown])
    left.set_xlabel("skill" if heads == 1 else "head (its skills)")
    left.set_yticks(range(t), [tasks[k] for k in order], fontsize=7)
    image = right.imshow(every[order][:, by_likeness(every)], **style)
    right.set_title(f"all routers,\n{every.shape[1]:,} probabilities", fontsize=8)
    right.set_xticks([])
    right.set_xlabel("router, head and skill, clustered" if heads > 1 else "router and skill, clustered")
    for ax in (left, right):
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    bar = fig.colorbar(image, ax=(left, right), location="bottom", fraction=0.03, aspect=40, pad=0.01)
    bar.set_label("probability that the task uses the skill")
    bar.outline.set_visible(False)
    save(fig, stem)


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
    with matplotlib.rc_context({"lines.linewidth": 1.0}):
        dendrogram(
            tree, ax=ax, orientation="left", labels=tasks, leaf_font_size=7, color_threshold=0,
            above_threshold_color=COLOURS[0],
        )  # fmt: skip
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("1 − cosine similarity of allocations")
    save(fig, stem)


@drawing
def matrices(panels: dict[str, np.ndarray], stem, label: str, signed: bool = False):
    """Square heat maps (t, t) of pairs of tasks side by side, each with its own scale. panels: {title: matrix}.

    The diagonal, a task with itself, is grey. signed: values around 0, which is then white.
    """
    width = WIDTH if len(panels) > 1 else 0.7 * WIDTH
    fig = Figure(figsize=(width, width / len(panels) + 1.2))
    for ax, (title, matrix) in zip(np.atleast_1d(fig.subplots(1, len(panels))), panels.items(), strict=True):
        others = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)
        low, high = np.nanmin(others), np.nanmax(others)
        if signed:
            low, high = -max(-low, high), max(-low, high)
        colours = matplotlib.colormaps["PuOr_r" if signed else "Blues"].with_extremes(bad="0.8")
        image = ax.imshow(others, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        ax.set_title(title, fontsize=8)
        ax.set(xticks=[], yticks=[], xlabel="tasks in the order of their tree")
        ax.spines[:].set_visible(False)
        bar = fig.colorbar(image, ax=ax, location="bottom", fraction=0.05, aspect=25, ticks=MaxNLocator(4))
        bar.set_label(label)
        bar.outline.set_visible(False)
    save(fig, stem)


@drawing
def by_layer(measures: dict[str, list[float]], layers: list[str], stem):
    """Measures between 0 and 1 of each layer (Polytropon figure 7), with encoder, decoder and blocks marked.

    measures: {name: a value for each layer}. layers: their names, in model order.
    """
    fig = Figure(figsize=(WIDTH, 3.2))
    ax = fig.subplots()
    for name, style in styles(measures).items():
        ax.plot(
            measures[name],
            label=name,
            **style | dict(markersize=3 if len(layers) < 100 else 1.5, linewidth=0.8, linestyle="-"),
        )
    blocks = [block(layer) for layer in layers]
    starts = [k for k in range(len(blocks)) if k == 0 or blocks[k] != blocks[k - 1]]
    for k in starts:
        if k == 0 or blocks[k][0] != blocks[k - 1][0]:
            ax.text(k, 1.05, blocks[k][0], fontsize=8)
            ax.axvline(k - 0.5, color="black", linewidth=1, zorder=0)
        else:
            ax.axvline(k - 0.5, color="0.88", linewidth=0.8, zorder=0)
    middles = [(a + b - 1) / 2 for a, b in zip(starts, [*starts[1:], len(layers)], strict=True)]
    every = -(-len(starts) // 16)  # few enough numbers of blocks not to overlap
    ax.set_xticks(middles[::every], [blocks[k][1] for k in starts[::every]])
    ax.tick_params(axis="x", length=0)
    ax.set(
        ylim=(-0.03, 1.03), xlim=(-0.5, len(layers) - 0.5), xlabel="block; one point a router", ylabel="measure of Z"
    )
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
def over_steps(panels: dict[str, dict], stem, ylabel: str, xlabel: str = "training steps", log: bool = False):
    """Lines over steps, in panels side by side. panels: {title: {label: [(steps, values) of each seed]}}.

    All panels have the same labels. log: a logarithmic y axis.
    """
    fig = Figure(figsize=(WIDTH, 3.0))
    axes = np.atleast_1d(fig.subplots(1, len(panels), sharey=True))
    for ax, (title, series) in zip(axes, panels.items(), strict=True):
        lines(ax, series)
        ax.set(title=title, xlabel=xlabel)
        ax.set_xlim(left=0)
        if log:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel(ylabel)
    legend(fig)
    save(fig, stem)


@drawing
def over_skills(series: dict[str, list[tuple]], stem, ylabel: str):
    """Lines over sizes of the inventory, which double. series: {label: [(sizes, values) of each seed]}."""
    fig = Figure(figsize=(WIDTH, 3.0))
    ax = fig.subplots()
    lines(ax, series)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="skills in the inventory", ylabel=ylabel)
    sizes = sorted({size for seeds in series.values() for x, _ in seeds for size in x})
    ax.set_xticks(sizes, sizes)
    legend(fig)
    save(fig, stem)


def lines(ax, series: dict[str, list[tuple]]):
    """Draw lines: {label: [(x, values) of each seed]}.

    Several seeds are drawn as their mean in a band of one standard deviation, at the x that all of them have. If labels
    have different numbers of seeds, each says its own.
    """
    alike = len({len(seeds) for seeds in series.values()}) == 1
    for label, style in styles(series).items():
        steps = sorted(set.intersection(*(set(x) for x, _ in series[label])))
        values = np.array([[dict(zip(x, y, strict=True))[k] for k in steps] for x, y in series[label]])
        mean, std = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0
        every = max(1, len(steps) // 8)
        seeds = f" ({len(values)} seeds)" if len(values) > 1 and not alike else ""
        ax.plot(steps, mean, label=label + seeds, markevery=every, **style)
        if len(values) > 1:
            ax.fill_between(steps, mean - std, mean + std, color=style["color"], alpha=0.2, linewidth=0)
    ax.grid(axis="y", color="0.9", linewidth=0.6)


def legend(fig: Figure):
    """A legend of the first panel's labels above all panels, in as many columns as fit."""
    handles, labels = fig.axes[0].get_legend_handles_labels()
    if labels:
        columns = max(1, min(3, len(labels), 60 // max(map(len, labels))))
        fig.legend(handles, labels, loc="outside upper center", ncols=columns)


@drawing
def performance(panels: dict[str, dict], stem, ylabel: str, when: str = "for a new task"):
    """Score against trained parameters (MHR figures 2 and 3, right), in panels side by side.

    panels: {title: {label: {mark: (parameters, mean, standard deviation over seeds, 0 for one)}}}. when: what the
    parameters are trained for. A curve of one point has its label beside it. Longer curves, at most two per panel, have
    theirs in a legend, and a mark at each point: numbers above the first, below the second; words at the lower right.
    """
    fig = Figure(figsize=(WIDTH, 3.6))
    axes = np.atleast_1d(fig.subplots(1, len(panels), sharey=True))
    every, handles = styles([label for curves in panels.values() for label in curves]), []
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        ax.set(xscale="log", title=title)
        ax.margins(0.18, 0.15)
        handles += draw_curves(ax, curves, every)
        ax.xaxis.set_major_locator(LogLocator(10))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(color="0.92", linewidth=0.6)
        ax.set_axisbelow(True)
    axes[0].set_ylabel(ylabel)
    fig.supxlabel(f"trained parameters {when}", fontsize=9)
    if handles:
        fig.legend(handles=handles, loc="outside upper center", ncols=2)
    for ax, curves in zip(axes, panels.values(), strict=True):
        place_labels(fig, ax, [(label, *p) for label, of in curves.items() if len(of) == 1 for p in of.values()])
    save(fig, stem)


def draw_curves(ax, curves: dict[str, dict[str, tuple]], every: dict[str, dict]) -> list:
    """Draw the curves of a panel of `performance` and their marks; returns the handles for the legend."""
    handles = []
    for label, curve in curves.items():
        x, mean, std = np.array(list(curve.values()), float).T
        line = dict(linestyle="none") if len(curve) == 1 else dict(linewidth=1, label=label)
        bars = dict(yerr=std, capsize=2.5, elinewidth=1) if std.any() else {}
        drawn = ax.errorbar(x, mean, **bars, **every[label] | dict(markersize=6) | line)
        if len(curve) == 1:
            continue
        side = -1 if handles else 1
        handles.append(drawn)
        for k, mark in enumerate(curve):
            at = dict(xy=(x[k], mean[k] + side * std[k]), xytext=(0, 8 * side), ha="center")
            if not mark.isdecimal():
                at = dict(xy=(x[k], mean[k]), xytext=(5, -6), ha="left")
            look = dict(va="center", fontsize=8, color=every[label]["color"], zorder=5)
            ax.annotate(mark, textcoords="offset points", **at, **look)
    return handles


def mean_std(values) -> tuple[float, float]:
    """The mean and the standard deviation (n - 1) over seeds; 0 for one seed."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def place_labels(fig: Figure, ax, points: list[tuple[str, float, float, float]]):
    """Write the label of each point (label, x, mean, std) beside it.

    It goes to the first of 16 places where it overlaps no point, error bar, label or edge.
    """
    renderer = FigureCanvasAgg(fig).get_renderer()
    fig.draw_without_rendering()
    spots = [(7, 0, "left"), (-7, 0, "right"), (0, 9, "center"), (0, -9, "center"), (6, 7, "left"), (-6, 7, "right"),
             (6, -7, "left"), (-6, -7, "right")]  # fmt: skip
    spots += [(2 * dx, 2 * dy, side) for dx, dy, side in spots]
    taken = []
    for _, x, y, std in points:
        (x, low), (_, high) = ax.transData.transform([(x, y - std), (x, y + std)])
        taken.append(Bbox.from_extents(x - 6, low - 6, x + 6, high + 6))
    frame = ax.get_window_extent(renderer)
    for label, *point, _ in points:
        for dx, dy, side in spots:
            at = dict(xytext=(dx, dy), textcoords="offset points", ha=side, va="center")
            text = ax.annotate(label, point, fontsize=8, zorder=5, **at)
            box = text.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = ax.annotate(label, point, (7, 0), textcoords="offset points", va="center", fontsize=8)
        taken.append(text.get_window_extent(renderer))


@drawing
def by_method(values: dict[str, list[float]], stem, xlabel: str, reference: str = "", bars: dict | None = None):
    """One line per method: its seeds as dots, below them their mean and standard deviation.

    values: {method: [value of each seed]}. reference: a method whose mean is drawn through the whole figure, to compare
    the others with. bars: {method: (low, high)}, drawn instead of the standard deviation.
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
    ax.set_yticks(range(len(values)), list(values), fontsize=9)
    ax.set_ylim(len(values) - 0.5, -0.5)  # downwards
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_xlabel(xlabel)
    save(fig, stem)


@drawing
def by_episodes(panels: dict[str, dict[str, list[np.ndarray]]], stem, window: int):
    """Success by episodes, one panel per level (Polytropon figure 2): the mean over seeds, in a band from min to max.

    panels: {level: {method: [running mean of success over `window` episodes, of each seed]}}. A method's line ends
    where its shortest seed does.
    """
    columns = 2 if len(panels) in (2, 4) else 3
    rows = -(-len(panels) // columns)
    fig = Figure(figsize=(1.5 * WIDTH, 2.2 * rows + 0.4))
    axes = fig.subplots(rows, columns, squeeze=False).flat
    for ax, (level, methods) in zip(axes, panels.items(), strict=False):
        ax.axhline(0.99, color="0.5", linewidth=0.8, linestyle=":")  # what counts as solved
        for method, style in styles(methods).items():
            shared = min(map(len, methods[method]))
            drawn = np.arange(0, shared, max(1, shared // 100))
            rates, line = np.array([rate[drawn] for rate in methods[method]]), style | dict(marker=None, linewidth=1.3)
            ax.plot(drawn + window, rates.mean(0), label=method, **line)
            ax.fill_between(drawn + window, rates.min(0), rates.max(0), color=style["color"], alpha=0.12, linewidth=0)
        ax.set(title=level, ylim=(0, 1.02))
        ax.grid(axis="y", color="0.9", linewidth=0.6)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.xaxis.set_major_formatter("{x:,.0f}")
    handles, labels = axes[0].get_legend_handles_labels()
    for ax in axes[len(panels) :]:
        ax.remove()
    fig.supxlabel("episodes", fontsize=9)
    fig.supylabel(f"success (mean of {window:,} episodes)", fontsize=9)
    width = 6 + max(map(len, labels))  # of a column, in letters
    fig.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels), max(1, 90 // width)))
    save(fig, stem)
