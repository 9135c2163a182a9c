"""From a data folder to a run folder: records, pixels, components and splits."""

from collections import Counter
from pathlib import Path

from training.data import balanced, ham10000
from training.data.cache import build_cache
from training.data.manifest import DataError, save_manifest
from training.data.splits import assign, near_duplicates
from training.run import Config, Run


def prepare(data: Path, run: Run, config: Config) -> Counter[tuple[str, str]]:
    """Read HAM10000 (and the balanced set, where it is there), split it, and cache its pixels.

    Args:
        data: The folder that holds `ham10000/` and, where it is there, `balanced/`, which is only
            tested on.
        run: Where the manifest and the cache go.
        config: Frozen into the run.

    Returns:
        Number of images by (dataset, split).

    Raises:
        DataError: The data does not fit, or the run folder holds another configuration.
    """
    if not (data / "ham10000").is_dir():
        raise DataError(f"{data}/ham10000 does not exist. Give the folder that holds ham10000/.")
    training = ham10000.read(data / "ham10000")
    held_out = (
        balanced.read_validation_table(data / "balanced") if (data / "balanced").is_dir() else []
    )
    run.save_config(config)
    # Until the new one is written there is none: pixels and labels of two preparations never meet.
    run.manifest.unlink(missing_ok=True)
    # Rows with pixels first, so that they line up with the cache.
    held_out.sort(key=lambda record: not record.path)
    pictured = [record for record in held_out if record.path]
    pixels = build_cache(run.cache, [*training, *pictured], config.size, config.size)
    # Some images of the balanced set have no lesion id, so pictures are compared as well.
    training, held_out = assign(training, held_out, near_duplicates(pixels))
    records = [*training, *held_out[: len(pictured)]]
    save_manifest(run.manifest, records)
    return Counter((record.dataset, str(record.split)) for record in records)
