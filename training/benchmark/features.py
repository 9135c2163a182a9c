"""Features once: what every backbone makes of the images, cached on disk, each in its own process.

A process of its own bounds the memory (it is all given back), measures its peak, and a backbone
that fails or is killed takes no other with it.
"""

import json
import resource
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from models.files import write_atomically
from training.backbones import Classifier, Source, load_classifier
from training.data.cache import build_cache, open_cache
from training.data.manifest import DataError, Record, fingerprint
from training.zoo import Backbone

Floats = NDArray[np.floating]
# Of images of 224 x 224; fewer where they are larger.
BATCH_SIZE = 32
COST_BATCH_SIZES = (1, 32)
# A measurement that would take longer is not made.
_COST_SECONDS = 60.0
_COST_RUNS = 5


@dataclass(frozen=True, slots=True)
class Cost:
    """What a backbone takes on this machine at one batch size.

    Attributes:
        batch_size: Images at a time.
        images_per_second: Median of a few runs.
        peak_bytes: Of the process (of the GPU's memory, on one), weights included.
    """

    batch_size: int
    images_per_second: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Features:
    """What one backbone makes of the images.

    Attributes:
        backbone: With the normalisation that was used.
        source: Of its weights.
        device: That it ran on.
        costs: By batch size; without those that would have taken too long.
        penultimate: float32 [N, C].
        logits: float32 [N, 1000].
    """

    backbone: Backbone
    source: Source
    device: str
    costs: tuple[Cost, ...]
    penultimate: Floats
    logits: Floats


@dataclass(frozen=True, slots=True)
class Store:
    """The folder of the cached features."""

    folder: Path

    def path(self, backbone: Backbone) -> Path:
        """One backbone's file."""
        return self.folder / f"{backbone.name}.npz"

    def holds(self, backbone: Backbone, key: str) -> bool:
        """Whether its features of these weights and images are there, and whole."""
        try:
            with np.load(self.path(backbone)) as saved:
                return str(saved["key"]) == key
        except (OSError, ValueError, KeyError, BadZipFile):
            return False

    def save(self, features: Features, key: str) -> None:
        """Write the features, so that they are there as a whole or not at all."""
        about = {"device": features.device, "costs": [asdict(cost) for cost in features.costs]}
        with write_atomically(self.path(features.backbone)) as temporary, temporary.open("wb") as f:
            np.savez(
                f,
                key=key,
                about=json.dumps(about),
                penultimate=features.penultimate,
                logits=features.logits,
            )

    def load(self, backbone: Backbone, source: Source) -> Features:
        """Read the features."""
        with np.load(self.path(backbone)) as saved:
            about = json.loads(str(saved["about"]))
            return Features(
                backbone,
                source,
                about["device"],
                tuple(Cost(**cost) for cost in about["costs"]),
                saved["penultimate"],
                saved["logits"],
            )


Work = tuple[Backbone, Source]


def key_of(backbone: Backbone, source: Source, records: Sequence[Record]) -> str:
    """What features depend on: weights, preprocessing and images."""
    parts: dict[str, Any] = {
        "weights": source.label,
        "input": [backbone.input_size, *backbone.mean, *backbone.std],
        "data": fingerprint(records),
    }
    return json.dumps(parts)


def extract_all(
    work: Sequence[Work], records: Sequence[Record], store: Store, measure_costs: bool = True
) -> dict[str, str]:
    """Have every backbone's features in the store; what is there already stays.

    Args:
        work: The backbones and their weights.
        records: Of the images.
        store: To fill.
        measure_costs: Whether throughput and memory are measured, too.

    Returns:
        By name, why a backbone has none.

    Raises:
        DataError: An image cannot be read.
    """
    missing = [
        (backbone, source)
        for backbone, source in work
        if not store.holds(backbone, key_of(backbone, source, records))
    ]
    failed: dict[str, str] = {}
    # The estimate goes by the multiply-adds that remain.
    total = sum(backbone.multiply_adds for backbone, _ in missing)
    unit = "multiply-adds an image"
    with tqdm(total=total, desc="features", unit=unit, unit_scale=True, disable=not missing) as bar:
        for size, group in _by_size(missing):
            path = store.folder / f"pixels-{size}.npy"
            build_cache(path, records, size, size)
            for backbone, source in group:
                bar.set_postfix_str(backbone.name)
                reason = _in_own_process(backbone, source, records, store, path, measure_costs)
                if reason:
                    failed[backbone.name] = reason
                    tqdm.write(f"{backbone.name}: {reason}")
                bar.update(backbone.multiply_adds)
            # Pixels at 600 px are large, and all that needed these is done.
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)
    return failed


def extract(
    backbone: Backbone, source: Source, pixels: NDArray[np.uint8], measure_costs: bool
) -> Features:
    """Run a backbone over images of its input size: uint8 [N, S, S, 3].

    Raises:
        WeightsError: Its weights cannot be had or do not fit.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_classifier(backbone, source).to(device)
    costs = tuple(_costs(model, backbone.input_size, device)) if measure_costs else ()
    batch_size = max(1, round(BATCH_SIZE * (224 / backbone.input_size) ** 2))
    penultimate: list[Floats] = []
    logits: list[Floats] = []
    with torch.inference_mode():
        for start in range(0, len(pixels), batch_size):
            batch = torch.from_numpy(np.array(pixels[start : start + batch_size])).to(device)
            for parts, part in zip((penultimate, logits), model(batch), strict=True):
                parts.append(part.float().cpu().numpy())
    found = Features(
        backbone, source, str(device), costs, np.concatenate(penultimate), np.concatenate(logits)
    )
    if not (np.isfinite(found.penultimate).all() and np.isfinite(found.logits).all()):
        raise DataError("its features are not finite")
    return found


def _by_size(work: Sequence[Work]) -> Iterator[tuple[int, Iterable[Work]]]:
    ordered = sorted(work, key=lambda pair: (pair[0].input_size, pair[0].multiply_adds))
    return groupby(ordered, key=lambda pair: pair[0].input_size)


def _in_own_process(
    backbone: Backbone,
    source: Source,
    records: Sequence[Record],
    store: Store,
    pixels: Path,
    measure_costs: bool,
) -> str:
    """The reason why there are no features, or nothing."""
    # A process that is forked from a server without threads, which has torch imported already.
    context = get_context("forkserver")
    context.set_forkserver_preload(["training.benchmark.features"])
    key = key_of(backbone, source, records)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        arguments = (backbone, source, len(records), store, pixels, key, measure_costs)
        try:
            pool.submit(_extract_and_save, *arguments).result()
        except BrokenProcessPool:
            return "its process died; was there memory enough?"
        # Whatever one backbone fails with, the others go on.
        except Exception as error:
            return str(error).splitlines()[0] if str(error) else type(error).__name__
    return ""


def _extract_and_save(
    backbone: Backbone,
    source: Source,
    images: int,
    store: Store,
    pixels: Path,
    key: str,
    measure_costs: bool,
) -> None:
    store.save(extract(backbone, source, open_cache(pixels, images), measure_costs), key)


def _costs(model: Classifier, size: int, device: torch.device) -> Iterator[Cost]:
    last = 0.0
    for batch_size in COST_BATCH_SIZES:
        if last * batch_size > _COST_SECONDS:
            return
        images = torch.zeros(batch_size, size, size, 3, dtype=torch.uint8, device=device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds: list[float] = []
        # The first run of a shape is a warm-up, where there is time for more.
        while len(seconds) < 1 + _COST_RUNS and (not seconds or sum(seconds) < _COST_SECONDS / 4):
            started = time.perf_counter()
            with torch.inference_mode():
                model(images)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        last = statistics.median(seconds[1:] or seconds) / batch_size
        yield Cost(batch_size, 1 / last, _peak_bytes(device))


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
