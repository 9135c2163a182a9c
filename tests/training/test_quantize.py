"""Integers: what rounding shifts is taken back, and the threshold decides as the floats did."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from training.data.manifest import DataError
from training.quantize import TRUNK_WEIGHT, Backbone, Cost, _agreeing_threshold
from training.runners import onnx_runner

SIZE, WIDE = 8, 12
_0 = np.zeros(0)


def weights(*shape: int) -> NDArray[np.float32]:
    """Their largest fits the integers; the others all lie a third of a step above one."""
    steps = np.random.default_rng(0).integers(1, 6, shape) + 1 / 3
    steps.reshape(shape[0], -1)[:, 0] = 64
    return (steps / 64 / np.prod(shape[1:])).astype(np.float32)


def write_network(path: Path, trunk: str = TRUNK_WEIGHT) -> None:
    """A convolution, one of each channel alone (depthwise), and a trunk that sums up."""
    tensors = {
        "a.weight": weights(WIDE, 3, 3, 3),
        "a.bias": np.linspace(0, 1, WIDE, dtype=np.float32),
        "b.weight": weights(WIDE, 1, 3, 3),
        "b.bias": np.linspace(1, 0, WIDE, dtype=np.float32),
        trunk: np.ones((1, WIDE, 1, 1), np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "a.weight", "a.bias"], ["a"], "a"),
        helper.make_node("Relu", ["a"], ["a.relu"], "a.relu"),
        helper.make_node("Conv", ["a.relu", "b.weight", "b.bias"], ["b"], "b", group=WIDE),
        helper.make_node("Relu", ["b"], ["b.relu"], "b.relu"),
        helper.make_node("Conv", ["b.relu", trunk], ["sum"], "trunk"),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["n", 1, SIZE - 4, SIZE - 4])],
        [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)


def images(count: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(60, 200, (count, SIZE, SIZE, 3), dtype=np.uint8)


def test_what_rounding_the_weights_shifts_is_taken_back_in_the_biases(tmp_path: Path) -> None:
    write_network(tmp_path / "floats.onnx")
    backbone = Backbone(tmp_path / "floats.onnx", tmp_path, images(40, seed=1))
    backbone.write(tmp_path / "integers.onnx", 0)
    backbone._biases = {}
    backbone.write(tmp_path / "as_rounded.onnx", 0)
    floats, integers, as_rounded = (
        onnx_runner(tmp_path / f"{name}.onnx")(images(64, seed=2))["sum"].mean()
        for name in ("floats", "integers", "as_rounded")
    )
    assert as_rounded == pytest.approx(floats, rel=0.5)
    assert abs(as_rounded / floats - 1) > 0.03
    assert integers == pytest.approx(floats, rel=0.01)


def test_the_first_convolutions_stay_in_floats_if_so_asked(tmp_path: Path) -> None:
    write_network(tmp_path / "floats.onnx")
    backbone = Backbone(tmp_path / "floats.onnx", tmp_path, images(16, seed=1))
    for count, in_floats in ((0, {"trunk"}), (1, {"a", "trunk"})):
        backbone.write(tmp_path / "integers.onnx", count)
        graph = onnx.load(tmp_path / "integers.onnx").graph
        widened = {o for n in graph.node if n.op_type == "DequantizeLinear" for o in n.output}
        convolutions = [node for node in graph.node if node.op_type == "Conv"]
        assert {n.name for n in convolutions if n.input[1] not in widened} == in_floats


def test_integers_have_seven_bits_and_each_channel_a_scale_of_its_own(tmp_path: Path) -> None:
    """A processor without VNNI adds two products in 16 bits, where two of eight bits overflow."""
    write_network(tmp_path / "floats.onnx")
    Backbone(tmp_path / "floats.onnx", tmp_path, images(16, seed=1)).write(tmp_path / "q.onnx", 0)
    graph = onnx.load(tmp_path / "q.onnx").graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weighed = [node.input for node in graph.node if node.op_type == "DequantizeLinear"]
    integers = {name: scale for name, scale, _ in weighed if tensors.get(name, _0).dtype == np.int8}
    assert sorted(tensors[name].shape for name in integers) == [(WIDE, 1, 3, 3), (WIDE, 3, 3, 3)]
    assert max(int(np.abs(tensors[name]).max()) for name in integers) == 64
    assert {tensors[scale].shape for scale in integers.values()} == {(WIDE,)}
    written = [node.input[2] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert {tensors[zero].dtype for zero in written} == {np.dtype(np.uint8)}


@pytest.mark.parametrize(
    ("cost", "small"),
    [
        (Cost(0, 0.0029, 0.005, 0.005), True),
        (Cost(0, -0.1, 0.0, 0.0), True),
        (Cost(0, 0.003, 0.0, 0.0), False),
        (Cost(0, 0.0, 0.0051, 0.0), False),
        (Cost(0, 0.0, 0.0, 0.0051), False),
    ],
)
def test_integers_are_taken_where_each_of_their_costs_is_small(cost: Cost, small: bool) -> None:
    assert cost.small == small


def test_a_network_of_others_is_refused_in_a_sentence(tmp_path: Path) -> None:
    write_network(tmp_path / "floats.onnx", trunk="classifier.weight")
    with pytest.raises(
        DataError, match=r"is not a network of `mmtl-train export`: it has no trunk"
    ):
        Backbone(tmp_path / "floats.onnx", tmp_path, images(2, seed=1))


@given(
    values=st.lists(st.integers(0, 1000) | st.integers(500, 502), min_size=1, max_size=30),
    data=st.data(),
)
def test_no_threshold_decides_fewer_images_otherwise(
    values: list[int], data: st.DataObject
) -> None:
    probability = np.array(values) / 1000
    decided = np.array([data.draw(st.booleans()) for _ in values])
    decided[probability.argmax()] = True  # as every threshold that is taken from them has it

    def otherwise(threshold: float) -> int:
        return int(((probability >= threshold) != decided).sum())

    found = _agreeing_threshold(probability, decided)
    assert 0 <= found <= 1
    assert otherwise(found) == min(map(otherwise, probability.tolist()))
