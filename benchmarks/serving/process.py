"""A system that is measured: its environment, its processes, and what they cost."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PORT = 8765
# What the name of an environment ends with where the network runs on a GPU.
ON_GPU = "-gpu"
_MARK = "BENCH_SERVE_TOKEN"
# Of /proc/PID/smaps: proc_pid_smaps(5).
_MAPPING = re.compile(
    r"^[0-9a-f]+-[0-9a-f]+ \S+ (?P<place>[0-9a-f]+ \S+) (?P<inode>\d+).*\n"
    r"(?P<sizes>(?:[A-Z].*\n)+)",
    re.MULTILINE,
)
_SIZE = re.compile(r"^(Rss|Pss|Anonymous): +(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class System:
    """Something that answers `POST /predict`.

    Attributes:
        environment: Of .venv-bench.
        command: Whose first word is a program there.
        variables: Of its environment.
        port: That it listens on.
    """

    environment: str
    command: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    port: int = PORT


def fingerprint(*paths: Path) -> str:
    """Of the code and the requirements in files, and in folders of them."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(ROOT)} {file.stat().st_size}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def make_environment(name: str) -> Path:
    """The folder of an environment's programs, installed from hash-locked requirements.

    It is made anew where what it was made of has changed.
    """
    folder = ROOT / ".venv-bench" / name
    done = folder / ".done"
    system, gpu, _ = name.partition(ON_GPU)
    locked = HERE / f"requirements-{system}.txt"
    made_of = [locked]
    if system == "mmtl":
        locked = ROOT / f"requirements/{'gpu' if gpu else 'cpu'}.txt"
        made_of = [locked, ROOT / "pyproject.toml", ROOT / "app", ROOT / "models"]
    elif gpu:
        made_of.append(HERE / "requirements-onnxruntime-gpu.txt")
    if not done.exists() or done.read_text() != fingerprint(*made_of):
        uv = ROOT / ".venv/bin/uv"
        print(f"installing {folder}", file=sys.stderr)
        subprocess.run([uv, "venv", "--quiet", "--clear", "-p", sys.executable, folder], check=True)
        there = ["--quiet", "--python", folder / "bin/python"]
        # Compiled as pip leaves it: most of a start would go into that.
        install = [uv, "pip", "install", "--compile-bytecode", *there]
        subprocess.run([*install, "--require-hashes", "-r", locked], check=True)
        if system == "mmtl":
            # A copy: what is edited meanwhile is not measured.
            subprocess.run([*install, "--no-deps", "--no-build-isolation", ROOT], check=True)
        elif gpu:
            subprocess.run([uv, "pip", "uninstall", *there, "onnxruntime"], check=True)
            locked = HERE / "requirements-onnxruntime-gpu.txt"
            subprocess.run([*install, "--no-deps", "--require-hashes", "-r", locked], check=True)
        done.write_text(fingerprint(*made_of))
    return folder / "bin"


def _wait_for_port(system: System) -> None:
    """Until the port is free: the last system's processes may just be ending."""
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", system.port)) != 0:
                return
        time.sleep(0.1)
    raise SystemExit(
        f"Something answers on port {system.port} already, and would be measured in place of "
        f"{system.command[0]}: a server that an interrupted run left, maybe. Stop it."
    )


class Process:
    """A system's processes, found by a mark in their environment: some start daemons."""

    def __init__(self, system: System, log: Path):
        _wait_for_port(system)
        self.port = system.port
        self.token = f"{time.time_ns()}"
        programs = make_environment(system.environment)
        self.log = log.open("wb")
        self.main = subprocess.Popen(
            [programs / system.command[0], *system.command[1:]],
            cwd=HERE / "peers",
            env={**os.environ, **system.variables, _MARK: self.token},
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.peak = 0.0

    def pids(self) -> Iterator[int]:
        """Of every process that is alive."""
        mark = f"{_MARK}={self.token}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if mark in (entry / "environ").read_bytes():
                        yield int(entry.name)
                except OSError:
                    pass

    def cpu_seconds(self) -> float:
        """User and system time of all of them, and of their children that have ended."""
        ticks = 0
        for pid in self.pids():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            ticks += sum(map(int, fields[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def megabytes(self) -> float:
        """Memory, with what several of them share counted once.

        Not their PSS alone: of a library, another system may hold the same pages.
        """
        own, files = 0, dict[str, int]()
        for pid in self.pids():
            try:
                text = Path(f"/proc/{pid}/smaps").read_text()
            except OSError:
                continue
            for mapping in _MAPPING.finditer(text):
                sizes = dict(_SIZE.findall(mapping["sizes"]))
                resident, anonymous = int(sizes["Rss"]), int(sizes["Anonymous"])
                if mapping["inode"] == "0":
                    own += int(sizes["Pss"])
                else:
                    own += anonymous
                    there = f"{mapping['place']} {mapping['inode']}"
                    files[there] = max(files.get(there, 0), resident - anonymous)
        return 1.024e-3 * (own + sum(files.values()))

    def wait(self, image: bytes) -> float:
        """Seconds until a posted image is answered."""
        started = time.monotonic()
        body = (
            b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n'
            b"Content-Type: image/jpeg\r\n\r\n" + image + b"\r\n--b--\r\n"
        )
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/predict",
            body,
            {"Content-Type": "multipart/form-data; boundary=b"},
        )
        while True:
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    answer.read()
                    return time.monotonic() - started
            except (urllib.error.URLError, OSError):
                pass
            if self.main.poll() is not None or time.monotonic() - started > 120:
                raise SystemExit(f"A system did not start: see {self.log.name}.")
            time.sleep(0.02)

    @contextmanager
    def watched(self) -> Iterator[dict[str, float]]:
        """CPU seconds and the most memory, of the time that the block takes."""
        found: dict[str, float] = {}
        over = threading.Event()
        peak = 0.0

        def watch() -> None:
            nonlocal peak
            while not over.wait(1.0):
                peak = max(peak, self.megabytes())

        watcher = threading.Thread(target=watch)
        before = self.cpu_seconds()
        watcher.start()
        try:
            yield found
        finally:
            over.set()
            watcher.join()
            found["cpu_seconds"] = self.cpu_seconds() - before
            found["peak_megabytes"] = max(peak, self.megabytes())

    def pause(self) -> None:
        """Stop all of them where they are, so that nothing of theirs runs."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, how: signal.Signals) -> None:
        for pid in list(self.pids()):
            with suppress(ProcessLookupError):
                os.kill(pid, how)

    def stop(self) -> None:
        """End all of them."""
        self.resume()
        for how in (signal.SIGTERM, signal.SIGKILL):
            self._signal(how)
            try:
                self.main.wait(8 if how == signal.SIGTERM else None)
            except subprocess.TimeoutExpired:
                continue
        while any(True for _ in self.pids()):
            time.sleep(0.1)
        self.log.close()
