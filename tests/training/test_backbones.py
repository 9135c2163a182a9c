from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import ImageNetInfo

from models.images import decode
from training import backbones
from training.backbones import WeightsError, build_lite0, load_lite0


@torch.inference_mode()
def test_lite0_gives_a_grid_of_features() -> None:
    backbone, channels, mean, std = build_lite0()
    features = backbone.eval()(torch.zeros(2, 3, 96, 64))
    assert features.shape == (2, channels, 3, 2)
    assert (mean, std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"one": torch.zeros(1)}, tmp_path / "weights.pth")
    monkeypatch.setattr(backbones, "_lite0_weights", lambda: tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="do not fit"):
        load_lite0()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise ModuleNotFoundError

    monkeypatch.setattr(backbones, "files", missing)
    with pytest.raises(WeightsError, match=r"install requirements/training\.txt"):
        load_lite0()


@torch.inference_mode()
def test_the_weights_recognise_imagenet_photographs(shared_data: Path) -> None:
    """Mapped position by position: a wrong order would recognise none."""
    model, names = load_lite0().eval(), ImageNetInfo()
    right = []
    for path in sorted((shared_data / "other").glob("photo_*"))[::4]:
        pixels = np.array(decode(path.read_bytes(), 224, 224).pixels)
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        best = names.index_to_description(int(model(image).argmax())).split(",")[0]
        right.append(best.lower() == path.stem.removeprefix("photo_").replace("_", " ").lower())
    assert np.mean(right) > 0.6
