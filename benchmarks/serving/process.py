"""A system that is measured: its environment, its processes, and what they cost."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PORT = 8765
# What the name of an environment ends with where the network runs on a GPU.
ON_GPU = "-gpu"
_MARK = "BENCH_SERVE_TOKEN"
# As it is in mmtl: none reports to its makers while it is measured.
_ALIKE = {
    "ORT_DISABLE_TELEMETRY": "1",
    "BENTOML_DO_NOT_TRACK": "True",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Of variables that are settings of what is measured: those of whoever measures are not to be.
_SETTINGS = ("MMTL_", "OMP_", "ORT_", "OTEL_", "RAY_", "BENTOML_", "WEB_CONCURRENCY")
# At rest: of a core; looked at so often, in seconds, and so many times at most.
_RESTS, _LOOK_SECONDS, _LOOKS = 0.1, 0.5, 60
# Of /proc/PID/smaps: proc_pid_smaps(5).
_MAPPING = re.compile(
    r"^[0-9a-f]+-[0-9a-f]+ \S+ (?P<place>[0-9a-f]+ \S+) (?P<inode>\d+).*\n"
    r"(?P<sizes>(?:[A-Z].*\n)+)",
    re.MULTILINE,
)
_SIZE = re.compile(r"^(Rss|Pss|Anonymous): +(\d+) kB$", re.MULTILINE)
# Of /proc/PID/status: what is resident, and the most that was since that was forgotten, which 5 in
# /proc/PID/clear_refs does (proc_pid_clear_refs(5)).
_RESIDENT = re.compile(r"^Vm(HWM|RSS):\s+(\d+) kB$", re.MULTILINE)
_FORGET_MOST = "5"


@dataclass(frozen=True)
class System:
    """Something that answers `POST /predict`.

    Attributes:
        environment: Of .venv-bench.
        command: Whose first word is a program there.
        variables: Of its environment.
        port: That it listens on.
        many: Several processes listen there: they share images better than connections that stay.
    """

    environment: str
    command: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    port: int = PORT
    many: bool = False


def fingerprint(*paths: Path) -> str:
    """Of the code and the requirements in files, and in folders of them."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(ROOT)} {file.stat().st_size}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@cache
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
        uv = Path(sys.executable).with_name("uv")
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


def stop_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this program as an error does: it stops what it has started.

    What is ignored, as `nohup` has it, still is.
    """
    for each in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, lambda *_: sys.exit(1))


def surroundings() -> dict[str, str]:
    """This process's environment, without settings of what is measured."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)}


def _stat(process: Path) -> list[str]:
    """The fields of /proc/PID/stat from the third on, the state: proc_pid_stat(5)."""
    return (process / "stat").read_text().rpartition(")")[2].split()


def _given_back_megabytes(pid: int) -> float:
    """How much less a process has now than it had at most."""
    try:
        found = dict(_RESIDENT.findall(Path(f"/proc/{pid}/status").read_text()))
    except OSError:  # it has ended
        return 0.0
    return 1.024e-3 * (int(found["HWM"]) - int(found["RSS"])) if found else 0.0


def _wait_for_port(system: System) -> None:
    """Until the port is free: the last system's processes may just be ending."""
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", system.port)) != 0:
                return
        time.sleep(0.1)
    raise SystemExit(
        f"Something answers on port {system.port} already, and would be measured in place of "
        f"{system.command[0]}: a server that an interrupted run left, maybe. Kill it (`kill -9`: "
        "it may be stopped)."
    )


class Process:
    """A system's processes: those of its session, and daemons, by a mark in their environment."""

    def __init__(self, system: System, log: Path):
        _wait_for_port(system)
        self.system = system
        self.port = system.port
        self.token = f"{time.time_ns()}"
        programs = make_environment(system.environment)
        self.log = log.open("ab")
        self.main = subprocess.Popen(
            [programs / system.command[0], *system.command[1:]],
            cwd=HERE / "peers",
            env={**surroundings(), **_ALIKE, **system.variables, _MARK: self.token},
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def pids(self) -> Iterator[int]:
        """Of every process that is alive."""
        mark, session = f"{_MARK}={self.token}".encode(), str(self.main.pid)
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    ours = mark in (entry / "environ").read_bytes()
                    state, _, _, its_session, *_ = _stat(entry)
                except OSError:
                    continue
                if (ours or its_session == session) and state != "Z":
                    yield int(entry.name)

    def cpu_seconds(self) -> float:
        """User and system time of all of them, and of their children that have ended."""
        ticks = 0
        for pid in self.pids():
            try:
                fields = _stat(Path(f"/proc/{pid}"))
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

    def wait(self, image: bytes) -> tuple[float, Any]:
        """Seconds until a posted image is answered, and the answer."""
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
                    content = answer.read()
                    return time.monotonic() - started, json.loads(content)
            except (urllib.error.URLError, OSError):
                pass
            if self.main.poll() is not None or time.monotonic() - started > 120:
                raise SystemExit(f"A system did not start: see {self.log.name}.")
            time.sleep(0.02)

    def settle(self, most: int = _LOOKS) -> None:
        """Wait until it rests: where one of its workers answers, others may still be starting.

        Args:
            most: Times that it is looked at.
        """
        for _ in range(most):
            before = self.cpu_seconds()
            time.sleep(_LOOK_SECONDS)
            if self.cpu_seconds() - before < _RESTS * _LOOK_SECONDS:
                return

    @contextmanager
    def watched(self) -> Iterator[dict[str, float]]:
        """CPU seconds and the most memory, of the time that the block takes.

        Of several processes, the most that each had is added up, though they may not have had it at
        one time.
        """
        found: dict[str, float] = {}
        pids = list(self.pids())
        for pid in pids:
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended just now
                Path(f"/proc/{pid}/clear_refs").write_text(_FORGET_MOST)
        before = self.cpu_seconds()
        try:
            yield found
        finally:
            found["cpu_seconds"] = self.cpu_seconds() - before
            more = sum(map(_given_back_megabytes, pids))
            found["peak_megabytes"] = self.megabytes() + more

    def pause(self) -> None:
        """Stop all of them where they are, so that nothing of theirs runs."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, how: signal.Signals) -> None:
        told = set[int]()
        while new := set(self.pids()) - told:  # one may start another meanwhile
            for pid in new:
                with suppress(ProcessLookupError):
                    os.kill(pid, how)
            told |= new

    def stop(self) -> None:
        """End all of them."""
        self.resume()
        for how in (signal.SIGTERM, signal.SIGKILL):
            self._signal(how)
            try:
                self.main.wait(8 if how == signal.SIGTERM else None)
            except subprocess.TimeoutExpired:
                continue
        while any(self.pids()):
            self._signal(signal.SIGKILL)
            time.sleep(0.1)
        self.log.close()
