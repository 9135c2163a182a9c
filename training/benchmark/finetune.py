"""Fine-tune a backbone in the probes' folds: what the cheaper scores have to foretell."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm

from training.backbones import Classifier, Source, load_classifier
from training.benchmark.features import BATCH_SIZE, load_arrays, save_arrays
from training.benchmark.probes import FOLDS, Study
from training.config import Config
from training.data.cache import build_cache
from training.data.manifest import DataError, Record
from training.draws import AugmentedImages, context_of
from training.fit import freeze_batch_norm
from training.zoo import Backbone

BACKBONE_RATE = 2e-4
HEAD_RATE = 2e-3
WEIGHT_DECAY = 0.02
# What of a recipe says how images are augmented.
_AUGMENTED = {"augmentation", "mixing", "mixing_concentration", "seed"}

Floats = NDArray[np.floating]


class _Tuned(nn.Module):
    """A backbone whose penultimate features go to one new output; its batch norm stays frozen."""

    def __init__(self, classifier: Classifier, channels: int):
        super().__init__()
        self.classifier = classifier
        self.head = nn.Linear(channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> logits [N]."""
        features, _ = self.classifier(images)
        logits: Tensor = self.head(features)
        return logits[:, 0]

    def train(self, mode: bool = True) -> "_Tuned":
        """Statistics of a few hundred images are worse than ImageNet's, and some are folded."""
        super().train(mode)
        freeze_batch_norm(self)
        return self


def finetune(
    backbone: Backbone,
    source: Source,
    channels: int,
    records: Sequence[Record],
    study: Study,
    folder: Path,
    key: str,
    epochs: int,
    workers: int = 2,
) -> Floats:
    """Held-out scores of every image, [N], fold by fold; a fold that is there is not done again.

    Args:
        backbone: To tune.
        source: Of the weights that it starts from.
        channels: Of its penultimate features.
        records: Of the images.
        study: Its folds and labels.
        folder: For the scores of finished folds.
        key: Of its features.
        epochs: Of one cycle of the learning rate.
        workers: Processes that augment images.

    Raises:
        DataError: The loss is not finite.
    """
    size = backbone.input_size
    pixels = build_cache(folder / f"pixels-{size}.npy", records, size, size)
    augmented = Config(size=size).model_dump(mode="json", include=_AUGMENTED)
    recipe = f"{BACKBONE_RATE} {HEAD_RATE} {WEIGHT_DECAY} {BATCH_SIZE} {augmented}"
    scores = np.empty(len(records))
    for fold in tqdm(range(FOLDS), f"fine-tune {backbone.name}", unit="fold"):
        held = np.flatnonzero(study.folds == fold)
        labels = f"labels {study.truth.tolist()} held {held.tolist()}"
        own_key = f"{key} epochs {epochs} {recipe} {labels}"
        path = folder / f"{backbone.name}-{fold}.npz"
        found = load_arrays(path, own_key, ("scores",))
        if found is None:
            train = np.flatnonzero(study.folds != fold).tolist()
            torch.manual_seed(fold)
            model = _Tuned(load_classifier(backbone, source), channels)
            done = _tune(model, pixels, study, train, held.tolist(), epochs, workers)
            found = {"scores": done}
            save_arrays(path, own_key, scores=done)
        scores[held] = found["scores"]
    return scores


def _tune(
    model: _Tuned,
    pixels: NDArray[np.uint8],
    study: Study,
    train: list[int],
    held: list[int],
    epochs: int,
    workers: int,
) -> Floats:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    groups = [
        {"params": model.classifier.parameters(), "lr": BACKBONE_RATE},
        {"params": model.head.parameters(), "lr": HEAD_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    batch_size = max(2, round(BATCH_SIZE * (224 / pixels.shape[1]) ** 2))
    steps = epochs * max(len(train) // batch_size, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
    )
    truth, config = torch.from_numpy(study.truth).float(), Config(size=pixels.shape[1])
    for epoch in range(epochs):
        model.train()
        order = torch.Generator().manual_seed(epoch)
        torch.manual_seed(epoch)
        images = AugmentedImages(pixels, [(position, 0) for position in train], config, epoch)
        loader = DataLoader(
            images,
            batch_size,
            shuffle=True,
            drop_last=len(train) >= batch_size,
            num_workers=workers,
            multiprocessing_context=context_of(workers),
            generator=order,
        )
        for batch, positions, *_ in loader:
            logits = model(batch.to(device))
            target = truth[positions].to(device)
            loss = functional.binary_cross_entropy_with_logits(logits, target)
            if not math.isfinite(loss.item()):
                raise DataError(f"The loss of fine-tuning is not finite in epoch {epoch + 1}.")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own gap
            optimizer.step()
            schedule.step()
    model.eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(held), batch_size):
            batch = torch.from_numpy(np.array(pixels[held[start : start + batch_size]])).to(device)
            parts.append(model(batch).float().cpu().numpy())
    return np.concatenate(parts)
