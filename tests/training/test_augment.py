import torch

from tests.lesions import draw_lesion
from training.augment import Jpeg, Resolution, seeded, training_transform


def image() -> torch.Tensor:
    return torch.from_numpy(draw_lesion(0, 64, 64)).permute(2, 0, 1)


def test_a_sample_of_an_epoch_is_always_drawn_alike() -> None:
    transform = training_transform(64)
    before = torch.random.get_rng_state()
    first = seeded(transform, image(), 0, 3, 7)
    torch.rand(5)
    assert torch.equal(seeded(transform, image(), 0, 3, 7), first)
    for other in ((1, 3, 7), (0, 4, 7), (0, 3, 8)):
        assert not torch.equal(seeded(transform, image(), *other), first)
    torch.random.set_rng_state(before)
    assert (first.shape, first.dtype) == ((3, 64, 64), torch.uint8)


def test_the_caller_s_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    seeded(training_transform(64), image(), 0, 0, 0)
    assert torch.equal(torch.rand(3), expected)


def test_resolution_and_jpeg_lose_detail_and_keep_the_picture() -> None:
    for transform in (Resolution(0.4), Jpeg(40, 60)):
        changed = transform(image())
        difference = (changed.int() - image().int()).abs().float()
        assert (changed.shape, changed.dtype) == ((3, 64, 64), torch.uint8)
        assert 0 < difference.mean() < 8
