"""On a CPU: the gradients of two kinds of layers, sooner than PyTorch has them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode

# The widest kernel for whose weights oneDNN has a depthwise gradient, if images are as tall as it.
# For others it takes that of a dense convolution, many times the work (`ONEDNN_VERBOSE=1` names it:
# jit, not jit_dw).
_WIDEST = 3
_convolution_backward = torch.ops.aten.convolution_backward


class FasterGradients(TorchFunctionMode):
    """While it is entered, which is for a CPU, layers get the gradients of this module.

    They are PyTorch's, up to rounding (benchmarks/training_speed.py measures what they save). What
    layers call is replaced, not the layers: they may be any library's.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """What `func` returns."""
        named = kwargs or {}
        if torch.compiler.is_compiling():  # which makes gradients of its own
            return func(*args, **named)
        if func is torch.conv2d and len(args) == 7 and _is_slow(*args):
            images, weight, bias, stride, padding, _, _ = args
            return _Depthwise.apply(images, weight, bias, _pair(stride), _pair(padding))
        if func is functional.hardtanh and named.get("inplace") and _is_changeable(args[0]):
            return _Clamp.apply(args[0], named["min_val"], named["max_val"])
        return func(*args, **named)


def _is_slow(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> bool:
    """Whether these are the arguments of a depthwise convolution whose gradients are slow."""
    return (
        images.dim() == 4
        and weight.requires_grad
        and weight.shape[:2] == (groups, 1)
        and _pair(dilation) == (1, 1)
        and not isinstance(padding, str)
        and (
            weight.shape[3] > _WIDEST
            or weight.shape[2] > images.shape[2]
            or (torch.is_autocast_enabled("cpu") and _pair(stride) != (1, 1))
        )
    )


def _is_changeable(values: Tensor) -> bool:
    """Whether autograd lets a function of ours change these values in place."""
    return values.requires_grad and not values.is_leaf and not values._is_view()


class _Clamp(Function):
    """`hardtanh_` (ReLU6), which PyTorch does in a copy that it then copies back.

    The bits of bfloat16 numbers, read as integers, stand in the order of the numbers from zero up,
    and integers are clamped five times as fast. That hides what is not a number; validation, which
    is in float32, finds it.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, lowest: float, highest: float) -> Tensor:
        ctx.mark_dirty(values)
        if values.dtype == torch.bfloat16 and lowest == 0 <= highest:
            top = torch.tensor(highest, dtype=torch.bfloat16).view(torch.int16)
            values.view(torch.int16).clamp_(0, int(top))
        else:
            values.clamp_(lowest, highest)
        ctx.save_for_backward(values)
        ctx.bounds = lowest, highest
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, values, *ctx.bounds), None, None


class _Depthwise(Function):
    """A depthwise convolution; the gradient of a wide or tall kernel's weight is taken in parts.

    That of its images is taken in float32 where the kernel strides: oneDNN's in bfloat16 takes
    twelve to a hundred and fifty times as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
        images = images.to(kind)
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        bias = None if bias is None else bias.to(kind)
        return torch.conv2d(images, weight.to(kind), bias, stride, padding, 1, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        weight = weight.to(images.dtype)
        stride, padding = ctx.stride, ctx.padding
        wide, tall = weight.shape[3] > _WIDEST, weight.shape[2] > images.shape[2]

        def convolution(
            images: Tensor, weight: Tensor, padding: tuple[int, int], of: int
        ) -> Tensor:
            """The gradient of its images (0) or its weight (1)."""
            which = [of == 0, of == 1, False]
            found: Tensor = _convolution_backward(
                gradient.to(weight.dtype),
                images,
                weight,
                None,
                stride,
                padding,
                [1, 1],
                False,
                [0, 0],
                len(weight),
                which,
            )[of]
            return found

        def columns(first: int) -> Tensor:
            """The gradient of a few columns of the kernel, from the pixels they are laid on."""
            part = weight[..., first : first + _WIDEST]
            reach = stride[1] * (gradient.shape[3] - 1) + part.shape[3]
            begin = first - padding[1]
            under = images[..., max(begin, 0) : max(begin + reach, 0)]
            left = min(max(-begin, 0), reach - under.shape[3])
            rows = padding[0] if tall else 0
            laid = functional.pad(under, (left, reach - left - under.shape[3], rows, rows))
            return convolution(laid, part, (padding[0] - rows, 0), 1)

        of_images = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            kind = images.dtype
            if stride != (1, 1):
                kind = torch.promote_types(kind, torch.float32)
            # Of the images, only the shape is looked at.
            like = images if kind == images.dtype else torch.empty_like(images, dtype=kind)
            of_images = convolution(like, weight.to(kind), padding, 0)
        if ctx.needs_input_grad[1] and (wide or tall):
            firsts = range(0, weight.shape[3], _WIDEST)
            of_weight = torch.cat([columns(first) for first in firsts], 3)
        elif ctx.needs_input_grad[1]:
            of_weight = convolution(images, weight, padding, 1)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_images, of_weight, of_bias, None, None
