"""The processes that fit one network together, as torchrun starts them; or one alone."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from training.data.manifest import DataError
from training.losses import Part, labels_of
from training.tasks import Targets

T = TypeVar("T")

ANSWER_WITHIN = timedelta(seconds=2)
# The others wait while one asks the teachers or validates; of a process that died, torchrun tells.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Team:
    """This process among those that fit one network together.

    Attributes:
        rank: From 0, which leads: it validates, writes and reports.
        size: Processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process validates, writes and reports."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """To train on: this process's GPU where there are GPUs."""
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cpu")

    def share(self, batch: Sequence[T]) -> Sequence[T]:
        """What of a batch this process works on."""
        return batch[self.rank :: self.size]

    def part(self, targets: Targets) -> Part | None:
        """How much of the whole batch the images of these targets are; None where they are all."""
        if self.size == 1:
            return None
        here = labels_of(targets)
        weights = targets.weights
        images = len(targets.classes["melanoma"]) if weights is None else float(weights.sum())
        counts = self.sum(torch.tensor([*here.values(), images], dtype=torch.float64))
        everywhere = dict(zip(here, counts.tolist(), strict=False))
        return Part(
            {task: count / everywhere[task] for task, count in here.items() if everywhere[task]},
            images / float(counts[-1]),
            1 / self.size,
            self.sum,
        )

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes."""
        if self.size == 1:
            return values
        values = values.to(self.device, copy=True)
        distributed.all_reduce(values)
        return values.cpu()

    def told(self, value: T | None) -> T:
        """What the leader says."""
        said: list[Any] = [value]
        if self.size > 1:
            distributed.broadcast_object_list(said)
        found: T = said[0]
        return found

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The leader runs the block, then the others."""
        if not self.leads:
            self.told(None)
        yield
        if self.leads:
            self.told(None)

    def join(self, step: nn.Module) -> nn.Module:
        """A step whose gradients are the mean over all processes, in each of them."""
        if self.size == 1:
            return step
        # Not every batch has a label for every head.
        return DistributedDataParallel(
            step, forward_sync_buffers=False, find_unused_parameters=True
        )

    @contextmanager
    def gradients(self, step: nn.Module, shared: bool) -> Iterator[None]:
        """A step's block; its gradients stay with this process unless they are shared."""
        if isinstance(step, DistributedDataParallel) and not shared:
            with step.no_sync():
                yield
        else:
            yield

    @contextmanager
    def draws(self, images: int) -> Iterator[None]:
        """A block that draws what one process would draw for a batch of so many images."""
        if self.size == 1:
            yield
        else:
            with WholeBatchDraws(self, images):
                yield


@contextmanager
def gather() -> Iterator[Team]:
    """The team that torchrun's variables name; without them, this process alone.

    Raises:
        DataError: There are more processes on this machine than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team()
        return
    if torch.cuda.is_available():
        device, gpus = Team().device, torch.cuda.device_count()
        if device.index >= gpus:
            raise DataError(
                f"This machine has {gpus} GPUs, and this is its process {device.index + 1}: start "
                f"one for each (--nproc-per-node {gpus})."
            )
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=meet(store, rank, size),
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
    )
    yield Team(distributed.get_rank(), distributed.get_world_size())
    # Not where it failed: the others may wait for this one, which torchrun ends with its process.
    distributed.destroy_process_group()


def meet(store: Store, rank: int, size: int) -> Store:
    """A part of a store that these processes alone know.

    torchrun gives the processes it starts again the store of those before them (pytorch issue
    135712), where one may take a dead process's address for its successor's. So the leader names
    itself anew, and answers those who greet it by that name: a dead one's name gets no answer.
    """
    me = uuid4().hex
    if rank == 0:
        store.set("leader", me)
        for other in range(1, size):
            store.set(f"{me}/{store.get(f'{me}/{other}').decode()}", "welcome")
        return PrefixStore(me, store)
    while True:
        leader = store.get("leader").decode()
        store.set(f"{leader}/{rank}", me)
        with suppress(distributed.DistStoreError):
            store.wait([f"{leader}/{me}"], ANSWER_WITHIN)
            return PrefixStore(leader, store)


class WholeBatchDraws(TorchFunctionMode):
    """Dropout and stochastic depth as one process would draw them for the whole batch.

    Every process draws for all images, from the same seed, and takes those of its own.

    Args:
        team: Whose process this is.
        images: In the whole batch.
    """

    def __init__(self, team: Team, images: int):
        super().__init__()
        self._images = images
        self._own = torch.arange(images)[team.rank :: team.size]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Any function of torch within the block."""
        kwargs = kwargs or {}
        if func is functional.dropout:
            return self._dropout(*args, **kwargs)
        if func is Tensor.bernoulli_ and len(args[0]) == len(self._own):
            empty = args[0].new_empty(self._images, *args[0].shape[1:])
            return args[0].copy_(empty.bernoulli_(*args[1:], **kwargs)[self._own])
        return func(*args, **kwargs)

    def _dropout(
        self, values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or not p:  # Swin asks for nothing to be dropped of other shapes
            return values
        ones = values.new_ones(self._images, *values.shape[1:])
        return values * functional.dropout(ones, p)[self._own]
