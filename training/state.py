"""What a checkpoint holds: network, its average, loss, optimiser, schedule and progress."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from models.bundle import Bundle
from models.cores import has_amx
from models.files import write_atomically
from training.config import Config, Precision
from training.data.manifest import DataError, Record, fingerprint
from training.distillation import name_of
from training.losses import MultiTaskLoss
from training.network import MultiTaskNetwork
from training.run import Run


class State:
    """Of a run, after a whole epoch.

    Args:
        network: Freshly built.
        loss: Freshly built.
        config: Of the run.
        images: To train on, for the steps of an epoch.
        device: To train on.
    """

    def __init__(
        self,
        network: MultiTaskNetwork,
        loss: MultiTaskLoss,
        config: Config,
        images: int,
        device: torch.device,
    ):
        self.config = config
        self.device = device
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own gap
        averaging = partial(_average, config.ema_decay)
        self.average = AveragedModel(self.network, multi_avg_fn=averaging, use_buffers=True)
        self.loss = loss.to(device)
        self.optimizer = torch.optim.AdamW(
            [
                *_backbone_groups(network.backbone, config),
                *_groups(network.trunk.parameters(), config.learning_rate, config),
                *_groups(network.heads.parameters(), config.learning_rate, config),
                *_groups(loss.parameters(), config.learning_rate, config),
            ],
            fused=True,
        )
        batches = max(images // config.batch_size, 1)
        self.steps = math.ceil(batches / config.accumulate)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: warmup_cosine(step / self.steps, config.warmup_epochs, config.epochs),
        )
        self.precision = precision_on(device.type, config)
        self.epoch = 0
        self.best = -math.inf
        self.stale = 0
        self.history: list[dict[str, str]] = []

    @property
    def finished(self) -> bool:
        """Whether there is no epoch left, or no hope of a better one."""
        return is_finished(self.epoch, self.stale, self.config)

    @property
    def learning_rate(self) -> float:
        """Of the heads, in the last step."""
        epoch = (self.scheduler.last_epoch - 1) / self.steps
        share = warmup_cosine(epoch, self.config.warmup_epochs, self.config.epochs)
        return self.config.learning_rate * share

    def advance(self, score: float) -> None:
        """Count a whole epoch with its validation AUROC."""
        self.epoch += 1
        self.stale = 0 if score > self.best else self.stale + 1
        self.best = max(self.best, score)

    def save(self, run: Run, identity: dict[str, Any]) -> None:
        """Write the checkpoint."""
        parts = {name: getattr(self, name).state_dict() for name in self._PARTS}
        progress = {name: getattr(self, name) for name in self._PROGRESS}
        save_tensors(run.checkpoint, {"identity": identity, **parts, **progress})

    def resume(self, run: Run, identity: dict[str, Any]) -> None:
        """Go on where the run's checkpoint is, if there is one.

        Raises:
            DataError: It is damaged, or of another configuration, other data or another version.
        """
        if not run.checkpoint.is_file():
            return
        saved = load_tensors(run.checkpoint, self.device)
        if missing := [n for n in ("identity", *self._PARTS, *self._PROGRESS) if n not in saved]:
            raise of_another_version(run.checkpoint, f"it has no {missing[0]}")
        if not belongs(saved, identity):
            raise DataError(
                f"{run.checkpoint} was made with another configuration or other data. "
                "Choose another folder with --run, or delete it and best.pt."
            )
        try:
            for name in self._PARTS:
                getattr(self, name).load_state_dict(saved[name])
        except (RuntimeError, ValueError, KeyError):
            raise of_another_version(run.checkpoint, "its parts are others") from None
        for name in self._PROGRESS:
            setattr(self, name, saved[name])
        check_best(run, self.best)
        tqdm.write(f"Resuming after epoch {self.epoch}.")

    _PARTS = ("network", "average", "loss", "optimizer", "scheduler")
    _PROGRESS = ("precision", "epoch", "best", "stale", "history")


def _average(
    decay: float, averages: list[Tensor], weights: list[Tensor], steps: Tensor | int
) -> None:
    """Move averages on by a step.

    The first steps' weights would be most of the average for a thousand steps, which a small
    dataset never takes: as in TensorFlow's ExponentialMovingAverage, few steps decay faster.
    """
    if not averages[0].is_floating_point():  # indices, of Swin's windows for one: no means of them
        for average, weight in zip(averages, weights, strict=True):
            average.copy_(weight)
        return
    decay = min(decay, (1 + float(steps)) / (10 + float(steps)))
    get_ema_multi_avg_fn(decay)(averages, weights, steps)  # type: ignore[no-untyped-call]  # torch's own gap


def is_finished(epoch: int, stale: int, config: Config) -> bool:
    """Whether a run is over after so many epochs, the last of them without a better one."""
    return epoch >= config.epochs or stale >= config.patience


def precision_on(device: str, config: Config) -> Precision:
    """The arithmetic that a configuration means on such a device (`cpu`, `cuda`)."""
    if config.precision != "auto":
        return config.precision
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = has_amx()
    return "bfloat16" if fast else "float32"


def identity_of(
    config: Config, records: Sequence[Record], teachers: Sequence[Bundle] = ()
) -> dict[str, Any]:
    """What a checkpoint belongs to: configuration, data and teachers."""
    identity = {"config": config.model_dump(), "data": fingerprint(records)}
    if teachers:
        identity["teachers"] = [name_of(teacher) for teacher in teachers]
    return identity


def belongs(checkpoint: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of this configuration (newer settings: default) and data."""
    saved = checkpoint.get("identity", {"config": {}})
    saved = {**saved, "config": Config().model_dump() | saved["config"]}
    return all(saved.get(name) == value for name, value in identity.items())


def of_another_version(path: Path, why: str) -> DataError:
    """What to say of a file of weights that does not fit this program."""
    return DataError(
        f"{path} was made by another version of mmtl ({why}). Delete checkpoint.pt and best.pt "
        "there, and fit again."
    )


def check_best(run: Run, best: float) -> None:
    """Whether the weights of the best epoch are there, where there was one.

    Raises:
        DataError: They are not; a run that goes on might never write them.
    """
    if best > -math.inf and not run.best.is_file():
        raise DataError(
            f"{run.best}, the best network of {run.folder}, is gone. Delete {run.checkpoint}, too, "
            "and fit again."
        )


def save_tensors(path: Path, values: Mapping[str, Any]) -> None:
    """Write what `load_tensors` reads, whole or not at all.

    Raises:
        DataError: It cannot be written; what was there before is kept.
    """
    # In memory first: of a full disk, torch says `unexpected pos 576 vs 534`.
    buffer = BytesIO()
    torch.save(values, buffer)
    try:
        with write_atomically(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); what was fitted before is kept. "
            "Make room, and fit again."
        ) from None


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save_tensors` wrote.

    Raises:
        DataError: The file is damaged.
    """
    try:
        saved: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # a damaged pickle raises whatever its bytes happen to call
        raise DataError(
            f"{path} is damaged. Delete checkpoint.pt and best.pt there, and fit again."
        ) from None
    if not isinstance(saved, dict):
        raise of_another_version(path, "it holds no tensors by name")
    return saved


def warmup_cosine(epoch: float, warmup: float, epochs: int) -> float:
    """Linear from 0 to 1 over `warmup` epochs, then a half cosine down to 0 at `epochs`."""
    if epoch < warmup:
        return (epoch + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min((epoch - warmup) / max(epochs - warmup, 1e-9), 1)))


def _backbone_groups(backbone: torch.nn.Module, config: Config) -> list[dict[str, Any]]:
    """Slower than the heads, and its first layers slower than its last ones."""
    rate = config.learning_rate * config.backbone_rate
    if config.first_layer_rate == 1:
        return _groups(backbone.parameters(), rate, config)
    # Layers stand in the order in which they are made, which is that in which they are used.
    layers = [own for m in backbone.modules() if (own := list(m.parameters(recurse=False)))]
    last = max(len(layers) - 1, 1)
    return [
        group
        for number, layer in enumerate(layers)
        for group in _groups(layer, rate * config.first_layer_rate ** (1 - number / last), config)
    ]


def _groups(
    parameters: Iterable[torch.nn.Parameter], rate: float, config: Config
) -> list[dict[str, Any]]:
    """Weights decay; biases, norms and the loss's own parameters do not."""
    parameters = list(parameters)
    decay = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    return [
        {"params": chosen, "lr": rate, "weight_decay": weight_decay}
        for chosen, weight_decay in ((decay, config.weight_decay), (plain, 0.0))
        if chosen
    ]
