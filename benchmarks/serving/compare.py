"""mmtl beside what a user would otherwise pick: the same network, images and cores, in one run.

    make bench-serve                (.venv/bin/python -m benchmarks.serving.compare ../shared/data)

Each system has an environment of its own (.venv-bench) and is configured as its documentation
advises (peers/). In every repeat all of them are started, and each load is given to one after the
other, in an order that rotates, while the others are stopped (SIGSTOP): on a machine whose speed
changes, as that of a shared host does, it is nearly the same for all. The load generator is `mmtl
bench`, in a process of its own. What was measured is kept in runs/bench-serve, repeat by repeat,
and a run that was interrupted goes on there; the page of this kind of CPU is written from it
(docs/performance.md is that of one with AMX), or another one with `--name`.
"""

import argparse
import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

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
    stop_on_signals,
    surroundings,
)
from models.bundle import Bundle, load_bundle
from models.cores import available_cores, processor

# As many as the service takes: a container may have fewer than its machine.
CORES = available_cores()
SECONDS = 3.0
# Of an overload: what waits grows all the time.
OVERLOAD_SECONDS = 10.0
# How often it is looked whether a system rests that was stopped: a part of Ray's never does.
_LOOKS = 6
REPEATS = 4
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
LIMIT_BATCH = 8
# Its documentation's "high throughput mode" (/kuberay/user-guides/serve-high-throughput.html).
RAY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
# Of a peer.
PEER_BATCH = 8
# How far apart probabilities of an age bin may be: decoders and integers make some difference.
_ALIKE = 0.1
# Of measuring: figures of another one do not belong beside these.
METHOD = (
    "each load to all systems in turn, at rest before it, open loops after a new start, each of a "
    "closed loop's rate just before it, all connections anew where some are, overloads longer and "
    "of the rate as shipped, as many arrivals as their rate says, limits by the median, the "
    "kernel's most memory"
)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Load:
    """What a system is given to do.

    Attributes:
        mix: Of images.
        clients: At once; each waits for its answer.
        share: Instead, images by chance (Poisson) at this share of what the system answered to the
            crowd just before (as it is shipped, where it has other settings alone), over as many
            connections as there are clients.
    """

    mix: str
    clients: int
    share: float | None = None

    @property
    def name(self) -> str:
        """In the results."""
        if self.share:
            return f"{self.mix}, open loop, {self.share:.0%}"
        return f"{self.mix}, {self.clients} clients"

    @property
    def seconds(self) -> float:
        """That are measured."""
        return max(OVERLOAD_SECONDS, SECONDS) if self.share and self.share > 1 else SECONDS


def systems(
    network: Path, side: int, processes: int = CORES, batch: int = PEER_BATCH
) -> dict[str, System]:
    """Everything that is measured over HTTP.

    Args:
        network: The fp32 ONNX file.
        side: Height and width of its input.
        processes: Of FastAPI, where it has several.
        batch: Largest, of a peer.
    """
    peers = HERE / "peers"
    shared = {"NETWORK": str(network), "SIDE": str(side), "CORES": str(CORES)}
    shared["MAX_BATCH"] = str(batch)
    ports = count(PORT)

    def mmtl(**variables: str) -> System:
        port = next(ports)
        ours = {"MMTL_PORT": str(port), "MMTL_BUNDLE": str(network.parent), **variables}
        return System("mmtl", ("mmtl", "serve"), ours, port)

    def other(environment: str, *command: str, many: bool = False, **variables: str) -> System:
        port = next(ports)
        return System(environment, (*command, str(port)), {**shared, **variables}, port, many)

    uvicorn = ("uvicorn", "fastapi_app:app", "--log-level", "warning")
    workers = ("--workers", str(processes))
    bentoml = ("bentoml", "serve", "bentoml_app:Service", "--host", "127.0.0.1")
    its_cores = str(max(CORES // processes, 1))
    return {
        page.SAME: mmtl(MMTL_PRECISION="fp32"),
        page.SHIPPED: mmtl(),
        page.INT8: mmtl(MMTL_PRECISION="int8"),
        **{name: mmtl(**variables) for name, variables in page.REFUSING.items()},
        "FastAPI": other("fastapi", *uvicorn, "--port"),
        page.PROCESSES: other("fastapi", *uvicorn, *workers, "--port", many=True, CORES=its_cores),
        page.SCALED: other("fastapi", *uvicorn, "--port", SCALED="1"),
        page.UNCOPIED: other("fastapi", *uvicorn, "--port", UNCOPIED="1"),
        "LitServe": other("litserve", "python", f"{peers}/litserve_app.py"),
        "BentoML": other("bentoml", *bentoml, "--port", many=True),
        "Ray Serve": other("ray", "python", f"{peers}/ray_app.py", **RAY),
        "nothing": other("mmtl", "python", f"{HERE}/null_server.py"),
    }


def loads_of(name: str, crowd: int) -> list[Load]:
    """What a system is measured with: few clients first, as BentoML goes on waiting after many.

    One client with every mix is for mmtl and its limits.

    The open loops come last, on systems that are started anew.
    """
    every = [Load(mix, crowd) for mix in MIXES]
    arrivals = [Load("mixed", OPEN_CLIENTS, share) for share in OPEN_LOADS]
    if name in ("nothing", page.SCALED, page.UNCOPIED):
        return every
    alone = [Load(mix, 1) for mix in MIXES]
    if name.startswith("limit"):
        return [*alone, *every]
    if name in page.REFUSING:
        return [arrivals[-1]]
    if name not in page.LIMIT:
        alone = [Load("mixed", 1)]
    fewer = [Load("mixed", n) for n in CLIENTS if 1 < n < crowd]
    more = [Load("mixed", n) for n in CLIENTS if n > crowd]
    return [*alone, *fewer, *every, *more, *arrivals]


def make_images(data: Path, folder: Path) -> dict[str, list[Path]]:
    """Files of each mix: real ones, and real ones made small as HAM10000's originals are."""
    originals = sorted((data / "originals").glob("*.jpg"))
    folder.mkdir(parents=True, exist_ok=True)
    mixes: dict[str, list[Path]] = {name: [] for name in MIXES}
    for path in originals:
        with Image.open(path) as image:
            width = image.width
            # By what it is made of: another folder may have another file of that name.
            small = folder / f"{_hash([path])}.jpg"
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
        raise SystemExit(
            f"{data}/originals needs *.jpg files less than 1,100 pixels wide (medium images) and "
            "ones of 3,000 or more (full size)."
        )
    most = max(len(mixes[name]) for name in MIXES[:3])
    for i in range(most):
        mixes["mixed"] += [mixes[name][i % len(mixes[name])] for name in MIXES[:3]]
    return mixes


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def send(
    process: Process, load: Load, files: list[Path], rate: float | None = None, seed: int = 0
) -> dict[str, Any]:
    """What a load on a system gave, and what it cost the system."""
    command: list[str | Path] = [make_environment("mmtl") / "mmtl", "bench"]
    command += [f"http://127.0.0.1:{process.port}", *files, "--clients", str(load.clients)]
    command += ["--json", "--seconds", str(load.seconds), "--seed", str(seed)]
    command += ["--rate", str(rate)] if rate else []
    command += ["--reconnect-every", "1"] if process.system.many else []
    with process.watched() as watched:
        done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout:  # where there was no answer, it prints that before it fails
        raise SystemExit(f"The load generator failed: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)[str(load.clients)]
    # What the warm-up cost is in it, as its answers are.
    answers = found["answers_in_all"]
    return {
        **found,
        "server_cpu_ms_per_image": 1000 * watched["cpu_seconds"] / max(answers, 1),
        "peak_megabytes": watched["peak_megabytes"],
    }


def run_bare(system: System, load: Load, files: list[Path], batch: int) -> dict[str, Any]:
    """What the bare loop does of a load, with what a system runs.

    With a thread a core, and with one more, as the service may have: what is faster in the median
    repeat is the limit. (The faster one of each repeat would be the luckier one, too.)
    """
    if load.clients == 1:
        return _run_bare(system, files, 1, 1)
    either = (CORES, CORES + 1)
    return {page.EITHER: [_run_bare(system, files, threads, batch) for threads in either]}


def _run_bare(system: System, files: list[Path], threads: int, batch: int) -> dict[str, Any]:
    python = make_environment(system.environment) / "python"
    command = [python, HERE / "limit.py", SECONDS, threads, batch, *files]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**surroundings(), **system.variables, "MMTL_THREADS": str(CORES)},
    )
    if done.returncode:
        raise SystemExit(f"limit.py failed: {done.stderr[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def ages(answer: Any) -> list[float]:
    """Probabilities of the age bins in what a system answers for an image, whatever its form."""
    while isinstance(answer, list):
        answer = answer[0]
    if "results" in answer:
        answer = answer["results"][0]["prediction"]
        return list(answer["age"]["probabilities"].values())
    return list(answer["age"])


def measure(
    served: Mapping[str, System],
    bare: Mapping[str, System],
    mixes: dict[str, list[Path]],
    run: Path,
    repeat: int,
    crowd: int = CROWD,
    batch: int = LIMIT_BATCH,
    answers: list[list[float]] | None = None,
) -> dict[str, Any]:
    """Every load on all of some systems, in turn, while the others are stopped.

    Args:
        served: Over HTTP, by name.
        bare: What the bare loop runs, by its name.
        mixes: Files of images.
        run: Folder of logs.
        repeat: Each has another order.
        crowd: Clients that every mix is measured with.
        batch: Of the bare loop, at most.
        answers: Of systems that were measured before, which those of these are added to.

    Raises:
        SystemExit: One of them does not start, answers otherwise than the others, or the load
            generator fails.
    """
    names = [*served, *bare]
    loads = {name: loads_of(name, crowd) for name in names}
    found: dict[str, Any] = {name: {"loads": {}} for name in names}
    running: dict[str, Process] = {}
    anew = set[str]()
    answers = [] if answers is None else answers

    def start(name: str) -> float:
        log = run / f"{name.replace(', ', '-').replace(' ', '-')}.log"
        running[name] = Process(served[name], log)
        seconds, answer = running[name].wait(mixes["small"][0].read_bytes())
        running[name].settle()
        running[name].pause()
        if name != "nothing":
            answers.append(ages(answer))
            apart = [abs(a - b) for a, b in zip(answers[0], answers[-1], strict=True)]
            if max(apart) > _ALIKE:
                raise SystemExit(
                    f"{name} answers otherwise than others: ages {answers[-1]}, not {answers[0]}."
                )
        return seconds

    def give(name: str, load: Load) -> dict[str, Any]:
        if name in bare:
            return run_bare(bare[name], load, mixes[load.mix], batch)
        if load.share is None:
            return ask(name, load)
        if name not in anew:
            running[name].stop()
            start(name)
            anew.add(name)
        # What it learns from is of a closed loop, too, and not of this one alone.
        closed = ask(name, Load(load.mix, crowd))
        if name in page.REFUSING:
            closed = ask(page.SHIPPED, Load(load.mix, crowd))
        answered = closed["images_per_second"]
        return {
            **ask(name, load, max(load.share * answered, 0.1)),
            "closed_images_per_second": answered,
        }

    def ask(name: str, load: Load, rate: float | None = None) -> dict[str, Any]:
        running[name].resume()
        running[name].settle(_LOOKS)
        try:
            return send(running[name], load, mixes[load.mix], rate, repeat)
        finally:
            running[name].pause()

    with ExitStack() as stack:
        stack.callback(lambda: [process.stop() for process in running.values()])
        for name in rotated(list(served), repeat):
            found[name]["ready_seconds"] = start(name)
        what = f"repeat {repeat + 1}, {names[0] if len(names) == 1 else f'{len(names)} systems'}"
        bar = tqdm(total=sum(map(len, loads.values())), desc=what, unit="load")
        for number, load in enumerate(dict.fromkeys(chain(*loads.values()))):
            for name in rotated(names, repeat + number):
                if load in loads[name]:
                    found[name]["loads"][load.name] = give(name, load)
                    bar.update()
        bar.close()
    return found


def rotated(several: Sequence[_T], by: int) -> list[_T]:
    """The same, beginning with another."""
    by %= max(len(several), 1)
    return [*several[by:], *several[:by]]


def conditions(bundle: Bundle, mixes: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Of a figure: figures that differ in one do not belong on one page."""
    return {
        "images": {mix: _hash(files) for mix, files in mixes.items()},
        "cores": CORES,
        "code": fingerprint(*MEASURED),
        "network": {one.file: one.sha256[:16] for one in bundle.manifest.artifacts},
        "machine": f"{CORES} cores ({processor()}), Python {platform.python_version()}",
        "seconds": SECONDS,
        "overload_seconds": max(OVERLOAD_SECONDS, SECONDS),
        "refusing": page.REFUSING,
        "method": METHOD,
    }


def collect(
    run: Path,
    repeats: int,
    groups: Sequence[Sequence[str]],
    facts: dict[str, Any],
    measure_group: Callable[[list[str], int], dict[str, Any]],
) -> list[dict[str, Any]]:
    """What is measured of every system in every repeat; what a run has already is not again.

    A group of which something is missing is measured as a whole: what is compared is measured in
    turn. SIGTERM and SIGHUP end this as Ctrl-C does: systems that are stopped do not end alone.

    Args:
        run: Folder of logs and results.
        repeats: Each begins with another group.
        groups: Names of systems that are measured in turn.
        facts: The conditions, which stand in every row.
        measure_group: Of names, and the repeat's number.

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
    stop_on_signals()
    for repeat in range(repeats):
        for group in rotated(groups, repeat):
            old = [row for row in rows if row["repeat"] == repeat and row["system"] in group]
            if len(old) < len(group):
                found = measure_group(list(group), repeat)
                rows = [row for row in rows if row not in old]
                rows += [
                    {"repeat": repeat, "system": name, **facts, **found[name]} for name in found
                ]
                part = results.with_suffix(".part")
                part.write_text("".join(json.dumps(row) + "\n" for row in rows))
                part.rename(results)
    return rows


def chosen(names: Sequence[str], only: Sequence[str] | None) -> list[str]:
    """Those that were asked for, if any were.

    Raises:
        SystemExit: One of them is none.
    """
    if unknown := sorted(set(only or ()) - {*names}):
        raise SystemExit(f"There is no system {unknown[0]!r}. There are: {'; '.join(names)}.")
    if only and page.SHIPPED not in only and (lone := sorted({*only} & {*page.REFUSING})):
        raise SystemExit(
            f"{lone[0]!r} is given a share of what {page.SHIPPED!r} answers: ask both."
        )
    return [name for name in names if name in (only or names)]


def main() -> None:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="The folder that holds originals/.")
    parser.add_argument("--bundle", type=Path, default=ROOT / "models/default")
    parser.add_argument("--run", type=Path, default=ROOT / "runs/bench-serve")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--name", default=page.name_here(), help="Of the page and its files.")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--only", nargs="*", help="Systems to measure; the page is not written.")
    parser.add_argument("--page", action="store_true", help="Write anew what is measured already.")
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle.resolve())
    network = bundle.path(bundle.artifact("onnx", "fp32"))
    mixes = make_images(arguments.data.resolve(), arguments.run / "images")
    if arguments.page:
        rows = json.loads((arguments.out / f"{arguments.name}.json").read_text())
        now = conditions(bundle, mixes)
        facts = {name: now[name] for name in ("method", "images", "network", "refusing")}
        if differ := [fact for fact in facts if rows[0].get(fact) != facts[fact]]:
            raise SystemExit(
                f"{arguments.name}.json is of another {' and '.join(differ)}: measure it anew."
            )
        page.write(arguments.out, arguments.name, rows, bundle, mixes)
        return
    known = systems(network, bundle.manifest.input.width)
    names = chosen([*known, *page.LIMIT.values()], arguments.only)
    for name in {"mmtl", *(known[name].environment for name in names if name in known)}:
        make_environment(name)

    def measure_group(names: list[str], repeat: int) -> dict[str, Any]:
        served = {name: known[name] for name in names if name in known}
        bare = {name: known[name.replace("limit", "mmtl")] for name in names if name not in known}
        return measure(served, bare, mixes, arguments.run, repeat)

    facts = conditions(bundle, mixes)
    rows = collect(arguments.run, arguments.repeats, [names], facts, measure_group)
    if not arguments.only:
        page.write(arguments.out, arguments.name, rows, bundle, mixes)


if __name__ == "__main__":
    main()
