"""What each optimisation of the service gives: mmtl with one of them undone, beside mmtl as it is.

.venv/bin/python -m benchmarks.serving.steps ../shared/data > docs/performance-steps.md

Every variant is the service in a process of its own, 32 clients, small and full-size images, in
rounds, so that a slow minute of the machine falls on all of them.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict, deque
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

import numpy as np
from tqdm import tqdm
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from benchmarks.serving.compare import CORES, make_images
from benchmarks.serving.process import PORT, ROOT
from models.cores import processor

ROUNDS = 5
SECONDS = 3.0
MIXES = ("small", "full size")
AS_IT_IS = "as it is"
UNDONE = {
    "int8": "the fp32 network, in ONNX Runtime",
    "OpenVINO": "the int8 network in ONNX Runtime",
    "bfloat16": "what stays in floats in float32",
    "a run a core": "one run at a time, on all cores",
    "batches of 8": "every image run on its own",
    "spare worker": "no more workers than cores",
    "measured together": "each picture's quality measured alone",
    "lines together": "each log line written by itself",
    "arenas shared": "an arena of malloc for each thread",
    "fewer scans": "every scan of a progressive JPEG",
    "read at once": "JPEGs read in Pillow's blocks of 64 KB",
    "past the router": "FastAPI finds every route, and reads its parameters",
    "joined": "batches put together by numpy, which lets the interpreter go",
    "bodies as they come": "bodies copied twice on their way through uvicorn",
    "rare collections": "garbage collected after every 700 objects, not 20,000",
    "rare trims": "memory given back to the kernel after every large image",
}
TRIED = {
    "garbage frozen": "garbage collector frozen after start",
    "short switches": "threads switched every 0.5 ms, not every 5",
    "batches of 4": "batches of 4",
    "two spare workers": "two workers more than cores, not one",
    "nice workers": "workers behind the event loop (`nice` 5)",
    "freed memory kept": "freed memory not given back to the kernel",
    "log later": "log lines written ten times a second",
    "no system call": "request ids drawn without one, which lets the interpreter go",
}


def serve(variant: str) -> None:
    """The service, but for one thing."""
    import gc

    import app.batcher
    import app.cli
    import app.engines.openvino
    import app.networks
    import app.routes.predict
    import app.server
    import app.telemetry
    import models.images
    import models.memory

    if variant == "int8":
        os.environ["MMTL_PRECISION"] = "fp32"
    elif variant == "OpenVINO":
        os.environ["MMTL_RUNTIME"] = "onnxruntime"
    elif variant == "bfloat16":
        os.environ["MMTL_RUNTIME"] = "openvino"
        app.engines.has_amx = lambda: False
    elif variant == "a run a core":
        for name in ("compile_model", "import_model"):
            load: Any = getattr(app.engines.openvino.openvino.Core, name)

            def wide(*arguments: Any, load: Any = load) -> Any:
                *others, options = arguments
                return load(*others, {**options, "INFERENCE_NUM_THREADS": CORES})

            setattr(app.engines.openvino.openvino.Core, name, wide)
        start: Any = app.engines.openvino.OpenVinoEngine.__init__
        app.engines.openvino.OpenVinoEngine.__init__ = (
            lambda self, file, content, size, _, *others: start(
                self, file, content, size, 1, *others
            )
        )
    elif variant == "batches of 8":
        os.environ["MMTL_MAX_BATCH"] = "1"
    elif variant == "batches of 4":
        os.environ["MMTL_MAX_BATCH"] = "4"
    elif variant == "spare worker":
        app.batcher._SPARE = 0
    elif variant == "measured together":
        measure = app.networks.measure

        def alone(pixels: Any) -> dict[str, Any]:
            each = [measure(one[None]) for one in pixels]
            return {name: np.concatenate([one[name] for one in each]) for name in each[0]}

        app.networks.measure = alone
    elif variant == "lines together":
        import structlog

        lines = structlog.WriteLogger(sys.stderr)
        app.telemetry._Lines = lambda file: lines
    elif variant == "arenas shared":
        app.engines.openvino.limit_arenas = lambda most: None
    elif variant == "fewer scans":
        models.images.for_an_eighth = lambda data: data
    elif variant == "read at once":
        models.images._READ_AT_ONCE = 65536
    elif variant == "past the router":

        async def through(self: Any, *request: Any) -> None:
            await self.app(*request)

        app.routes.predict.Direct.__call__ = through
    elif variant == "joined":
        app.batcher._stack = np.stack
    elif variant == "bodies as they come":
        app.server.Protocol.on_body = copied
    elif variant == "rare collections":
        app.cli._OBJECTS_PER_COLLECTION = 700
    elif variant == "rare trims":
        models.images.trim_heaps_soon = models.memory.trim_heaps
    elif variant == "garbage frozen":
        gc.collect()
        gc.freeze()
    elif variant == "two spare workers":
        app.batcher._SPARE = 2
    elif variant == "nice workers":
        work = app.batcher.Batcher._work

        def nice(self: Any, warms_up: bool) -> None:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
            work(self, warms_up)

        app.batcher.Batcher._work = nice
    elif variant == "short switches":
        sys.setswitchinterval(0.0005)
    elif variant == "log later":
        write_later()
    elif variant == "no system call":

        class Drawn:
            def __init__(self) -> None:
                self.hex = f"{random.getrandbits(128):032x}"

        app.telemetry.uuid4 = Drawn
    sys.argv = ["mmtl", "serve"]
    app.cli.main()


def copied(self: Any, body: bytes) -> None:
    """`Protocol.on_body`, but for what it spares."""
    self._bodies += 1
    self._header_bytes = 0
    if not self.transport.is_closing():
        HttpToolsProtocol.on_body(self, body)


def write_later() -> None:
    """Have a thread write what is logged."""
    import structlog

    import app.telemetry

    lines: deque[str] = deque()

    class Later(structlog.WriteLogger):
        def msg(self, message: str) -> None:
            lines.append(f"{message}\n")

        log = debug = info = warn = warning = msg
        fatal = failure = err = error = critical = exception = msg

    def write() -> None:
        while True:
            time.sleep(0.1)
            sys.stderr.write("".join(lines.popleft() for _ in range(len(lines))))
            sys.stderr.flush()

    app.telemetry._Lines = Later
    threading.Thread(target=write, daemon=True).start()


def measure(variant: str, mixes: dict[str, list[Path]]) -> dict[str, float]:
    """Images a second, by mix."""
    environment = {**os.environ, "MMTL_PORT": str(PORT), "MMTL_LOG_LEVEL": "INFO"}
    if variant == "freed memory kept":
        environment |= {"MALLOC_TRIM_THRESHOLD_": "268435456", "MALLOC_MMAP_THRESHOLD_": "33554432"}
    command = [sys.executable, "-m", "benchmarks.serving.steps", "--serve", variant]
    with tempfile.TemporaryFile("w+") as logged:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=logged)
        try:
            for _ in range(300):
                time.sleep(0.1)
                if process.poll() is not None:
                    break
                with suppress(OSError), urlopen(f"http://127.0.0.1:{PORT}/health/ready", None, 5):
                    return {mix: bench(mixes[mix]) for mix in MIXES}
            logged.seek(0)
            raise SystemExit(f"{variant}: the service did not start.\n{logged.read()[-1000:]}")
        finally:
            process.terminate()
            process.wait()


def bench(files: list[Path]) -> float:
    """Images a second."""
    command = [Path(sys.executable).with_name("mmtl"), "bench", f"http://127.0.0.1:{PORT}"]
    options = ["--clients", "32", "--seconds", str(SECONDS), "--json"]
    done = subprocess.run([*command, *files, *options], stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)["32"]
    if found["failed"] or found["refused"]:
        raise SystemExit(f"Not every request was answered: {found['statuses']}.")
    return float(found["images_per_second"])


def main() -> None:
    """Measure, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--serve", help="A variant, instead of measuring them all.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    mixes = make_images(arguments.data.resolve(), ROOT / "runs/bench-serve/images")
    variants = [AS_IT_IS, *UNDONE, *TRIED]
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    bar = tqdm(total=arguments.rounds * len(variants))
    for number in range(arguments.rounds):
        turned = variants[number % len(variants) :] + variants[: number % len(variants)]
        for variant in turned:
            for mix, rate in measure(variant, mixes).items():
                rates[variant, mix].append(rate)
            bar.update()
    bar.close()

    def row(variant: str, what: str) -> str:
        cells = []
        for mix in MIXES:
            own, whole = rates[variant, mix], rates[AS_IT_IS, mix]
            ratios = [a / b for a, b in zip(own, whole, strict=True)]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            cells.append(f"{median(own):.1f} | {median(ratios):.2f} ({spread})")
        return f"| {what} | {' | '.join(cells)} |"

    head = "| | small, images/s | of as it is | full size, images/s | of as it is |"
    print("# What each optimisation gives\n")
    print("<!-- Generated by `benchmarks/serving/steps.py`; do not edit. -->\n")
    print(
        f"32 clients, {CORES} cores ({processor()}), the int8 network in OpenVINO (but where it "
        f"says otherwise), {arguments.rounds} rounds of {SECONDS:g} "
        "seconds: medians, and the ratio to the service as it is in the same round: its median, "
        "lowest and highest. What spans 1 was not told apart from it; a slow round of the service "
        "as it is lifts all.\n"
    )
    print("## Kept: the service with one of them undone\n")
    print(f"{head}\n|---|---|---|---|---|")
    print(row(AS_IT_IS, AS_IT_IS))
    for variant, what in UNDONE.items():
        print(row(variant, what))
    print("\n## Tried, and not the default: the service with one of them added\n")
    print(f"{head}\n|---|---|---|---|---|")
    for variant, what in TRIED.items():
        print(row(variant, what))


if __name__ == "__main__":
    main()
