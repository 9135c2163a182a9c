"""An evaluation as people read it: one self-contained page, and the same numbers as JSON."""

import json
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from models.files import write_atomically
from training import plots
from training.evaluate import KEY_FIGURES, Report
from training.statistics import LEAST_CLUSTERS

JSON = "report.json"
PAGE = "report.html"
# Where there is no figure.
_NONE = "–"


def save_report(folder: Path, report: Report) -> None:
    """Write `report.json` and `report.html` into a folder."""
    page, numbers = render(report), to_json(report)  # before either: they belong together
    with write_atomically(folder / JSON) as temporary:
        temporary.write_text(numbers)
    with write_atomically(folder / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def to_json(report: Report) -> str:
    """The report's numbers, rounded to what they can mean; a figure without a value is null."""
    return json.dumps(_rounded(report), indent=1, allow_nan=False) + "\n"


def render(report: Report) -> str:
    """The page: no script, nothing loaded from elsewhere."""
    template = load_template("report.html.j2")
    shown: Report = {
        "paper": None,
        "originals": None,
        "out of distribution": None,
        "not learned from": {},
        "cautions": (),
    } | report
    shown["sets"] = {name: {"compared": None} | found for name, found in report["sets"].items()}
    return template.render(report=shown, plots=_Plots(), figures=KEY_FIGURES, least=LEAST_CLUSTERS)


def load_template(name: str) -> Template:
    """A page of this package, with what formats figures for people."""
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    environment.globals |= {
        "interval": interval,
        "lacks_interval": lacks_interval,
        "number": number,
    }
    text = files("training").joinpath(name).read_text(encoding="utf-8")
    return environment.from_string(text)


def number(value: float | None, digits: int = 3) -> str:
    """A figure for people; a dash where there is none."""
    # Adding 0.0 takes the sign off a zero.
    return _NONE if value is None or value != value else f"{round(value, digits) + 0.0:.{digits}f}"


def interval(estimate: dict[str, float], digits: int = 3) -> str:
    """A figure and its interval for people."""
    value, low, high = (number(estimate[name], digits) for name in ("value", "low", "high"))
    return value if low == high == _NONE else f"{value} ({low} to {high})"


def lacks_interval(tasks: Report) -> bool:
    """Whether a task's macro F1 has none, of which a resampling tells nothing."""
    return any(number(found["F1, macro"]["low"]) == _NONE for found in tasks.values())


class _Plots:
    """The plots, as markup that the template does not escape."""

    def __getattr__(self, name: str) -> Any:
        plot = getattr(plots, name)
        return lambda *arguments: Markup(plot(*arguments))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6) if isfinite(value) else None
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
