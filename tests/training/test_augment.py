from typing import get_args

import pytest
import torch
from torchvision.transforms import v2

from tests.lesions import draw_lesion
from training.augment import (
    Blur,
    Colour,
    Framing,
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
    transform = training_transform(48, augmentation)

    def look(*place: int) -> torch.Tensor:
        with drawn_from(*place):
            return transform(image())

    first = look(0, 3, 7)
    torch.rand(5)
    assert torch.equal(look(0, 3, 7), first)
    for other in ((1, 3, 7), (0, 4, 7), (0, 3, 8)):
        assert not torch.equal(look(*other), first)
    assert (first.shape, first.dtype) == ((3, 48, 48), torch.uint8)


@pytest.mark.parametrize(
    ("augmentation", "steps"),
    [
        ("plain", "RandomHorizontalFlip RandomVerticalFlip RandomResizedCrop Colour"),
        ("clinic", "Framing Colour Resolution:0.3 Blur:0.15 Jpeg:0.3"),
        # On the skin, before its colours.
        ("occluded", "Framing Hairs:0.3 Ruler:0.1 Colour Resolution:0.3 Blur:0.15 Jpeg:0.3"),
    ],
)
def test_each_augmentation_has_its_steps_as_often_as_it_should(
    augmentation: Augmentation, steps: str
) -> None:
    named = [
        f"{type(step.transforms[0]).__name__}:{step.p}"
        if isinstance(step, v2.RandomApply)
        else type(step).__name__
        for step in training_transform(48, augmentation).transforms
    ]
    assert " ".join(named) == steps


def test_the_caller_s_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with drawn_from(0, 0, 0):
        training_transform(64)(image())
    assert torch.equal(torch.rand(3), expected)


def test_a_framing_of_all_that_is_there_is_the_picture_mirrored_or_turned() -> None:
    # A disc looks alike however it is turned, its centre stays where it is.
    axis = torch.linspace(-1, 1, 64)
    disc = (100 + 100 * (axis[:, None] ** 2 + axis**2 < 0.25)).byte().expand(3, -1, -1)
    for seed in range(10):
        torch.manual_seed(seed)
        framed = Framing(64, reach=1, shares=(1, 1), ratio=1)(disc)
        assert (framed.int() - disc.int()).abs().float().mean() < 2


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quarters", range(4))
def test_a_quarter_turn_moves_every_pixel_to_its_place(
    monkeypatch: pytest.MonkeyPatch, quarters: int, mirrored: bool
) -> None:
    drawn = torch.tensor([0.0 if mirrored else 1.0, quarters / 4, 1, 0.5, 0.5, 0.5])
    monkeypatch.setattr(torch, "rand", lambda _: drawn)
    framed = Framing(64, reach=1, shares=(1, 1), ratio=1)(image())
    turned = torch.rot90(image(), quarters, dims=(1, 2))
    assert torch.equal(framed, turned.flip(2) if mirrored else turned)


@pytest.mark.parametrize("out", [16, 48, 64])
def test_a_framing_shows_a_share_of_what_is_within_reach(out: int) -> None:
    # Brightness is the place: a plane sampled anywhere keeps its slope, by the view's extent.
    plane = torch.linspace(0, 255, 64).byte().expand(3, 64, 64)
    spans = []
    for seed in range(50):
        torch.manual_seed(seed)
        framed = Framing(out, reach=0.6, shares=(0.25, 1), ratio=4 / 3)(plane).float()
        across = framed[0].diff(dim=1).mean() * out / 255
        down = framed[0].diff(dim=0).mean() * out / 255
        spans.append(float((across**2 + down**2) ** 0.5))
    assert 0.2 < min(spans) < 0.4
    assert 0.5 < max(spans) < 0.62


def test_a_small_framing_averages_rather_than_skips() -> None:
    checkered = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255).byte().expand(3, 64, 64)
    torch.manual_seed(0)
    framed = Framing(16, reach=1, shares=(1, 1), ratio=1)(checkered).float()
    assert framed.std() < 40


def test_colours_change_without_moving_anything() -> None:
    torch.manual_seed(0)
    assert (Colour(0, 0)(image()).int() - image().int()).abs().max() <= 1
    grey = torch.full((3, 8, 8), 120, dtype=torch.uint8)
    for _ in range(20):
        changed = Colour(0.15, 0.02)(grey).int()
        # A grey stays one whatever the saturation and the hue; of one colour, it has no contrast.
        assert (changed[0] - changed[1]).abs().max() <= 1
        assert 120 * 0.85 - 1 <= changed.min() <= changed.max() <= 120 * 1.15 + 1
    looks = torch.stack([Colour(0.15, 0.02)(image()).float().mean(dim=(1, 2)) for _ in range(50)])
    assert (looks.std(dim=0) > 3).all()


def test_resolution_jpeg_and_blur_lose_detail_and_keep_the_picture() -> None:
    for transform in (Resolution(0.4), Jpeg(40, 60), Blur(0.5, 1.5)):
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
