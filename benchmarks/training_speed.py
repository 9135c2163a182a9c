"""How fast an epoch goes: mmtl beside loops over timm's and torchvision's loaders.

.venv/bin/python benchmarks/training_speed.py ../shared/data > docs/training-speed.md

Same images, same backbone (EfficientNet-Lite0, 160 px), batches of 32, AdamW, two workers, each in
a process of its own and in turn, twice; medians. `timm` is `timm.data.create_loader(...,
is_training=True)` with its defaults, `torchvision` an `ImageFolder` with the transforms of its
documented training recipe (RandomResizedCrop, horizontal flip, TrivialAugmentWide, normalisation).
Both train one head, the library's own; mmtl trains five. mmtl's first epoch decodes into its cache,
the others' every epoch decodes from the files. "Memory given back" is mmtl without
training/memory.py.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

VARIANTS = ("mmtl", "mmtl, memory given back", "timm", "torchvision")
SIZE, BATCH, WORKERS = 160, 32, 2
SMALL, LARGE = 384, 63
REPEATS = 2


def lay_out(data: Path, folder: Path) -> None:
    """Both sets as folders of classes, as the libraries want them."""
    small = sorted((data / "ham10000" / "HAM10000_images").glob("*.jpg"))[:SMALL]
    originals = sorted((data / "originals").glob("*.jpg"))
    large = [originals[number % len(originals)] for number in range(LARGE)]
    for name, paths in (("small", small), ("large", large)):
        for number, path in enumerate(paths):
            target = folder / name / str(number % 2) / f"{number}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def mmtl_epochs(folder: Path, keep_memory: bool) -> list[float]:
    """Seconds of the first epoch, cache included, and of the second."""
    import torch

    from training.config import Config
    from training.data.cache import build_cache
    from training.data.manifest import Record
    from training.data.vocabulary import Diagnosis, Sex, Site, Split
    from training.draws import AugmentedImages, draw
    from training.fit import build_network, train_one_epoch
    from training.losses import MultiTaskLoss
    from training.memory import keep_freed_memory
    from training.state import State
    from training.tasks import encode_targets
    from training.team import Team

    if keep_memory:
        keep_freed_memory()
    config = Config(size=SIZE, batch_size=BATCH)
    records = [
        Record(
            dataset="drawn",
            image=path.stem,
            path=str(path),
            melanoma=path.parent.name == "1",
            diagnosis=Diagnosis.MEL if path.parent.name == "1" else Diagnosis.NV,
            age=50,
            sex=Sex.FEMALE,
            site=Site.TORSO,
            split=Split.TRAIN,
        )
        for path in sorted(folder.glob("*/*.jpg"))
    ]
    targets = encode_targets(records)
    network = build_network(config)
    state = State(
        network, MultiTaskLoss(config, targets), config, len(records), torch.device("cpu")
    )
    times = []
    for epoch in range(2):
        began = time.perf_counter()
        pixels = build_cache(folder / "cache.npy", records, SIZE, SIZE)
        order = draw(list(range(len(records))), targets, config, epoch)
        images = AugmentedImages(pixels, order, config, epoch)
        train_one_epoch(state, images, targets, WORKERS, Team())
        times.append(time.perf_counter() - began)
    return times


def library_epochs(folder: Path, library: str) -> list[float]:
    """Seconds of the first epoch and of the second."""
    import timm
    import torch
    from timm.data import create_dataset, create_loader
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    if library == "timm":
        loader = create_loader(
            create_dataset("", str(folder), split="train"),
            input_size=(3, SIZE, SIZE),
            batch_size=BATCH,
            is_training=True,
            use_prefetcher=False,
            num_workers=WORKERS,
        )
    else:
        loader = DataLoader(
            ImageFolder(
                str(folder),
                v2.Compose(
                    [
                        v2.RandomResizedCrop(SIZE, antialias=True),
                        v2.RandomHorizontalFlip(),
                        v2.TrivialAugmentWide(),
                        v2.PILToTensor(),
                        v2.ToDtype(torch.float, scale=True),
                        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
                        v2.ToPureTensor(),
                    ]
                ),
            ),
            BATCH,
            shuffle=True,
            num_workers=WORKERS,
            drop_last=True,
        )
    network = timm.create_model("tf_efficientnet_lite0", num_classes=2)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
    loss = torch.nn.CrossEntropyLoss()
    network.train()
    times = []
    for _ in range(2):
        began = time.perf_counter()
        for images, classes in loader:
            optimizer.zero_grad()
            loss(network(images), classes).backward()
            optimizer.step()
        times.append(time.perf_counter() - began)
    return times


def measure(variant: str, folder: Path) -> list[float]:
    """In a process of its own."""
    (folder / "cache.npy").unlink(missing_ok=True)
    for note in folder.glob("cache*"):
        note.unlink()
    told = [sys.executable, __file__, "--one", variant, str(folder)]
    done = subprocess.run(told, capture_output=True, text=True, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--one", help="Of the variants: measure it here, and print its seconds.")
    arguments = parser.parse_args()
    if arguments.one:
        ours = arguments.one.startswith("mmtl")
        times = (
            mmtl_epochs(arguments.data, arguments.one == "mmtl")
            if ours
            else library_epochs(arguments.data, arguments.one)
        )
        print(json.dumps(times))
        return
    found: dict[tuple[str, str], list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        lay_out(arguments.data, Path(temporary))
        for repeat in range(REPEATS):
            for number in range(len(VARIANTS)):
                variant = VARIANTS[(number + repeat) % len(VARIANTS)]
                for size in ("small", "large"):
                    times = measure(variant, Path(temporary) / size)
                    found.setdefault((variant, size), []).append(times)
                    print(variant, size, [round(t, 1) for t in times], file=sys.stderr)
    batches = {"small": SMALL // BATCH * BATCH, "large": LARGE // BATCH * BATCH}
    medians = {
        key: [statistics.median(times[epoch] for times in runs) for epoch in (0, 1)]
        for key, runs in found.items()
    }
    rows = []
    for variant in VARIANTS:
        cells = [
            f"{batches[size] / medians[variant, size][epoch]:.1f}"
            for size in ("small", "large")
            for epoch in (0, 1)
        ]
        rows.append(f"| {variant} | {' | '.join(cells)} |")
    peers = [
        f"| mmtl / {peer} | "
        + " | ".join(
            f"{medians[peer, size][epoch] / medians['mmtl', size][epoch]:.2f}"
            for size in ("small", "large")
            for epoch in (0, 1)
        )
        + " |"
        for peer in VARIANTS[1:]
    ]
    head = "| | small, first epoch | small, second | full size, first epoch | full size, second |"
    print(f"""# Training speed

<!-- Generated by benchmarks/training_speed.py; do not edit. -->

{" ".join(islice((__doc__ or "").split(chr(10) + chr(10)), 2, 3)).strip()}

Images a second on two cores ({SMALL:,} images of 200 px, {LARGE} of 1,024 to 6,000 px), medians of
{REPEATS}:

{head}
|---|---|---|---|---|
{chr(10).join(rows)}

How many times as fast:

{head}
|---|---|---|---|---|
{chr(10).join(peers)}
""")


if __name__ == "__main__":
    main()
