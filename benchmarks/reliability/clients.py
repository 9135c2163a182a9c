"""The drill's clients: what they send, and whether the answers are what they should be."""

import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256

from benchmarks.reliability.garbage import BOUNDARY, garbage

AGREEMENT = 1e-4


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


def answered_by(
    headers: Mapping[str, str], content: bytes, sha256: str, expected: dict[str, float]
) -> str:
    """The version of the network that an answer 200 is of.

    Args:
        headers: Of the answer.
        content: Its body.
        sha256: Of the one image that was sent.
        expected: By version, the probability that its bundle answers offline.

    Raises:
        ValueError, KeyError, TypeError: The answer is not what it should be.
    """
    body = json.loads(content)
    version = headers["X-Model-Version"]
    (result,) = body["results"]
    if body["model"]["version"] != version:
        raise ValueError("header and body name two networks")
    if result["image"]["sha256"] != sha256:
        raise ValueError("the answer names another image")
    found = result["prediction"]["melanoma"]["probability"]
    if abs(found - expected[version]) > AGREEMENT:
        raise ValueError(f"{found} is not {expected[version]}")
    return version


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


class Clients:
    """Send until it is over, and check every answer.

    Attributes:
        stopping: Whether the service has been told to stop.
        over: Set when nothing more is to be sent.
        tally: What became of the requests.
    """

    def __init__(
        self, port: int, key: str, images: list[bytes], expected: dict[str, list[float]]
    ) -> None:
        """Clients of the service on a port of this machine.

        Args:
            port: Of the service.
            key: That it takes.
            images: Good ones.
            expected: By version of the network, what each image is answered offline.
        """
        self._port = port
        self._key = key
        self._images = images
        self._expected = expected
        self._hashes = [sha256(image).hexdigest() for image in images]
        self._bad = garbage(images[0])
        self._lock = threading.Lock()
        self.tally = Tally()
        self.over = threading.Event()
        self.stopping = False

    def run(self, seed: int) -> None:
        """One of the clients, until the drill is over."""
        chance = random.Random(seed)
        form = f"multipart/form-data; boundary={BOUNDARY}".encode()
        while not self.over.is_set():
            try:
                self._send(chance, form)
            except Exception as error:  # or one client less would send, unsaid
                with self._lock:
                    self.tally.wrong.append(f"the client itself: {error!r}")

    def _send(self, chance: random.Random, form: bytes) -> None:
        number = chance.randrange(len(self._images))
        head = (
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; '
            f'filename="{number}.jpg"\r\n\r\n'
        )
        body = head.encode() + self._images[number] + f"\r\n--{BOUNDARY}--\r\n".encode()
        dice = chance.random()
        if dice < 0.1:
            self._leave(request(form, body, self._key), chance)
        elif dice < 0.2:
            kind, head_of_it, bad = chance.choice(self._bad)
            self.send_garbage(kind, request(head_of_it, bad, self._key))
        else:
            self.ask(number, request(form, body, self._key))

    def _leave(self, sent: bytes, chance: random.Random) -> None:
        """Hang up in the middle of the request, or before its answer."""
        try:
            with socket.create_connection(("127.0.0.1", self._port), 30) as connection:
                connection.sendall(sent[: chance.choice([40, len(sent) // 2, len(sent)])])
                time.sleep(chance.choice([0.0, 0.005, 0.05]))
        except OSError:
            pass
        with self._lock:
            self.tally.left += 1

    def _exchange(self, sent: bytes) -> tuple[int, http.client.HTTPMessage, bytes] | str:
        """The answer; or `not let in`, or `lost` where a whole request was taken without one."""
        try:
            connection = socket.create_connection(("127.0.0.1", self._port), 60)
        except OSError:
            return "not let in"
        with connection:
            with suppress(OSError):  # an answer may have come before the end of the request
                connection.sendall(sent)
            before = not self.stopping
            answer = http.client.HTTPResponse(connection)
            try:
                answer.begin()
            except http.client.RemoteDisconnected:
                # Closed in order, and so by the service, which had read the whole request: what it
                # has not read makes the kernel reset the connection.
                return "lost" if before else "not let in"
            except ConnectionResetError:
                # Of a connection that the kernel had taken and the service never accepted.
                return "not let in" if self.stopping else "lost"
            except (OSError, http.client.HTTPException):
                return "lost"
            try:
                return answer.status, answer.headers, answer.read()
            except (OSError, http.client.HTTPException):
                return "lost"

    def ask(self, number: int, sent: bytes) -> None:
        """A good request, and its answer checked."""
        began = time.monotonic()
        answer = self._exchange(sent)
        took = time.monotonic() - began
        with self._lock:
            self.tally.worst = max(self.tally.worst, took)
            if isinstance(answer, str):
                if answer == "not let in" and self.stopping:
                    self.tally.not_let_in += 1
                else:
                    self.tally.wrong.append(f"{took:.3f} s: {answer}")
                return
            status, headers, content = answer
            expected = {version: found[number] for version, found in self._expected.items()}
            try:
                if status == 503 and headers["Retry-After"]:
                    self.tally.refused[json.loads(content)["type"].rpartition(":")[2]] += 1
                elif status == 200:
                    version = answered_by(headers, content, self._hashes[number], expected)
                    self.tally.answered[version] += 1
                else:
                    raise ValueError(f"status {status}")
            except (ValueError, KeyError, TypeError) as error:
                self.tally.wrong.append(f"{error!r}: {content[:200]!r}")

    def send_garbage(self, kind: str, sent: bytes) -> None:
        """It must be refused with a 4xx, or a 503 that says when to come back."""
        answer = self._exchange(sent)
        with self._lock:
            if isinstance(answer, str):
                if answer == "lost" or not self.stopping:
                    self.tally.wrong.append(f"garbage ({kind}): {answer}")
                return
            status, headers, content = answer
            announced = status == 503 and headers["Retry-After"]
            # Bits may flip where it does not show.
            harmless = status == 200 and "flipped" in kind
            if not (400 <= status < 500 or announced or harmless):
                self.tally.wrong.append(f"garbage ({kind}): {status} {content[:200]!r}")
            self.tally.garbage[str(status)] += 1
