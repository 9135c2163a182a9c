"""What the network learns: one table entry a task."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from models.bundle import AGE_GRID
from training.data.manifest import Record
from training.data.vocabulary import Diagnosis, Sex, Site

MISSING = -1
# The seven classes of HAM10000, which has no invasive squamous cell carcinoma.
DIAGNOSES = tuple(diagnosis for diagnosis in Diagnosis if diagnosis is not Diagnosis.SCC)
MELANOMA = DIAGNOSES.index(Diagnosis.MEL)


@dataclass(frozen=True, slots=True)
class Task:
    """One head and its labels.

    Attributes:
        name: Of the head.
        kind: Decides the loss: a binary head has one output, a categorical one a class each, an
            ordinal one a step between neighbouring classes each.
        classes: How many.
        weight: Of its loss. Melanoma is what the network is for; the others regularise the trunk
            and are reported.
        read: A record's class, or None where it is not known.
    """

    name: str
    kind: Literal["binary", "categorical", "ordinal"]
    classes: int
    weight: float
    read: Callable[[Record], int | None]

    @property
    def outputs(self) -> int:
        """Of the head."""
        return self.classes if self.kind == "categorical" else self.classes - 1


def _age(record: Record) -> int | None:
    """On ISIC's 5-year grid, nearest below."""
    if record.age is None:
        return None
    return max(i for i, years in enumerate(AGE_GRID) if years <= record.age)


TASKS = (
    Task("melanoma", "binary", 2, 1.0, lambda r: None if r.melanoma is None else int(r.melanoma)),
    Task("diagnosis", "categorical", len(DIAGNOSES), 1.0, lambda r: _place(r.diagnosis, DIAGNOSES)),
    Task("age", "ordinal", len(AGE_GRID), 0.1, _age),
    Task("site", "categorical", len(Site), 0.3, lambda r: _place(r.site, list(Site))),
    Task("sex", "categorical", len(Sex), 0.1, lambda r: _place(r.sex, list(Sex))),
)


@dataclass(frozen=True, slots=True)
class Targets:
    """What to learn of N images.

    Attributes:
        classes: Class numbers by task, int64 [N]; MISSING where the label is not known.
        soft: What teachers say by task, float32 [N, classes]; empty without any.
        weights: How much each counts, float32 [N]; None for 1 each.
    """

    classes: dict[str, Tensor]
    soft: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None

    def without(self, tasks: Collection[str], positions: Sequence[int] | None = None) -> "Targets":
        """The same, as if no label of these tasks were known; of all images, or some."""
        left = dict(self.classes)
        for task in tasks:
            left[task] = left[task].clone()
            left[task][slice(None) if positions is None else list(positions)] = MISSING
        return replace(self, classes=left)

    def take(self, indices: Tensor) -> "Targets":
        """The targets of some of the images."""
        return self._each(lambda values: values[indices])

    def to(self, device: torch.device) -> "Targets":
        """The targets on another device."""
        return self._each(lambda values: values.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Targets":
        return Targets(
            {task: change(values) for task, values in self.classes.items()},
            {task: change(values) for task, values in self.soft.items()},
            None if self.weights is None else change(self.weights),
        )


def untaught(records: Sequence[Record]) -> list[str]:
    """Tasks that some images do not teach: they have no labels of it, or nothing to tell apart.

    That the only diagnosis known is melanoma (folders `melanoma` and `benign`), or that it alone is
    not, teaches that every image is one, or none; and the diagnosis is half of the melanoma logit.
    """
    return [task.name for task in TASKS if len(_told_apart(task, records)) < 2]


def without_untaught(
    targets: Targets, records: Sequence[Record], train: Sequence[int]
) -> tuple[Targets, set[str]]:
    """The targets without labels that teach nothing, and the tasks that nothing else teaches.

    What teachers answer of such a task is learned alone: beside it, labels that all say the same
    would still pull it their way. What validates stays, then.

    Args:
        targets: Of all images.
        records: Likewise.
        train: Positions of those that are trained on.
    """
    lacking = set(untaught([records[row] for row in train]))
    left_out = lacking - set(targets.soft)
    return targets.without(lacking, train).without(left_out), left_out


def _told_apart(task: Task, records: Sequence[Record]) -> set[int]:
    found = {label for record in records if (label := task.read(record)) is not None}
    return {int(label == MELANOMA) for label in found} if task.name == "diagnosis" else found


def encode_targets(records: Sequence[Record]) -> Targets:
    """The labels of a manifest as class numbers."""

    def encode(task: Task, record: Record) -> int:
        found = task.read(record)
        return MISSING if found is None else found

    return Targets(
        {
            task.name: torch.tensor([encode(task, r) for r in records], dtype=torch.int64)
            for task in TASKS
        }
    )


def _place(value: object, labels: Sequence[object]) -> int | None:
    return labels.index(value) if value in labels else None
