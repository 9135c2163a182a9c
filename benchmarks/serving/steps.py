"""What each optimisation of the service gives: mmtl with one of them undone, beside mmtl as it is.

.venv/bin/python -m benchmarks.serving.steps ../shared/data > page.part &&
    mv page.part docs/performance-steps.md

(docs/performance-avx2-steps.md on such a CPU, as page.name_here has it.)

Every variant is the service in a process of its own, next to the service as it is in another. They
are loaded in turn for a second or two, over and over, and compared turn by turn: a machine whose
speed changes from one second to the next, as that of a shared host does, changes for both. What is
done about requests that would be answered too late shows in an overload, which comes last.
"""

import argparse
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from statistics import median

from PIL import Image
from tqdm import tqdm

from app import load
from benchmarks.serving.compare import CORES, CROWD, make_images
from benchmarks.serving.page import DEADLINE, REFUSING, row, span
from benchmarks.serving.process import HERE, PORT, ROOT, Process, System, stop_on_signals
from benchmarks.serving.variants import (
    ALL,
    LEFT_OUT,
    OVERLOADED,
    RUNS_OPENVINO,
    TRIED,
    UNDONE,
    Variant,
    as_it_is,
)
from models.cores import processor

ROUNDS = 6
# Of each turn. As many clients as there are fill the queue in the first.
WARM_UP_SECONDS, SECONDS = 0.5, 1.5
# By title: whose images, from how many clients.
LOADS = {
    "one client, small": ("small", 1),
    "one client, full size": ("full size", 1),
    "small": ("small", CROWD),
    "mixed": ("mixed", CROWD),
    "full size": ("full size", CROWD),
    "progressive": ("progressive", CROWD),
}
# Of the rate with as many clients as that, in an open loop, and for how long.
OVERLOAD, OVERLOAD_SECONDS = 1.2, 4.0
RUN = ROOT / "runs/bench-serve"
# Not the copy in mmtl's environment, which may be of an earlier one.
BUNDLE = ROOT / "models/default"
_HEAD = [f"{name}, {of}" for name in LOADS for of in ("images/s", "of as it is", "CPU of as it is")]


@dataclass
class Turns:
    """What a service gave, turn by turn.

    Attributes:
        rates: Images a second.
        cpu: Milliseconds an image.
        megabytes: The most that it took so far.
    """

    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    megabytes: float = 0.0


def start(variant: Variant, port: int, image: bytes, **settings: str) -> Process:
    """A variant, when it answers.

    Args:
        variant: Of variants.py.
        port: To serve on.
        image: To ask it about.
        settings: Of the service, beside its port.

    Raises:
        SystemExit: It does not start.
    """
    command = ("python", f"{HERE}/variants.py", variant.__name__)
    log = RUN / f"steps-{port}.log"
    ours = {"MMTL_PORT": str(port), "MMTL_BUNDLE": str(BUNDLE), **settings}
    process = Process(System("mmtl", command, ours, port), log)
    try:
        process.wait(image)
    except BaseException:
        process.stop()
        raise
    return process


def take_turn(process: Process, images: list[bytes], clients: int, turns: Turns) -> None:
    """Load a service for a moment.

    Raises:
        SystemExit: It does not answer every request.
    """
    target = load.Target(f"http://127.0.0.1:{process.port}", images)
    with process.watched() as watched:
        found = load.run(target, clients, SECONDS, WARM_UP_SECONDS)
    if set(found.statuses) != {"200"}:
        raise SystemExit(f"Not every answer is a 200: {found.statuses}. See {process.log.name}.")
    turns.rates.append(found.images / SECONDS)
    turns.cpu.append(1000 * watched["cpu_seconds"] / found.answers_in_all)
    turns.megabytes = max(turns.megabytes, watched["peak_megabytes"])


def progressive(path: Path) -> bytes:
    """The same picture in many scans, which a decoder holds whole."""
    data = BytesIO()
    with Image.open(path) as image:
        image.save(data, "JPEG", quality=90, progressive=True)
    return data.getvalue()


def compare(
    variant: Variant, whole: Process, mixes: dict[str, list[bytes]], rounds: int
) -> list[str]:
    """A variant's row: it and the service as it is in turn, now the one first and now the other."""
    other = start(variant, PORT + 1, mixes["small"][0])
    cells = [str(variant.__doc__).rstrip(".")]
    megabytes = {}
    try:
        for mix, clients in LOADS.values():
            ours, theirs = Turns(), Turns()
            for number in range(rounds):
                pair = [(whole, ours), (other, theirs)]
                for process, turns in pair if number % 2 else pair[::-1]:
                    take_turn(process, mixes[mix], clients, turns)
            rates = [a / b for a, b in zip(theirs.rates, ours.rates, strict=True)]
            cpu = [a / b for a, b in zip(theirs.cpu, ours.cpu, strict=True)]
            cells += [f"{median(theirs.rates):.0f}", span(rates), span(cpu)]
            megabytes[mix] = theirs.megabytes
        return [*cells, f"{megabytes['full size']:.0f}"]
    finally:
        other.stop()


def overload(variants: list[Variant], images: list[bytes], rounds: int) -> list[list[str]]:
    """A row each, of services that have little time to answer: they are asked too much in turn.

    The first says how much that is.

    Raises:
        SystemExit: One does not start, or answers anything but 200 and 503.
    """
    processes: list[Process] = []
    found: list[list[load.Measured]] = [[] for _ in variants]
    try:
        for number, variant in enumerate(variants):
            processes.append(start(variant, PORT + number, images[0], **REFUSING[DEADLINE]))
        targets = [load.Target(f"http://127.0.0.1:{one.port}", images) for one in processes]
        for number in range(rounds * len(variants)):
            which = (number + number // len(variants)) % len(variants)
            # The same for all: one that answers less may not be asked for less.
            peak = load.run(targets[0], CROWD, SECONDS, WARM_UP_SECONDS).images / SECONDS
            rate = max(OVERLOAD * peak, 1.0)
            measured = load.run(targets[which], load.OPEN_CLIENTS, OVERLOAD_SECONDS, 1.0, rate)
            if not set(measured.statuses) <= {"200", "503"}:
                raise SystemExit(f"Not every answer is a 200 or 503: {measured.statuses}.")
            found[which].append(measured)
    finally:
        for process in processes:
            process.stop()
    rows = []
    for variant, turns in zip(variants, found, strict=True):
        each = [turn.summary() for turn in turns]
        cells = [str(variant.__doc__).rstrip(".")]
        for name in ("images_per_second", "p50_ms", "p99_ms", "refused", "refused_p99_ms"):
            values = [one[name] for one in each if one[name] is not None]
            cells.append(span(values, "{:.0f}") if values else "none")
        rows.append(cells)
    return rows


def main() -> None:
    """Measure, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", nargs="*", choices=ALL, metavar="VARIANT", help="Of variants.py.")
    arguments = parser.parse_args()
    stop_on_signals()
    files = make_images(arguments.data.resolve(), RUN / "images")
    mixes = {mix: [path.read_bytes() for path in paths] for mix, paths in files.items()}
    mixes["progressive"] = [progressive(path) for path in files["full size"]]
    print("# What each optimisation gives\n")
    print("<!-- Generated by `benchmarks/serving/steps.py`; do not edit. -->\n")
    print(
        f"{CROWD} clients, or one, {CORES} cores ({processor()}), the int8 network "
        f"in {'OpenVINO' if RUNS_OPENVINO else 'ONNX Runtime'} (but where it says "
        "otherwise). Each variant and the service as it is are loaded in turn, "
        f"{arguments.rounds} times each for {SECONDS:g} seconds: the median, and the ratio to the "
        "service as it is in the turn next to it, of images a second and of CPU time an image: its "
        "median, lowest and highest. What spans 1 was not told apart from it; the first row, the "
        "service beside itself, says what this machine tells apart. *Progressive* are the "
        "full-size ones, written in many scans. "
        "The last column is the most memory, full size, in MB."
    )
    if arguments.only is not None:
        print("\nOnly some variants were measured here; docs/ has pages of other CPUs.")
    asked = ALL if arguments.only is None else {as_it_is.__name__, *arguments.only}
    parts = {
        title: [variant for variant in those if variant.__name__ in asked]
        for title, those in (
            ("Kept: the service with one of them undone", (as_it_is, *UNDONE)),
            ("Tried, and not the default: the service with one of them added", TRIED),
            ("What the contract costs: the service without one of its parts", LEFT_OUT),
        )
    }
    overloaded = [variant for variant in OVERLOADED if variant.__name__ in asked]
    bar = tqdm(total=sum(map(len, parts.values())) + len(overloaded))
    whole = start(as_it_is, PORT, mixes["small"][0])
    try:
        for title, those in parts.items():
            if not those:
                continue
            print(f"\n## {title}\n")
            print(row(["", *_HEAD, "MB"]))
            print(row(["---"] * (len(_HEAD) + 2)))
            for variant in those:
                print(row(compare(variant, whole, mixes, arguments.rounds)), flush=True)
                bar.update()
    finally:
        whole.stop()
    if overloaded:
        settings = " ".join(f"`{name}={value}`" for name, value in REFUSING[DEADLINE].items())
        print("\n## Who would be answered too late: the service with less done about it\n")
        print(
            f"{settings}, mixed images, arrivals by chance at {OVERLOAD:.0%} of what the service "
            f"as it is answered to {CROWD} clients just before, over {load.OPEN_CLIENTS} "
            f"connections, for {OVERLOAD_SECONDS:g} seconds a turn.\n"
        )
        print(row(["", "images/s", "p50 ms", "p99 ms", "refused (503)", "p99 of refusals, ms"]))
        print(row(["---"] * 6))
        for cells in overload([as_it_is, *overloaded], mixes["mixed"], arguments.rounds):
            print(row(cells), flush=True)
        bar.update(len(overloaded))
    bar.close()


if __name__ == "__main__":
    main()
