"""Fit M-MTL: the loop over epochs, batches and validation images."""

import csv
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, WeightedRandomSampler
from tqdm import tqdm

from models.files import write_atomically
from training.augment import seeded, training_transform
from training.backbones import find_source
from training.config import Config
from training.data.cache import Pixels
from training.data.manifest import DataError
from training.data.vocabulary import Split
from training.feature_maps import build_feature_map
from training.losses import MultiTaskLoss
from training.network import MultiTaskNetwork
from training.plots import curves
from training.run import Run, rows
from training.state import State, identity_of
from training.tasks import MISSING, Targets, encode_targets
from training.zoo import choose


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Training images of one epoch; image and position, each drawn from (seed, epoch, sample)."""

    def __init__(self, pixels: Pixels, positions: list[int], config: Config):
        self.pixels = pixels
        self.positions = positions
        self.seed = config.seed
        self.epoch = 0
        self.transform = training_transform(config.size)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        position = self.positions[item]
        image = torch.from_numpy(np.array(self.pixels[position])).permute(2, 0, 1)
        return seeded(self.transform, image, self.seed, self.epoch, position), position


def build_network(config: Config, pretrained: bool = True) -> MultiTaskNetwork:
    """The network of a configuration, its heads drawn from the seed.

    Raises:
        training.backbones.WeightsError: The pretrained weights are missing.
    """
    torch.manual_seed(config.seed)
    (entry,) = choose([config.backbone])
    source = None
    if pretrained:
        weights_dir = Path(config.weights_dir) if config.weights_dir else None
        source, entry = find_source(entry, weights_dir)
    backbone, channels, mean, std = build_feature_map(entry, source, config.drop_path)
    return MultiTaskNetwork(backbone, channels, config.trunk_channels, mean, std)


def fit(run: Run, workers: int = 2, pretrained: bool = True) -> float:
    """Fit the run's network, from its checkpoint where there is one.

    Args:
        run: Prepared. Its log, checkpoint and best weights are written.
        workers: Processes that augment images.
        pretrained: Start from ImageNet weights.

    Returns:
        The best validation AUROC for melanoma.

    Raises:
        DataError: The run is not prepared, has no image to train on, or its loss is not finite.
    """
    config = run.load_config()
    records, pixels = run.load_data()
    targets = encode_targets(records)
    train = rows(records, Split.TRAIN)
    validation = rows(records, Split.VALIDATION, config.validate_on)
    if not train or len(set(targets.classes["melanoma"][validation].tolist()) - {-1}) < 2:
        raise DataError(
            f"{run.manifest} must have training images, and validation images with and without "
            f"melanoma; it has {len(train)} and {len(validation)}."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loss = MultiTaskLoss(config, targets.take(torch.tensor(train)))
    state = State(build_network(config, pretrained), loss, config, len(train), device)
    identity = identity_of(config, records)
    state.resume(run, identity)
    images = AugmentedImages(pixels, train, config)
    while not state.finished:
        started = time.monotonic()
        images.epoch = state.epoch
        losses = train_one_epoch(state, images, targets, workers)
        scores = validate(state.average.module, state.loss, pixels, targets, validation)
        improved = scores["validation_auroc"] > state.best
        if improved:
            with write_atomically(run.best) as temporary:
                torch.save(state.average.module.state_dict(), temporary)
        state.advance(scores["validation_auroc"])
        row = {
            "epoch": state.epoch,
            "learning_rate": state.scheduler.get_last_lr()[0],
            **losses,
            **scores,
            "seconds": time.monotonic() - started,
        }
        state.history.append({name: f"{value:.6g}" for name, value in row.items()})
        state.save(run, identity)
        _write_log(run, state.history)
        with write_atomically(run.curves) as temporary:
            temporary.write_text(curves(state.history))
        tqdm.write("  ".join(f"{name} {value}" for name, value in state.history[-1].items()))
    return state.best


def train_one_epoch(
    state: State, images: AugmentedImages, targets: Targets, workers: int
) -> dict[str, float]:
    """One pass over the training images; the mean of each task's loss.

    Raises:
        DataError: The loss is not finite.
    """
    config, network = state.config, state.network
    order = torch.Generator().manual_seed(config.seed * 1_000_003 + images.epoch)
    loader = DataLoader(
        images,
        config.batch_size,
        sampler=sampler(images.positions, targets, config, order),
        drop_last=len(images) >= config.batch_size,
        num_workers=workers,
        generator=order,
    )
    state.loss.train()
    set_mode(network, config, images.epoch)
    torch.manual_seed(config.seed * 1_000_003 + images.epoch)
    sums: dict[str, float] = {}
    bar = tqdm(loader, f"epoch {images.epoch + 1}", unit="batch")
    for number, (batch, positions) in enumerate(bar, start=1):
        logits = network(batch.to(state.device).contiguous(memory_format=torch.channels_last))
        loss, parts = state.loss(logits, targets.take(positions).to(state.device))
        if not math.isfinite(loss.item()):
            raise DataError(
                f"The loss of epoch {images.epoch + 1} is not finite; the last whole epoch is "
                "kept. Prepare another run with a lower --learning-rate."
            )
        (loss / config.accumulate).backward()
        for task, value in parts.items():
            sums[task] = sums.get(task, 0.0) + value / len(loader)
        if number % config.accumulate == 0 or number == len(loader):
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.scheduler.step()
            state.average.update_parameters(network)
    return {f"train_{task}": value for task, value in sums.items()}


def sampler(
    positions: list[int], targets: Targets, config: Config, generator: torch.Generator
) -> Sampler[int]:
    """The order of one epoch; balanced, it draws both classes alike often, with replacement."""
    if config.imbalance != "balanced_sampling":
        return RandomSampler(positions, generator=generator)
    melanoma = targets.classes["melanoma"][positions]
    known = melanoma != MISSING
    counts = torch.bincount(melanoma[known], minlength=2).clamp(min=1)
    weights = torch.full((len(positions),), 1 / len(positions), dtype=torch.float64)
    weights[known] = (known.sum() / (2 * counts[melanoma[known]])).double() / len(positions)
    return WeightedRandomSampler(weights.tolist(), len(positions), generator=generator)


def set_mode(network: MultiTaskNetwork, config: Config, epoch: int) -> None:
    """Training mode, but for what is frozen in this epoch."""
    frozen = epoch < config.frozen_epochs
    network.train()
    network.backbone.requires_grad_(not frozen)
    if frozen:
        network.backbone.eval()
    elif config.freeze_batch_norm:
        for module in network.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def validate(
    network: nn.Module,
    loss: MultiTaskLoss,
    pixels: Pixels,
    targets: Targets,
    positions: list[int],
) -> dict[str, float]:
    """AUROC for melanoma and each task's loss on unaugmented images."""
    logits = predict_logits(network, pixels, positions)
    _, parts = loss.cpu().eval()(logits, targets.take(torch.tensor(positions)))
    loss.to(next(network.parameters()).device)
    melanoma = targets.classes["melanoma"][positions]
    known = melanoma >= 0
    auroc = roc_auc_score(melanoma[known], logits["melanoma"][known, 0])
    return {"validation_auroc": float(auroc)} | {f"validation_{k}": v for k, v in parts.items()}


@torch.inference_mode()
def predict_logits(
    network: nn.Module, pixels: Pixels, positions: list[int], batch_size: int = 64
) -> dict[str, Tensor]:
    """The logits of some images, by task, on the CPU."""
    network.eval()
    device = next(network.parameters()).device
    parts = [
        {task: value.cpu() for task, value in network(batch.to(device).permute(0, 3, 1, 2)).items()}
        for batch in batches(pixels, positions, batch_size)
    ]
    return {task: torch.cat([part[task] for part in parts]) for task in parts[0]}


def batches(pixels: Pixels, positions: list[int], size: int) -> Iterator[Tensor]:
    """uint8 [n, H, W, 3] at a time."""
    for start in range(0, len(positions), size):
        batch: NDArray[np.uint8] = np.stack([pixels[i] for i in positions[start : start + size]])
        yield torch.from_numpy(batch)


def _write_log(run: Run, history: list[dict[str, str]]) -> None:
    with write_atomically(run.log) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
