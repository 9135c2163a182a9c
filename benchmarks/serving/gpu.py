"""mmtl on a GPU beside what a user would otherwise pick: as compare.py, on one NVIDIA GPU.

    make bench-serve-gpu                (.venv/bin/python -m benchmarks.serving.gpu ../shared/data)

The same ONNX file behind each system, in ONNX Runtime on the first GPU. docs/performance-gpu.md and
.json are written from runs/bench-serve-gpu.
"""

import argparse
import json
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from app.settings import PREFIX, Settings
from benchmarks.serving import compare
from benchmarks.serving.compare import MIXES
from benchmarks.serving.page import PEERS, Results, counts, latency, row, span, write_all
from benchmarks.serving.process import ON_GPU, ROOT, System, fingerprint, make_environment
from models.bundle import Bundle, load_bundle
from models.cores import processor

CROWD = 128
BATCH = 32
# Of measuring, as compare.METHOD.
METHOD = "one system after the other; connections spread; but for that, " + compare.METHOD
OURS, ALONE, LIMIT, NOTHING = "mmtl", "mmtl, one process", "limit", "nothing"


def systems(network: Path, side: int, processes: int) -> dict[str, System]:
    """Everything that is measured over HTTP, each in an environment with CUDA."""
    named = compare.systems(network, side, processes, BATCH)
    ours = {"MMTL_DEVICE": "cuda:0", "MMTL_MAX_BATCH": str(BATCH)}
    shared = {"MMTL_PROCESSES": str(processes)}
    # What processes divide among them, each of which must be able to take the largest request.
    for divided, of_one in (("queue_size", "max_files"), ("max_bytes_in_flight", "max_bytes")):
        whole, least = (Settings.model_fields[name].default for name in (divided, of_one))
        shared[f"{PREFIX}{divided.upper()}"] = str(max(whole, least * processes))
    known = {
        OURS: (named["mmtl, same network"], {**ours, **shared}),
        ALONE: (named["mmtl, same network"], ours),
        **{name: (named[name], {"GPU": "1"}) for name in PEERS},
    }
    on_gpu = {
        name: replace(
            system, environment=system.environment + ON_GPU, variables=system.variables | more
        )
        for name, (system, more) in known.items()
    }
    return {**on_gpu, NOTHING: named[NOTHING]}


def machine() -> str:
    """What the figures are of: the GPU, the cores, and Python."""
    cores = f"{compare.CORES} cores ({processor()})"
    return f"{gpu_name()}; {cores}, Python {platform.python_version()}"


def gpu_name() -> str:
    """As its driver has it.

    Raises:
        SystemExit: There is none.
    """
    try:
        ask = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit("nvidia-smi finds no GPU here: run this on a GPU host.") from None
    name, _, driver = found.splitlines()[0].partition(", ")
    return f"{name}, driver {driver}"


def main() -> None:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="The folder that holds originals/.")
    parser.add_argument("--bundle", type=Path, default=ROOT / "models/default")
    parser.add_argument("--run", type=Path, default=ROOT / "runs/bench-serve-gpu")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    most = max(compare.CORES // 2, 1)
    parser.add_argument("--processes", type=int, default=most, help="Of mmtl.")
    parser.add_argument("--seconds", type=float, default=compare.SECONDS, help="Of each load.")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--page", action="store_true", help="Write of what is measured already.")
    parser.add_argument("--only", nargs="*", help="Systems to measure; the page is not written.")
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle.resolve())
    network = bundle.path(bundle.artifact("onnx", "fp32"))
    known = systems(network, bundle.manifest.input.width, arguments.processes)
    every = (*known, LIMIT)
    names = compare.chosen(every, arguments.only)
    if arguments.only and not arguments.page:
        _measure(known, names, bundle, arguments)
        return
    if arguments.page:
        rows = [json.loads(line) for line in (arguments.run / "results.jsonl").open()]
        if rows[0].get("method") != METHOD:
            raise SystemExit(f"{arguments.run} was measured in another way: measure it anew.")
    else:
        rows = _measure(known, names, bundle, arguments)
    results = Results(rows)
    text = "\n".join(_lines(results, every, bundle)) + "\n"
    write_all(
        arguments.out,
        {
            "performance-gpu.json": json.dumps(results.rows, indent=1) + "\n",
            "performance-gpu.md": text,
        },
    )
    print(text)


def _measure(
    known: dict[str, System], names: list[str], bundle: Bundle, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    compare.SECONDS = arguments.seconds
    mixes = compare.make_images(arguments.data.resolve(), arguments.run / "images")
    facts = compare.conditions(bundle, mixes)
    facts |= {
        "code": fingerprint(*compare.MEASURED, Path(__file__)),
        "machine": machine(),
        "processes": arguments.processes,
        "method": METHOD,
    }
    for name in {known[name].environment for name in names if name != LIMIT}:
        make_environment(name)

    answers: list[list[float]] = []

    def measure_one(names: list[str], repeat: int) -> dict[str, Any]:
        served = {name: known[name] for name in names if name != LIMIT}
        bare = {name: known[ALONE] for name in names if name == LIMIT}
        return compare.measure(served, bare, mixes, arguments.run, repeat, CROWD, BATCH, answers)

    # One after the other: what holds a GPU's memory holds it while it is stopped, too.
    one_by_one = [[name] for name in names]
    return compare.collect(arguments.run, arguments.repeats, one_by_one, facts, measure_one)


def _lines(results: Results, names: Sequence[str], bundle: Bundle) -> Iterator[str]:
    measured = {row["system"] for row in results.rows}
    served = [name for name in (OURS, ALONE, *PEERS) if name in measured]
    missing = [name for name in names if name not in measured]
    facts = results.rows[0]
    loads = [f"{mix}, {CROWD} clients" for mix in MIXES]
    manifest = bundle.manifest
    yield "# How fast it serves on a GPU, beside others\n"
    yield "<!-- Generated by `make bench-serve-gpu`; do not edit. -->\n"
    yield (
        f"{manifest.name} {manifest.version}, {manifest.input.width} pixels, the fp32 ONNX file in "
        f"every system; {facts['machine']}; repeats of {facts['seconds']:g} seconds a load after "
        f"one of warm-up at least: {len(results.repeats)}. The load generator, one process, runs "
        f"on the same cores. *mmtl* is {facts['processes']} processes (`MMTL_PROCESSES`), in "
        f"batches of at most {BATCH} (`MMTL_MAX_BATCH`); peers decode "
        "with Pillow, in a process a core or (FastAPI) a thread a core, in one process or in as "
        "many as mmtl has, and fill batches up to one size, without which they took a second for "
        "each change of it. They run ONNX Runtime as it comes, in TensorFloat-32, in which the "
        "network is faster, and in batches as large as mmtl's (FastAPI: one image at a time). "
        "FastAPI in several processes and BentoML get a new connection for every image, mmtl's "
        "processes do not. "
        "*The limit* is a bare loop without HTTP, in one process: mmtl's decoder and engine, a "
        f"thread a core or one more (the faster in the median repeat), in batches of {BATCH}. "
        + (f"Not measured here: {', '.join(missing)}. " if missing else "")
        + "What each part of the engine gives: "
        "[performance-gpu-steps.md](performance-gpu-steps.md).\n"
    )
    yield f"## Images a second, {CROWD} clients\n"
    yield row(["", *MIXES])
    yield row(["---"] * 5)
    for name in (*served, *([LIMIT] if LIMIT in measured else [])):
        rates = [results.median(name, load, "images_per_second") for load in loads]
        yield row([name, *(f"{rate:.0f}" for rate in rates)])
    for peer in served[1:]:
        ratios = [results.ratios(OURS, peer, load) for load in loads]
        yield row([f"{OURS} over {peer}", *(span(each, "{:.2f}x") for each in ratios)])
    yield "\n## Latency, mixed images: p50 / p95 / p99 in milliseconds\n"
    yield row(["clients", *map(str, compare.CLIENTS)])
    yield row(["---"] * 5)
    for name in served:
        each = [latency(results, name, f"mixed, {n} clients") for n in compare.CLIENTS]
        yield row([name, *each])
    if LIMIT in measured:
        alone = results.median(LIMIT, "mixed, 1 clients", "p50_ms")
        yield row([f"{LIMIT} (one image at a time)", f"{alone:.0f}", "", "", ""])
    rate = f"each system's rate with {CROWD} clients"
    yield f"\n## Arrivals by chance (Poisson), at a share of {rate}\n"
    yield (
        "For these, each is started anew, and answers that many clients just before. At 120 % (for "
        f"{facts['overload_seconds']:g} seconds) more and more wait, whatever answers them.\n"
    )
    yield row(["", "load", "images/s", "p50 / p95 / p99 ms", "refused (503)", "failed", "unsent"])
    yield row(["---"] * 7)
    for name in served:
        for share in compare.OPEN_LOADS:
            load = f"mixed, open loop, {share:.0%}"
            rate = results.median(name, load, "images_per_second")
            cells = [f"{rate:.0f}", latency(results, name, load), *counts(results, name, load)]
            yield row([name, f"{share:.0%}", *cells])
    yield f"\n## What it costs, {CROWD} clients\n"
    yield row(["", *(f"CPU ms an image, {m}" for m in MIXES), "peak MB, full size", "ready, s"])
    yield row(["---"] * 7)
    for name in served:
        costs = [results.median(name, load, "server_cpu_ms_per_image") for load in loads]
        ready = median(results.of(name, repeat)["ready_seconds"] for repeat in results.repeats)
        peak = max(results.each(name, f"full size, {CROWD} clients", "peak_megabytes"))
        yield row([name, *(f"{cost:.1f}" for cost in costs), f"{peak:.0f}", f"{ready:.1f}"])
    if LIMIT in measured:
        costs = [results.median(LIMIT, load, "cpu_ms_per_image") for load in loads]
        yield row([LIMIT, *(f"{cost:.1f}" for cost in costs), "", ""])
    if NOTHING in measured:
        yield "\n## The load generator, against a server that does nothing\n"
        yield row(["", *MIXES])
        yield row(["---"] * 5)
        rates = [results.median(NOTHING, load, "images_per_second") for load in loads]
        yield row(["images a second", *(f"{rate:.0f}" for rate in rates)])


if __name__ == "__main__":
    main()
