"""What an attacker sends, and what it costs the others: memory, and the time of a good request.

.venv/bin/python -m benchmarks.reliability.attacks [--seconds 12]

Eight clients send good images all the time, one in four of them of 24 megapixels. Each attack runs
beside them for some seconds, after as many without it: resident memory and the clients' p99 are
compared. The result is runs/reliability/attacks.json, which `page.py` shows. Exits with 1 where a
good request failed, an attack was answered with a 5xx other than 503, or the service did not end
well.
"""

import argparse
import json
import multiprocessing
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app import load
from models.bundle import load_bundle
from models.cores import available_cores, processor

OUT = Path("runs/reliability/attacks.json")
BUNDLE = Path("models/default")
CLIENTS = 8
ATTACKERS = 4
PATIENCE = 30


def conditions() -> dict[str, Any]:
    """What is measured, and where: they stand beside the figures."""
    manifest = load_bundle(BUNDLE).manifest
    return {
        "bundle": f"{manifest.name} {manifest.version}",
        "cores": available_cores(),
        "processor": processor(),
    }


def png(width: int, height: int, rows: bytes, texts: Sequence[bytes] = ()) -> bytes:
    """A PNG of one byte a pixel, its rows as given: they need not be as many as declared."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    before = b"".join(chunk(b"iTXt", text) for text in texts)
    body = chunk(b"IHDR", head) + before + chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def tiff_of_overlapping_strips(rows: int) -> bytes:
    """A grey TIFF without compression, each row's bytes beginning one after the last row's."""
    width, entries, counted = 1_000, 9, 4 * rows
    lists = 8 + 2 + 12 * entries + 4
    pixels = lists + 2 * counted
    directory = struct.pack(
        f"<H{entries * 'HHII'}I",
        *(entries, 256, 4, 1, width, 257, 4, 1, rows, 258, 3, 1, 8, 259, 3, 1, 1, 262, 3, 1, 1),
        *(273, 4, rows, lists, 277, 3, 1, 1, 278, 4, 1, 1, 279, 4, rows, lists + counted, 0),
    )
    where = struct.pack(f"<{rows}I", *range(pixels, pixels + rows))
    how_long = struct.pack("<I", width) * rows
    return b"II*\0" + struct.pack("<I", 8) + directory + where + how_long + bytes(rows + width)


def gif(frames: int) -> bytes:
    """Of so many frames of 16 x 16 pixels."""
    buffer = BytesIO()
    pictures = [Image.new("P", (16, 16), n % 256) for n in range(frames)]
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


def flat_jpeg(width: int, height: int) -> bytes:
    """A baseline JPEG of one colour."""
    buffer = BytesIO()
    Image.new("RGB", (width, height), (200, 150, 120)).save(buffer, "JPEG", quality=30)
    return buffer.getvalue()


def post(content_type: str, body: bytes) -> bytes:
    """A whole request."""
    head = (
        "POST /predict HTTP/1.1\r\nHost: attack\r\nConnection: close\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def form(*parts: bytes) -> bytes:
    """A multipart request."""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    body = b"".join(head + part + b"\r\n" for part in parts) + b"--x--\r\n"
    return post("multipart/form-data; boundary=x", body)


def attacks() -> dict[str, Callable[[int], str]]:
    """By name: called with the port, again and again; returns what was answered."""
    picture = load.draw_images(0)[0]
    zeros, thirty = bytes(30_001) * 30_000, bytes(30_000_000)
    # A character beyond the first 65,536 has Python keep all in four bytes.
    text = b"a\0\1\0\0\0" + zlib.compress(1_000_000 * b"a" + "\U0001f600".encode(), 9)
    sent = {
        "a PNG of 30,000 x 30,000 zeros": post("image/png", png(30_000, 30_000, zeros)),
        "one pixel high, 100 megapixels (PNG)": post(
            "image/png", png(100_000_000, 1, bytes(100_000_001))
        ),
        "one pixel wide, 30 megapixels (PNG)": post("image/png", png(1, 30_000_000, 2 * thirty)),
        "a PNG of 70 texts of 4 MB (70 kB)": post("image/png", png(1, 1, bytes(2), 70 * [text])),
        "a TIFF of 16,000 strips one byte apart": form(tiff_of_overlapping_strips(16_000)),
        "65,500 x 1,500 flat pixels (JPEG)": post("image/jpeg", flat_jpeg(65_500, 1_500)),
        "a JPEG of 500,000 empty segments": form(
            picture[:2] + 500_000 * b"\xff\xe5\x00\x02" + picture[2:]
        ),
        "a JPEG of 40,000 pieces of EXIF": form(
            picture[:2] + 40_000 * (b"\xff\xe1\x00\x48Exif\x00\x00" + bytes(64)) + picture[2:]
        ),
        "a GIF of 10,000 frames": form(gif(10_000)),
        "an SVG": form(b"<svg xmlns='http://www.w3.org/2000/svg'>" + b"<g>" * 50_000),
        "a JPEG that is a ZIP and a page, too": form(
            picture + b"PK\x03\x04" + b"<html><script>alert(1)</script></html>" * 1000
        ),
        "10,000 parts": form(*[b"x"] * 10_000),
    }
    del zeros, thirty
    named: dict[str, Callable[[int], str]] = {
        name: partial(exchange, pieces=[whole]) for name, whole in sent.items()
    }
    named["2 GB in chunks, without a length"] = lambda port: exchange(port, endless())
    return named


def endless() -> Iterator[bytes]:
    """An upload of 2 GB that does not say so."""
    yield (
        b"POST /predict HTTP/1.1\r\nHost: attack\r\nConnection: close\r\n"
        b"Content-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    piece = b"\xff\xd8\xff\xe0" + bytes(999_996)
    for _ in range(2_000):
        yield b"%x\r\n" % len(piece) + piece + b"\r\n"
    yield b"0\r\n\r\n"


def exchange(port: int, pieces: Iterator[bytes] | list[bytes]) -> str:
    """Send, and read the status."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
        with suppress(OSError):
            for piece in pieces:
                connection.sendall(piece)
        try:
            return connection.recv(65_536).split(b" ")[1].decode()
        except (OSError, IndexError):
            return "cut off"


def attack(send: Callable[[int], str], port: int, seconds: float) -> Counter[str]:
    """Attack from processes of their own, so that the good clients are not slowed by this one."""
    forks = multiprocessing.get_context("fork")
    told = forks.SimpleQueue()

    def work() -> None:
        answers: Counter[str] = Counter()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                answers[send(port)] += 1
            except OSError as error:
                answers[type(error).__name__] += 1
        told.put(answers)

    processes = [forks.Process(target=work) for _ in range(ATTACKERS)]
    for process in processes:
        process.start()
    answers = sum((told.get() for _ in processes), Counter())
    for process in processes:
        process.join()
    return answers


@contextmanager
def slowloris(port: int, count: int = 500) -> Iterator[Counter[str]]:
    """So many connections that send a byte of a header now and then, for as long as they may."""
    over = threading.Event()
    seen: Counter[str] = Counter()

    def dribble() -> None:
        waiting: list[socket.socket] = []
        while not over.is_set():
            while len(waiting) < count and not over.is_set():
                with suppress(OSError):
                    one = socket.create_connection(("127.0.0.1", port), 1)
                    one.sendall(b"POST /predict HTTP/1.1\r\nX-Slow: ")
                    waiting.append(one)
            seen["most at once"] = max(seen["most at once"], len(waiting))
            for one in waiting[:]:
                try:
                    one.sendall(b"a")
                except OSError:
                    seen["cut off"] += 1
                    waiting.remove(one)
                    one.close()
            over.wait(1.0)
        for one in waiting:
            one.close()

    thread = threading.Thread(target=dribble)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


class Watched:
    """The service, good clients, and what they see."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {n: os.environ[n] for n in ("PATH", "HOME") if n in os.environ}
        environment |= {"MMTL_PORT": str(self.port), "MMTL_LOG_LEVEL": "ERROR"}
        self.process = subprocess.Popen(
            [Path(sys.executable).parent / "mmtl", "serve"], env=environment
        )
        small = load.draw_images(0)[0]
        with Image.open(BytesIO(small)) as image:
            buffer = BytesIO()
            image.resize((6000, 4000)).save(buffer, "JPEG", quality=90)
        self.good = [form(small)] * 3 + [form(buffer.getvalue())]
        while True:
            if self.process.poll() is not None:
                raise SystemExit("The service did not start; what it said stands above.")
            with suppress(OSError):
                if exchange(self.port, [self.good[0]]) == "200":
                    break
            time.sleep(0.05)
        self.times: list[tuple[float, float]] = []
        self.waiting: dict[int, float] = {}
        self.failures: Counter[str] = Counter()
        self.memory: list[tuple[float, float]] = []
        self.over = threading.Event()
        self.threads = [
            *(threading.Thread(target=self._client, args=[n]) for n in range(CLIENTS)),
            threading.Thread(target=self._watch),
        ]
        for thread in self.threads:
            thread.start()

    def _client(self, client: int) -> None:
        number = client
        while not self.over.is_set():
            number += 1
            began = self.waiting[client] = time.monotonic()
            try:
                status = exchange(self.port, [self.good[number % len(self.good)]])
            except OSError as error:
                status = type(error).__name__
            self.times.append((began, time.monotonic() - began))
            if status != "200":
                self.failures[status] += 1

    def _watch(self) -> None:
        while not self.over.wait(0.05):
            try:
                lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            except OSError:  # it has ended
                return
            line = next((line for line in lines if line.startswith("VmRSS")), "VmRSS: 0")
            self.memory.append((time.monotonic(), float(line.split()[1]) * 1024 / 1e6))

    def during(self, began: float, ended: float) -> dict[str, float]:
        """The clients' p99, what they had answered, and the most memory between two times."""
        while min(self.waiting.values()) < ended:  # what is not answered is the slowest
            time.sleep(0.05)
        times = [took for at, took in self.times if began <= at < ended]
        answered = sum(began <= at + took < ended for at, took in self.times)
        return {
            "p99_ms": 1000 * float(np.percentile(times, 99)),
            "images_per_second": answered / (ended - began),
            "megabytes": max((mb for at, mb in self.memory if began <= at < ended), default=0.0),
        }

    def stop(self) -> int:
        """End everything; the service's exit status."""
        self.over.set()
        for thread in self.threads:
            thread.join()
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def main() -> None:
    """Attack, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=12)
    seconds = parser.parse_args().seconds
    made = attacks()
    watched = Watched()
    found = []
    try:
        time.sleep(seconds)  # warm
        for name in [*made, "slowloris on 500 connections"]:
            quiet = time.monotonic()
            time.sleep(seconds)
            began = time.monotonic()
            if name in made:
                answers = attack(made[name], watched.port, seconds)
            else:
                with slowloris(watched.port) as answers:
                    time.sleep(2 * seconds)
            ended = time.monotonic()
            row = {
                "attack": name,
                "answers": dict(answers),
                "quiet": watched.during(quiet, began),
                "attacked": watched.during(began, ended),
            }
            found.append(row)
            print(json.dumps(row), flush=True)
    finally:
        status = watched.stop()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    failures = dict(watched.failures)
    told = {
        **conditions(),
        "attacks": found,
        "good_requests_failed": failures,
        "exit_status": status,
    }
    OUT.write_text(json.dumps(told, indent=1) + "\n")
    answers = {answer for row in found for answer in row["answers"]}
    broken = sorted(a for a in answers if a.startswith("5") and a != "503")
    print(f"good requests that failed: {failures}; attacks answered with {broken}; ended {status}")
    raise SystemExit(bool(failures or broken or status))


if __name__ == "__main__":
    main()
