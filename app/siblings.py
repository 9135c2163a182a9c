"""The other processes of a service: what one is asked that is about all of them.

Each listens on a Unix socket in a folder that nobody else can open. A question is a line, a name
and what is asked about; the answer is what comes until the end.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

Answer = Callable[[str], Awaitable[bytes]]
# Answer to a question to reload; any other is why not.
RELOADED = b"reloaded"
# Bytes of a question: more than a request's headers, of which one may be what it is about.
_LONGEST = 1_000_000


class Siblings:
    """This process among the others.

    Args:
        folder: Of the sockets, and of what else all share.
        number: Of this process.
        count: Of all.
    """

    def __init__(self, folder: Path, number: int, count: int):
        self.number = number
        self.count = count
        self.folder = folder
        self._socket = folder / f"{number}.socket"
        self._server: asyncio.Server | None = None

    async def listen(self, answers: Mapping[str, Answer]) -> None:
        """Answer the others from now on.

        Args:
            answers: By the question's name.
        """

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                name, _, about = (await reader.readline()).decode().rstrip("\n").partition(" ")
                if name in answers:
                    writer.write(await answers[name](about))
            finally:
                writer.close()

        # Which takes the place of a socket that one left behind that died.
        self._server = await asyncio.start_unix_server(answer, self._socket, limit=_LONGEST)

    def close(self) -> None:
        """Answer no more."""
        if self._server is not None:
            self._server.close()
            self._socket.unlink(missing_ok=True)

    async def ask(self, name: str, about: str, seconds: float) -> dict[int, bytes]:
        """What the others answer, by number; nothing of one that is being started, dies or hangs.

        Args:
            name: Of the question.
            about: What it is about; one line.
            seconds: Longest to wait.
        """
        paths = {int(path.stem): path for path in self.folder.glob("*.socket")}
        others = sorted(number for number in paths if number != self.number)
        found = await asyncio.gather(
            *(_ask(paths[number], f"{name} {about}\n", seconds) for number in others)
        )
        return {n: answer for n, answer in zip(others, found, strict=True) if answer}


async def _ask(path: Path, question: str, seconds: float) -> bytes | None:
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                writer.write(question.encode())
                return await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None


def merge_metrics(texts: Mapping[int, bytes]) -> bytes:
    """One exposition of several processes' metrics, each sample labelled with its process.

    Prometheus wants all samples of a metric together, below one description.

    Args:
        texts: By process, in Prometheus' text format, or all as OpenMetrics.
    """
    families: dict[bytes, tuple[list[bytes], list[bytes]]] = {}
    ends = b""
    for number, text in sorted(texts.items()):
        described: list[bytes] = []
        samples: list[bytes] = []
        for line in text.split(b"\n"):
            if line.startswith(b"# EOF"):
                ends = b"# EOF\n"
            elif line.startswith(b"#"):
                described, samples = families.setdefault(line.split(b" ", 3)[2], ([], []))
                if line not in described:
                    described.append(line)
            elif line:
                name, mark, rest = re.split(rb"([ {])", line, maxsplit=1)
                end = b"," if mark == b"{" else b"} "
                samples.append(b'%b{process="%d"%b%b' % (name, number, end, rest))
    lines = [line for each in families.values() for part in each for line in part]
    return b"".join(line + b"\n" for line in lines) + ends
