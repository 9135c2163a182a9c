"""One masked loss a task, each the mean over the images that have its label."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from models.bundle import AGE_GRID
from training.data.manifest import Record
from training.data.vocabulary import Sex, Site
from training.network import DIAGNOSES

MISSING = -1
# Melanoma is what the network is for; the others regularise the trunk and are reported.
WEIGHTS = {"melanoma": 1.0, "diagnosis": 1.0, "age": 0.1, "site": 0.3, "sex": 0.1}


@dataclass(frozen=True, slots=True)
class Targets:
    """Class numbers by task, int64 [N]; MISSING where the label is not known."""

    classes: dict[str, Tensor]

    def take(self, indices: Tensor) -> "Targets":
        """The targets of some of the images."""
        return Targets({task: values[indices] for task, values in self.classes.items()})

    def to(self, device: torch.device) -> "Targets":
        """The targets on another device."""
        return Targets({task: values.to(device) for task, values in self.classes.items()})


def encode_targets(records: Sequence[Record]) -> Targets:
    """The labels of a manifest as class numbers, ages on ISIC's 5-year grid (nearest below)."""
    sites, sexes, diagnoses = list(Site), list(Sex), list(DIAGNOSES)

    def encode(record: Record) -> tuple[int, ...]:
        age = MISSING
        if record.age is not None:
            age = max(i for i, years in enumerate(AGE_GRID) if years <= record.age)
        return (
            MISSING if record.melanoma is None else int(record.melanoma),
            age,
            MISSING if record.site is None else sites.index(record.site),
            MISSING if record.sex is None else sexes.index(record.sex),
            diagnoses.index(record.diagnosis) if record.diagnosis in diagnoses else MISSING,
        )

    table = torch.tensor([encode(record) for record in records]).reshape(-1, 5)
    names = ("melanoma", "age", "site", "sex", "diagnosis")
    return Targets({name: table[:, column] for column, name in enumerate(names)})


def multi_task_loss(logits: dict[str, Tensor], targets: Targets) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum of the tasks' losses.

    Args:
        logits: By task, as `MultiTaskNetwork` gives them.
        targets: Of the same images.

    Returns:
        The loss to minimise, and each task's own for the log. A task without a label among these
        images contributes nothing.
    """
    total = torch.zeros((), device=logits["melanoma"].device)
    parts = {}
    for task, weight in WEIGHTS.items():
        classes = targets.classes[task]
        known = classes != MISSING
        if not known.any():
            continue
        loss = _LOSSES.get(task, functional.cross_entropy)(logits[task][known], classes[known])
        total = total + weight * loss
        parts[task] = float(loss.detach())
    return total, parts


def _binary(logits: Tensor, classes: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits[:, 0], classes.float())


def _ordinal(logits: Tensor, classes: Tensor) -> Tensor:
    """The exact negative log-likelihood of the continuation-ratio model."""
    steps = torch.arange(logits.shape[1], device=logits.device)
    reached = steps[None, :] <= classes[:, None]
    goes_on = (steps[None, :] < classes[:, None]).float()
    each = functional.binary_cross_entropy_with_logits(logits, goes_on, reduction="none")
    return (each * reached).sum(dim=1).mean()


_LOSSES = {"melanoma": _binary, "age": _ordinal}
