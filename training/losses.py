"""One masked loss a task, each the mean over the images that have its label; and their balance."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.config import Config
from training.tasks import MISSING, TASKS, Targets, Task

FOCUS = 2.0
# What rare classes are made up for in: what the network is for, and its finer form.
_ADJUSTED = ("melanoma", "diagnosis")


@dataclass(frozen=True, slots=True)
class Part:
    """How much of a batch is here, where several processes share one.

    Attributes:
        labels: Of the batch's labels, by task; a task that has none is left out.
        images: Of its images.
        processes: Of the processes.
    """

    labels: dict[str, float]
    images: float = 1.0
    processes: float = 1.0


def labels_of(targets: Targets) -> dict[str, int]:
    """How many images have a label, by task."""
    return {task: int((classes != MISSING).sum()) for task, classes in targets.classes.items()}


class MultiTaskLoss(nn.Module):
    """The weighted sum of the tasks' losses.

    Args:
        config: Its imbalance and task balancing.
        targets: Of the training images, whose shares of each class logit adjustment needs.
    """

    def __init__(self, config: Config, targets: Targets):
        super().__init__()
        self.imbalance = config.imbalance
        self.distillation = config.distillation
        for task in TASKS:
            if task.name in _ADJUSTED:
                classes = targets.classes[task.name]
                counts = torch.bincount(classes[classes != MISSING], minlength=task.classes)
                # A class that is nowhere counts as half an image: its logit stays finite.
                shares = counts.clamp(min=0.5) / counts.sum().clamp(min=1)
                self.register_buffer(f"prior_{task.name}", shares.log())
        # The logarithm of each task's variance (Kendall et al. 2018), zero at first.
        self.balance = (
            nn.ParameterDict({task.name: nn.Parameter(torch.zeros(())) for task in TASKS})
            if config.task_balancing == "uncertainty"
            else None
        )

    def forward(
        self, logits: dict[str, Tensor], targets: Targets, part: Part | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """What to minimise, and each task's own loss for the log.

        A task without a label among these images, and without a teacher, contributes nothing. In
        training, a taught task's loss is shared between label and teachers; its own part in the log
        is that of the labels.

        Args:
            logits: By task, as `MultiTaskNetwork` gives them.
            targets: Of the same images.
            part: Of the batch that they are; None where they are all. The sum over all parts is
                what the whole batch gives.
        """
        if part is None:
            part = Part({task: 1.0 for task, count in labels_of(targets).items() if count})
        total = torch.zeros((), device=logits["melanoma"].device)
        parts = {}
        for task in TASKS:
            classes = targets.classes[task.name]
            known = classes != MISSING
            soft = targets.soft.get(task.name) if self.training else None
            if soft is None and task.name not in part.labels:
                continue
            loss = total.new_zeros(())
            if known.any():
                loss = self._loss(task, logits[task.name][known], classes[known])
                loss = part.labels[task.name] * loss
            if task.name in part.labels:
                parts[task.name] = float(loss.detach())
            if soft is not None:
                taught = functional.cross_entropy(_class_logits(task, logits[task.name]), soft)
                taught = part.images * taught
                loss = (1 - self.distillation) * loss + self.distillation * taught
            if self.balance is not None:
                variance = self.balance[task.name]
                loss = torch.exp(-variance) * loss + part.processes * variance / 2
            total = total + task.weight * loss
        return total, parts

    def _loss(self, task: Task, logits: Tensor, classes: Tensor) -> Tensor:
        if task.kind == "ordinal":
            return ordinal_loss(logits, classes)
        logits = _class_logits(task, logits)
        if task.name not in _ADJUSTED or not self.training:
            return functional.cross_entropy(logits, classes)
        if self.imbalance == "logit_adjustment":
            prior: Tensor = self.get_buffer(f"prior_{task.name}")
            logits = logits + prior
        each = functional.cross_entropy(logits, classes, reduction="none")
        if self.imbalance == "focal":
            each = (1 - torch.exp(-each)) ** FOCUS * each
        return each.mean()


def _class_logits(task: Task, logits: Tensor) -> Tensor:
    """A logit a class: a binary task's as two, so that what is done is written once."""
    if task.kind == "binary":
        return torch.cat([torch.zeros_like(logits), logits], dim=1)
    return logits


def ordinal_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """The exact negative log-likelihood of the continuation-ratio model.

    Args:
        logits: As `age_distribution` takes them, [N, G - 1].
        classes: int64 [N], 0 to G - 1.
    """
    steps = torch.arange(logits.shape[1], device=logits.device)
    reached = steps[None, :] <= classes[:, None]
    goes_on = (steps[None, :] < classes[:, None]).float()
    each = functional.binary_cross_entropy_with_logits(logits, goes_on, reduction="none")
    return (each * reached).sum(dim=1).mean()
