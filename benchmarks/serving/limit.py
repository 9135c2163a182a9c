"""The limit: decode and infer in a bare loop without HTTP, on the same cores with perfect batches.

Run by compare.py in mmtl's environment, with the settings (MMTL_*) of the service that it is the
limit of: images in turn from files, mmtl's decoder, the engine that the service runs.

    limit.py SECONDS THREADS BATCH IMAGE... -> one line of JSON

Batches are no larger than the engine's own.
"""

import json
import statistics
import sys
import threading
import time
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from app.engines import open_engine
from app.settings import load_settings
from models.bundle import load_bundle
from models.images import decode


def main(seconds: float, threads: int, batch: int, paths: list[str]):
    """Every thread takes a batch of images, decodes them and runs the network on them."""
    settings = load_settings()
    bundle = load_bundle(settings.bundle)
    _, engine = open_engine(bundle, settings)
    batch = min(batch, engine.batch)
    size = bundle.manifest.input.height, bundle.manifest.input.width
    images = cycle([Path(path).read_bytes() for path in paths])
    turn = threading.Lock()
    spans: list[float] = []
    start = time.monotonic() + 0.5
    began = 0.0

    def work() -> None:
        nonlocal began
        while (now := time.monotonic()) < start + seconds:
            if now >= start and not began:
                began = time.process_time()
            with turn:
                taken = list(islice(images, batch))
            pixels = np.stack([decode(data, *size).pixels for data in taken])
            engine.run(pixels)
            if now >= start:
                spans.append(time.monotonic() - now)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    took, cpu = time.monotonic() - start, time.process_time() - began
    count = len(spans) * batch
    print(
        json.dumps(
            {
                "images_per_second": count / took,
                "p50_ms": 1000 * statistics.median(spans) / batch,
                "cpu_ms_per_image": 1000 * cpu / count,
            }
        )
    )


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
