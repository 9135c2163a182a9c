"""How fast an epoch goes: mmtl beside loops over timm's and torchvision's loaders.

.venv/bin/python -m benchmarks.training_speed ../shared/data ../shared/weights > training-speed.md

Same images, same backbone, 160 px, batches of 32, AdamW, two workers, each in a process of its own
and in turn; medians. `timm` is `timm.data.create_loader(..., is_training=True)` with its
defaults, `torchvision` an `ImageFolder` with the transforms of its documented training recipe
(RandomResizedCrop, horizontal flip, TrivialAugmentWide, normalisation). Both train one head, the
library's own; mmtl trains five. mmtl's first epoch decodes into its cache, on every core, the
others' every epoch decodes from the files. The libraries' arithmetic is float32, as it is unless
one asks for another; mmtl's is what it takes unless told otherwise (`precision`), "in float32" mmtl
with `precision = "float32"`. With `--ablations`, "memory given back" is mmtl without
training/memory.py, "PyTorch's gradients" mmtl without training/gradients.py, and "timm, in
bfloat16" timm's loop under torch.autocast.
"The step alone" is mmtl's network on images that are there already, in turns of its own: but for
what a shared machine differs by from one turn to the next, no input could make an epoch faster.
With EfficientNet-Lite0 the step takes most of an epoch here, with MobileNetV3-Small the
input. The input alone is the same epochs without a network: what two cores can feed to a GPU.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from models.cores import processor

STEP_ALONE = "the step alone"
FLOAT32 = "mmtl, in float32"
GIVEN_BACK = "mmtl, memory given back"
PLAIN_GRADIENTS = "mmtl, PyTorch's gradients"
TIMM_MIXED = "timm, in bfloat16"
LIBRARIES = ("timm", "torchvision", TIMM_MIXED)
VARIANTS = ("mmtl", FLOAT32, "timm", "torchvision", STEP_ALONE)
ABLATIONS = (GIVEN_BACK, PLAIN_GRADIENTS, TIMM_MIXED)
# Nothing of a network.
WITHOUT_NETWORK = ("mmtl", GIVEN_BACK, "timm", "torchvision")
SIZE, BATCH, WORKERS = 160, 32, 2
# Heavy for two cores, and light for them; and the input without a network.
BACKBONES = ("tf_efficientnet_lite0", "tf_mobilenetv3_small_100")
INPUT_ALONE = "none"
# Whole batches, as the last one is dropped.
IMAGES = {"small": 384, "large": 640}
IMAGES_ALONE = {"small": 3200, "large": 320}
# Without a network, libraries and mmtl may be close.
REPEATS, REPEATS_ALONE = 2, 4


def lay_out(data: Path, folder: Path, size: str, count: int) -> None:
    """A set as a folder of classes, as the libraries want it."""
    found = data / ("ham10000/HAM10000_images" if size == "small" else "originals")
    paths = sorted(found.glob("*.jpg"))
    for number in range(count):
        target = folder / str(number % 2) / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(paths[number % len(paths)], target)


def images_of(backbone: str) -> dict[str, int]:
    """How many, by size."""
    return IMAGES_ALONE if backbone == INPUT_ALONE else IMAGES


def mmtl_epochs(
    folder: Path, variant: str, backbone: str = BACKBONES[0], weights: str = ""
) -> list[float]:
    """Seconds of the first epoch, cache included, and of the second."""
    import torch
    from torch.utils.data import DataLoader

    from training import fit
    from training.config import Config
    from training.data.cache import build_cache
    from training.data.manifest import Record
    from training.data.vocabulary import Diagnosis, Sex, Site, Split
    from training.draws import AugmentedImages, draw
    from training.losses import MultiTaskLoss
    from training.memory import keep_freed_memory
    from training.state import State
    from training.tasks import encode_targets
    from training.team import Team

    if variant != GIVEN_BACK:
        keep_freed_memory()
    if variant == PLAIN_GRADIENTS:
        fit.FasterGradients = nullcontext
    named = {} if backbone == INPUT_ALONE else {"backbone": backbone, "weights_dir": weights}
    if variant == FLOAT32:
        named["precision"] = "float32"
    config = Config(size=SIZE, batch_size=BATCH, **named)
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
    if train := backbone != INPUT_ALONE:
        state = State(
            fit.build_network(config),
            MultiTaskLoss(config, targets),
            config,
            len(records),
            torch.device("cpu"),
        )
    if variant == STEP_ALONE:
        there = torch.randint(256, (SIZE, SIZE, 3), dtype=torch.uint8), 0, 0, 1.0
        AugmentedImages.__getitem__ = lambda *_: there
        build_cache(folder / "cache.npy", records, SIZE, SIZE)
    workers = 0 if variant == STEP_ALONE else WORKERS
    times = []
    for epoch in range(2):
        began = time.perf_counter()
        pixels = build_cache(folder / "cache.npy", records, SIZE, SIZE)
        order = draw(list(range(len(records))), targets, config, epoch)
        images = AugmentedImages(pixels, order, config, epoch)
        if train:
            fit.train_one_epoch(state, images, targets, workers, Team())
        else:
            deque(DataLoader(images, BATCH, num_workers=WORKERS, drop_last=True), 0)
        times.append(time.perf_counter() - began)
    return times


def library_epochs(folder: Path, library: str, backbone: str) -> list[float]:
    """Seconds of the first epoch and of the second."""
    import timm
    import torch
    from timm.data import create_dataset, create_loader
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    if library != "torchvision":
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
    if train := backbone != INPUT_ALONE:
        network = timm.create_model(backbone, num_classes=2).train()
        optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
        loss = torch.nn.CrossEntropyLoss()
    times = []
    for _ in range(2):
        began = time.perf_counter()
        if not train:
            deque(loader, 0)
        for images, classes in loader if train else ():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=library == TIMM_MIXED):
                value = loss(network(images), classes)
            value.backward()
            optimizer.step()
        times.append(time.perf_counter() - began)
    return times


def measure(variant: str, backbone: str, weights: str, folder: Path) -> list[float]:
    """In a process of its own."""
    for file in folder.glob("cache*"):
        file.unlink()
    module = [sys.executable, "-m", "benchmarks.training_speed"]
    told = [*module, str(folder), weights, "--one", variant, backbone]
    done = subprocess.run(told, stdout=subprocess.PIPE, text=True, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", help="Folder of NAME.pth; what is not there is downloaded.")
    parser.add_argument(
        "--ablations", action="store_true", help="Measure mmtl without parts of it."
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        variant, backbone = arguments.one
        if variant in LIBRARIES:
            times = library_epochs(arguments.data, variant, backbone)
        else:
            times = mmtl_epochs(arguments.data, variant, backbone, arguments.weights)
        print(json.dumps(times))
        return
    variants = VARIANTS + ABLATIONS if arguments.ablations else VARIANTS
    seconds: dict[tuple[str, str, str], list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for backbone in (*BACKBONES, INPUT_ALONE):
            for size, count in images_of(backbone).items():
                folder = Path(temporary) / f"{backbone}-{size}"
                lay_out(arguments.data, folder, size, count)
                for repeat in range(REPEATS_ALONE if backbone == INPUT_ALONE else REPEATS):
                    first = repeat % len(variants)
                    for variant in variants[first:] + variants[:first]:
                        if backbone != INPUT_ALONE or variant in WITHOUT_NETWORK:
                            times = measure(variant, backbone, arguments.weights, folder)
                            seconds.setdefault((backbone, variant, size), []).append(times)
                            told = [round(t, 1) for t in times]
                            print(backbone, variant, size, told, file=sys.stderr)
    from training.config import Config
    from training.state import precision_on

    precision = precision_on("cpu", Config())
    print(f"""# Training speed

<!-- Generated by benchmarks/training_speed.py; do not edit. -->

{" ".join(islice((__doc__ or "").split(chr(10) + chr(10)), 2, 3)).strip()}

Images a second on {len(os.sched_getaffinity(0))} cores ({processor()}), where mmtl takes
{precision}; medians of {REPEATS} ({REPEATS_ALONE} of the input alone), and how many times as fast
mmtl is; small images are of 200 px, full-size ones of 1,024 to 6,000 px.""")
    for backbone in (*BACKBONES, INPUT_ALONE):
        small, large = images_of(backbone).values()
        name = "The input alone" if backbone == INPUT_ALONE else f"`{backbone}`"
        print(f"\n{name}, {small:,} small images and {large} full-size ones:\n")
        print(table(seconds, backbone))


def table(seconds: dict[tuple[str, str, str], list[list[float]]], backbone: str) -> str:
    """Images a second of each variant, and mmtl's ratio to it."""
    rates = {
        variant: [
            count / statistics.median(times[epoch] for times in seconds[backbone, variant, size])
            for size, count in images_of(backbone).items()
            for epoch in (0, 1)
        ]
        for variant in VARIANTS + ABLATIONS
        if (backbone, variant, "small") in seconds
    }
    rows = [
        " | ".join(
            [f"| {variant}"]
            + [
                f"{rate:.1f} ({mmtl / rate:.2f})"
                for rate, mmtl in zip(own, rates["mmtl"], strict=True)
            ]
        )
        + " |"
        for variant, own in rates.items()
    ]
    head = "| | small, first epoch | small, second | full size, first epoch | full size, second |"
    return "\n".join([head, "|---|---|---|---|---|", *rows])


if __name__ == "__main__":
    main()
