"""The backbones' report: one self-contained page, and the JSON and CSV behind it."""

import csv
from pathlib import Path
from typing import Any

from markupsafe import Markup

from models.files import write_atomically
from training.benchmark import plots
from training.benchmark.probes import FIGURES
from training.benchmark.table import SCORES
from training.report import load_template, to_json

JSON, TABLE, PAGE = "report.json", "backbones.csv", "report.html"
Report = dict[str, Any]


def save_report(folder: Path, report: Report) -> None:
    """Write `report.html`, `report.json` and `backbones.csv` into a folder."""
    page, numbers = render(report), to_json(report)  # before any: they belong together
    with write_atomically(folder / JSON) as temporary:
        temporary.write_text(numbers)
    with write_atomically(folder / TABLE) as temporary, temporary.open("w", newline="") as file:
        rows = [flat(b) | {"weights are": report["weights"]} for b in report["backbones"]]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with write_atomically(folder / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def flat(backbone: Report) -> dict[str, Any]:
    """One backbone's row of the CSV."""
    row = {name: value for name, value in backbone.items() if not isinstance(value, dict | list)}
    row.pop("fine-tuned", None)
    for group in ("zero-train", "chance", "logistic", "neighbours", "fine-tuned"):
        for name, value in (backbone[group] or {}).items():
            if isinstance(value, dict):
                row |= {f"{group} {name} {end}": _short(v) for end, v in value.items()}
            else:
                row[f"{group} {name}"] = _short(value)
    row |= {name: _short(value) for name, value in backbone["scores"].items()}
    for cost in backbone["costs"]:
        for name in ("images per second", "peak MB"):
            row[f"{name} at batch {cost['batch size']}"] = _short(cost[name])
    return row


def render(report: Report) -> str:
    """The page: no script, nothing loaded from elsewhere."""
    shown = {
        name: Markup(plot(report))
        for name, plot in (
            ("zero_train", plots.zero_train),
            ("chance", plots.chance),
            ("probe", plots.probe),
        )
    }
    if report["pareto"]:
        shown["pareto"] = Markup(plots.pareto(report))
    return load_template("benchmark/report.html.j2").render(
        report=report, plots=shown, figures=FIGURES, scores=SCORES
    )


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
