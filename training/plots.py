"""The plots of a report, as SVG text that stands inside a page."""

from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, GREY, RED = "#1f5fa8", "#8a8f98", "#b3372f"


def draw(plot: Callable[[Axes], None], width: float = 4.2, height: float = 3.6) -> str:
    """An SVG element of one plot, the same for the same numbers."""
    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "mmtl",
            "text.parse_math": False,  # a dataset may be called anything
            "font.size": 9,
            "font.family": "sans-serif",
        }
    ):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        plot(axes)
        buffer = StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def roc(found: Mapping[str, Any]) -> str:
    """ROC curve with the operating point and the line at 80 % sensitivity."""
    points = np.array(found["roc"])

    def plot(axes: Axes) -> None:
        axes.plot(points[:, 0], points[:, 1], color=BLUE)
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
        axes.axhline(0.8, color=GREY, linewidth=0.6, label="80 % sensitivity")
        melanoma = found["melanoma"]
        axes.plot(
            1 - melanoma["specificity"]["value"],
            melanoma["sensitivity"]["value"],
            "o",
            color=RED,
            label="at the threshold",
        )
        axes.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC", aspect="equal")
        axes.legend(frameon=False, loc="lower right")

    return draw(plot)


def reliability(found: Mapping[str, Any]) -> str:
    """Share of melanoma against predicted probability; a disc's area is its number of images."""
    bins = found["calibration"]["reliability"]

    def plot(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
        images = np.array([item["images"] for item in bins])
        axes.plot(
            [item["probability"] for item in bins],
            [item["share"] for item in bins],
            color=BLUE,
            linewidth=0.8,
        )
        axes.scatter(
            [item["probability"] for item in bins],
            [item["share"] for item in bins],
            s=12 + 160 * images / images.max(),
            color=BLUE,
            alpha=0.6,
            linewidths=0,
        )
        axes.set(
            xlabel="predicted probability",
            ylabel="share of melanoma",
            title="Reliability",
            aspect="equal",
            xlim=(-0.03, 1.03),
            ylim=(-0.03, 1.03),
        )

    return draw(plot)


def decision(found: Mapping[str, Any], threshold: float) -> str:
    """Net benefit against that of treating everybody and nobody."""
    curve = found["decision curve"]
    cuts = [point["threshold"] for point in curve]
    prevalence = found["prevalence"]

    def plot(axes: Axes) -> None:
        axes.plot(cuts, [point["model"] for point in curve], color=BLUE, label="model")
        everybody = [point["all"] for point in curve]
        axes.plot(cuts, everybody, color=GREY, linestyle="--", label="all excised")
        axes.axhline(0, color="black", linewidth=1.2, label="none excised")
        axes.axvline(threshold, color=RED, linewidth=0.8, label="the threshold")
        axes.set(
            xlabel="threshold probability",
            ylabel="net benefit per image",
            title="Decision curve",
            ylim=(-0.25 * prevalence, 1.08 * prevalence),
        )
        axes.legend(frameon=False, loc="upper right")

    return draw(plot)


def confusion(task: str, found: Mapping[str, Any]) -> str:
    """Counts, shaded by the share of the true class."""
    labels: Sequence[str] = found["labels"]
    counts = np.array(found["counts"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    def plot(axes: Axes) -> None:
        axes.spines[:].set_visible(False)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.72 else "black"  # 4.5 to 1 (WCAG 1.4.3)
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, size=8)
        axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right")
        axes.set_yticks(range(len(labels)), labels)
        axes.set(xlabel="predicted", ylabel="true", title=task)

    size = 2.2 + 0.42 * len(labels)
    return draw(plot, size + 0.6, size)


def forest(groups: Mapping[str, Mapping[str, Any]], figure: str, overall: float) -> str:
    """A figure with its interval, by group."""
    rows = [
        (f"{attribute}: {name}", found)
        for attribute, members in groups.items()
        for name, found in members.items()
        if figure in found
    ][::-1]

    def plot(axes: Axes) -> None:
        for height, (_, found) in enumerate(rows):
            value = found[figure]
            axes.plot([value["low"], value["high"]], [height, height], color=BLUE, linewidth=1.2)
            axes.plot(value["value"], height, "o", color=BLUE, markersize=4)
        axes.axvline(overall, color=GREY, linestyle=":", linewidth=1)
        axes.set_yticks(range(len(rows)), [f"{name} ({found['images']:,})" for name, found in rows])
        axes.set(xlabel=f"{figure} (95 % interval)", title=f"{figure} by group (images)")

    return draw(plot, 6.4, 1.1 + 0.24 * len(rows)) if rows else ""


def curves(history: Sequence[Mapping[str, str]]) -> str:
    """Losses of the melanoma task and validation AUROC over epochs (the paper's Fig. 4)."""
    epochs = [int(float(row["epoch"])) for row in history]

    def plot(axes: Axes) -> None:
        for part, color in (("train", GREY), ("validation", BLUE)):
            values = [float(row.get(f"{part}_melanoma", "nan")) for row in history]
            axes.plot(epochs, values, ".-", color=color, label=f"{part} loss")
        right = axes.twinx()
        auroc = [float(row["validation_auroc"]) for row in history]
        right.plot(epochs, auroc, ".-", color=RED, label="validation AUROC")
        right.set(ylabel="AUROC", ylim=(min(0.5, *auroc), 1))
        axes.set(xlabel="epoch", ylabel="loss", title="Melanoma")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles = [*axes.get_lines(), *right.get_lines()]
        axes.legend(handles=handles, frameon=False, loc="lower left")

    return draw(plot, 6.0)
