"""Fit M-MTL: warm-up and cosine, averaged weights, early stopping, a checkpoint every epoch."""

import csv
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from models.files import write_atomically
from training.augment import seeded, training_transform
from training.backbones import find_source
from training.data.cache import Pixels
from training.data.layouts import ham10000
from training.data.manifest import DataError, Record, fingerprint
from training.data.vocabulary import Split
from training.feature_maps import build_feature_map
from training.losses import Targets, encode_targets, multi_task_loss
from training.network import MultiTaskNetwork
from training.run import Config, Run, rows
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
    validation = rows(records, Split.VALIDATION, ham10000.TITLE)
    if not train or len(set(targets.classes["melanoma"][validation].tolist()) - {-1}) < 2:
        raise DataError(
            f"{run.manifest} must have training images, and validation images with and without "
            f"melanoma; it has {len(train)} and {len(validation)}."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = _State(build_network(config, pretrained), config, len(train), device)
    identity = identity_of(config, records)
    state.resume(run, identity)
    images = AugmentedImages(pixels, train, config)
    while not state.finished:
        started = time.monotonic()
        images.epoch = state.epoch
        losses = train_one_epoch(state, images, targets, workers)
        scores = validate(state.average.module, pixels, targets, validation)
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
        tqdm.write("  ".join(f"{name} {value}" for name, value in state.history[-1].items()))
    return state.best


def train_one_epoch(
    state: "_State", images: AugmentedImages, targets: Targets, workers: int
) -> dict[str, float]:
    """One pass over the training images; the mean of each task's loss.

    Raises:
        DataError: The loss is not finite.
    """
    config = state.config
    order = torch.Generator().manual_seed(config.seed * 1_000_003 + images.epoch)
    loader = DataLoader(
        images,
        config.batch_size,
        shuffle=True,
        drop_last=len(images) >= config.batch_size,
        num_workers=workers,
        generator=order,
    )
    state.network.train()
    torch.manual_seed(config.seed * 1_000_003 + images.epoch)
    sums: dict[str, float] = {}
    for batch, positions in tqdm(loader, f"epoch {images.epoch + 1}", unit="batch"):
        logits = state.network(batch.to(state.device).contiguous(memory_format=torch.channels_last))
        loss, parts = multi_task_loss(logits, targets.take(positions).to(state.device))
        if not math.isfinite(loss.item()):
            raise DataError(
                f"The loss of epoch {images.epoch + 1} is not finite; the last whole epoch is "
                "kept. Prepare another run with a lower --learning-rate."
            )
        state.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own gap
        state.optimizer.step()
        state.scheduler.step()
        state.average.update_parameters(state.network)
        for task, value in parts.items():
            sums[task] = sums.get(task, 0.0) + value / len(loader)
    return {f"train_{task}": value for task, value in sums.items()}


def validate(
    network: nn.Module, pixels: Pixels, targets: Targets, positions: list[int]
) -> dict[str, float]:
    """AUROC for melanoma and each task's loss on unaugmented images."""
    logits = predict_logits(network, pixels, positions)
    _, parts = multi_task_loss(logits, targets.take(torch.tensor(positions)))
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


def identity_of(config: Config, records: Sequence[Record]) -> dict[str, Any]:
    """What a checkpoint belongs to: configuration and data."""
    return {"config": asdict(config), "data": fingerprint(records)}


def belongs(checkpoint: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of this configuration (newer settings: default) and data."""
    saved = checkpoint["identity"]
    return bool({**saved, "config": asdict(Config()) | saved["config"]} == identity)


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `torch.save` wrote.

    Raises:
        DataError: The file is damaged.
    """
    try:
        saved: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        raise DataError(f"{path} is damaged ({error}). Delete it and fit again.") from None
    return saved


class _State:
    """What a checkpoint holds: network, its average, optimiser, schedule and progress."""

    def __init__(
        self, network: MultiTaskNetwork, config: Config, images: int, device: torch.device
    ):
        self.config = config
        self.device = device
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own gap
        averaging = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]  # torch's own gap
        self.average = AveragedModel(self.network, multi_avg_fn=averaging, use_buffers=True)
        decay = [p for p in network.parameters() if p.ndim > 1]
        plain = [p for p in network.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decay, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
        steps = max(images // config.batch_size, 1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: warmup_cosine(step / steps, config.warmup_epochs, config.epochs),
        )
        self.epoch = 0
        self.best = -math.inf
        self.stale = 0
        self.history: list[dict[str, str]] = []

    @property
    def finished(self) -> bool:
        return self.epoch >= self.config.epochs or self.stale >= self.config.patience

    def advance(self, score: float) -> None:
        self.epoch += 1
        self.stale = 0 if score > self.best else self.stale + 1
        self.best = max(self.best, score)

    def save(self, run: Run, identity: dict[str, Any]) -> None:
        parts = {name: getattr(self, name).state_dict() for name in self._PARTS}
        progress = {name: getattr(self, name) for name in self._PROGRESS}
        with write_atomically(run.checkpoint) as temporary:
            torch.save({"identity": identity, **parts, **progress}, temporary)

    def resume(self, run: Run, identity: dict[str, Any]) -> None:
        if not run.checkpoint.is_file():
            return
        saved = load_tensors(run.checkpoint, self.device)
        if not belongs(saved, identity):
            raise DataError(
                f"{run.checkpoint} was made with another configuration or other data. "
                "Choose another folder with --run, or delete it."
            )
        for name in self._PARTS:
            getattr(self, name).load_state_dict(saved[name])
        for name in self._PROGRESS:
            setattr(self, name, saved[name])
        tqdm.write(f"Resuming after epoch {self.epoch}.")

    _PARTS = ("network", "average", "optimizer", "scheduler")
    _PROGRESS = ("epoch", "best", "stale", "history")


def warmup_cosine(epoch: float, warmup: float, epochs: int) -> float:
    """Linear from 0 to 1 over `warmup` epochs, then a half cosine down to 0 at `epochs`."""
    if epoch < warmup:
        return (epoch + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min((epoch - warmup) / max(epochs - warmup, 1e-9), 1)))


def _write_log(run: Run, history: list[dict[str, str]]) -> None:
    with write_atomically(run.log) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
