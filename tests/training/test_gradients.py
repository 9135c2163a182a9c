"""The gradients are PyTorch's, however they are computed."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from training import gradients as module
from training.gradients import FasterGradients


def gradients(
    net: nn.Module, images: Tensor, how: AbstractContextManager[object], mixed: bool = False
) -> list[Tensor]:
    """Of the images and of each parameter, where every output counts otherwise."""
    net.zero_grad()
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed), how:
        out = net(images * 1.0).float()
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    found = [images.grad, *(parameter.grad for parameter in net.parameters())]
    return [gradient.clone() for gradient in found if gradient is not None]


def assert_alike(found: list[Tensor], expected: list[Tensor], share: float = 1e-4) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= share * theirs.abs().max() + 1e-6


def drawn(channels: int, height: int = 12, width: int = 9) -> Tensor:
    torch.manual_seed(0)
    images = 3 * torch.randn(2, channels, height, width)
    return images.contiguous(memory_format=torch.channels_last)


@given(
    kernel=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    bias=st.booleans(),
)
def test_a_depthwise_convolution_of_any_kernel_has_the_gradients_of_pytorch(
    kernel: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    height: int,
    width: int,
    bias: bool,
) -> None:
    assume(height + 2 * padding[0] >= kernel[0] and width + 2 * padding[1] >= kernel[1])
    images = drawn(4, height, width)
    net = nn.Conv2d(4, 4, kernel, stride, padding, groups=4, bias=bias)
    assert_alike(gradients(net, images, FasterGradients()), gradients(net, images, nullcontext()))


@pytest.mark.parametrize(
    "net",
    [
        nn.Conv2d(4, 4, 5, dilation=2, groups=4),
        nn.Conv2d(4, 8, 5, groups=4),
        nn.Conv2d(4, 4, 5, padding="same", groups=4),
        nn.Conv2d(4, 4, 5, padding=2, padding_mode="circular", groups=4),
        nn.Conv2d(4, 6, 5),
        nn.ReLU6(inplace=True),
        nn.ReLU6(),
        nn.Hardtanh(-0.5, 0.25, inplace=True),
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU6(inplace=True), nn.Conv2d(4, 4, 5, groups=4)),
        nn.Sequential(nn.ChannelShuffle(2), nn.ReLU6(inplace=True)),
    ],
)
def test_so_has_every_other_layer(net: nn.Module) -> None:
    images = drawn(4)
    assert_alike(gradients(net, images, FasterGradients()), gradients(net, images, nullcontext()))


def test_a_view_may_be_clamped_in_place() -> None:
    whole = drawn(4).requires_grad_() * 1.0
    with FasterGradients():
        nn.ReLU6(inplace=True)(whole[:, :2])
    assert whole[:, :2].min() == 0
    assert whole[:, 2:].min() < 0
    whole.sum().backward()


def test_relu6_in_place_copies_nothing() -> None:
    values = drawn(4).requires_grad_() * 1.0
    with FasterGradients():
        assert nn.ReLU6(inplace=True)(values).data_ptr() == values.data_ptr()


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, int]]:
    """Kind of numbers and width of each kernel that a gradient is computed with."""
    seen = []
    real = module._convolution_backward

    def watch(gradient: Tensor, images: Tensor, weight: Tensor, *more: Any) -> Any:
        assert gradient.dtype == images.dtype == weight.dtype
        seen.append((weight.dtype, weight.shape[3]))
        return real(gradient, images, weight, *more)

    monkeypatch.setattr(module, "_convolution_backward", watch)
    return seen


def test_a_wide_kernel_is_taken_three_columns_at_a_time(
    convolutions: list[tuple[torch.dtype, int]],
) -> None:
    gradients(nn.Conv2d(4, 4, 7, padding=3, groups=4), drawn(4), FasterGradients())
    assert convolutions == [(torch.float32, width) for width in (7, 3, 3, 1)]  # images, then weight


def test_the_weight_of_a_kernel_taller_than_the_images_is_taken_without_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paddings = []
    real = module._convolution_backward

    def watch(*args: Any) -> Any:
        if args[-1][1]:  # of the weight
            paddings.append(args[5])
        return real(*args)

    monkeypatch.setattr(module, "_convolution_backward", watch)
    for height in (3, 2):
        net = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        gradients(net, drawn(4, height, 2), FasterGradients())
    assert paddings == [(0, 0)]


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 1), (5, 2)])
def test_in_bfloat16_the_gradient_of_the_images_of_a_kernel_that_strides_is_computed_in_float32(
    kernel: int, stride: int, convolutions: list[tuple[torch.dtype, int]]
) -> None:
    images, net = drawn(4), nn.Conv2d(4, 4, kernel, stride, groups=4)
    exact = gradients(net, images, nullcontext())
    assert_alike(gradients(net, images, FasterGradients(), mixed=True), exact, share=0.02)
    of_images, *of_weight = (kind for kind, _ in convolutions)
    assert of_images == (torch.bfloat16 if stride == 1 else torch.float32)
    assert set(of_weight) == {torch.bfloat16}


@pytest.mark.parametrize("bounds", [(0.0, 6.0), (0.0, 0.3), (-0.5, 0.25)])
def test_bfloat16_numbers_are_clamped_as_pytorch_does(bounds: tuple[float, float]) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = every[~every.isnan()]
    values = numbers.clone().requires_grad_() * 1.0
    with FasterGradients():
        nn.Hardtanh(*bounds, inplace=True)(values)
    assert torch.equal(values, numbers.clamp(*bounds))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_narrow_kernel_is_left_to_pytorch(
    mixed: bool, convolutions: list[tuple[torch.dtype, int]]
) -> None:
    gradients(nn.Conv2d(4, 4, 3, groups=4), drawn(4), FasterGradients(), mixed)
    assert not convolutions
