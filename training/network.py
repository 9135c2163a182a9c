"""M-MTL: a pretrained backbone, a shared trunk and one linear head a task.

The trunk is a 1x1 convolution and an activation before global pooling, and the heads are linear, so
that a prediction is a mean over places: that mean, taken apart again, is the heat map.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.bundle import AGE_GRID
from training.feature_maps import last_and_middle
from training.ood import FeatureDistance
from training.tasks import MELANOMA, TASKS

# Of the dihedral group: whether rows and columns are exchanged, and which are mirrored then.
VIEWS = tuple(
    (transposed, flipped) for transposed in (False, True) for flipped in ((), (0,), (1,), (0, 1))
)
_DROPOUT = 0.2


class MultiTaskNetwork(nn.Module):
    """Backbone -> trunk -> one head a task.

    Args:
        backbone: float32 [N, 3, H, W] -> features [N, C, h, w].
        channels: C.
        trunk_channels: Of the features that the heads share.
        mean: Of the normalisation that the backbone was pretrained with, per channel, 0 to 1.
        std: Likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        trunk_channels: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        self.backbone = backbone
        self.trunk = nn.Sequential(nn.Conv2d(channels, trunk_channels, 1), nn.SiLU())
        self.dropout = nn.Dropout(_DROPOUT)  # of the pooled features, in training
        self.heads = nn.ModuleDict(
            {task.name: nn.Linear(trunk_channels, task.outputs) for task in TASKS}
        )
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1))

    def leave_out(self, tasks: Iterable[str]) -> None:
        """Have heads that nothing teaches say nothing: each class, or age, is as likely as others.

        They stay so, as their losses have no gradient; drawn at random, they would make answers up,
        and that of the diagnosis half of the melanoma logit.
        """
        with torch.no_grad():
            for task in TASKS:
                if task.name in tasks:
                    head = cast(nn.Linear, self.heads[task.name])
                    head.weight.zero_()
                    head.bias.zero_()
                    if task.kind == "ordinal":  # of k classes left, one in k stops
                        left = torch.arange(task.classes, 1, -1)
                        head.bias.copy_((left - 1).log())

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the backbone sees last, before the trunk, and what it saw on the way.

        Args:
            images: 0 to 255, [N, 3, H, W], uint8 or float.

        Returns:
            float32 [N, C, h, w] and [N, C', h', w'], as `last_and_middle` has them.
        """
        return last_and_middle(self.backbone, self._normalised(images))

    def _normalised(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits by task, each [N, outputs]; `age` as `continuation_logits`."""
        features = self.trunk(self.backbone(self._normalised(images)))
        pooled = self.dropout(features.mean(dim=(2, 3)))
        return {name: head(pooled) for name, head in self.heads.items()}


def age_distribution(continuation_logits: Tensor) -> Tensor:
    """The probability of each age on ISIC's 5-year grid, by the continuation-ratio model.

    Logit k is that of P(age > grid[k] | age >= grid[k]), so that any logits give a distribution
    (Agresti, Analysis of Ordinal Categorical Data; Shi, Cao & Raschka 2023, CORN).

    Args:
        continuation_logits: float32 [N, G - 1].

    Returns:
        float32 [N, G], rows summing to 1.
    """
    goes_on = functional.logsigmoid(continuation_logits)
    stops = functional.logsigmoid(-continuation_logits)
    reached = torch.cumsum(goes_on, dim=1)
    before = torch.cat([torch.zeros_like(reached[:, :1]), reached[:, :-1]], dim=1)
    return torch.cat([before + stops, reached[:, -1:]], dim=1).exp()


def melanoma_log_odds(melanoma: Tensor, diagnosis: Tensor) -> Tensor:
    """The melanoma logit: the mean of what both heads say that know of it.

    On validation the diagnosis head, which has to tell each other diagnosis from melanoma, ranks a
    little better than the head that only knows melanoma and not, and their mean is between them; it
    also knows what images without a diagnosis taught.

    Args:
        melanoma: Logits of that head, [N, 1].
        diagnosis: Logits of that head, [N, 7].

    Returns:
        float32 [N].
    """
    against = diagnosis[:, MELANOMA] - _without_melanoma(diagnosis).logsumexp(dim=1)
    return (melanoma[:, 0] + against) / 2


def _turn(values: Tensor, rows: int, view: tuple[bool, tuple[int, ...]]) -> Tensor:
    """A view of squares whose rows are this dimension, and whose columns the next one."""
    transposed, flipped = view
    if transposed:
        values = values.transpose(rows, rows + 1)
    return values.flip([rows + side for side in flipped]) if flipped else values


def _turn_back(values: Tensor, rows: int, view: tuple[bool, tuple[int, ...]]) -> Tensor:
    transposed, flipped = view
    if flipped:
        values = values.flip([rows + side for side in flipped])
    return values.transpose(rows, rows + 1) if transposed else values


def _without_melanoma(values: Tensor) -> Tensor:
    return torch.cat([values[:, :MELANOMA], values[:, MELANOMA + 1 :]], dim=1)


class ServedNetwork(nn.Module):
    """The network as every artifact holds it: uint8 [N, H, W, 3] in, `Manifest.output_shapes` out.

    Args:
        network: Fitted.
        age_edges: The first age, in years, of every age bin but the first.
        distance: Fitted to the backbone's middle features of the training images, pooled.
        views: Of each image that are answered together, and take as many times the work: 1, 4 (its
            mirrorings) or 8 (the dihedral group: those and their transposes; the input is square).
    """

    OUTPUTS = (
        "melanoma_logit",
        "age",
        "age_years",
        "site",
        "sex",
        "diagnosis",
        "melanoma_map",
        "ood_score",
    )

    age_grid: Tensor
    age_bins: Tensor
    melanoma_bias: Tensor

    def __init__(
        self,
        network: MultiTaskNetwork,
        age_edges: Sequence[float],
        distance: FeatureDistance,
        views: int = 1,
    ):
        super().__init__()
        self.network = network
        self.views = VIEWS[:views]
        self.distance = distance
        grid = torch.tensor(AGE_GRID, dtype=torch.float32)
        bins = torch.bucketize(grid, torch.tensor(age_edges), right=True)
        self.register_buffer("age_grid", grid)
        self.register_buffer("age_bins", functional.one_hot(bins).float())
        with torch.no_grad():
            biases = {name: cast(Tensor, head.bias)[None] for name, head in network.heads.items()}
            nothing = melanoma_log_odds(biases["melanoma"], biases["diagnosis"])
        # The logit of an image without any feature.
        self.register_buffer("melanoma_bias", nothing[0].clone())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [N, H, W, 3] -> the outputs by name, in the order of `OUTPUTS`."""
        if len(self.views) == 1:
            return self._answer(images)
        seen = torch.cat([_turn(images, 1, view) for view in self.views])
        each = {
            name: values.reshape(len(self.views), images.shape[0], *values.shape[1:])
            for name, values in self._answer(seen).items()
        }
        # Each view's map is turned back before they are averaged.
        maps = zip(each["melanoma_map"].unbind(), self.views, strict=True)
        each["melanoma_map"] = torch.stack([_turn_back(one, 1, view) for one, view in maps])
        return {name: values.mean(dim=0) for name, values in each.items()}

    def _answer(self, images: Tensor) -> dict[str, Tensor]:
        heads = self.network.heads
        last, middle = self.network.maps(images.permute(0, 3, 1, 2))
        features = self.network.trunk(last)
        pooled = features.mean(dim=(2, 3))
        ages = age_distribution(heads["age"](pooled))
        diagnosis = heads["diagnosis"](pooled)
        logit = melanoma_log_odds(heads["melanoma"](pooled), diagnosis)
        return {
            "melanoma_logit": logit,
            "age": ages @ self.age_bins,
            "age_years": ages @ self.age_grid,
            "site": heads["site"](pooled).softmax(dim=1),
            "sex": heads["sex"](pooled).softmax(dim=1),
            "diagnosis": diagnosis.softmax(dim=1),
            "melanoma_map": self._map(features, diagnosis, logit),
            "ood_score": self.distance(middle.mean(dim=(2, 3))),
        }

    def _map(self, features: Tensor, diagnosis: Tensor, logit: Tensor) -> Tensor:
        """What each place adds to the melanoma logit, beside `melanoma_bias`.

        A place speaks for melanoma and against the other diagnoses, each as much as it is in
        question for this image. What is of no place (the logarithm that brings the others
        together is not linear) is spread evenly, so that the mean is exact.
        """
        own = cast(Tensor, self.network.heads["melanoma"].weight)
        against = cast(Tensor, self.network.heads["diagnosis"].weight)
        others = _without_melanoma(diagnosis).softmax(dim=1) @ _without_melanoma(against.T).T
        direction = (own + against[MELANOMA] - others) / 2
        places = (features * direction[:, :, None, None]).sum(dim=1)
        rest = logit - self.melanoma_bias - places.mean(dim=(1, 2))
        return places + rest[:, None, None]


class ServedEnsemble(nn.Module):
    """Several networks as every artifact holds them: each output is the mean over them.

    Args:
        members: Of the same input and outputs.
    """

    def __init__(self, members: Sequence[ServedNetwork]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """As `ServedNetwork`."""
        each = [member(images) for member in self.members]
        return {
            name: torch.stack([one[name] for one in each]).mean(dim=0)
            for name in ServedNetwork.OUTPUTS
        }
