import csv
import errno
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import tracemalloc
from collections import Counter
from multiprocessing import Pipe
from pathlib import Path

import pytest
from fastapi import FastAPI

from app import cli
from app.load import LoadError, Measured
from app.main import create_app
from app.networks import Networks
from app.predictor import Predictor
from app.processes import Place
from app.server import Server
from app.settings import Settings
from app.uploads import Upload
from models.bundle import OperatingPoint, load_bundle
from models.turns import NotItsTurn, in_turn
from tests.bundles import make_bundle
from tests.conftest import ROOT
from tests.lesions import flat

pytestmark = pytest.mark.usefixtures("logs_as_before")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, bundle_folder: Path, capsys):
    monkeypatch.setenv("MMTL_BUNDLE", str(bundle_folder))

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["mmtl", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        output = capsys.readouterr()
        return int(stopped.value.code or 0), output.out, output.err

    return call


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(flat(160))
    return path


def test_predict_answers_as_the_service_does(run, picture: Path, client) -> None:
    status, output, _ = run("predict", "--json", picture)
    answer = json.loads(output)
    served = client.post("/predict", files={"files": ("picture.png", picture.read_bytes())}).json()
    assert status == 0
    (found,), (expected,) = answer["results"], served["results"]
    assert found == {**expected, "filename": str(picture)}


def test_what_is_checked_and_predicts_has_the_threads_of_one_of_several_processes(
    run, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMTL_THREADS", "4")
    monkeypatch.setenv("MMTL_PROCESSES", "2")
    threads: list[int] = []

    def create(settings: Settings) -> FastAPI:
        threads.append(settings.threads)
        return create_app(settings)

    monkeypatch.setattr(cli, "create_app", create)
    assert run("serve", "--check")[0] == run("predict", picture)[0] == 0
    assert threads == [2, 2]


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


def test_an_audit_log_is_begun_by_the_service_alone(
    run, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "audit.jsonl"
    monkeypatch.setenv("MMTL_AUDIT_LOG", str(log))
    assert run("serve", "--check")[0] == 0
    assert run("predict", picture)[0] == 0
    with monkeypatch.context() as patch:
        patch.setenv("MMTL_BUNDLE", "/nowhere")
        assert run("serve", "--check")[0] == 2
    assert not log.exists()
    log.write_text("{}\n")
    assert run("serve", "--check")[0] == 0
    assert log.read_text() == "{}\n"
    link, there = tmp_path / "link.jsonl", tmp_path / "there.jsonl"
    link.symlink_to(there)
    monkeypatch.setenv("MMTL_AUDIT_LOG", str(link))
    assert run("serve", "--check")[0] == 0
    assert link.is_symlink()
    assert not there.exists()


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
    assert cli._told_apart(probability, threshold) == shown


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


@pytest.mark.parametrize("header", ["bogus", ": value"])
def test_a_header_without_a_name_or_a_value_is_refused(run, header: str) -> None:
    status, _, told = run("bench", "http://127.0.0.1:9", "--header", header)
    assert (status, told.strip()) == (2, "mmtl: A --header is `Name: value`.")


def test_headers_can_be_those_of_a_file(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A key on a command line is seen by everybody who may list processes."""
    file = tmp_path / "headers"
    file.write_text("Authorization: Bearer secret\n\nX-Request-ID: a\n")
    sent: list[tuple[str, str]] = []
    monkeypatch.setattr("app.load.Target", lambda url, images, headers: sent.extend(headers))
    monkeypatch.setattr(
        "app.load.run", lambda *_, **__: Measured(1.0, 3, statuses=Counter({"200": 3}))
    )
    status, _, told = run("bench", "http://127.0.0.1:9", "--clients", "1", "--header", f"@{file}")
    assert (status, told) == (0, "")
    assert sent == [("Authorization", "Bearer secret"), ("X-Request-ID", "a")]
    status, _, told = run("bench", "http://127.0.0.1:9", "--header", f"@{file}s")
    assert (status, told.strip()) == (
        2,
        f"mmtl: --header @{file}s: the file cannot be read: No such file or directory.",
    )


@pytest.mark.parametrize(
    ("statuses", "images", "status", "said"),
    [
        ({"200": 3}, 3, 0, ""),
        ({"200": 1}, 0, 2, "No answer came in the measured time: give more --seconds."),
        (
            {},
            0,
            2,
            "No request was sent in the measured time: all clients waited for earlier answers. "
            "Give more --seconds.",
        ),
        ({"503": 2, "401": 1}, 0, 2, "No request was answered with 200: 1 x 401, 2 x 503."),
        (
            {"429": 2},
            0,
            2,
            "No request was answered with 200: 2 x 429. 429 is the key's quota, and no limit of "
            "the host: give a key without one.",
        ),
        (
            {"200": 9, "503": 2, "500": 3000, "broken": 1},
            9,
            1,
            "Some requests failed: 3,000 x 500, 1 x no answer, the connection ended.",
        ),
        (
            {"200": 9, "429": 1},
            9,
            1,
            "Some requests failed: 1 x 429. 429 is the key's quota, and no limit of the host: give "
            "a key without one.",
        ),
    ],
)
def test_a_load_without_an_answer_says_why(
    run,
    monkeypatch: pytest.MonkeyPatch,
    statuses: dict[str, int],
    images: int,
    status: int,
    said: str,
) -> None:
    measured = Measured(1.0, images, statuses=Counter(statuses))
    monkeypatch.setattr("app.load.run", lambda *_, **__: measured)
    found, _, told = run("bench", "http://127.0.0.1:9", "--clients", "1")
    assert (found, told) == (status, f"mmtl: {said}\n" if said else "")


def test_who_answers_no_client_is_not_asked_by_more(run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(_: object, clients: int, *__: object, **___: object) -> Measured:
        asked.append(clients)
        return Measured(1.0, statuses=Counter({"404": 3}))

    monkeypatch.setattr("app.load.run", refuse)
    status, _, told = run("bench", "http://127.0.0.1:9")
    assert (status, told) == (2, "mmtl: No request was answered with 200: 3 x 404.\n")
    assert asked == [1]


def test_a_number_of_clients_may_be_measured_again(run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Counter({"500": 1, "200": 9}), Counter({"200": 7})]

    def answer(*_: object, **__: object) -> Measured:
        statuses = found.pop(0)
        images = statuses["200"]
        return Measured(1.0, images, latencies=[0.01] * images, statuses=statuses)

    monkeypatch.setattr("app.load.run", answer)
    twice = ("bench", "http://127.0.0.1:9", "--clients", "32", "--clients", "32")
    status, output, told = run(*twice)
    assert (status, told) == (1, "mmtl: Some requests failed: 1 x 500.\n")
    assert "9.0" in output
    assert "7.0" in output
    status, _, told = run(*twice, "--json")
    assert (status, "name each once" in told) == (2, True)


def test_what_was_measured_is_told_where_a_later_load_finds_nobody(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(_: object, clients: int, *__: object, **___: object) -> Measured:
        if clients > 1:
            raise LoadError("Nobody answers at 127.0.0.1:9: Connection refused.")
        return Measured(1.0, 7, latencies=[0.01] * 7, statuses=Counter({"200": 7}))

    monkeypatch.setattr("app.load.run", answer)
    said = "mmtl: With 8 clients: Nobody answers at 127.0.0.1:9: Connection refused.\n"
    status, output, told = run("bench", "http://127.0.0.1:9", "--json")
    assert (status, told) == (2, said)
    assert {
        clients: found["images_per_second"] for clients, found in json.loads(output).items()
    } == {"1": 7.0}
    status, output, told = run("bench", "http://127.0.0.1:9")
    assert (status, "7.0" in output, told) == (2, True, said)
    status, output, told = run("bench", "http://127.0.0.1:9", "--clients", "8")
    assert (status, output, told) == (2, "", said.replace("With 8 clients: ", ""))


def test_check_validates_and_exits(run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("serve", "--check")[:2] == (0, "ok: test 1.2.3 on 127.0.0.1:8000\n")
    monkeypatch.setenv("MMTL_BUNDLE", "/nowhere")
    status, _, error = run("serve", "--check")
    assert (status, error) == (
        2,
        "mmtl: /nowhere is not a bundle: bundle.json cannot be read (No such file or directory).\n",
    )


@pytest.mark.parametrize("comes", [True, False])
def test_a_hangup_while_the_bundle_is_loaded_reloads_it_then(
    run, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    reloaded: list[Networks] = []
    before = signal.getsignal(signal.SIGHUP)

    def create(settings: Settings) -> FastAPI:
        app = create_app(settings)
        if comes:
            signal.raise_signal(signal.SIGHUP)
        return app

    monkeypatch.setattr("app.cli.check_address", lambda *_: None)
    monkeypatch.setattr("app.cli.create_app", create)
    monkeypatch.setattr("app.cli._serve", lambda server: server.on_start())
    monkeypatch.setattr(Networks, "hang_up", lambda networks: reloaded.append(networks))
    for name in ("keep_no_core", "allow_files"):  # which are of the whole process
        monkeypatch.setattr(f"app.cli.{name}", lambda *_: None)
    try:
        assert run("serve")[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(reloaded) == comes


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("a..b", "a..b is not the name of a host: set another MMTL_HOST."),
        ("127.0.0.1", "cannot be listened on: Address already in use. Set another MMTL_PORT or"),
        (
            "192.0.2.1",
            "cannot be listened on: Cannot assign requested address. Set another",
        ),  # RFC 5737
    ],
)
def test_where_nobody_can_listen_nothing_is_loaded(
    run, monkeypatch: pytest.MonkeyPatch, host: str, said: str
) -> None:
    monkeypatch.setattr("app.cli.create_app", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MMTL_HOST", host)
        monkeypatch.setenv("MMTL_PORT", str(taken.getsockname()[1]))
        status, _, error = run("serve", "--insecure")
    assert status == 2
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value"), [("MMTL_KEYS", "/nowhere"), ("MMTL_AUDIT_LOG", "/nowhere/a")]
)
def test_a_file_that_cannot_be_used_is_named_with_its_setting(
    run, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    status, _, error = run("serve", "--check")
    assert status == 2
    assert error.startswith(f"mmtl: {name}: {value} cannot be ")


def test_without_a_folder_for_what_processes_share_it_says_so(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: str) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setenv("MMTL_PROCESSES", "2")
    monkeypatch.setattr("app.processes.TemporaryDirectory", refuse)
    status, _, error = run("serve")
    assert status == 2
    assert error == "mmtl: No usable temporary directory found in ['/tmp'].\n"


def test_processes_share_what_large_images_may_be_decoded_at_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.turns.available_cores", lambda: 4)
    monkeypatch.setattr("models.turns.available_memory", lambda: 1_000_000_000_000)
    monkeypatch.setattr("gc.set_threshold", lambda _: None)
    cli._tune(settings, processes=4)
    with pytest.raises(NotItsTurn):
        in_turn(lambda: in_turn(int, wait=False))
    cli._tune(settings, processes=2)
    assert in_turn(lambda: in_turn(int, wait=False)) == 0


def test_predict_decodes_as_many_large_images_at_once_as_their_limit_allows(
    run, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.turns.available_cores", lambda: 2)
    monkeypatch.setattr("models.turns.available_memory", lambda: 200_000_000)
    monkeypatch.setattr("gc.set_threshold", lambda _: None)
    monkeypatch.setenv("MMTL_MAX_PIXELS_IN_FULL", "1000000")
    run("predict", picture)
    assert in_turn(lambda: in_turn(int, wait=False)) == 0


def test_a_bundle_is_verified_and_shown(run, bundle_folder: Path) -> None:
    assert run("bundle", "verify", bundle_folder)[:2] == (0, "ok       model.onnx\n")
    shown = run("bundle", "inspect", bundle_folder)[1]
    assert "test 1.2.3" in shown
    assert "its threshold from" not in shown
    assert json.loads(run("bundle", "inspect", "--json", bundle_folder)[1])["name"] == "test"


def test_an_artifact_with_an_operating_point_of_its_own_is_shown_with_it(
    run, tmp_path: Path
) -> None:
    artifact = make_bundle(tmp_path / "one").manifest.artifacts[0]
    point = OperatingPoint(
        criterion="fewest flips",
        dataset="theirs",
        images=9,
        melanomas=3,
        sensitivity=2 / 3,
        specificity=0.5,
    )
    own = artifact.model_copy(update={"operating_point": point})
    make_bundle(tmp_path / "two", artifacts=(own,))
    shown = " ".join(run("bundle", "inspect", tmp_path / "two")[1].split())
    assert "its threshold from │ fewest flips on theirs (9 images, 3 melanomas): " in shown
    assert "sensitivity 0.667, specificity 0.500" in shown


def test_what_looks_like_markup_is_shown_as_it_is(run, bundle_folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd[/v2]"
    shutil.copytree(bundle_folder, odd)
    manifest = odd / "bundle.json"
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(told | {"description": "ours [/v2] :smile:"}))
    status, output, _ = run("bundle", "inspect", odd)
    assert (status, "ours [/v2] :smile:" in output) == (0, True)
    status, output, _ = run("bundle", "diff", odd, bundle_folder)
    title = "".join(line.strip() for line in output.splitlines())  # folded to the table's width
    assert (status, "odd[/v2]" in title) == (1, True)


def test_a_bundle_is_recalibrated_into_another_one_and_compared(
    run, bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    rows = [f"{(number % 40) / 10},{int(number % 40 > 25 + number % 7)}" for number in range(400)]
    table = tmp_path / "outcomes.csv"
    table.write_text("melanoma_logit,melanoma\n" + "\n".join(rows))
    new = tmp_path / "new"
    status, output, _ = run("bundle", "recalibrate", bundle_folder, "--outcomes", table, "-o", new)
    assert status == 0
    assert f"{new}: test 1.2.4, fitted to 400 outcomes" in output
    assert "Of model.onnx:" in output
    status, output, _ = run("bundle", "diff", bundle_folder, new)
    assert status == 1
    assert "artifacts[model.onnx].calibration.slope" in output
    assert run("bundle", "diff", new, new)[:2] == (0, "The bundles are the same.\n")
    assert run("bundle", "verify", new)[0] == 0
    fitted = ("bundle", "recalibrate", bundle_folder, "--outcomes", table, "-o", tmp_path / "x")
    status, _, error = run(*fitted, "--sensitivity", "nan")
    assert (status, "--sensitivity is a share from 0.5 to 1" in error) == (2, True)
    link = tmp_path / "link"
    link.symlink_to(new)
    arguments = ("bundle", "recalibrate", bundle_folder, "--prevalence", "0.02", "-o")
    status, _, error = run(*arguments, link)
    assert (status, "holds a bundle already: choose another folder" in error) == (2, True)
    assert run(*arguments, link, "--version", "8.0.0", "--replace")[0] == 0
    assert link.is_symlink()
    assert "test 8.0.0" in run("bundle", "inspect", new)[1]
    (new / "bundle.json.sig").write_text("of a signature")
    status, output, _ = run(*arguments, new, "--replace")
    assert (status, "It is not signed, as the one before was" in output) == (0, True)
    assert "test 8.0.1" in run("bundle", "inspect", new)[1]  # not the version of the one before
    other = tmp_path / "other"
    for wrong, sentence in (
        ((bundle_folder,), "--out is the bundle itself"),
        ((bundle_folder.parent, "--replace"), "--out is the bundle itself, or holds it"),
        ((other, "--version", "x"), "--version is of the form 1.2.3"),
        ((other, "--version", "١.٢.٣"), "--version is of the form 1.2.3"),
        ((other, "--sensitivity", "0.99"), "--sensitivity takes --outcomes"),
        ((other, "--prevalence", "2"), "--prevalence is a share between 0 and 1"),
        ((other, "--outcomes", table), "Give either --outcomes or --prevalence"),
    ):
        status, _, error = run(*arguments, *wrong)
        assert (status, sentence in error) == (2, True)


def test_outcomes_may_have_a_name_that_is_no_text(run, bundle_folder: Path, tmp_path: Path) -> None:
    table = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.csv"))
    rows = "".join(f"{n},{n % 3 // 2}\n" for n in range(60))
    table.write_text("melanoma_logit,melanoma\n" + rows)
    out = tmp_path / "new"
    assert run("bundle", "recalibrate", bundle_folder, "--outcomes", table, "-o", out)[0] == 0
    assert load_bundle(out).manifest.operating_point.dataset == "\ufffd.csv (recalibration)"


def test_bundles_that_differ_in_the_order_of_artifacts_differ(run, tmp_path: Path) -> None:
    (first,) = make_bundle(tmp_path / "one").manifest.artifacts
    second = first.model_copy(update={"file": "other.onnx", "precision": "int8"})
    for folder, artifacts in (("one", (first, second)), ("two", (second, first))):
        make_bundle(tmp_path / folder, artifacts=artifacts)
    status, output, _ = run("bundle", "diff", tmp_path / "one", tmp_path / "two")
    assert status == 1
    assert "other.onnx" in output


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


def test_a_key_that_nobody_would_see_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.argv", ["mmtl", "keys", "create", "x", "--file", str(tmp_path / "k")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert not (tmp_path / "k").exists()


@pytest.mark.parametrize("page", ["settings", "problems"])
def test_a_page_of_reference_is_the_program_s(run, page: str) -> None:
    assert (ROOT / "docs" / f"{page}.md").read_text() == run(page)[1], "run `make docs`"


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


def test_a_name_moves_nothing_on_the_terminal(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    picture = Path("a\x1b[2Jb\nc.png")
    picture.write_bytes(flat(160))
    _, output, _ = run("predict", picture)
    assert "a\\x1b[2Jb\\nc.png" in output
    missing = run("bundle", "inspect", "\x1b[2J")[2]
    assert missing.startswith("mmtl: \\x1b[2J is not a bundle")


def test_probabilities_are_taken_of_the_artifact_that_is_named(
    run, bundle_folder: Path, tmp_path: Path
) -> None:
    table = tmp_path / "outcomes.csv"
    table.write_text("melanoma_probability,melanoma\n" + "0.9,1\n0.2,0\n0.4,1\n0.5,0\n" * 20)
    told = "bundle", "recalibrate", bundle_folder, "--outcomes", table, "-o", tmp_path / "new"
    status, _, error = run(*told, "--artifact", "model.int8.onnx")
    assert (status, "--artifact model.int8.onnx is none of model.onnx." in error) == (2, True)
    status, output, _ = run(*told, "--artifact", "model.onnx")
    assert (status, "fitted to 80 outcomes" in output) == (0, True)


def test_one_of_several_processes_stops_when_the_one_that_watches_says_so(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Server] = []
    monkeypatch.setenv("MMTL_BUNDLE", str(bundle_folder))
    monkeypatch.setenv("MMTL_PROCESSES", "2")
    monkeypatch.setattr(tempfile, "tempdir", tempfile.tempdir)
    for name in ("be_watched", "allow_files", "_tune"):
        monkeypatch.setattr(f"app.cli.{name}", lambda *_: None)
    monkeypatch.setattr("app.cli.keep_no_core", lambda: None)
    monkeypatch.setattr("app.cli._serve", lambda server, listener: served.append(server))
    link, theirs = Pipe()
    with link, theirs:
        place = Place(1, tmp_path, ("127.0.0.1", 0), theirs)
        monkeypatch.setattr(Place, "listener", lambda _: None)
        cli._serve_beside(place)
        served[0].on_start()
        assert link.recv() == "listens"
    served[0].handle_exit(signal.SIGTERM, None)  # as systemd sends it to each
    assert not served[0].should_exit
    served[0].handle_exit(signal.SIGINT, None)
    assert served[0].should_exit
