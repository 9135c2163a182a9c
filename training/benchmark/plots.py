"""The plots of the backbones' report, as SVG text that stands inside a page."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from training.benchmark.probes import AUROC
from training.plots import BLUE, GREY, RED, draw

Report = dict[str, Any]


def zero_train(report: Report) -> str:
    """The paper's Fig. 3: accuracy of one random head a backbone, sorted, and chance."""
    backbones = sorted(report["backbones"], key=lambda b: -b["zero-train"]["value"])
    values = np.array([b["zero-train"]["value"] for b in backbones])
    low, high = (np.array([b["zero-train"][end] for b in backbones]) for end in ("low", "high"))

    def plot(axes: Axes) -> None:
        places = np.arange(len(values))
        axes.bar(places, values, color=[GREY if b["extra"] else BLUE for b in backbones])
        axes.errorbar(
            places, values, [values - low, high - values], fmt="none", ecolor="#333", elinewidth=0.8
        )
        axes.axhline(0.5, color=RED, linestyle="--", linewidth=1, label="chance")
        axes.set_xticks(places, [b["name"] for b in backbones], rotation=90, fontsize=7)
        axes.set(ylabel="accuracy", ylim=(0, 1), title=_title(report, "One random head a backbone"))
        axes.set_xlim(-0.7, len(values) - 0.3)
        axes.legend(frameon=False, loc="upper right")

    return draw(plot, _width(len(values)), 4.2)


def chance(report: Report) -> str:
    """Where 90 of 100 random heads of each backbone end, and where the fixed one did."""
    backbones = sorted(report["backbones"], key=lambda b: -b["chance"]["mean"])

    def plot(axes: Axes) -> None:
        places = np.arange(len(backbones))
        low, high = ([b["chance"][end] for b in backbones] for end in ("low", "high"))
        axes.vlines(
            places, low, high, color=BLUE, linewidth=3, alpha=0.5, label="5 to 95 % of heads"
        )
        means = [b["chance"]["mean"] for b in backbones]
        axes.plot(places, means, "_", color=BLUE, label="mean")
        fixed = [b["zero-train"]["value"] for b in backbones]
        axes.plot(places, fixed, ".", color=RED, label="the fixed head")
        axes.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
        axes.set_xticks(places, [b["name"] for b in backbones], rotation=90, fontsize=7)
        axes.set(ylabel="accuracy", ylim=(0, 1), title=_title(report, "All random heads"))
        axes.set_xlim(-0.7, len(backbones) - 0.3)
        axes.legend(frameon=False, loc="upper right", ncols=3)

    return draw(plot, _width(len(backbones)), 4.2)


def probe(report: Report) -> str:
    """The real ranking, best on top, with intervals; blue is not shown to be worse than it."""
    backbones = report["backbones"]

    def plot(axes: Axes) -> None:
        places = np.arange(len(backbones))
        for tied, color, label in (
            (True, BLUE, "tied for first"),
            (False, GREY, "worse than the best"),
        ):
            chosen = [i for i, b in enumerate(backbones) if b["tied for first"] is tied]
            if not chosen:
                continue
            found = [backbones[i]["logistic"][AUROC] for i in chosen]
            values = np.array([f["value"] for f in found])
            reach = [
                [f["value"] - f["low"] for f in found],
                [f["high"] - f["value"] for f in found],
            ]
            axes.errorbar(
                values, places[chosen], xerr=reach, fmt="o", markersize=4, color=color, label=label
            )
        axes.axvline(0.5, color=RED, linestyle="--", linewidth=1)
        names = [b["name"] for b in backbones]
        axes.set_yticks(places, names, fontsize=8 if len(names) < 30 else 6)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set(xlabel="AUROC of the logistic probe", title=_title(report, "What can be learned"))
        axes.figure.legend(frameon=False, loc="outside lower center", ncols=2)

    return draw(plot, 6.2, max(2.8, 0.9 + 0.17 * len(backbones)))


def pareto(report: Report) -> str:
    """AUROC against images/s at the larger batch size; labelled is what nothing beats in both."""
    measured = [b for b in report["backbones"] if len(b["costs"]) > 1]

    def plot(axes: Axes) -> None:
        speeds = [b["costs"][-1]["images per second"] for b in measured]
        values = [b["logistic"][AUROC]["value"] for b in measured]
        on_it = [b["name"] in report["pareto"] for b in measured]
        axes.scatter(speeds, values, c=[BLUE if best else GREY for best in on_it], s=18)
        for b, speed, value, best in zip(measured, speeds, values, on_it, strict=True):
            if best or len(measured) <= 12:
                axes.annotate(
                    b["name"], (speed, value), (4, 4), textcoords="offset points", fontsize=7
                )
        front = sorted((s, v) for s, v, best in zip(speeds, values, on_it, strict=True) if best)
        axes.step(*np.array(front).T, where="pre", color=BLUE, linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.2)
        axes.set(
            xlabel=f"images per second at batch {measured[0]['costs'][-1]['batch size']}",
            ylabel="AUROC of the logistic probe",
            title=_title(report, "Quality against speed"),
        )

    return draw(plot, 6.2, 4.0)


def _title(report: Report, text: str) -> str:
    return f"{text} (RANDOM WEIGHTS)" if report["weights"] == "random" else text


def _width(bars: int) -> float:
    return max(5.0, min(1.5 + 0.17 * bars, 16.0))
