"""Features once: what every backbone makes of the images, cached on disk, each in its own process.

A process of its own bounds the memory (it is all given back), measures its peak, and a backbone
that fails or is killed takes no other with it.
"""

import fcntl
import hashlib
import json
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from models.cores import available_cores, processor
from models.files import write_atomically
from training.backbones import (
    BUILT_PLAIN,
    Classifier,
    Source,
    has_listed_normalisation,
    load_classifier,
)
from training.data.cache import build_cache, files_key, open_cache
from training.data.manifest import DataError, Record, first_line
from training.zoo import Backbone

Floats = NDArray[np.floating]
Work = tuple[Backbone, Source]

# Of images of 224 x 224; fewer where they are larger.
BATCH_SIZE = 32
COST_BATCH_SIZES = (1, 32)
# A measurement that would take longer is not made.
_COST_SECONDS = 60.0
_COST_RUNS = 5
# Folders of decoded images, and the file in one that is locked while it is used.
_PIXELS, _LOCK = "pixels-", "lock"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a backbone takes on one machine at one batch size.

    Attributes:
        batch_size: Images at a time.
        images_per_second: Median of a few runs.
        peak_bytes: Of the process, its weights and the runtime included; on a GPU, of its memory.
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
        costs: On this machine, by batch size; without those that would have taken too long.
        penultimate: float32 [N, C].
        logits: float32 [N, 1000].
    """

    backbone: Backbone
    source: Source
    costs: tuple[Cost, ...]
    penultimate: Floats
    logits: Floats


@dataclass(frozen=True, slots=True)
class Store:
    """The folder of the cached features, each file named for all that it depends on."""

    folder: Path

    def path(self, backbone: Backbone, key: str) -> Path:
        """One backbone's features."""
        return self.folder / f"{backbone.name}-{_short(key)}.npz"

    def costs_path(self, backbone: Backbone) -> Path:
        """What a backbone takes on this machine; its weights do not matter."""
        return self.folder / f"{backbone.name}-{_short(machine())}.json"

    def holds(self, backbone: Backbone, key: str) -> bool:
        """Whether its features of these weights and images are there."""
        return load_arrays(self.path(backbone, key), key, ()) is not None

    def holds_others(self, name: str) -> bool:
        """Whether there are features of a backbone, of any weights and images."""
        return any(self.folder.glob(f"{name}-*.npz"))

    def save(self, key: str, backbone: Backbone, penultimate: Floats, logits: Floats) -> None:
        """Write features, so that they are there as a whole or not at all."""
        save_arrays(self.path(backbone, key), key, penultimate=penultimate, logits=logits)

    def save_costs(self, backbone: Backbone, costs: Iterable[Cost]) -> None:
        """Write what it takes, as far as that is known; `keep_costs` when no more is to come."""
        with write_atomically(self._costs_so_far(backbone)) as temporary:
            temporary.write_text(json.dumps([asdict(cost) for cost in costs]))

    def forget_costs(self, backbone: Backbone) -> None:
        """Drop what was written and not kept."""
        self._costs_so_far(backbone).unlink(missing_ok=True)

    def keep_costs(self, backbone: Backbone) -> None:
        """Take what was written for the whole."""
        if self._costs_so_far(backbone).is_file():
            self._costs_so_far(backbone).replace(self.costs_path(backbone))

    def _costs_so_far(self, backbone: Backbone) -> Path:
        return self.costs_path(backbone).with_suffix(".some.json")

    def load(self, key: str, backbone: Backbone, source: Source) -> Features:
        """Read the features, and what they cost where that was measured.

        Raises:
            DataError: They are not there, or damaged.
        """
        found = load_arrays(self.path(backbone, key), key, ("penultimate", "logits"))
        if found is None:
            raise DataError(f"{self.path(backbone, key)} is damaged. Delete it and run again.")
        costs: tuple[Cost, ...] = ()
        if self.costs_path(backbone).is_file():
            costs = tuple(Cost(**c) for c in json.loads(self.costs_path(backbone).read_text()))
        return Features(backbone, source, costs, found["penultimate"], found["logits"])


def save_arrays(path: Path, key: str, **arrays: Floats) -> None:
    """Write arrays under a key."""
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        np.savez(file, key=np.array(key), **arrays)  # type: ignore[arg-type]  # its stub wants bools


def load_arrays(path: Path, key: str, names: Sequence[str]) -> dict[str, Floats] | None:
    """Read arrays, if the file is there, whole and of this key."""
    try:
        with np.load(path) as saved:
            if str(saved["key"]) != key:
                return None
            return {name: saved[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def machine() -> str:
    """What costs are measured on."""
    cores = f"{available_cores()} cores of {processor()}"
    return f"{torch.cuda.get_device_name()}, {cores}" if torch.cuda.is_available() else cores


def keys_of(work: Iterable[Work], records: Sequence[Record]) -> dict[str, str]:
    """What each backbone's features depend on, by name: weights, preprocessing, images in order.

    Raises:
        DataError: An image is not there.
    """
    images: dict[int, str] = {}
    keys = {}
    for backbone, source in work:
        size = backbone.input_size
        if size not in images:
            images[size] = files_key(records, size, size)
        parts: dict[str, Any] = {
            "weights": source.label,
            "normalisation": [*backbone.mean, *backbone.std],
            "images": images[size],
        }
        if backbone.name in BUILT_PLAIN and not has_listed_normalisation(backbone):
            parts["normalised"] = "once"  # as it was not always
        keys[backbone.name] = json.dumps(parts)
    return keys


def extract_all(
    work: Sequence[Work],
    keys: Mapping[str, str],
    records: Sequence[Record],
    store: Store,
) -> dict[str, str]:
    """Have every backbone's features in the store; what is there already stays.

    Several of these may fill one store, each with its own backbones.

    Args:
        work: The backbones and their weights.
        keys: Theirs.
        records: Of the images.
        store: To fill.

    Returns:
        By name, why a backbone has none.

    Raises:
        DataError: An image cannot be read.
    """
    missing = [pair for pair in work if not store.holds(pair[0], keys[pair[0].name])]
    failed: dict[str, str] = {}
    # The estimate goes by the multiply-adds that remain.
    total = sum(backbone.multiply_adds for backbone, _ in missing)
    unit = "multiply-adds an image"
    with (
        _own_folder(store.folder) as pixels,
        tqdm(total=total, desc="features", unit=unit, unit_scale=True, disable=not missing) as bar,
    ):
        for size, group in _by_size(missing):
            path = pixels / f"{size}.npy"
            build_cache(path, records, size, size)
            for backbone, source in group:
                bar.set_postfix_str(backbone.name)
                arguments = (backbone, source, len(records), store, path, keys[backbone.name])
                reason = in_own_process(extract_and_save, *arguments)
                if reason:
                    failed[backbone.name] = reason
                    tqdm.write(f"{backbone.name}: {reason}")
                bar.update(backbone.multiply_adds)
            # Pixels at 600 px are large, and all that needed these is done.
            path.unlink()
    return failed


def measure_all(backbones: Sequence[Backbone], store: Store) -> None:
    """Have throughput and memory of every backbone in the store; what is there already stays."""
    wanted = [backbone for backbone in backbones if not store.costs_path(backbone).is_file()]
    for backbone in tqdm(wanted, "costs", unit="net", disable=not wanted):
        store.forget_costs(backbone)  # of which a kill may have left some
        # A batch that does not fit is not measured; the ranking needs none.
        in_own_process(measure_and_save, backbone, store)
        store.keep_costs(backbone)


def extract_and_save(
    backbone: Backbone, source: Source, images: int, store: Store, pixels: Path, key: str
) -> None:
    """Run a backbone over images of its input size, and store what it makes of them.

    Raises:
        WeightsError: Its weights cannot be had or do not fit.
        DataError: Its features are not finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_classifier(backbone, source).to(device)
    cache = open_cache(pixels, images)
    batch_size = max(1, round(BATCH_SIZE * (224 / backbone.input_size) ** 2))
    parts: tuple[list[Floats], list[Floats]] = ([], [])
    with torch.inference_mode():
        for start in range(0, images, batch_size):
            batch = torch.from_numpy(np.array(cache[start : start + batch_size])).to(device)
            for found, part in zip(parts, model(batch), strict=True):
                found.append(part.float().cpu().numpy())
    penultimate, logits = (np.concatenate(part) for part in parts)
    if not (np.isfinite(penultimate).all() and np.isfinite(logits).all()):
        raise DataError("its features are not finite")
    store.save(key, backbone, penultimate, logits)


def measure_and_save(backbone: Backbone, store: Store) -> None:
    """Measure throughput and memory; after every batch size, so that a larger one may fail.

    They count when the process has ended (`Store.keep_costs`).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_classifier(backbone, Source("random", "random")).to(device)
    costs: list[Cost] = []
    for cost in _costs(model, backbone.input_size, device):
        costs.append(cost)
        store.save_costs(backbone, costs)


def in_own_process(function: Callable[..., None], *arguments: Any) -> str:
    """The reason why it failed, or nothing."""
    # Forked from a server without threads, which has torch imported already.
    context = get_context("forkserver")
    context.set_forkserver_preload(["training.benchmark.features"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        reason: str = ours.recv()
    except EOFError:
        reason = "its process died; was there memory enough?"
    process.join()
    return reason


def _report(to: Connection, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # Of Ctrl-C, which a terminal sends it, too: the one that waits for it ends, and this with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        function(*arguments)
        to.send("")
    # Whatever one backbone fails with, the others go on.
    except Exception as error:
        to.send(first_line(error))


def _by_size(work: Sequence[Work]) -> Iterator[tuple[int, Iterable[Work]]]:
    ordered = sorted(work, key=lambda pair: (pair[0].input_size, pair[0].multiply_adds))
    return groupby(ordered, key=lambda pair: pair[0].input_size)


@contextmanager
def _own_folder(store: Path) -> Iterator[Path]:
    """For pixels of this process; what killed ones left, whose lock is free, is removed."""
    store.mkdir(parents=True, exist_ok=True)
    for left in store.glob(f"{_PIXELS}*"):
        with suppress(OSError), (left / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    own = Path(tempfile.mkdtemp(prefix=_PIXELS, dir=store))
    with (own / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        try:
            yield own
        finally:
            shutil.rmtree(own, ignore_errors=True)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
