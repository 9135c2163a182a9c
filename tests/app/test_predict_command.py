import csv
import errno
import json
import os
import shutil
import sys
import tracemalloc
from pathlib import Path

import pytest

from app.predict_command import _told_apart
from app.predictor import Predictor
from app.uploads import Upload
from models.turns import in_turn
from tests.lesions import flat

pytestmark = pytest.mark.usefixtures("logs_as_before")


def test_predict_answers_as_the_service_does(run, picture: Path, client) -> None:
    status, output, _ = run("predict", "--json", picture)
    answer = json.loads(output)
    served = client.post("/predict", files={"files": ("picture.png", picture.read_bytes())}).json()
    assert status == 0
    (found,), (expected,) = answer["results"], served["results"]
    assert found == {**expected, "filename": str(picture)}


def test_predict_takes_more_images_than_one_request(
    run, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMTL_MAX_FILES", "2")
    _, output, _ = run("predict", "--json", *[picture] * 5)
    assert len(json.loads(output)["results"]) == 5


def test_predict_gives_every_image_its_time(
    run, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMTL_DEADLINE_SECONDS", "0.000001")
    status, output, _ = run("predict", "--json", picture)
    assert (status, json.loads(output)["results"][0]["status"]) == (0, "ok")


def test_predict_shows_a_table(run, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # however long the path of a temporary file is
    status, output, _ = run("predict", picture)
    assert status == 0
    for word in (
        "picture.png",
        "0.881",
        "at or above threshold",
        "45-59",
        "torso",
        "not a medical",
    ):
        assert word in output


def test_an_image_that_fails_is_shown_and_the_exit_status_tells(run, tmp_path: Path) -> None:
    path = tmp_path / "text.jpg"
    path.write_text("text")
    status, output, _ = run("predict", "--json", path)
    assert status == 1
    assert json.loads(output)["results"][0]["error"]["status"] == 415


def test_a_file_that_cannot_be_read_costs_the_others_nothing(
    run, picture: Path, tmp_path: Path
) -> None:
    circle = tmp_path / "circle.png"
    circle.symlink_to(circle)
    status, output, _ = run("predict", "--json", tmp_path / "nowhere.jpg", picture, circle)
    assert status == 1
    first, second, third = json.loads(output)["results"]
    assert first["error"] == {
        "type": "urn:mmtl:problem:unreadable-file",
        "title": "The file cannot be read",
        "status": 422,
        "detail": "The file cannot be read: No such file or directory.",
    }
    assert first["filename"] == str(tmp_path / "nowhere.jpg")
    assert first["status"] == third["status"] == "error"
    assert second["status"] == "ok"
    assert "The file cannot be read: Too many levels of symbolic" in third["error"]["detail"]
    assert run("predict", circle)[0] == 1


def test_heat_maps_are_not_made_for_a_table(run, picture: Path) -> None:
    status, _, error = run("predict", "--explain", picture)
    assert (status, "add --json" in error) == (2, True)


def test_predict_needs_nothing_of_those_who_call(
    run, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMTL_KEYS", "/nowhere")
    monkeypatch.setenv("MMTL_TRACES", "true")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert run("predict", picture)[0] == 0


@pytest.mark.parametrize(
    ("probability", "threshold", "shown"),
    [
        (0.12, 0.31, ["0.120", "0.310"]),
        (0.04921, 0.04946, ["0.0492", "0.0495"]),
        (0.000444, 0.000446, ["0.00044", "0.00045"]),
        (0.5, 0.5, ["0.500000", "0.500000"]),
    ],
)
def test_a_table_shows_as_many_digits_as_tell_the_decision(
    probability: float, threshold: float, shown: list[str]
) -> None:
    assert _told_apart(probability, threshold) == shown


def test_a_name_that_is_no_text_is_shown_all_the_same(run, picture: Path) -> None:
    odd = picture.with_name("picture\udcff.png")
    try:
        picture.rename(odd)
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    status, output, _ = run("predict", "--json", odd)
    assert status == 0
    assert json.loads(output)["results"][0]["filename"].endswith(
        "picture\N{REPLACEMENT CHARACTER}.png"
    )


def test_a_folder_s_images_are_predicted_into_a_table(run, picture: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for name in ("b.PNG", "deep/a.png", ".hidden.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, folder / name)
    (folder / "notes.txt").write_text("no picture")
    table = tmp_path / "out" / "table.csv"
    status, output, told = run("predict", folder, "--csv", table)
    assert (status, told) == (0, "")
    assert f"Wrote {table}: 2 of 2 images. Research software" in output
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["b.PNG", "deep/a.png"]
    status, output, _ = run("predict", "--json", picture)
    (result,) = json.loads(output)["results"]
    prediction = result["prediction"]
    for row in rows:
        assert float(row["melanoma_probability"]) == prediction["melanoma"]["probability"]
        assert float(row["site:torso"]) == prediction["site"]["probabilities"]["torso"]
        assert float(row["age_years"]) == prediction["age"]["years"]
        assert row["warnings"].split() == result["quality"]["warnings"]
        assert row["sha256"] == result["image"]["sha256"]


def test_a_folder_that_cannot_be_read_is_told_and_costs_the_others_nothing(
    run, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / "cohort" / name).mkdir(parents=True)
        shutil.copy(picture, tmp_path / "cohort" / name)
    closed, read = {str(tmp_path / "cohort" / "b")}, os.scandir

    def look(folder: str) -> object:  # tests may run as root, whom no mode keeps out
        if str(folder) in closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        return read(folder)

    monkeypatch.setattr(os, "scandir", look)
    table = tmp_path / "table.csv"
    status, output, told = run("predict", tmp_path / "cohort", "--csv", table)
    assert (status, "1 of 1 images" in output) == (1, True)
    said = "The folder cannot be read: Permission denied."
    assert told == f"{tmp_path / 'cohort' / 'b'}: {said}\n"
    status, output, _ = run("predict", tmp_path / "cohort", "--json")
    first, second = json.loads(output)["results"]
    assert (status, first["status"], second["error"]["detail"]) == (1, "ok", said)
    closed.add(str(tmp_path / "cohort"))
    status, _, told = run("predict", tmp_path / "cohort")
    assert (status, told) == (2, f"mmtl: {tmp_path / 'cohort'}: Permission denied.\n")


def test_names_that_are_no_text_stay_in_a_table_as_they_are(
    run, picture: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "caf\udce9"
    names = ["m\udce8.png", "m\udce9.png"]
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    for name in names:
        shutil.copy(picture, folder / name)
    table = tmp_path / "table.csv"
    assert run("predict", folder, "--csv", table)[0] == 0
    with table.open(newline="", errors="surrogateescape") as file:
        assert [row["image"] for row in csv.DictReader(file)] == names
    assert run("predict", *(folder / name for name in names), "--csv", table)[0] == 0
    with table.open(newline="", errors="surrogateescape") as file:
        assert [row["image"] for row in csv.DictReader(file)] == [str(folder / n) for n in names]


def test_no_more_bytes_are_read_at_a_time_than_a_request_may_have(
    run, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = picture.stat().st_size
    monkeypatch.setenv("MMTL_MAX_BYTES", str(2 * size + 1))
    asked: list[int] = []
    predict = Predictor.predict

    async def count(self: Predictor, uploads: list[Upload], *others: object) -> object:
        asked.append(len(uploads))
        return await predict(self, uploads, *others)

    monkeypatch.setattr(Predictor, "predict", count)
    status, output, _ = run("predict", "--json", *[picture] * 5)
    assert (status, len(json.loads(output)["results"])) == (0, 5)
    assert asked == [2, 2, 1]


def test_an_image_that_cannot_be_used_is_told_and_has_no_row(
    run, picture: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(picture.read_bytes()[:60])
    table = tmp_path / "table.csv"
    status, output, told = run("predict", damaged, picture, "--csv", table)
    assert (status, "1 of 2 images" in output) == (1, True)
    assert told.startswith(f"{damaged}: The image")
    assert len(table.read_text().splitlines()) == 2
    before = table.read_bytes()
    status, _, told = run("predict", damaged, "--csv", table)
    assert (status, told.endswith("no table is written.\n")) == (1, True)
    assert table.read_bytes() == before
    status, _, told = run("predict", picture, "--csv", table, "--json")
    assert (status, told) == (2, "mmtl: Choose one of --json and --csv.\n")
    (tmp_path / "empty").mkdir()
    status, _, told = run("predict", tmp_path / "empty")
    assert (status, "empty holds no image files (.bmp, .jpeg, " in told) == (2, True)


def test_predict_decodes_as_many_large_images_at_once_as_their_limit_allows(
    run, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.turns.available_cores", lambda: 2)
    monkeypatch.setattr("models.turns.available_memory", lambda: 200_000_000)
    monkeypatch.setattr("gc.set_threshold", lambda _: None)
    monkeypatch.setenv("MMTL_MAX_PIXELS_IN_FULL", "1000000")
    run("predict", picture)
    assert in_turn(lambda: in_turn(int, wait=False)) == 0


def test_of_a_file_that_is_too_large_no_more_is_read_than_tells_so(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(3_000_000_000)
    monkeypatch.setenv("MMTL_MAX_BYTES", "1000000")
    tracemalloc.start()
    status, output, _ = run("predict", "--json", large)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (status, "more than 1,000,000 bytes" in output) == (1, True)
    assert peak < 100_000_000


def test_pictures_of_one_name_are_told_apart(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)
    for side in ("[left]", "[right]"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "mole.png").write_bytes(flat(160))
    _, output, _ = run("predict", "[left]/mole.png", "[right]/mole.png")
    assert "[left]/mole.png" in output
    assert "[right]/mole.png" in output
