"""The zoo is data: 86 backbones of 17 families, as their libraries publish them."""

import json
from collections import Counter

import pytest
import timm
import torch
import torchvision
from typer.testing import CliRunner

from training.backbones import build
from training.cli import cli
from training.data.manifest import DataError
from training.zoo import choose, load_zoo, shard

ZOO = load_zoo()
THE_86 = [backbone for backbone in ZOO if not backbone.extra]
LIGHT = [backbone.name for backbone in ZOO if backbone.parameters < 6_000_000]


def test_it_has_the_86_of_17_families() -> None:
    assert len(THE_86) == 86
    assert len({backbone.family for backbone in THE_86}) == 17
    assert len({backbone.name for backbone in ZOO}) == len(ZOO)
    assert Counter(b.library for b in THE_86) == {"torchvision": 79, "timm": 7}


def test_every_classifier_of_torchvision_is_there() -> None:
    known = {backbone.name for backbone in ZOO if backbone.library == "torchvision"}
    assert known == set(torchvision.models.list_models(module=torchvision.models))


@pytest.mark.parametrize("name", [b.name for b in ZOO if b.library == "torchvision"])
def test_an_entry_says_what_torchvision_publishes(name: str) -> None:
    (backbone,) = choose([name])
    weights = torchvision.models.get_model_weights(name)[backbone.weights]
    transforms = weights.transforms()
    assert backbone.input_size == transforms.crop_size[0]
    assert backbone.mean == tuple(transforms.mean)
    assert backbone.std == tuple(transforms.std)
    assert backbone.multiply_adds == round(weights.meta["_ops"] * 1e9)
    assert backbone.imagenet_top1 == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    # Without Inception's auxiliary head.
    if name != "inception_v3":
        assert backbone.parameters == weights.meta["num_params"]


@pytest.mark.parametrize("name", [b.name for b in ZOO if b.library == "timm"])
def test_an_entry_says_what_timm_publishes(name: str) -> None:
    (backbone,) = choose([name])
    config = timm.get_pretrained_cfg(f"{name}.{backbone.weights}")
    assert config.input_size == (3, backbone.input_size, backbone.input_size)
    assert (backbone.mean, backbone.std) == (config.mean, config.std)
    with torch.device("meta"):
        network = timm.create_model(name)
    assert backbone.parameters == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", ["inception_v3", "googlenet", "squeezenet1_0", "mobilenet_v2"])
def test_parameters_are_of_the_network_that_is_run(name: str) -> None:
    (backbone,) = choose([name])
    assert backbone.parameters == sum(p.numel() for p in build(backbone).parameters())


def test_a_vision_transformer_is_built_for_its_own_size() -> None:
    (backbone,) = choose(["vit_h_14"])
    with torch.device("meta"):
        network = build(backbone)
    assert network.image_size == backbone.input_size == 518
    assert backbone.parameters == sum(p.numel() for p in network.parameters())


def test_the_list_is_for_people_and_for_scripts() -> None:
    shown = CliRunner().invoke(cli, ["zoo", "list"])
    assert shown.exit_code == 0
    assert "vit_h_14" in shown.output
    listed = json.loads(CliRunner().invoke(cli, ["zoo", "list", "--json"]).output)
    assert len(listed) == len(ZOO)
    assert sum(not entry["extra"] for entry in listed) == 86
    keys = {"name", "family", "library", "parameters", "input_size", "extra"}
    assert keys <= set(listed[0])


def test_a_mistyped_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(DataError, match="Did you mean resnet50"):
        choose(["resnet5O"])


def test_shards_are_a_partition() -> None:
    parts = [shard(ZOO, f"{i}/5") for i in range(1, 6)]
    assert sorted(b.name for part in parts for b in part) == sorted(b.name for b in ZOO)
    work = [sum(b.multiply_adds for b in part) for part in parts]
    largest = max(b.multiply_adds for b in ZOO)
    assert max(work) == largest  # as little as the longest part can have
    assert min(work) > 0.9 * (sum(work) - largest) / 4


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0"])
def test_a_shard_is_written_i_of_n(text: str) -> None:
    with pytest.raises(DataError, match="write i/n"):
        shard(ZOO, text)
