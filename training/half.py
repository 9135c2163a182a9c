"""Weights in half precision: an ONNX file of half the size that computes in single precision.

The network is rounded before any artifact is written, so that all of them hold the same numbers;
the ONNX file then stores 16 bits of each weight and widens them when it is loaded. Batch norm is
folded into the convolution before it first: whoever folds it later would multiply what was rounded.
"""

from collections import Counter
from copy import deepcopy
from typing import TypeVar

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Network = TypeVar("Network", bound=nn.Module)

_STORED = ".half"
# Elements; smaller tensors are not worth a node of the graph.
_WORTH_IT = 1024
# Relative: what arithmetic in single precision changes in a weight that was rounded.
_SAME = 1e-6


@torch.no_grad()
def rounded(network: Network, images: Tensor) -> Network:
    """A copy whose every weight of two dimensions or more is rounded to half precision.

    Biases and what else has one dimension stay as they are, and so does a tensor that holds a
    number too large for half precision.

    Args:
        network: In evaluation mode; it gives a mapping of tensors.
        images: Any that it takes; they show which batch norm follows which convolution.
    """
    expected = network(images)
    copy = deepcopy(network)
    fold_batch_norm(copy, images)
    found = copy(images)
    if not all(torch.allclose(found[name], expected[name], 1e-3, 1e-3) for name in expected):
        # Something else reads what a convolution gave to a batch norm.
        copy = deepcopy(network)
    for weight in copy.parameters():
        half = weight.half().float()
        if weight.ndim > 1 and bool(half.isfinite().all()):
            weight.copy_(half)
    return copy


@torch.no_grad()
def fold_batch_norm(network: nn.Module, images: Tensor) -> None:
    """Give the work of each batch norm that follows a convolution to that convolution, in place.

    Args:
        network: In evaluation mode; nothing but the batch norm reads such a convolution's output.
        images: As for `rounded`.
    """
    # The outputs are kept, so that no two of them have the same id.
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: list[tuple[nn.Conv2d, _BatchNorm]] = []

    def after(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        made[id(output)] = module, output

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _BatchNorm)
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], module))

    hooks = [
        module.register_forward_hook(after)
        if isinstance(module, nn.Conv2d)
        else module.register_forward_pre_hook(before)
        for module in network.modules()
        if isinstance(module, nn.Conv2d | _BatchNorm)
    ]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    uses = Counter(module for pair in pairs for module in pair)
    for convolution, norm in pairs:
        if uses[convolution] == uses[norm] == 1:
            _fold(convolution, norm)


def _fold(convolution: nn.Conv2d, norm: _BatchNorm) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale *= norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift += norm.bias.double()
    if convolution.bias is not None:
        shift += convolution.bias.double() * scale
    weight = convolution.weight.double() * scale[:, None, None, None]
    convolution.weight.copy_(weight.float())
    convolution.bias = nn.Parameter(shift.float())
    # It stays in its place, since some apply an activation, too.
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    if norm.weight is not None:
        norm.weight.fill_(1)
    if norm.bias is not None:
        norm.bias.zero_()


def store_in_half(model: onnx.ModelProto) -> None:
    """Store what half precision can hold in half precision, in place; a runtime widens it."""
    graph = model.graph
    widened = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < _WORTH_IT:
            continue
        values = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if np.allclose(halves, values, rtol=_SAME, atol=0):
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(halves, name + _STORED))
            widened.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*widened, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def widen(model: onnx.ModelProto) -> None:
    """Undo `store_in_half`, in place."""
    graph = model.graph
    stored = {i.name: i for i in graph.initializer if i.name.endswith(_STORED)}
    nodes = [node for node in graph.node if not (node.input and node.input[0] in stored)]
    del graph.node[:]
    graph.node.extend(nodes)
    for name, tensor in stored.items():
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, name.removesuffix(_STORED)))
