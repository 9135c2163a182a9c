from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import compare, page
from benchmarks.serving.compare import (
    Load,
    System,
    ages,
    chosen,
    loads_of,
    rotated,
    run_bare,
    systems,
)


def test_every_system_has_a_port_of_its_own() -> None:
    known = systems(Path("model.onnx"), 160)
    assert len({system.port for system in known.values()}) == len(known)
    assert set(page.PEERS) < set(known)


def test_what_shares_a_port_among_processes_gets_new_connections() -> None:
    known = systems(Path("model.onnx"), 160, processes=2)
    assert [name for name, system in known.items() if system.many] == [page.PROCESSES, "BentoML"]


@pytest.mark.parametrize("name", [page.SAME, page.SHIPPED, *page.LIMIT.values()])
def test_one_client_sends_each_mix_to_mmtl_and_the_limits(name: str) -> None:
    alone = [load.mix for load in loads_of(name, 32) if load.clients == 1]
    assert sorted(alone) == sorted(compare.MIXES)


def test_open_loops_come_last() -> None:
    loads = loads_of(page.SAME, 32)
    assert loads.index(Load("mixed", 32)) < min(loads.index(load) for load in loads if load.share)
    assert len(set(loads)) == len(loads)


class Served:
    """Stands in for a system's process: notes what becomes of it."""

    def __init__(self, system: System, log: Path):
        self.system = system
        self.done: list[str] = []

    def wait(self, image: bytes) -> tuple[float, Any]:
        return 1.0, {"age": [1.0]}

    def __getattr__(self, what: str) -> Any:
        return lambda *_: self.done.append(what)


def test_an_open_loop_is_a_share_of_the_closed_one_just_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, str, float | None]] = []
    names = {8001: page.SHIPPED, 8002: page.DEADLINE}

    def send(process: Served, load: Load, files: Any, rate: Any = None, seed: int = 0) -> Any:
        assert process.done[-2:] == ["resume", "settle"]
        given.append((names[process.system.port], load.name, rate))
        return {"images_per_second": float(len(given))}

    monkeypatch.setattr(compare, "Process", Served)
    monkeypatch.setattr(compare, "send", send)
    image = tmp_path / "a.jpg"
    image.write_bytes(b"")
    served = {name: System("mmtl", (), port=port) for port, name in names.items()}
    found = compare.measure(served, {}, {mix: [image] for mix in compare.MIXES}, tmp_path, 0)
    opened = [number for number, (_, _, rate) in enumerate(given) if rate]
    assert len(opened) == 4
    for number in opened:
        name, load, rate = given[number]
        # What refuses is asked for what others answer, after what it learns from.
        closed = "mixed, 32 clients", None
        assert given[number - 1] == (page.SHIPPED, *closed)
        if name == page.DEADLINE:
            assert given[number - 2] == (page.DEADLINE, *closed)
        share = float(load.removesuffix("%").split()[-1]) / 100
        assert rate == pytest.approx(share * number)
        assert found[name]["loads"][load] == {
            "images_per_second": number + 1,
            "closed_images_per_second": number,
        }
    # Which counts for nothing else.
    assert found[page.DEADLINE]["loads"].keys() == {"mixed, open loop, 120%"}
    assert len(found[page.SHIPPED]["loads"]) == len(loads_of(page.SHIPPED, 32))


def test_an_overload_lasts_longer() -> None:
    seconds = {load.name: load.seconds for load in loads_of(page.SAME, 32)}
    assert seconds.pop("mixed, open loop, 120%") == compare.OVERLOAD_SECONDS > compare.SECONDS
    assert set(seconds.values()) == {compare.SECONDS}


def test_only_systems_that_there_are_can_be_asked_for() -> None:
    assert chosen(["a", "b", "c"], None) == ["a", "b", "c"]
    assert chosen(["a", "b", "c"], ["c", "a"]) == ["a", "c"]
    with pytest.raises(SystemExit, match=r"no system 'd'\. There are: a; b; c"):
        chosen(["a", "b", "c"], ["a", "d"])
    both = [page.DEADLINE, page.SHIPPED]
    assert chosen(both, both) == both
    with pytest.raises(SystemExit, match="is given a share of what 'mmtl, as shipped' answers"):
        chosen(both, [page.DEADLINE])


def test_the_order_rotates() -> None:
    assert [rotated("abc", by) for by in range(4)] == [[*"abc"], [*"bca"], [*"cab"], [*"abc"]]


def test_the_limit_is_measured_with_a_thread_a_core_and_with_one_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(system: System, files: Sequence[Path], threads: int, batch: int) -> dict[str, Any]:
        return {"images_per_second": 10 * threads, "threads": threads, "batch": batch}

    monkeypatch.setattr(compare, "_run_bare", run)
    served = System("mmtl", ())
    (found,) = run_bare(served, Load("small", 32), [], 8).values()
    assert [each["threads"] for each in found] == [compare.CORES, compare.CORES + 1]
    assert run_bare(served, Load("small", 1), [], 8) == run(served, [], 1, 1)


@pytest.mark.parametrize(
    "answer",
    [
        {"age": [0.2, 0.8]},
        [{"age": [0.2, 0.8]}],
        {"results": [{"prediction": {"age": {"probabilities": {"0-29": 0.2, "30+": 0.8}}}}]},
    ],
)
def test_answers_of_each_form_hold_the_same(answer: Any) -> None:
    assert ages(answer) == [0.2, 0.8]
