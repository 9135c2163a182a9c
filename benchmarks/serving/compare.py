"""mmtl beside what a user would otherwise pick: the same network, images and cores, in one run.

    make bench-serve                (.venv/bin/python -m benchmarks.serving.compare ../shared/data)

Each system has an environment of its own (.venv-bench), is configured as its documentation
advises (peers/), and is measured alone, one after the other, in an order that rotates from repeat
to repeat. The load generator is `mmtl bench`, in a process of its own. What was measured is kept in
runs/bench-serve, and a run that was interrupted goes on there; docs/performance.md is written from
it, or with `--name` a page beside it, for a machine of another kind.
"""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from benchmarks.serving import page
from benchmarks.serving.process import (
    HERE,
    PORT,
    ROOT,
    Process,
    System,
    fingerprint,
    make_environment,
)
from models.bundle import Bundle, load_bundle
from models.cores import processor

CORES = len(os.sched_getaffinity(0))
SECONDS = 4.0
REPEATS = 3
MIXES = ("small", "medium", "full size", "mixed")
CLIENTS = (1, 8, 32, 128)
# Clients that every mix is measured with.
CROWD = 32
OPEN_CLIENTS = 128
OPEN_LOADS = (0.5, 0.8, 1.2)
# What decides what is measured, and how.
MEASURED = (
    ROOT / "app",
    ROOT / "models",
    ROOT / "requirements/cpu.txt",
    ROOT / "requirements/gpu.txt",
    *sorted(HERE.glob("requirements-*.txt")),
    HERE / "peers",
    *(HERE / f"{name}.py" for name in ("compare", "limit", "null_server", "process")),
)
# Images that may wait where refusals are looked at: fewer than there are connections.
SHORT_QUEUE = 32
LIMIT_BATCH = 8


def systems(network: Path, side: int) -> dict[str, System]:
    """Everything that is measured over HTTP."""
    peers = HERE / "peers"
    shared = {"NETWORK": str(network), "SIDE": str(side), "CORES": str(CORES)}
    ours = {"MMTL_PORT": str(PORT), "MMTL_BUNDLE": str(network.parent)}
    port = str(PORT)
    quiet = ("--port", port, "--log-level", "warning")
    return {
        "mmtl, same network": System("mmtl", ("mmtl", "serve"), {**ours, "MMTL_PRECISION": "fp32"}),
        "mmtl, as shipped": System("mmtl", ("mmtl", "serve"), ours),
        "mmtl, int8 in ONNX Runtime": System(
            "mmtl", ("mmtl", "serve"), {**ours, "MMTL_PRECISION": "int8"}
        ),
        "mmtl, short queue": System(
            "mmtl", ("mmtl", "serve"), {**ours, "MMTL_QUEUE_SIZE": str(SHORT_QUEUE)}
        ),
        "FastAPI": System("fastapi", ("uvicorn", "fastapi_app:app", *quiet), shared),
        "LitServe": System("litserve", ("python", f"{peers}/litserve_app.py", port), shared),
        "BentoML": System(
            "bentoml", ("bentoml", "serve", "bentoml_app:Service", "--port", port), shared
        ),
        "Ray Serve": System("ray", ("python", f"{peers}/ray_app.py", port), shared),
        "nothing": System("mmtl", ("python", f"{HERE}/null_server.py", port)),
    }


def make_images(data: Path, folder: Path) -> dict[str, list[Path]]:
    """Files of each mix: real ones, and real ones made small as HAM10000's originals are."""
    originals = sorted((data / "originals").glob("*.jpg"))
    folder.mkdir(parents=True, exist_ok=True)
    mixes: dict[str, list[Path]] = {name: [] for name in MIXES}
    for path in originals:
        with Image.open(path) as image:
            width = image.width
            small = folder / path.name
            if not small.exists():
                part = small.with_suffix(".part")
                thumbnail = image.convert("RGB").resize((600, 450), Image.Resampling.LANCZOS)
                thumbnail.save(part, "JPEG", quality=95)
                part.rename(small)
        mixes["small"].append(small)
        if width < 1100:
            mixes["medium"].append(path)
        elif width >= 3000:
            mixes["full size"].append(path)
    if not all(mixes[name] for name in MIXES[:3]):
        raise SystemExit(f"{data}/originals holds no images: give the data folder.")
    most = max(len(mixes[name]) for name in MIXES[:3])
    for i in range(most):
        mixes["mixed"] += [mixes[name][i % len(mixes[name])] for name in MIXES[:3]]
    return mixes


def load(
    process: Process, files: list[Path], clients: int, rate: float | None = None
) -> dict[str, Any]:
    """What one load gave, and what it cost the system."""
    command: list[str | Path] = [make_environment("mmtl") / "mmtl", "bench"]
    command += [f"http://127.0.0.1:{PORT}", *files, "--clients", str(clients), "--json"]
    command += ["--seconds", str(SECONDS), *(["--rate", str(rate)] if rate else [])]
    with process.watched() as watched:
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"The load generator failed: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)[str(clients)]
    # The generator warms up for a second, and what is measured is its answers' share of the whole.
    answers = found["answers_in_all"]
    return {
        **found,
        "server_cpu_ms_per_image": 1000 * watched["cpu_seconds"] / max(answers, 1),
        "peak_megabytes": watched["peak_megabytes"],
    }


def measure(
    system: System, mixes: dict[str, list[Path]], log: Path, crowd: int = CROWD
) -> dict[str, Any]:
    """Every load on one system, started for it; each mix with a crowd of clients."""
    process = Process(system, log)
    try:
        ready = process.wait(mixes["small"][0].read_bytes())
        found: dict[str, Any] = {
            f"{mix}, {crowd} clients": load(process, mixes[mix], crowd) for mix in MIXES
        }
        for clients in CLIENTS:
            if clients != crowd:
                found[f"mixed, {clients} clients"] = load(process, mixes["mixed"], clients)
        found |= measure_arrivals(process, mixes, found[f"mixed, {crowd} clients"], OPEN_LOADS)
        return {"ready_seconds": ready, "loads": found}
    finally:
        process.stop()


def measure_arrivals(
    process: Process, mixes: dict[str, list[Path]], closed: dict[str, Any], shares: Sequence[float]
) -> dict[str, Any]:
    """Open loops, at shares of what a closed one gave."""
    return {
        f"mixed, open loop, {share:.0%}": load(
            process, mixes["mixed"], OPEN_CLIENTS, share * closed["images_per_second"]
        )
        for share in shares
    }


def measure_refusals(system: System, mixes: dict[str, list[Path]], log: Path) -> dict[str, Any]:
    """More than the system can do, where few may wait."""
    process = Process(system, log)
    try:
        ready = process.wait(mixes["small"][0].read_bytes())
        closed = load(process, mixes["mixed"], SHORT_QUEUE)
        loads = measure_arrivals(process, mixes, closed, OPEN_LOADS[-1:])
        return {"ready_seconds": ready, "loads": {"mixed, 32 clients": closed, **loads}}
    finally:
        process.stop()


def measure_generator(
    system: System, mixes: dict[str, list[Path]], log: Path, crowd: int = CROWD
) -> dict[str, Any]:
    """What the load generator can do at most: every mix against a server that does nothing."""
    process = Process(system, log)
    try:
        ready = process.wait(mixes["small"][0].read_bytes())
        loads = {f"{mix}, {crowd} clients": load(process, mixes[mix], crowd) for mix in MIXES}
        return {"ready_seconds": ready, "loads": loads}
    finally:
        process.stop()


def measure_limit(
    system: System, mixes: dict[str, list[Path]], batch: int, crowd: int = CROWD
) -> dict[str, Any]:
    """The bare loop on every mix, and one image after the other, with what a system runs."""
    python = make_environment(system.environment) / "python"

    def run(mix: str, threads: int, batch: int) -> dict[str, Any]:
        command = [python, HERE / "limit.py", SECONDS, threads, batch, *mixes[mix]]
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **system.variables, "MMTL_THREADS": str(threads)},
        )
        if done.returncode:
            raise SystemExit(f"limit.py failed: {done.stderr[-500:]}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    loads = {f"{mix}, {crowd} clients": run(mix, CORES, batch) for mix in MIXES}
    loads["mixed, 1 clients"] = run("mixed", 1, 1)
    return {"loads": loads}


def conditions(bundle: Bundle) -> dict[str, Any]:
    """Of a figure: figures that differ in one do not belong on one page."""
    return {
        "code": fingerprint(*MEASURED),
        "network": {one.file: one.sha256[:16] for one in bundle.manifest.artifacts},
        "machine": f"{CORES} cores ({processor()}), Python {platform.python_version()}",
        "seconds": SECONDS,
    }


def collect(
    run: Path,
    repeats: int,
    names: Sequence[str],
    facts: dict[str, Any],
    measure_one: Callable[[str, Path], Any],
) -> list[dict[str, Any]]:
    """What is measured of every system in every repeat; what a run has already is not again.

    Args:
        run: Folder of logs and results.
        repeats: Each begins with another system.
        names: Of the systems.
        facts: The conditions, which stand in every row.
        measure_one: Of a system's name, and a file for its log.

    Raises:
        SystemExit: The run holds figures of other conditions.
    """
    results = run / "results.jsonl"
    rows = [json.loads(line) for line in results.open()] if results.exists() else []
    for row in rows:
        if differ := [name for name in facts if row.get(name) != facts[name]]:
            raise SystemExit(
                f"{results} holds figures of another {', '.join(differ)}, which do not belong "
                "beside new ones: delete it, or give another --run."
            )
    done = {(row["repeat"], row["system"]) for row in rows}
    bar = tqdm(total=repeats * len(names), desc="systems")
    for repeat in range(repeats):
        for name in [*names[repeat % len(names) :], *names[: repeat % len(names)]]:
            if (repeat, name) not in done:
                log = run / f"{name.replace(', ', '-').replace(' ', '-')}.log"
                row = {"repeat": repeat, "system": name, **facts, **measure_one(name, log)}
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                rows.append(row)
            bar.update()
    return rows


def main() -> None:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="The folder that holds originals/.")
    parser.add_argument("--bundle", type=Path, default=ROOT / "models/default")
    parser.add_argument("--run", type=Path, default=ROOT / "runs/bench-serve")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--name", default="performance", help="Of the page and its files.")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--only", nargs="*", help="Systems to measure; the page is not written.")
    parser.add_argument("--page", action="store_true", help="Write anew what is measured already.")
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle.resolve())
    network = bundle.path(bundle.artifact("onnx", "fp32"))
    mixes = make_images(arguments.data.resolve(), arguments.run / "images")
    if arguments.page:
        rows = json.loads((arguments.out / f"{arguments.name}.json").read_text())
        page.write(arguments.out, arguments.name, rows, bundle, mixes)
        return
    known = systems(network, bundle.manifest.input.width)
    names = [*known, "limit, same network", "limit, as shipped"]
    if arguments.only:
        names = [name for name in names if name in arguments.only]
    for name in {system.environment for system in known.values()}:
        make_environment(name)

    def measure_one(name: str, log: Path) -> dict[str, Any]:
        if name.startswith("limit"):
            return measure_limit(known[name.replace("limit", "mmtl")], mixes, LIMIT_BATCH)
        if name == "nothing":
            return measure_generator(known[name], mixes, log)
        if name == "mmtl, short queue":
            return measure_refusals(known[name], mixes, log)
        return measure(known[name], mixes, log)

    rows = collect(arguments.run, arguments.repeats, names, conditions(bundle), measure_one)
    if not arguments.only:
        page.write(arguments.out, arguments.name, rows, bundle, mixes)


if __name__ == "__main__":
    main()
