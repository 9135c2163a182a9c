"""The limit: decode and infer in a bare loop without HTTP, on the same cores with perfect batches.

Run by compare.py in mmtl's environment, with the settings (MMTL_*) of the service that it is the
limit of: images in turn from files, mmtl's decoder, the engine that the service runs.

    limit.py SECONDS THREADS BATCH IMAGE... -> one line of JSON

Batches are no larger than the engine's own, and no more of them run at once than in the service;
threads beyond that decode meanwhile. One thread with batches of one has the machine to itself, and
runs each image as the service runs one that is alone.
"""

import json
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from app.engines import open_engine
from app.settings import load_settings
from app.telemetry import configure_logs
from models.bundle import load_bundle
from models.images import decode

_WARM_UP_SECONDS = 1.0


def main(seconds: float, threads: int, batch: int, paths: list[str]):
    """Every thread takes a batch of images, decodes them and runs the network on them."""
    configure_logs("WARNING")  # not beside the line that is read
    settings = load_settings()
    bundle = load_bundle(settings.bundle)
    _, engine = open_engine(bundle, settings)
    batch = min(batch, engine.batch)
    run = engine.run_alone if threads == batch == 1 else engine.run
    size = bundle.manifest.input.height, bundle.manifest.input.width
    images = cycle([Path(path).read_bytes() for path in paths])
    turn = threading.Lock()
    runs = threading.Semaphore(engine.runs_at_once)
    spans: list[float] = []
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            with turn:
                taken = list(islice(images, batch))
            began = time.monotonic()
            pixels = np.stack([decode(data, *size).pixels for data in taken])
            with runs:
                run(pixels)
            spans.append(time.monotonic() - began)

    pool = ThreadPoolExecutor(threads)
    workers = [pool.submit(work) for _ in range(threads)]
    # What ends in the measured time counts, as it does for a service.
    time.sleep(_WARM_UP_SECONDS)
    before, start, cpu = len(spans), time.monotonic(), time.process_time()
    time.sleep(seconds)
    took, cpu = time.monotonic() - start, time.process_time() - cpu
    measured = spans[before:]
    over.set()
    for worker in workers:
        worker.result()  # or what it failed with
    count = len(measured) * batch
    print(
        json.dumps(
            {
                "images_per_second": count / took,
                "p50_ms": 1000 * statistics.median(measured) / batch,
                "cpu_ms_per_image": 1000 * cpu / count,
                "threads": threads,
            }
        )
    )


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
