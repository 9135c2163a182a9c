"""From a data folder to a run folder: records, pixels, components and splits."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from training.data.cache import build_cache
from training.data.components import components
from training.data.duplicates import find_duplicates, thumbnails
from training.data.layouts import balanced, gather, ham10000, read_datasets
from training.data.manifest import DataError, save_manifest
from training.data.splits import assign_fixed, is_published_test
from training.run import Config, Run

TRAINED_ON = (ham10000.TITLE,)


def prepare(
    data: Path, run: Run, config: Config, trained_on: Sequence[str] = TRAINED_ON
) -> Counter[tuple[str, str]]:
    """Find every dataset below a folder, split what is to be used, and cache its pixels.

    Datasets that are not trained on still say which images belong together.

    Args:
        data: The folder that holds HAM10000 and, where they are there, other datasets.
        run: Where the manifest and the cache go.
        config: Frozen into the run.
        trained_on: Names of the datasets to learn from. The balanced set's `val` is tested on.

    Returns:
        Number of images by (dataset, split).

    Raises:
        DataError: The data does not fit, or the run folder holds another configuration.
    """
    records, listed = gather(read_datasets([data]))
    if any(balanced.is_part(r) for r in records) and not any(map(is_published_test, records)):
        raise DataError(f"{data} holds the balanced set without its val, which must be left out.")
    used = [
        position
        for position, record in enumerate(records)
        if record.path and (record.dataset in trained_on or is_published_test(record))
    ]
    if not any(records[i].dataset == ham10000.TITLE for i in used):
        raise DataError(
            f"{data} holds no images of HAM10000, which the network is validated and tested on."
        )
    if absent := set(trained_on) - {records[i].dataset for i in used}:
        raise DataError(
            f"{data} holds no images of {min(absent)}; found are "
            f"{', '.join(sorted({record.dataset for record in records if record.path}))}."
        )
    run.save_config(config)
    # Until the new one is written there is none: pixels and labels of two preparations never meet.
    run.manifest.unlink(missing_ok=True)
    pixels = build_cache(run.cache, [records[i] for i in used], config.size, config.size)
    # Ids alone miss copies that a dataset holds under another name, so pictures are compared, too.
    found = find_duplicates(thumbnails(lambda row: pixels[row], len(pixels)))
    pairs = [(used[pair.one], used[pair.other]) for pair in found]
    divided = assign_fixed(records, components(records, pairs, listed))
    manifest = [divided[i] for i in used]
    save_manifest(run.manifest, manifest)
    return Counter((record.dataset, str(record.split)) for record in manifest)
