"""Load and faults together: ten minutes, 32 clients, and every answer checked.

.venv/bin/python -m benchmarks.reliability.drill ../shared/data [--minutes 10]

One in ten requests ends in the middle, one in ten is garbage of one of thirty kinds. Two reloads
(to another bundle and back), one run of the network that fails, one that hangs, and a SIGTERM at
full load. Every 200 to a good request is compared with what the bundle named in X-Model-Version
answers offline; the images are chosen so that no two answers lie within 0.01 of each other, in
either bundle. The result is runs/reliability/drill.json, which `page.py` shows in
docs/reliability.md. Exits with 1, and says why, where the service was not what it promises to be.
"""

import argparse
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from app.engines import open_engine
from app.keys import create_key
from app.settings import Settings
from app.telemetry import configure_logs
from benchmarks.reliability.attacks import conditions
from benchmarks.reliability.clients import Clients
from models.bundle import Bundle, load_bundle, melanoma_probability, save_bundle
from models.images import decode

OUT = Path("runs/reliability")
CLIENTS = 32
IMAGES = 24
APART = 0.01
HANG_SECONDS = 5
# Events after which another network is served, which may hold memory of its own.
CHANGES = ("clients", "reload", "hangs")
# Seconds after such an event before memory is looked at.
SETTLES = 20
DEADLINE = Settings().deadline_seconds
# What the service's own counters say at the end: each fault and each reload was met, once.
COUNTED = {
    "mmtl_reloads_total switched": 2,
    "mmtl_network_replacements_total": 1,
    "mmtl_failed_runs_total": 1,
}


def offline(bundle: Bundle, images: list[bytes]) -> list[float]:
    """What the artifact that this machine serves answers, one image at a time."""
    artifact, engine = open_engine(bundle, Settings())
    size = bundle.manifest.input
    found = []
    for data in images:
        pixels = decode(data, size.height, size.width).pixels[None]
        logit = engine.run(pixels)["melanoma_logit"]
        found.append(float(melanoma_probability(logit, artifact.calibration).reshape(-1)[0]))
    return found


def make_successor(bundle: Bundle, folder: Path) -> Bundle:
    """The same network, calibrated otherwise: another version, other answers."""
    artifacts = tuple(
        artifact.model_copy(
            update={
                "calibration": artifact.calibration.model_copy(
                    update={"intercept": artifact.calibration.intercept + 0.7}
                )
            }
        )
        for artifact in bundle.manifest.artifacts
        if bundle.path(artifact).is_file()
    )
    manifest = bundle.manifest.model_copy(update={"version": "9.9.9", "artifacts": artifacts})
    files = {artifact.file: bundle.path(artifact) for artifact in artifacts}
    return save_bundle(folder, manifest, files)


def choose(data: Path, bundles: list[Bundle]) -> tuple[list[bytes], list[list[float]]]:
    """Images whose answers lie apart in every bundle, and the answers."""
    paths = sorted((data / "balanced").rglob("val/*/*.jpg"))
    random.Random(0).shuffle(paths)
    candidates = [path.read_bytes() for path in paths[:300]]
    answers = [offline(bundle, candidates) for bundle in bundles]
    chosen: list[int] = []
    for number in range(len(candidates)):
        mine = [found[number] for found in answers]
        if all(
            abs(value - found[other]) > APART
            for other in chosen
            for value in mine
            for found in answers
        ) and all(abs(a - b) > APART for i, a in enumerate(mine) for b in mine[i + 1 :]):
            chosen.append(number)
        if len(chosen) == IMAGES:
            break
    if len(chosen) < IMAGES:
        raise SystemExit(
            f"{len(chosen)} of {IMAGES} images were found whose answers lie apart, of "
            f"{len(paths)} in {data}/balanced/*/val: name the folder of the development data."
        )
    return [candidates[n] for n in chosen], [[found[n] for n in chosen] for found in answers]


class Drill:
    """The service, its clients and its faults."""

    def __init__(self, data: Path):
        shutil.rmtree(OUT / "work", ignore_errors=True)
        self.work = (OUT / "work").resolve()
        self.work.mkdir(parents=True)
        shipped = load_bundle(Path("models/default"))
        successor = make_successor(shipped, self.work / "successor")
        self.bundles = {b.manifest.version: b for b in (shipped, successor)}
        images, answers = choose(data, [shipped, successor])
        expected = dict(zip(self.bundles, answers, strict=True))
        self.current = self.work / "current"
        self.current.symlink_to(Path("models/default").resolve())
        self.key = create_key(
            self.work / "keys.json", "drill", ("predict", "metrics", "admin"), None
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.clients = Clients(self.port, self.key, images, expected)
        self.memory: list[tuple[float, float]] = []
        self.events: list[tuple[float, str]] = []
        # At each event, the network that is to be served from then on, and who had answered so far.
        self.answered: list[tuple[str, Counter[str]]] = []
        self.counters: dict[str, float] = {}

    def start(self) -> None:
        """Start the service, and wait until it is ready."""
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "FAULTS": str(self.work),
            "MMTL_PORT": str(self.port),
            "MMTL_BUNDLE": str(self.current),
            "MMTL_KEYS": str(self.work / "keys.json"),
            "MMTL_HANG_SECONDS": str(HANG_SECONDS),
            "MMTL_LOG_LEVEL": "WARNING",
        }
        self.log = (self.work / "log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.reliability.faulty"],
            env=environment,
            stderr=self.log,
        )
        while self.get("/health/ready")[0] != 200:
            assert self.process.poll() is None, (self.work / "log").read_text()
            time.sleep(0.05)
        self.began = time.monotonic()

    def get(self, path: str, method: str = "GET") -> tuple[int, bytes]:
        """The status, 0 where nobody answers, and the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, headers={"Authorization": f"Bearer {self.key}"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def event(self, name: str, serves: Bundle) -> None:
        """Note and show what is done, and the network that is to be served from then on."""
        at = time.monotonic() - self.began
        self.events.append((round(at, 1), name))
        self.answered.append((serves.manifest.version, self.clients.tally.answered.copy()))
        print(
            f"{at:6.1f} s  {name}  {sum(self.clients.tally.answered.values())} answered", flush=True
        )

    def watch(self) -> None:
        """Resident megabytes, once a second."""
        while not self.clients.over.wait(1.0):
            try:
                lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            except OSError:  # it has ended
                return
            found = [line for line in lines if line.startswith("VmRSS")]
            if found:
                at = time.monotonic() - self.began
                self.memory.append((at, float(found[0].split()[1]) * 1024 / 1e6))

    def point(self, bundle: Bundle) -> None:
        """Let the served folder be another one, in one step."""
        fresh = self.work / "fresh"
        fresh.symlink_to(bundle.folder.resolve())
        fresh.replace(self.current)

    def wait_until(self, share: float, minutes: float) -> None:
        """Of the drill."""
        time.sleep(max(self.began + share * minutes * 60 - time.monotonic(), 0))

    def run(self, minutes: float) -> int:
        """Everything; the exit status of the service."""
        self.start()
        shipped, successor = self.bundles.values()
        threads = [
            threading.Thread(target=self.clients.run, args=[seed]) for seed in range(CLIENTS)
        ]
        watcher = threading.Thread(target=self.watch)
        for thread in (*threads, watcher):
            thread.start()
        self.event("32 clients", shipped)
        self.wait_until(0.2, minutes)
        self.point(successor)
        status, _ = self.get("/admin/reload", "POST")
        self.event(f"reload of the successor by POST: {status}", successor)
        self.wait_until(0.35, minutes)
        (self.work / "fail").touch()
        self.event("one run fails", successor)
        self.wait_until(0.5, minutes)
        self.point(shipped)
        self.process.send_signal(signal.SIGHUP)
        self.event("reload of the shipped bundle by SIGHUP", shipped)
        self.wait_until(0.7, minutes)
        (self.work / "hang").touch()
        self.event("one run hangs", shipped)
        self.wait_until(1.0, minutes)
        self.counters = counters(self.get("/metrics")[1].decode())
        self.clients.stopping = True
        self.process.send_signal(signal.SIGTERM)
        self.event("SIGTERM", shipped)
        try:
            status = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.event(f"the process ended with {status}", shipped)
        self.clients.over.set()
        for thread in (*threads, watcher):
            thread.join(90)
        return status


def counters(text: str) -> dict[str, float]:
    """The service's own counts, by name and, where there is one, outcome."""
    samples = [sample for found in text_string_to_metric_families(text) for sample in found.samples]
    named = [(f"{s.name} {s.labels.get('outcome', '')}".rstrip(), s.value) for s in samples]
    return {name: value for name, value in named if name in COUNTED}


def phases(
    memory: list[tuple[float, float]], events: list[tuple[float, str]]
) -> list[dict[str, float | str]]:
    """Resident megabytes while one network is served: it is compared with itself alone."""
    starts = [event for event in events if any(word in event[1] for word in CHANGES)]
    last = next(event for event in events if event[1] == "SIGTERM")
    found: list[dict[str, float | str]] = []
    for (start, name), (end, _) in pairwise([*starts, last]):
        inside = np.array([(at, mb) for at, mb in memory if start + SETTLES <= at < end])
        if len(inside) < 10:  # too short for a slope, or the service had died
            continue
        found.append(
            {
                "since": name,
                "median": float(np.median(inside[:, 1])),
                "most": float(inside[:, 1].max()),
                "slope_a_minute": float(np.polyfit(*inside.T, 1)[0]) * 60,
            }
        )
    return found


def shares(
    events: list[tuple[float, str]], answered: list[tuple[str, Counter[str]]]
) -> list[dict[str, Any]]:
    """From each event until SIGTERM: which network was to answer, which did, and how many."""
    found = []
    pairs = pairwise(zip(events, answered, strict=True))
    for ((start, name), (serves, before)), ((end, _), (_, after)) in pairs:
        if name == "SIGTERM":
            break
        ours = after - before
        found.append(
            {
                "since": name,
                "serves": serves,
                "answered": dict(ours),
                "a_second": ours.total() / max(end - start, 0.1),
            }
        )
    return found


def failures(result: dict[str, Any]) -> list[str]:
    """In what the service was not what it promises to be, by what drill.json holds."""
    found = []
    if result["wrong_in_all"]:
        found.append(f"{result['wrong_in_all']:,} answers were wrong, lost or another 5xx.")
    if result["faults_not_taken"]:
        found.append(f"No run met a fault: {', '.join(result['faults_not_taken'])}.")
    if result["exit_status"] != 0:
        found.append(f"The process ended with {result['exit_status']}.")
    if result["tracebacks"]:
        found.append(f"{result['tracebacks']} tracebacks are in the log.")
    if result["slowest_seconds"] > DEADLINE:
        found.append(f"An answer took {result['slowest_seconds']:.1f} s, of {DEADLINE:g}.")
    if result["counters"] != COUNTED:
        found.append(f"The service counted {result['counters']}, not {COUNTED}.")
    most = max(since["a_second"] for since in result["answered_since"])
    for since in result["answered_since"]:
        if not since["answered"].get(since["serves"]):
            found.append(f"{since['serves']} answered nothing after: {since['since']}.")
        elif since["a_second"] < most / 3:
            rate = f"{since['a_second']:.0f} a second, of {most:.0f}"
            found.append(f"So few were answered after: {since['since']} ({rate}).")
    return found


def main() -> None:
    """Drill, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    arguments = parser.parse_args()
    configure_logs("WARNING")
    drill = Drill(arguments.data)
    status = drill.run(arguments.minutes)
    tally = drill.clients.tally
    left = {name: (drill.work / name).exists() for name in ("fail", "hang")}
    result = {
        **conditions(),
        "minutes": arguments.minutes,
        "events": drill.events,
        "images": IMAGES,
        "answered": dict(tally.answered),
        "answered_since": shares(drill.events, drill.answered),
        "refused_503": dict(tally.refused),
        "garbage": dict(tally.garbage),
        "left": tally.left,
        "not_let_in_after_sigterm": tally.not_let_in,
        "wrong": tally.wrong[:20],
        "wrong_in_all": len(tally.wrong),
        "slowest_seconds": tally.worst,
        "faults_not_taken": [name for name, there in left.items() if there],
        "counters": drill.counters,
        "exit_status": status,
        "megabytes": phases(drill.memory, drill.events),
        "megabytes_every_ten_seconds": [round(mb) for _, mb in drill.memory[::10]],
        "tracebacks": (drill.work / "log").read_text().count("Traceback"),
    }
    result["failures"] = failures(result)
    (OUT / "drill.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    raise SystemExit(bool(result["failures"]))


if __name__ == "__main__":
    main()
