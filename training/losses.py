"""One masked loss a task, each the mean over the images that have its label; and their balance."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.config import Config
from training.famo import Famo
from training.tasks import MISSING, TASKS, Targets, Task

FOCUS = 2.0
# What rare classes are made up for in: what the network is for, and its finer form.
_ADJUSTED = ("melanoma", "diagnosis")


@dataclass(frozen=True, slots=True)
class Part:
    """This process's shares (0 to 1) of a batch that several processes work on.

    Attributes:
        labels: Its share of the batch's labels, by task; a task that has none is left out.
        images: Its share of the images.
        processes: One over the number of processes.
        sum: Adds up a value over all processes.
    """

    labels: dict[str, float]
    images: float = 1.0
    processes: float = 1.0
    sum: Callable[[Tensor], Tensor] = lambda values: values


def labels_of(targets: Targets) -> dict[str, float]:
    """How many images have a label, by task; each as much as it counts."""
    known = {task: classes != MISSING for task, classes in targets.classes.items()}
    if targets.weights is None:
        return {task: int(found.sum()) for task, found in known.items()}
    return {task: float(targets.weights[found].sum()) for task, found in known.items()}


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
        self.famo = Famo([task.name for task in TASKS]) if config.task_balancing == "famo" else None

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
        part = part or _whole(targets)
        losses, parts = self._losses(logits, targets, part)
        factors = self.famo.factors(_everywhere(losses, part)) if self.famo is not None else {}
        total = torch.zeros((), device=logits["melanoma"].device)
        for task in TASKS:
            if (loss := losses.get(task.name)) is None:
                continue
            if self.balance is not None:
                variance = self.balance[task.name]
                loss = torch.exp(-variance) * loss + part.processes * variance / 2
            total = total + task.weight * factors.get(task.name, 1.0) * loss
        return total, parts

    @torch.no_grad()
    def follow(self, logits: dict[str, Tensor], targets: Targets, part: Part | None = None) -> None:
        """Let FAMO see how far a step has moved each task's loss, on the images of that step.

        Args:
            logits: After the step.
            targets: Of the same images.
            part: Of the batch that they are.
        """
        if self.famo is not None:
            part = part or _whole(targets)
            losses, _ = self._losses(logits, targets, part)
            self.famo.follow(_everywhere(losses, part))

    def _losses(
        self, logits: dict[str, Tensor], targets: Targets, part: Part
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Each task's loss with its teachers, and that of its labels alone."""
        losses, parts = {}, {}
        for task in TASKS:
            classes = targets.classes[task.name]
            known = classes != MISSING
            soft = targets.soft.get(task.name) if self.training else None
            if soft is None and task.name not in part.labels:
                continue
            loss = logits[task.name].new_zeros(())
            if known.any():
                each = self._each(task, logits[task.name][known], classes[known])
                loss = part.labels[task.name] * _mean(each, targets.weights, known)
            if task.name in part.labels:
                parts[task.name] = float(loss.detach())
            if soft is not None:
                each = _cross_entropy(self._class_logits(task, logits[task.name]), soft)
                taught = part.images * _mean(each, targets.weights)
                loss = (1 - self.distillation) * loss + self.distillation * taught
            losses[task.name] = loss
        return losses, parts

    def _each(self, task: Task, logits: Tensor, classes: Tensor) -> Tensor:
        if task.kind == "ordinal":
            return ordinal_losses(logits, classes)
        each = _cross_entropy(self._class_logits(task, logits), classes)
        if task.name in _ADJUSTED and self.training and self.imbalance == "focal":
            return (1 - torch.exp(-each)) ** FOCUS * each
        return each

    def _class_logits(self, task: Task, logits: Tensor) -> Tensor:
        """A logit a class, adjusted in training; what teachers answer has the classes' shares, too.

        A binary task's logit is made two, so that what is done is written once.
        """
        if task.kind == "binary":
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        if task.name in _ADJUSTED and self.training and self.imbalance == "logit_adjustment":
            prior: Tensor = self.get_buffer(f"prior_{task.name}")
            logits = logits + prior
        return logits


def _whole(targets: Targets) -> Part:
    return Part({task: 1.0 for task, count in labels_of(targets).items() if count})


def _everywhere(losses: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
    """The losses of the whole batch."""
    if not losses:
        return losses
    summed = part.sum(torch.stack([loss.detach() for loss in losses.values()]))
    return dict(zip(losses, summed.unbind(), strict=True))


def _mean(each: Tensor, weights: Tensor | None, rows: Tensor | slice = slice(None)) -> Tensor:
    if weights is None:
        return each.mean()
    return (each * weights[rows]).sum() / weights[rows].sum()


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    return functional.cross_entropy(logits, classes, reduction="none")


def ordinal_losses(logits: Tensor, classes: Tensor) -> Tensor:
    """The exact negative log-likelihoods of the continuation-ratio model, [N].

    Args:
        logits: As `age_distribution` takes them, [N, G - 1].
        classes: int64 [N], 0 to G - 1.
    """
    steps = torch.arange(logits.shape[1], device=logits.device)
    reached = steps[None, :] <= classes[:, None]
    goes_on = (steps[None, :] < classes[:, None]).float()
    each = functional.binary_cross_entropy_with_logits(logits, goes_on, reduction="none")
    return (each * reached).sum(dim=1)
