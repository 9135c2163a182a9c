"""The service as a process, started as a newcomer starts it, in an environment without torch."""

import http.client
import json
import os
import platform
import re
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, needs_avx512
from tests.lesions import encode, flat, huge_png, lesion

VENV = ".venv-e2e"
BOUNDARY = "lesion"
pytestmark = pytest.mark.timeout(600)


def write_no_file() -> None:
    """From here on every write to a file is an error: an upload that touches the disk shows."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def open_few_files() -> None:
    """As a shell lets a program do that nobody has told of its many connections."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def allow_core_dumps() -> None:
    """As who looks for faults does."""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))


def leaves_no_core_dump(process: int) -> bool:
    """Whether its limit is a byte, where that may be set, and its memory is in no dump."""
    folder = Path(f"/proc/{process}")
    limits = (folder / "limits").read_text()
    soft, hard = re.findall(r"Max core file size +(\w+) +(\w+)", limits)[0]
    least = "1" if hard == "unlimited" else str(min(1, int(hard)))
    return soft == least and int((folder / "coredump_filter").read_text(), 16) == 0


def open_files(process: int) -> int:
    """How many a process may have."""
    limits = Path(f"/proc/{process}/limits").read_text()
    return int(re.findall(r"Max open files +(\d+)", limits)[0])


class Service:
    """`make serve` on a free port, with some settings."""

    def __init__(self, writes: bool = False, **settings: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "MMTL_PORT": str(self.port),
            **settings,
        }
        self.started = time.monotonic()

        def limit() -> None:
            open_few_files()
            allow_core_dumps()
            if not writes:
                write_no_file()

        self.process = subprocess.Popen(
            [ROOT / VENV / "bin" / "mmtl", "serve"],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit,
        )
        while self.get("/health/ready")[0] != 200:
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() - self.started < 60
            time.sleep(0.02)
        self.seconds_to_ready = time.monotonic() - self.started

    def request(
        self, method: str, path: str, body: Any = None, content_type: str = ""
    ) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": content_type})
            answer = connection.getresponse()
            content = answer.read()
            is_json = "json" in (answer.headers["Content-Type"] or "")
            return answer.status, json.loads(content) if is_json else content
        except (ConnectionError, http.client.RemoteDisconnected):
            return 0, None
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, Any]:
        return self.request("GET", path)

    def post(self, *files: bytes, field: str = "files") -> tuple[int, Any]:
        parts = [
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; '
            f'filename="{number}.jpg"\r\n\r\n'.encode()
            + data
            + b"\r\n"
            for number, data in enumerate(files)
        ]
        body = b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()
        return self.request("POST", "/predict", body, f"multipart/form-data; boundary={BOUNDARY}")

    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module", autouse=True)
def _environment() -> None:
    """What `make serve` installs, beside the developers' environment."""
    done = subprocess.run(
        ["make", f"{VENV}/.cpu", f"VENV={VENV}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    running = Service(**getattr(request, "param", {}))
    yield running
    running.process.kill()
    running.process.communicate()


def probability(result: dict[str, Any]) -> float:
    return result["prediction"]["melanoma"]["probability"]


def test_the_environment_has_no_torch() -> None:
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is not None)"
    assert subprocess.run([ROOT / VENV / "bin" / "python", "-c", code]).returncode == 0


def test_training_says_what_it_needs() -> None:
    done = subprocess.run(
        [ROOT / VENV / "bin" / "mmtl-train", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("mmtl-train: PyTorch is not installed here")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "service",
    [
        {"MMTL_RUNTIME": "onnxruntime"},
        pytest.param(
            {"MMTL_RUNTIME": "openvino"},
            marks=[
                pytest.mark.skipif(platform.machine() != "x86_64", reason="no OpenVINO"),
                needs_avx512,
            ],
        ),
    ],
    indirect=True,
)
def test_every_answer_belongs_to_its_image_in_order(service: Service) -> None:
    pictures = [lesion(seed, 300, 225, malignant=seed % 2 == 0) for seed in range(24)]
    alone = []
    for picture in pictures:
        status, body = service.post(picture)
        assert status == 200
        alone.append(probability(body["results"][0]))
    assert len(set(alone)) > 20  # so that a mix-up would show

    def post_some(start: int) -> None:
        chosen = [(start + 5 * step) % len(pictures) for step in range(1 + start % 7)]
        status, body = service.post(*[pictures[number] for number in chosen])
        assert status == 200
        found = [probability(result) for result in body["results"]]
        assert found == pytest.approx([alone[number] for number in chosen], abs=1e-4)
        assert [r["filename"] for r in body["results"]] == [f"{n}.jpg" for n in range(len(chosen))]

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(post_some, range(48)))


def test_bad_input_has_its_own_problem_and_costs_no_memory(service: Service) -> None:
    good = lesion(0, 800, 600)
    for _ in range(3):
        assert service.post(good, good)[0] == 200
    before = service.memory()
    jpeg, form = "image/jpeg", f"multipart/form-data; boundary={BOUNDARY}"
    cases = {
        "empty-image": lambda: service.request("POST", "/predict", b"", jpeg),
        "unsupported-image": lambda: service.post(b"just some text"),
        "corrupt-image": lambda: service.post(good[: len(good) // 2]),
        "image-too-large": lambda: service.post(huge_png()),
        "unexpected-field": lambda: service.post(good, field="image"),
        "body-too-large": lambda: service.request("POST", "/predict", bytes(100_000_000), form),
        "unsupported-media-type": lambda: service.request("POST", "/predict", good, "text/plain"),
    }
    for _ in range(5):
        for kind, send in cases.items():
            status, body = send()
            assert 400 <= status < 500
            assert body["type"] == f"urn:mmtl:problem:{kind}"
        assert service.post(good)[0] == 200
    assert service.memory() - before < 60_000_000


def test_a_large_upload_never_touches_the_disk(service: Service) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (2, 700, 900, 3), np.uint8)
    pictures = [encode(picture, "PNG") for picture in noise]
    assert all(len(picture) > 1_000_000 for picture in pictures)
    status, body = service.post(*pictures)
    assert status == 200
    assert [result["status"] for result in body["results"]] == ["ok", "ok"]


def test_there_may_be_more_connections_than_a_shell_allows_files(service: Service) -> None:
    assert open_files(service.process.pid) > 256


def test_no_core_dump_is_left(service: Service) -> None:
    assert leaves_no_core_dump(service.process.pid)


def test_a_stop_answers_what_was_sent(service: Service) -> None:
    picture = flat(1, 3000, 3000)  # which take a while, all together
    with ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(service.post, *[picture] * 4) for _ in range(6)]
        until = time.monotonic() + 20
        while b"mmtl_queue_depth 24.0" not in service.get("/metrics")[1]:
            assert time.monotonic() < until
        service.process.send_signal(signal.SIGTERM)
        assert [answer.result()[0] for answer in answers] == [200] * 6
    service.process.wait(20)
    assert service.process.returncode == 0
    log = service.process.stderr.read()
    assert "Traceback" not in log


def test_a_hangup_reloads_and_a_second_stop_does_not_wait(service: Service) -> None:
    service.process.send_signal(signal.SIGHUP)
    until = time.monotonic() + 20
    while b'mmtl_reloads_total{outcome="switched"} 1.0' not in service.get("/metrics")[1]:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert service.post(lesion(1))[0] == 200
    # An upload that never ends would hold the stop up for as long as an upload may take.
    with socket.create_connection(("127.0.0.1", service.port)) as slow:
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n")
        slow.sendall(b"Content-Length: 1000\r\n\r\nabc")
        time.sleep(0.2)
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert service.process.poll() is None
        service.process.send_signal(signal.SIGTERM)
        service.process.wait(5)
    assert service.process.returncode == 0
    assert "Traceback" not in service.process.stderr.read()


def test_a_second_stop_does_not_wait_for_what_is_queued_either(service: Service) -> None:
    takes_a_while = flat(1, 5000, 5000)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(service.post, *[takes_a_while] * 30)
        until = time.monotonic() + 20
        while b"mmtl_queue_depth 30.0" not in service.get("/metrics")[1]:
            assert time.monotonic() < until
        for _ in range(2):
            service.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        service.process.wait(10)  # and not as long as 30 pictures of this size take
    assert service.process.returncode == 0
    assert answer.exception() or answer.result()[0] == 503
    assert "Traceback" not in service.process.stderr.read()


def test_several_processes_are_one_service() -> None:
    service = Service(writes=True, MMTL_PROCESSES="2")
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children")
    images = re.compile(r'mmtl_images_total\{process="(.)",outcome="ok"\} (\d+)')

    def answered() -> dict[str, int]:
        text = (service.get("/metrics")[1] or b"").decode()
        return {number: int(count) for number, count in images.findall(text)}

    try:
        deadline = time.monotonic() + 60
        while len(answered()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        processes = children.read_text().split()
        assert sum(open_files(int(process)) > 256 for process in processes) == 2
        assert sum(leaves_no_core_dump(int(process)) for process in processes) == 2
        for _ in range(40):
            assert service.post(lesion())[0] == 200
        assert sum(answered().values()) == 40
        assert min(answered().values()) > 0  # the kernel deals connections out
        # One is killed, as the kernel does where memory runs out: another takes its place.
        victim = int(children.read_text().split()[-1])
        os.kill(victim, signal.SIGKILL)
        while len(answered()) < 2 or str(victim) in children.read_text().split():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert service.post(lesion())[0] == 200
        # Each takes the bundle anew, and answers what it has when all are told to stop.
        service.process.send_signal(signal.SIGHUP)
        reloaded = re.compile(r'mmtl_reloads_total\{process=".",outcome="switched"\} 1.0')
        while len(reloaded.findall((service.get("/metrics")[1] or b"").decode())) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        depth = re.compile(r'mmtl_queue_depth\{process="."\} (\d+)')
        with ThreadPoolExecutor(6) as threads:
            picture = flat(1, 3000, 3000)
            sent = [threads.submit(service.post, *[picture] * 4) for _ in range(6)]
            while sum(map(int, depth.findall((service.get("/metrics")[1] or b"").decode()))) < 24:
                assert time.monotonic() < deadline
            service.process.send_signal(signal.SIGTERM)
            assert [answer.result()[0] for answer in sent] == [200] * 6
    finally:
        service.process.send_signal(signal.SIGTERM)
        _, written = service.process.communicate(timeout=30)
    assert service.process.returncode == 0, written
    lines = [json.loads(line) for line in written.splitlines()]
    assert {line["process"] for line in lines if line["event"] == "serving"} == {0, 1}
    assert sum(line["event"] == "process died" for line in lines) == 1


def test_real_images_are_answered(service: Service, shared_data: Path) -> None:
    paths = sorted((shared_data / "originals").glob("*.jpg"))[::5]
    assert paths
    for path in paths:
        status, body = service.post(path.read_bytes())
        assert status == 200
        assert 0 <= probability(body["results"][0]) <= 1


def test_settings_that_do_not_fit_stop_it_with_a_sentence() -> None:
    done = subprocess.run(
        [ROOT / VENV / "bin" / "mmtl", "serve"],
        env={"PATH": os.environ["PATH"], "MMTL_PROT": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "mmtl: MMTL_PROT is not a setting. Did you mean MMTL_PORT?\n"
