"""docs/performance*.md: tables, a plot and the targets, from what compare.py measured."""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from models.bundle import Bundle
from models.cores import has_amx, instructions
from models.files import write_atomically

Rows = Sequence[dict[str, Any]]
PROCESSES = "FastAPI, several processes"
PEERS = ("FastAPI", PROCESSES, "LitServe", "BentoML", "Ray Serve")
SAME, SHIPPED = "mmtl, same network", "mmtl, as shipped"
SHORT, DEADLINE = "mmtl, short queue", "mmtl, short deadline"
# As shipped, with settings of which requests are refused: fewer images may wait than there are
# connections, or as many as there are wait for longer than they may.
REFUSING = {
    SHORT: {"MMTL_QUEUE_SIZE": "32", "MMTL_DEADLINE_SECONDS": "1"},
    DEADLINE: {"MMTL_DEADLINE_SECONDS": "0.3"},
}
INT8 = "mmtl, int8 in ONNX Runtime"
LIMIT = {SAME: "limit, same network", SHIPPED: "limit, as shipped"}
# FastAPI with one line that is in no documentation: what that line is worth.
SCALED, UNCOPIED = "FastAPI, JPEG scaled", "FastAPI, RGB not copied"
MIXES = ("small", "medium", "full size", "mixed")
_TITLE = (
    "Images a second of mmtl, of its limits and of its peers, from 32 clients, by mix of images"
)
# Of a load on a limit: with a thread a core, and with one more.
EITHER = "either"
TARGETS_FULL = {SAME: 2.0, SHIPPED: 3.0}
TARGETS_SMALL = {SAME: 1.0, SHIPPED: 1.8}


class Results:
    """What was measured, by system and load; a figure is the median of its repeats.

    Args:
        rows: A system in a repeat each.
        each_repeat: The limit is with the number of threads that is faster in each repeat, the
            luckier one included, not in the median one.
    """

    def __init__(self, rows: Rows, each_repeat: bool = False):
        self.measured = rows
        self.rows = _with_limits(rows, each_repeat)
        self.repeats = sorted({row["repeat"] for row in rows})

    def of(self, system: str, repeat: int) -> dict[str, Any]:
        """One system in one repeat."""
        return next(r for r in self.rows if r["repeat"] == repeat and r["system"] == system)

    def each(self, system: str, load: str, name: str) -> list[float]:
        """A figure in every repeat."""
        values = [self.of(system, repeat)["loads"][load][name] for repeat in self.repeats]
        return [value for value in values if value is not None]

    def median(self, system: str, load: str, name: str) -> float:
        """A figure."""
        values = self.each(system, load, name)
        return median(values) if values else float("nan")

    def ratios(self, first: str, second: str, load: str) -> list[float]:
        """How many times as many images a second, in every repeat."""
        pairs = zip(
            self.each(first, load, "images_per_second"),
            self.each(second, load, "images_per_second"),
            strict=True,
        )
        return [a / b if b else float("inf") for a, b in pairs]

    def over_fastest(self, ours: str, loads: Sequence[str]) -> list[float]:
        """The ratios to the peer, on the load, where they are least in the median repeat."""
        return min((self.ratios(ours, peer, load) for peer in PEERS for load in loads), key=median)

    def cores_used(self, system: str, load: str) -> list[float]:
        """By a system, in every repeat."""
        cost = "cpu_ms_per_image" if system in LIMIT.values() else "server_cpu_ms_per_image"
        rates, costs = self.each(system, load, "images_per_second"), self.each(system, load, cost)
        return [rate * each / 1000 for rate, each in zip(rates, costs, strict=True)]

    def closed(self, system: str) -> list[str]:
        """Its closed loops."""
        loads = self.of(system, self.repeats[0])["loads"]
        return [load for load in loads if "open loop" not in load]

    def unanswered(self, system: str) -> int:
        """Requests of closed loops that were not answered with 200, in all repeats."""
        loads = [(load, why) for load in self.closed(system) for why in ("failed", "refused")]
        return sum(sum(self.each(system, load, why)) for load, why in loads)

    def kept(self, system: str, load: str) -> list[float]:
        """Of an open loop, the share of the closed loop's rate just before, in every repeat."""
        found = [self.of(system, repeat)["loads"][load] for repeat in self.repeats]
        return [one["images_per_second"] / one["closed_images_per_second"] for one in found]

    def beyond(self, ours: str, load: str, name: str, bare_name: str) -> list[float]:
        """A figure less the bare loop's, in every repeat."""
        bare = self.each(LIMIT[ours], load, bare_name)
        return [a - b for a, b in zip(self.each(ours, load, name), bare, strict=True)]

    def of_the_limit(self, system: str, limit: str, load: str, given_back: bool) -> list[float]:
        """Share of what the bare loop does; with the generator's CPU time taken off the latter."""
        shares = []
        for repeat in self.repeats:
            facts = self.of(system, repeat)
            found, cores = facts["loads"][load], facts["cores"]
            most = self.of(limit, repeat)["loads"][load]["images_per_second"]
            busy = found["generator_cpu_ms_per_answer"] * found["images_per_second"] / 1000
            left = (cores - busy) / cores if given_back else 1.0
            shares.append(found["images_per_second"] / (most * left))
        return shares


def _with_limits(rows: Rows, each_repeat: bool) -> Rows:
    """Each limit with the number of threads that is faster, in the median repeat or in each."""
    rates: dict[tuple[str, str], list[list[float]]] = {}
    for row in rows:
        for load, found in row["loads"].items():
            if EITHER in found:
                rates.setdefault((row["system"], load), []).append(_rates_of(found))

    def limit(system: str, load: str, found: dict[str, Any]) -> dict[str, Any]:
        if EITHER not in found:
            return found
        told = _rates_of(found) if each_repeat else np.median(rates[system, load], axis=0)
        several: list[dict[str, Any]] = found[EITHER]
        return several[int(np.argmax(told))]

    return [
        {
            **row,
            "loads": {load: limit(row["system"], load, of) for load, of in row["loads"].items()},
        }
        for row in rows
    ]


def _rates_of(found: dict[str, Any]) -> list[float]:
    """Images a second with either number of threads."""
    return [each["images_per_second"] for each in found[EITHER]]


def name_here() -> str:
    """The page of this machine: each kind of CPU has its own, and that of AMX the plain name."""
    widest = instructions() or platform.machine()
    return "performance" if has_amx() else f"performance-{widest.lower().replace(' ', '-')}"


def write(folder: Path, name: str, rows: Rows, bundle: Bundle, mixes: dict[str, list[Path]]):
    """Write the page of that name, its plot and what was measured, as .md, .svg and .json."""
    results = Results(rows)
    text = "\n".join(_lines(results, folder, name, bundle, mixes)) + "\n"
    with write_atomically(folder / f"{name}.svg") as part:
        _plot(results, part)
    write_all(folder, {f"{name}.json": json.dumps(list(rows), indent=1) + "\n", f"{name}.md": text})
    print(text)


def write_all(folder: Path, files: Mapping[str, str]) -> None:
    """Each whole, or as it was."""
    for name, text in files.items():
        with write_atomically(folder / name) as part:
            part.write_text(text)


def _beside(folder: Path, page: str, other: str) -> str:
    """The page on something else of the same machine, or of the one that has such a page."""
    name = f"{page.replace('performance', other)}.md"
    return name if name != f"{page}.md" and (folder / name).exists() else f"{other}.md"


def _lines(
    results: Results, folder: Path, page: str, bundle: Bundle, mixes: dict[str, list[Path]]
) -> Iterator[str]:
    manifest = bundle.manifest
    facts = results.rows[0]
    int8, soak = (_beside(folder, page, other) for other in ("int8", "soak"))
    here = f"{page}-steps.md"
    steps = here if (folder / here).exists() else "performance-steps.md"
    yield "# How fast it serves, beside others\n"
    yield "<!-- Generated by `make bench-serve`; do not edit. -->\n"
    yield (
        f"{manifest.name} {manifest.version}, {manifest.input.width} pixels; {facts['machine']}; "
        f"{len(results.repeats)} repeats of {facts['seconds']:g} seconds a load after one of "
        "warm-up at least: medians, and in brackets the lowest and highest repeat; of refusals "
        "and failures the sum. In every repeat each load is given to one system after the other, "
        "that is at rest, while the others are stopped, and they are compared within it. Of a load "
        "with fewer than a hundred answers, p99 is near the slowest of them. Everything runs on "
        "the same cores, the load generator included. Peers decode with Pillow and run the fp32 "
        "ONNX file, configured as their documentation has it (benchmarks/serving/peers), with a "
        "worker a core; FastAPI in one process with a thread a core, and in several processes. "
        "FastAPI in several processes and BentoML get a new connection for every image: of "
        "connections that stay, one of their processes takes most (the others share images out "
        "themselves). "
        "Peers decode every pixel of a JPEG, where mmtl has libjpeg decode large ones at a smaller "
        "scale, and of progressive ones only the scans that show there, which is most of the "
        'difference on full-size images; and `convert("RGB")`, as they have it, copies what is '
        "RGB already. *JPEG scaled* has Pillow decode at that scale (`image.draft`), *RGB not "
        "copied* leaves the copy out: one line each, in no peer's documentation. *Same "
        "network*: mmtl runs that file in ONNX Runtime, too. *As shipped*: mmtl runs what it takes"
        " by default, the int8 file; on a CPU of at most eight cores that multiplies bfloat16 "
        "numbers (AMX, AVX-512 BF16) in OpenVINO, which computes in them what stays in floats. "
        "*int8 in ONNX Runtime* is what it takes on any other: there it is the same measured "
        "twice, and what the two differ by is noise. Where *as shipped* is no faster than *same "
        "network*, the CPU multiplies integers no faster than floats, and `MMTL_PRECISION=fp32` "
        "is the better choice. "
        "*The limit* is a bare loop without HTTP: mmtl's decoder and the same network in the same "
        "runtime, in batches as large as its own, with a thread a core or one more, whichever is "
        "faster in the median repeat; beside one client, an image at "
        "a time, which runs on as many cores as mmtl gives one that is alone (two where there are"
        " two). Machines: "
        "[a CPU with AMX](performance.md), [one with AVX-512 BF16](performance-avx-512-bf16.md), "
        "[one with AVX2 alone](performance-avx2.md), "
        "[a GPU](performance-gpu.md)."
    )
    yield (
        "\nImages: "
        + "; ".join(
            f"{name}, {len(paths)} files of {median(p.stat().st_size for p in paths) / 1000:.0f} kB"
            for name, paths in mixes.items()
        )
        + " (medians; small ones are originals made 600x450, the others as they are).\n"
    )
    yield (
        f"What integers and bfloat16 cost: [{int8}]({int8}). Whether the service grows: "
        f"[{soak}]({soak}). What each optimisation gives: [{steps}]({steps}).\n"
    )
    yield f"![{_TITLE}: the figures of the tables below]({page}.svg)\n"
    for ours, title in ((SAME, "Same network"), (SHIPPED, "As shipped")):
        yield f"## {title}: images a second, 32 clients\n"
        yield row(["", *MIXES])
        yield row(["---"] * 5)
        others = (INT8, *PEERS) if ours == SHIPPED else PEERS
        for name in (LIMIT[ours], ours, *others, SCALED, UNCOPIED):
            yield row([name, *(span(_rates(results, name, mix), "{:.0f}") for mix in MIXES)])
        for given_back, what in (
            (False, "of the limit"),
            (True, "of what the generator leaves of it"),
        ):
            shares = [
                results.of_the_limit(ours, LIMIT[ours], f"{m}, 32 clients", given_back)
                for m in MIXES
            ]
            yield row([f"{ours}, {what}", *map(span, shares)])
        for peer in PEERS:
            shares = [results.ratios(peer, LIMIT[ours], f"{m}, 32 clients") for m in MIXES]
            yield row([f"{peer}, of the limit", *map(span, shares)])
        for peer in (*PEERS, SCALED, UNCOPIED):
            ratios = [results.ratios(ours, peer, f"{m}, 32 clients") for m in MIXES]
            yield row([f"{ours} over {peer}", *(span(each, "{:.2f}x") for each in ratios)])
        if ours == SHIPPED:
            for first, second in ((INT8, SHIPPED), (SHIPPED, SAME)):
                ratios = [results.ratios(first, second, f"{m}, 32 clients") for m in MIXES]
                yield row([f"{first} over {second}", *(span(each, "{:.2f}x") for each in ratios)])
        yield ""
    yield "## Latency, mixed images: p50 / p95 / p99 in milliseconds\n"
    crowds = (1, 8, 32, 128)
    yield row(["clients", *map(str, crowds)])
    yield row(["---"] * 5)
    for name in (SAME, SHIPPED, INT8, *PEERS):
        yield row([name, *(latency(results, name, f"mixed, {n} clients") for n in crowds)])
    for ours in (SAME, SHIPPED):
        alone = results.median(LIMIT[ours], "mixed, 1 clients", "p50_ms")
        yield row([f"{LIMIT[ours]} (one image at a time)", f"{alone:.1f}", "", "", ""])
    yield "\n## Latency, 32 clients: p50 / p95 / p99 in milliseconds\n"
    yield row(["", *MIXES])
    yield row(["---"] * 5)
    for name in (SAME, SHIPPED, INT8, *PEERS, SCALED, UNCOPIED):
        yield row([name, *(latency(results, name, f"{mix}, 32 clients") for mix in MIXES)])
    yield "\n## Arrivals by chance (Poisson), at a share of each system's rate with 32 clients\n"
    yield (
        "For these, each system is started anew, and answers 32 clients just before each: that is "
        f"the rate. At 120 % (for {facts['overload_seconds']:g} seconds) more and more wait, "
        "whatever answers them: how long is of how long that lasts.\n"
    )
    answered = ["images/s", "of the rate"]
    yield row(["", "load", *answered, "p50 / p95 / p99 ms", "refused (503)", "failed", "unsent"])
    yield row(["---"] * 8)
    for name in (SAME, SHIPPED, INT8, *PEERS):
        for share in ("50%", "80%", "120%"):
            load = f"mixed, open loop, {share}"
            yield row(
                [
                    name,
                    share,
                    f"{results.median(name, load, 'images_per_second'):.1f}",
                    f"{median(results.kept(name, load)):.2f}",
                    latency(results, name, load),
                    *counts(results, name, load),
                ]
            )
    yield (
        "\nRefusals take more connections than may wait, or a wait that is too long. mmtl as "
        "shipped, with other settings, under the same 120 % over 128 connections:\n"
    )
    refused = ["refused (503)", "failed", "unsent", "p99 of refusals, ms"]
    yield row(["", "images/s", "p50 / p95 / p99 ms", *refused])
    yield row(["---"] * 7)
    over = f"mixed, open loop, {1.2:.0%}"
    for name, settings in REFUSING.items():
        yield row(
            [
                f"{name}: {', '.join(f'`{each}={value}`' for each, value in settings.items())}",
                f"{results.median(name, over, 'images_per_second'):.1f}",
                latency(results, name, over),
                *counts(results, name, over),
                f"{results.median(name, over, 'refused_p99_ms'):.0f}",
            ]
        )
    yield "\n## What it costs, 32 clients\n"
    costly = [*(f"CPU ms an image, {mix}" for mix in MIXES), "peak MB, full size", "ready, s"]
    yield "Memory is the most that each process had, that of several added up.\n"
    yield row(["", *costly, "failed or refused, closed loops"])
    yield row(["---"] * 8)
    for name in (SAME, SHIPPED, INT8, *PEERS, SCALED, UNCOPIED):
        costs = [
            results.median(name, f"{mix}, 32 clients", "server_cpu_ms_per_image") for mix in MIXES
        ]
        ready = median(results.of(name, repeat)["ready_seconds"] for repeat in results.repeats)
        peak = max(results.each(name, "full size, 32 clients", "peak_megabytes"))
        middle = [*(f"{cost:.1f}" for cost in costs), f"{peak:.0f}", f"{ready:.2f}"]
        yield row([name, *middle, str(results.unanswered(name))])
    for ours in (SAME, SHIPPED):
        costs = [results.median(LIMIT[ours], f"{m}, 32 clients", "cpu_ms_per_image") for m in MIXES]
        yield row([LIMIT[ours], *(f"{cost:.1f}" for cost in costs), "", "", ""])
    yield f"\n## Cores that it used, of {facts['cores']}, 32 clients\n"
    yield "CPU time an image, that of the warm-up included, times images a second without it.\n"
    yield row(["", *MIXES])
    yield row(["---"] * 5)
    for name in (*LIMIT.values(), SAME, SHIPPED, INT8, *PEERS, SCALED, UNCOPIED):
        used = [results.cores_used(name, f"{mix}, 32 clients") for mix in MIXES]
        yield row([name, *map(span, used)])
    yield "\n## The load generator, against a server that does nothing\n"
    yield row(["", *MIXES])
    yield row(["---"] * 5)
    for what, name, unit in (
        ("images a second", "images_per_second", ""),
        ("its CPU an image", "generator_cpu_ms_per_answer", " ms"),
    ):
        values = [results.median("nothing", f"{mix}, 32 clients", name) for mix in MIXES]
        yield row([what, *(f"{value:.2f}{unit}" for value in values)])
    values = [
        results.median(SAME, f"{m}, 32 clients", "generator_cpu_ms_per_answer") for m in MIXES
    ]
    yield row(["its CPU an image, beside mmtl", *(f"{value:.2f} ms" for value in values)])
    yield "\n## Targets\n"
    yield row(["", "measured", "target", "met"])
    yield row(["---"] * 4)
    for what, value, target, met in _targets(results):
        yield row([what, value, target, "yes" if met else "no"])


def _targets(results: Results) -> Iterator[tuple[str, str, str, bool]]:
    luckier = Results(results.measured, each_repeat=True)
    for mix in ("mixed", "full size"):
        limit, load = LIMIT[SAME], f"{mix}, 32 clients"
        shares = results.of_the_limit(SAME, limit, load, given_back=True)
        raw = median(results.of_the_limit(SAME, limit, load, given_back=False))
        least = median(luckier.of_the_limit(SAME, limit, load, given_back=True))
        what = (
            f"same network, {mix}: share of the limit, generator accounted for (not: {raw:.2f}; "
            f"of the faster limit in each repeat: {least:.3f})"
        )
        yield what, span(shares, "{:.3f}"), "0.900", median(shares) >= 0.9
        cpu = "server_cpu_ms_per_image", "cpu_ms_per_image"
        more, most = (median(each.beyond(SAME, load, *cpu)) for each in (results, luckier))
        what = (
            f"same network, {mix}: CPU an image over the bare loop's (over the faster one's in "
            f"each repeat: {most:+.1f} ms)"
        )
        yield what, span(results.beyond(SAME, load, *cpu), "{:+.1f} ms"), "+2 ms", more <= 2
    for ours in (SAME, SHIPPED):
        for mix, targets in (("full size", TARGETS_FULL), ("small", TARGETS_SMALL)):
            ratios, least = results.over_fastest(ours, [f"{mix}, 32 clients"]), targets[ours]
            what = f"{ours}, {mix}: over the fastest peer"
            yield what, span(ratios, "{:.2f}x"), f"{least:g}x", median(ratios) >= least
    ratios = results.over_fastest(SAME, [f"{mix}, 32 clients" for mix in MIXES])
    what = "same network, any mix: over the fastest peer"
    yield what, span(ratios, "{:.2f}x"), "1x", median(ratios) >= 1
    over = f"mixed, open loop, {1.2:.0%}"
    for ours in (SAME, SHIPPED, *REFUSING):
        kept = results.kept(ours, over)
        whose = "the peak as shipped" if ours in REFUSING else "its peak"
        what = f"{ours}, 120 % load: throughput of {whose} (in a closed loop just before)"
        yield what, span(kept), "0.90", median(kept) >= 0.9
        failed = sum(
            sum(results.each(ours, over, what))
            for what in ("failed", "unsent", "without_retry_after")
        )
        what = f"{ours}, 120 % load: failed, unsent, or refused without Retry-After"
        yield what, f"{failed:.0f}", "0", not failed
    for ours, settings in REFUSING.items():
        p99_ms = results.each(ours, over, "p99_ms")
        most_ms = 1000 * float(settings["MMTL_DEADLINE_SECONDS"])
        what = f"{ours}, 120 % load: p99 of what is accepted, at most the deadline"
        yield what, span(p99_ms, "{:.0f} ms"), f"{most_ms:,.0f} ms", median(p99_ms) <= most_ms
        refused_ms = results.median(ours, over, "refused_p99_ms")
        accepted_ms = results.median(ours, over, "p50_ms")
        what = f"{ours}, 120 % load: p99 of what is refused, below the median of what is accepted"
        yield what, f"{refused_ms:.0f} ms", f"{accepted_ms:.0f} ms", refused_ms < accepted_ms
    for ours in (SAME, SHIPPED):
        for mix in MIXES:
            later = results.beyond(ours, f"{mix}, 1 clients", "p50_ms", "p50_ms")
            what = f"{ours}, one client, {mix}: p50 over bare decode and infer"
            yield what, span(later, "{:+.1f} ms"), "+3 ms", median(later) <= 3
        unanswered = results.unanswered(ours)
        yield f"{ours}: failed or refused, closed loops", f"{unanswered}", "0", not unanswered
        peak_mb = max(results.each(ours, "full size, 32 clients", "peak_megabytes"))
        yield f"{ours}: memory, full size", f"{peak_mb:.0f} MB", "350 MB", peak_mb < 350
        ready = [results.of(ours, repeat)["ready_seconds"] for repeat in results.repeats]
        yield f"{ours}: first answer after start", span(ready, "{:.2f} s"), "2 s", median(ready) < 2


def _rates(results: Results, system: str, mix: str) -> list[float]:
    return results.each(system, f"{mix}, 32 clients", "images_per_second")


def latency(results: Results, system: str, load: str) -> str:
    """Three percentiles of it."""
    values = [results.median(system, load, f"p{percent}_ms") for percent in (50, 95, 99)]
    return " / ".join(f"{value:.0f}" for value in values)


def counts(results: Results, system: str, load: str) -> list[str]:
    """Requests that were refused, failed or never sent, in all repeats."""
    names = ("refused", "failed", "unsent")
    return [f"{sum(results.each(system, load, name)):.0f}" for name in names]


def span(values: Sequence[float], form: str = "{:.2f}") -> str:
    """The median and, of several, the lowest and the highest."""
    low, middle, high = (form.format(of(values)) for of in (min, median, max))
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def row(cells: Sequence[str]) -> str:
    """Of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def _plot(results: Results, path: Path) -> None:
    names = [LIMIT[SHIPPED], SHIPPED, INT8, LIMIT[SAME], SAME, *PEERS]
    colours = ["0.8", "tab:red", "tab:pink", "0.65", "tab:orange", *["tab:blue"] * len(PEERS)]
    figure, axes = plt.subplots(1, len(MIXES), figsize=(13, 4.4), layout="constrained")
    for axis, mix in zip(axes, MIXES, strict=True):
        labels = [name.replace(" in ", "\nin ") for name in names]
        rates = [_rates(results, name, mix) for name in names]
        middle = [median(each) for each in rates]
        # From the lowest repeat to the highest.
        below = [median(each) - min(each) for each in rates]
        above = [max(each) - median(each) for each in rates]
        # Edged, as the lighter ones are hardly seen on white.
        axis.bar(labels, middle, color=colours, edgecolor="0.3", yerr=(below, above), ecolor="0.3")
        axis.set_title(f"{mix} images")
        axis.tick_params(axis="x", labelrotation=90)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("images a second, 32 clients")
    figure.savefig(path, format="svg", metadata={"Title": _TITLE})
    plt.close(figure)
