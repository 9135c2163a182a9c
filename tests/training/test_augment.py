from typing import get_args

import pytest
import torch

from tests.lesions import draw_lesion
from training.augment import (
    Hairs,
    Jpeg,
    Resolution,
    Ruler,
    drawn_from,
    mix,
    training_transform,
)
from training.config import Augmentation


def image() -> torch.Tensor:
    return torch.from_numpy(draw_lesion(0, 64, 64)).permute(2, 0, 1)


@pytest.mark.parametrize("augmentation", get_args(Augmentation))
def test_a_sample_of_an_epoch_is_always_drawn_alike(augmentation: Augmentation) -> None:
    transform = training_transform(64, 48, augmentation)

    def look(*place: int) -> torch.Tensor:
        with drawn_from(*place):
            return transform(image())

    first = look(0, 3, 7)
    torch.rand(5)
    assert torch.equal(look(0, 3, 7), first)
    for other in ((1, 3, 7), (0, 4, 7), (0, 3, 8)):
        assert not torch.equal(look(*other), first)
    assert (first.shape, first.dtype) == ((3, 48, 48), torch.uint8)


def test_the_caller_s_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with drawn_from(0, 0, 0):
        training_transform(64, 64)(image())
    assert torch.equal(torch.rand(3), expected)


def test_resolution_and_jpeg_lose_detail_and_keep_the_picture() -> None:
    for transform in (Resolution(0.4), Jpeg(40, 60)):
        changed = transform(image())
        difference = (changed.int() - image().int()).abs().float()
        assert (changed.shape, changed.dtype) == ((3, 64, 64), torch.uint8)
        assert 0 < difference.mean() < 8


@pytest.mark.parametrize("occlusion", [Hairs(10), Ruler()], ids=["hairs", "ruler"])
def test_what_lies_on_the_skin_covers_a_part_of_it(occlusion: torch.nn.Module) -> None:
    covered = set()
    for seed in range(20):
        torch.manual_seed(seed)
        plain = torch.full((3, 64, 64), 200, dtype=torch.uint8)
        drawn = occlusion(plain)
        assert (drawn.shape, drawn.dtype) == (plain.shape, torch.uint8)
        covered.add(float((drawn != plain).any(dim=0).float().mean()))
    assert min(covered) > 0
    assert max(covered) < 0.5
    assert len(covered) > 10


def test_a_mixture_is_both_images_in_proportion() -> None:
    torch.manual_seed(0)
    one, other = (torch.full((3, 40, 40), value, dtype=torch.uint8) for value in (200, 0))
    for _ in range(20):
        mixed, share = mix(one, other, "mixup", 0.4)
        assert mixed.unique().tolist() == [round(200 * share)]
        assert 0 < share < 1


def test_a_cut_and_pasted_rectangle_counts_by_its_area() -> None:
    torch.manual_seed(0)
    one, other = (torch.full((3, 40, 40), value, dtype=torch.uint8) for value in (200, 0))
    for _ in range(20):
        mixed, share = mix(one, other, "cutmix", 1.0)
        assert set(mixed.unique().tolist()) <= {0, 200}
        assert float((mixed == 200).float().mean()) == pytest.approx(share, abs=0.011)
        rows = (mixed[0] == 0).any(dim=1).sum() * (mixed[0] == 0).any(dim=0).sum()
        assert int(rows) == int((mixed[0] == 0).sum())
