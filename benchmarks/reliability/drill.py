"""Load and faults together: ten minutes, 32 clients, and every answer checked.

.venv/bin/python -m benchmarks.reliability.drill ../shared/data [--minutes 10]

One in ten requests ends in the middle, one in ten is garbage of one of thirty kinds. Two reloads
(to another bundle and back), one run of the network that fails, one that hangs, and a SIGTERM at
full load. Every 200 to a good request is compared with what the bundle named in X-Model-Version
answers offline; the images are chosen so that no two answers lie within 0.01 of each other, in
either bundle. The result is runs/reliability/drill.json, which `page.py` shows in
docs/reliability.md.
"""

import argparse
import hashlib
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
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from app.engines import open_engine
from app.keys import create_key
from app.settings import Settings
from app.telemetry import configure_logs
from benchmarks.reliability.attacks import conditions
from benchmarks.reliability.garbage import BOUNDARY, garbage
from models.bundle import Bundle, load_bundle, melanoma_probability, save_bundle
from models.images import decode

OUT = Path("runs/reliability")
CLIENTS = 32
IMAGES = 24
APART = 0.01
AGREEMENT = 1e-4
HANG_SECONDS = 5
# Events after which another network is served, which may hold memory of its own.
CHANGES = ("clients", "reload", "hangs")
# Seconds after such an event before memory is looked at.
SETTLES = 20


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
    return [candidates[n] for n in chosen], [[found[n] for n in chosen] for found in answers]


@dataclass
class Tally:
    """What became of the requests."""

    answered: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    garbage: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    left: int = 0
    not_let_in: int = 0
    worst: float = 0.0


def request(head: bytes, body: bytes, key: str) -> bytes:
    """A whole request on a connection of its own."""
    lines = [
        b"POST /predict HTTP/1.1",
        b"Host: drill",
        f"Authorization: Bearer {key}".encode(),
        f"Content-Length: {len(body)}".encode(),
        b"Connection: close",
    ]
    if head:
        lines.append(b"Content-Type: " + head)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


class Drill:
    """The service, its clients and its faults."""

    def __init__(self, data: Path):
        shutil.rmtree(OUT / "work", ignore_errors=True)
        self.work = (OUT / "work").resolve()
        self.work.mkdir(parents=True)
        shipped = load_bundle(Path("models/default"))
        successor = make_successor(shipped, self.work / "successor")
        self.bundles = {b.manifest.version: b for b in (shipped, successor)}
        self.images, answers = choose(data, [shipped, successor])
        self.expected = dict(zip(self.bundles, answers, strict=True))
        self.hashes = [hashlib.sha256(image).hexdigest() for image in self.images]
        self.bad = garbage(self.images[0])
        self.current = self.work / "current"
        self.current.symlink_to(Path("models/default").resolve())
        self.key = create_key(
            self.work / "keys.json", "drill", ("predict", "metrics", "admin"), None
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.tally = Tally()
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.stopping = self.reloaded = False
        self.last = ""
        self.memory: list[tuple[float, float]] = []
        self.events: list[tuple[float, str]] = []

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
        while self.get("/health/ready") != 200:
            assert self.process.poll() is None, (self.work / "log").read_text()
            time.sleep(0.05)
        self.began = time.monotonic()

    def get(self, path: str, method: str = "GET") -> int:
        """The status, 0 where nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, headers={"Authorization": f"Bearer {self.key}"})
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def client(self, seed: int) -> None:
        """One of the clients, until the drill is over."""
        chance = random.Random(seed)
        form = f"multipart/form-data; boundary={BOUNDARY}".encode()
        while not self.over.is_set():
            number = chance.randrange(len(self.images))
            head = (
                f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; '
                f'filename="{number}.jpg"\r\n\r\n'
            )
            body = head.encode() + self.images[number] + f"\r\n--{BOUNDARY}--\r\n".encode()
            dice = chance.random()
            if dice < 0.1:
                self.leave(request(form, body, self.key), chance)
            elif dice < 0.2:
                kind, head_of_it, bad = chance.choice(self.bad)
                self.send_garbage(kind, request(head_of_it, bad, self.key))
            else:
                self.ask(number, request(form, body, self.key))

    def leave(self, sent: bytes, chance: random.Random) -> None:
        """Hang up in the middle of the request, or before its answer."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 30) as connection:
                connection.sendall(sent[: chance.choice([40, len(sent) // 2, len(sent)])])
                time.sleep(chance.choice([0.0, 0.005, 0.05]))
        except OSError:
            pass
        with self.lock:
            self.tally.left += 1

    def exchange(self, sent: bytes) -> tuple[int, http.client.HTTPMessage, bytes] | str:
        """The answer; or `not let in`, or `lost` where a whole request was taken without one."""
        try:
            connection = socket.create_connection(("127.0.0.1", self.port), 60)
        except OSError:
            return "not let in"
        with connection:
            with suppress(OSError):  # an answer may have come before the end of the request
                connection.sendall(sent)
            try:
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                return answer.status, answer.headers, answer.read()
            except ConnectionResetError:
                # Of a connection that the kernel had taken and the service never accepted.
                return "not let in" if self.stopping else "lost"
            except (OSError, http.client.HTTPException):
                return "lost"

    def ask(self, number: int, sent: bytes) -> None:
        """A good request, and its answer checked."""
        began = time.monotonic()
        answer = self.exchange(sent)
        took = time.monotonic() - began
        with self.lock:
            self.tally.worst = max(self.tally.worst, took)
            if isinstance(answer, str):
                if answer == "not let in" and self.stopping:
                    self.tally.not_let_in += 1
                else:
                    self.tally.wrong.append(f"{took:.3f} s: {answer}")
                return
            status, headers, content = answer
            body = json.loads(content)
            if status == 503 and headers["Retry-After"]:
                self.tally.refused[body["type"].rpartition(":")[2]] += 1
                return
            if status != 200:
                self.tally.wrong.append(f"status {status}: {content[:200]!r}")
                return
            version = headers["X-Model-Version"]
            (result,) = body["results"]
            found = result["prediction"]["melanoma"]["probability"]
            if body["model"]["version"] != version:
                self.tally.wrong.append("header and body name two networks")
            elif result["image"]["sha256"] != self.hashes[number]:
                self.tally.wrong.append("the answer names another image")
            elif abs(found - self.expected[version][number]) > AGREEMENT:
                self.tally.wrong.append(f"{found} is not {self.expected[version][number]}")
            else:
                self.tally.answered[version] += 1
                self.last = version

    def send_garbage(self, kind: str, sent: bytes) -> None:
        """It must be refused with a 4xx, or a 503 that says when to come back."""
        answer = self.exchange(sent)
        with self.lock:
            if isinstance(answer, str):
                if not self.stopping:
                    self.tally.wrong.append(f"garbage ({kind}): {answer}")
                return
            status, headers, content = answer
            announced = status == 503 and headers["Retry-After"]
            # Bits may flip where it does not show.
            harmless = status == 200 and "flipped" in kind
            if not (400 <= status < 500 or announced or harmless):
                self.tally.wrong.append(f"garbage ({kind}): {status} {content[:200]!r}")
            self.tally.garbage[str(status)] += 1

    def event(self, name: str) -> None:
        """Note and show what is done."""
        at = time.monotonic() - self.began
        self.events.append((round(at, 1), name))
        print(f"{at:6.1f} s  {name}  {sum(self.tally.answered.values())} answered", flush=True)

    def watch(self) -> None:
        """Resident megabytes, once a second."""
        while not self.over.wait(1.0):
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
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
        threads = [threading.Thread(target=self.client, args=[seed]) for seed in range(CLIENTS)]
        watcher = threading.Thread(target=self.watch)
        for thread in (*threads, watcher):
            thread.start()
        self.event("32 clients")
        self.wait_until(0.2, minutes)
        self.point(successor)
        status = self.get("/admin/reload", "POST")
        self.reloaded = status == 200
        self.event(f"reload of the successor by POST: {status}")
        self.wait_until(0.35, minutes)
        (self.work / "fail").touch()
        self.event("one run fails")
        self.wait_until(0.5, minutes)
        self.point(shipped)
        self.process.send_signal(signal.SIGHUP)
        self.event("reload of the shipped bundle by SIGHUP")
        self.wait_until(0.7, minutes)
        self.reloaded &= self.last == shipped.manifest.version
        (self.work / "hang").touch()
        self.event("one run hangs")
        self.wait_until(1.0, minutes)
        self.stopping = True
        self.process.send_signal(signal.SIGTERM)
        self.event("SIGTERM")
        status = self.process.wait(60)
        self.event(f"the process ended with {status}")
        self.over.set()
        for thread in (*threads, watcher):
            thread.join(90)
        return status


def phases(
    memory: list[tuple[float, float]], events: list[tuple[float, str]]
) -> list[dict[str, float | str]]:
    """Resident megabytes while one network is served: it is compared with itself alone."""
    starts = [event for event in events if any(word in event[1] for word in CHANGES)]
    last = next(event for event in events if event[1] == "SIGTERM")
    found: list[dict[str, float | str]] = []
    for (start, name), (end, _) in pairwise([*starts, last]):
        inside = np.array([(at, mb) for at, mb in memory if start + SETTLES <= at < end])
        found.append(
            {
                "since": name,
                "median": float(np.median(inside[:, 1])),
                "most": float(inside[:, 1].max()),
                "slope_a_minute": float(np.polyfit(*inside.T, 1)[0]) * 60,
            }
        )
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
    tally = drill.tally
    left = {name: (drill.work / name).exists() for name in ("fail", "hang")}
    not_taken = [name for name, there in left.items() if there]
    result = {
        **conditions(),
        "minutes": arguments.minutes,
        "events": drill.events,
        "images": len(drill.images),
        "answered": dict(tally.answered),
        "refused_503": dict(tally.refused),
        "garbage": dict(tally.garbage),
        "left": tally.left,
        "not_let_in_after_sigterm": tally.not_let_in,
        "wrong": tally.wrong[:20],
        "wrong_in_all": len(tally.wrong),
        "slowest_seconds": tally.worst,
        "faults_not_taken": not_taken,
        "exit_status": status,
        "megabytes": phases(drill.memory, drill.events),
        "megabytes_every_ten_seconds": [round(mb) for _, mb in drill.memory[::10]],
        "tracebacks": (drill.work / "log").read_text().count("Traceback"),
    }
    (OUT / "drill.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    raise SystemExit(bool(tally.wrong or not_taken or status) or not drill.reloaded)


if __name__ == "__main__":
    main()
