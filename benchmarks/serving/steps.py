"""What each optimisation of the service gives: mmtl with one of them undone, beside mmtl as it is.

.venv/bin/python -m benchmarks.serving.steps ../shared/data > docs/performance-steps.md

(docs/performance-avx2-steps.md on such a CPU, as page.name_here has it.)

Every variant is the service in a process of its own, next to the service as it is in another. They
are loaded in turn for a second or two, over and over, and compared turn by turn: a machine whose
speed changes from one second to the next, as that of a shared host does, changes for both.
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
from benchmarks.serving.page import row, span
from benchmarks.serving.process import HERE, PORT, ROOT, Process, System
from benchmarks.serving.variants import (
    ALL,
    LEFT_OUT,
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
RUN = ROOT / "runs/bench-serve"
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


def start(variant: Variant, port: int, image: bytes) -> Process:
    """A variant, when it answers.

    Raises:
        SystemExit: It does not start.
    """
    command = ("python", f"{HERE}/variants.py", variant.__name__)
    log = RUN / f"steps-{port}.log"
    process = Process(System("mmtl", command, {"MMTL_PORT": str(port)}, port), log)
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


def main() -> None:
    """Measure, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", nargs="*", choices=ALL, metavar="VARIANT", help="Of variants.py.")
    arguments = parser.parse_args()
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
    bar = tqdm(total=sum(map(len, parts.values())))
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
        bar.close()


if __name__ == "__main__":
    main()
