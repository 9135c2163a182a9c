"""What each optimisation of the service gives: mmtl with one of them undone, beside mmtl as it is.

.venv/bin/python -m benchmarks.serving.steps ../shared/data > docs/performance-steps.md

Every variant is the service in a process of its own, 32 clients, small and full-size images, in
rounds, so that a slow minute of the machine falls on all of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.request import urlopen

from tqdm import tqdm

from benchmarks.serving.compare import CORES, make_images
from benchmarks.serving.page import row
from benchmarks.serving.process import PORT, ROOT
from benchmarks.serving.variants import LEFT_OUT, TRIED, UNDONE, Variant, as_it_is
from models.cores import processor

ROUNDS = 5
SECONDS = 3.0
MIXES = ("small", "full size")
_HEAD = [f"{mix}, {of}" for mix in MIXES for of in ("images/s", "of as it is", "CPU ms an image")]


@dataclass(frozen=True)
class Found:
    """What was measured of a variant in one round.

    Attributes:
        rates: Images a second, by mix.
        costs: CPU milliseconds of the service an image, by mix.
        megabytes: The most memory that was resident.
    """

    rates: dict[str, float]
    costs: dict[str, float]
    megabytes: float


def measure(variant: Variant, mixes: dict[str, list[Path]]) -> Found:
    """Start a variant, and measure it."""
    environment = {**os.environ, "MMTL_PORT": str(PORT), "MMTL_LOG_LEVEL": "INFO"}
    command = [sys.executable, "-m", "benchmarks.serving.variants", variant.__name__]
    rates, costs = {}, {}
    with tempfile.TemporaryFile("w+") as logged:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=logged)
        try:
            _wait(process)
            for mix in MIXES:
                before = _cpu_seconds(process.pid)
                rates[mix], answers = bench(mixes[mix])
                costs[mix] = 1000 * (_cpu_seconds(process.pid) - before) / answers
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
            return Found(rates, costs, int(peak.split()[1]) / 1000)
        except TimeoutError:
            logged.seek(0)
            raise SystemExit(
                f"{variant.__name__}: the service did not start.\n{logged.read()[-1000:]}"
            ) from None
        finally:
            process.terminate()
            process.wait()


def _wait(process: "subprocess.Popen[bytes]") -> None:
    for _ in range(300):
        time.sleep(0.1)
        if process.poll() is not None:
            break
        with suppress(OSError), urlopen(f"http://127.0.0.1:{PORT}/health/ready", None, 5):
            return
    raise TimeoutError


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bench(files: list[Path]) -> tuple[float, int]:
    """Images a second, and how many there were in all, those of the warm-up too."""
    command = [Path(sys.executable).with_name("mmtl"), "bench", f"http://127.0.0.1:{PORT}"]
    options = ["--clients", "32", "--seconds", str(SECONDS), "--json"]
    done = subprocess.run([*command, *files, *options], stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)["32"]
    if found["failed"] or found["refused"]:
        raise SystemExit(f"Not every request was answered: {found['statuses']}.")
    return float(found["images_per_second"]), int(found["answers_in_all"])


def main() -> None:
    """Measure, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    mixes = make_images(arguments.data.resolve(), ROOT / "runs/bench-serve/images")
    variants = [as_it_is, *UNDONE, *TRIED, *LEFT_OUT]
    found: dict[Variant, list[Found]] = defaultdict(list)
    bar = tqdm(total=arguments.rounds * len(variants))
    for number in range(arguments.rounds):
        turn = number * len(variants) // arguments.rounds
        for variant in [*variants[turn:], *variants[:turn]]:
            found[variant].append(measure(variant, mixes))
            bar.update()
    bar.close()

    def cells(variant: Variant) -> list[str]:
        own, whole = found[variant], found[as_it_is]
        written = [str(variant.__doc__).rstrip(".")]
        for mix in MIXES:
            ratios = [a.rates[mix] / b.rates[mix] for a, b in zip(own, whole, strict=True)]
            written += [
                f"{median(one.rates[mix] for one in own):.1f}",
                f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                f"{median(one.costs[mix] for one in own):.2f}",
            ]
        return [*written, f"{median(one.megabytes for one in own):.0f}"]

    print("# What each optimisation gives\n")
    print("<!-- Generated by `benchmarks/serving/steps.py`; do not edit. -->\n")
    print(
        f"32 clients, {CORES} cores ({processor()}), the int8 network in OpenVINO (but where it "
        f"says otherwise), {arguments.rounds} rounds of {SECONDS:g} "
        "seconds: medians, and the ratio to the service as it is in the same round: its median, "
        "lowest and highest. What spans 1 was not told apart from it; a slow round of the service "
        "as it is lifts all. The last column is the most memory that was resident, in MB."
    )
    for title, those in (
        ("Kept: the service with one of them undone", (as_it_is, *UNDONE)),
        ("Tried, and not the default: the service with one of them added", TRIED),
        ("What the contract costs: the service without one of its parts", LEFT_OUT),
    ):
        print(f"\n## {title}\n")
        print(row(["", *_HEAD, "MB"]))
        print(row(["---"] * (len(_HEAD) + 2)))
        for variant in those:
            print(row(cells(variant)))


if __name__ == "__main__":
    main()
