"""FAMO: task weights under which every task's loss falls at the same rate.

Liu, Feng, Stone & Liu 2023, "FAMO: Fast Adaptive Multitask Optimization" (NeurIPS,
arXiv:2306.03792): one more forward pass a step, where weighing gradients needs a backward pass a
task.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

# The authors' own: of the weights' optimiser, and the least that a loss can be.
RATE = 0.025
DECAY = 0.01
LEAST = 1e-8


class Famo(nn.Module):
    """The weights of tasks, and the optimiser that moves them.

    Args:
        tasks: By name.
    """

    def __init__(self, tasks: Sequence[str]):
        super().__init__()
        self.tasks = list(tasks)
        # Buffers, so that they are saved with the loss and no other optimiser moves them.
        for name in ("logits", "mean", "square"):
            self.register_buffer(name, torch.zeros(len(tasks)))
        self.register_buffer("steps", torch.zeros(()))
        self._before: dict[str, Tensor] = {}

    def factors(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What to multiply each task's loss with, so that the logarithms' weighted sum falls.

        Args:
            losses: By task, of the whole batch; a task without labels in it is left out.
        """
        self._before = {task: loss.detach() for task, loss in losses.items()}
        shares = self._shares()
        each = {task: shares[task] / (loss + LEAST) for task, loss in self._before.items()}
        total = sum(each.values())
        return {task: value / total for task, value in each.items()}

    def follow(self, losses: Mapping[str, Tensor]) -> None:
        """Move the weights to the tasks that a step has improved least.

        Args:
            losses: By task, of the same batch after the step.
        """
        if not losses:
            return
        shares = self._shares()
        gained = {
            task: ((self._before[task] + LEAST) / (loss + LEAST)).log()
            for task, loss in losses.items()
        }
        present = sum(shares[task] for task in gained)
        mean = sum(shares[task] * gain for task, gain in gained.items()) / present
        # A task without labels says nothing of its weight.
        gradient = [shares[task] * (gained.get(task, mean) - mean) for task in self.tasks]
        adam(
            [self.get_buffer("logits")],
            [torch.stack(gradient)],
            [self.get_buffer("mean")],
            [self.get_buffer("square")],
            [],
            [self.get_buffer("steps")],
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=RATE,
            weight_decay=DECAY,
            eps=1e-8,
            maximize=False,
        )

    def _shares(self) -> dict[str, Tensor]:
        shares = self.get_buffer("logits").softmax(0).unbind()
        return dict(zip(self.tasks, shares, strict=True))
