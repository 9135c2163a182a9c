"""The cache is exactly what serving decodes, is built once, and goes on where it stopped."""

import json
import os
import signal
import time
from multiprocessing import get_start_method
from pathlib import Path

import numpy as np
import pytest
import torch

from models.images import DecodedImage, decode
from tests.training.data.drawn import picture
from training.data import cache
from training.data.cache import build_cache, open_cache
from training.data.manifest import DataError, Record


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    for number in range(7):
        picture(tmp_path / "images" / f"{number}.jpg", number)
    return [Record(str(n), str(tmp_path / "images" / f"{n}.jpg"), "d") for n in range(7)]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what was decoded."""
    seen: list[int] = []

    def count(data: bytes, height: int, width: int):
        seen.append(len(data))
        return decode(data, height, width)

    monkeypatch.setattr(cache, "decode", count)
    monkeypatch.setattr(cache, "_PAUSE", 0.0)
    monkeypatch.setattr(cache, "_TOGETHER", 2)
    monkeypatch.setattr(cache, "available_cores", lambda: 0)
    return seen


@pytest.mark.parametrize("together", [2, 16], ids=["in processes", "in this one"])
def test_the_cache_is_exactly_what_serving_decodes(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(cache, "_TOGETHER", together)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    pixels = build_cache(tmp_path / "pixels.npy", records, 64, 48)
    for row, record in enumerate(records):
        expected = decode(Path(record.path).read_bytes(), 64, 48).pixels
        np.testing.assert_array_equal(pixels[row], expected)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(DataError, match="holds 7 images, the manifest 8"):
        open_cache(tmp_path / "pixels.npy", 8)


def test_a_file_s_name_may_be_of_any_bytes(tmp_path: Path) -> None:
    name = b"l\xe4sion.jpg".decode(errors="surrogateescape")
    picture(tmp_path / name, 1)
    record = Record(name, str(tmp_path / name), "drawn")
    assert len(build_cache(tmp_path / "pixels.npy", [record], 32, 32)) == 1


def test_it_is_built_once_and_anew_when_an_image_or_the_size_changes(
    records: list[Record], tmp_path: Path, decoded: list[int]
) -> None:
    path = tmp_path / "pixels.npy"
    build_cache(path, records, 32, 32)
    build_cache(path, records, 32, 32)
    assert len(decoded) == 7
    picture(Path(records[3].path), 99)
    build_cache(path, records, 32, 32)
    assert len(decoded) == 14
    assert build_cache(path, records, 48, 32).shape == (7, 48, 32, 3)
    assert len(decoded) == 21


def test_an_unreadable_image_is_named_and_what_was_decoded_is_kept(
    records: list[Record], tmp_path: Path, decoded: list[int]
) -> None:
    path = tmp_path / "pixels.npy"
    good = Path(records[5].path).read_bytes()
    Path(records[5].path).write_bytes(b"x" * len(good))
    with pytest.raises(DataError, match=r"5\.jpg: The bytes are not an image"):
        build_cache(path, records, 32, 32)
    assert not path.exists()
    assert len(decoded) <= 6
    decoded.clear()
    # Killed and started again, with nothing changed: only the rest is decoded.
    with pytest.raises(DataError, match=r"5\.jpg"):
        build_cache(path, records, 32, 32)
    assert len(decoded) <= 2
    assert json.loads(path.with_suffix(".part.json").read_text())["images"] == 5
    Path(records[5].path).write_bytes(good)
    pixels = build_cache(path, records, 32, 32)
    np.testing.assert_array_equal(pixels[5], decode(good, 32, 32).pixels)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "pixels.json", "pixels.npy"]


@pytest.mark.skipif(get_start_method() != "fork", reason="decode is patched in this process")
def test_a_process_that_dies_is_said_in_one_sentence_and_the_rest_is_decoded_later(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pixels.npy"
    deadly = Path(records[5].path).read_bytes()

    def die(data: bytes, height: int, width: int) -> DecodedImage:
        if data == deadly:
            until = time.monotonic() + 30  # for the others
            note = path.with_suffix(".part.json")
            while cache._read(note).get("images") != 4 and time.monotonic() < until:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(data, height, width)

    monkeypatch.setattr(cache, "_TOGETHER", 2)
    monkeypatch.setattr(cache, "_PAUSE", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(cache, "decode", die)
        with pytest.raises(DataError, match="A process that decodes images died"):
            build_cache(path, records, 32, 32)
    assert json.loads(path.with_suffix(".part.json").read_text())["images"] == 4
    pixels = build_cache(path, records, 32, 32)
    for row, record in enumerate(records):
        expected = decode(Path(record.path).read_bytes(), 32, 32).pixels
        np.testing.assert_array_equal(pixels[row], expected)


def test_a_fault_of_ours_is_not_called_a_death(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(cache, "_TOGETHER", 2)
    monkeypatch.setattr(cache, "decode", fail)
    with pytest.raises(NotImplementedError):
        build_cache(tmp_path / "pixels.npy", records, 32, 32)


def test_a_finished_cache_that_was_damaged_since_is_built_anew(
    records: list[Record], tmp_path: Path
) -> None:
    path = tmp_path / "pixels.npy"
    whole = build_cache(path, records, 32, 32).copy()
    path.write_bytes(path.read_bytes()[:1000])
    np.testing.assert_array_equal(build_cache(path, records, 32, 32), whole)


def test_a_partial_file_that_is_damaged_is_begun_anew(
    records: list[Record], tmp_path: Path
) -> None:
    path = tmp_path / "pixels.npy"
    build_cache(path, records, 32, 32)
    path.rename(path.with_suffix(".part"))
    path.with_suffix(".part").write_bytes(b"damaged")
    assert len(build_cache(path, records, 32, 32)) == 7
