from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from app.load import Measured
from benchmarks.serving import steps
from benchmarks.serving.variants import all_admitted, all_begun, as_it_is

VARIANTS = [as_it_is, all_admitted, all_begun]


class Services:
    """Services that answer so many images a second, and what was asked of them."""

    def __init__(self, rates: list[int], **statuses: int):
        self.rates = rates
        self.statuses = Counter(statuses or {"200": 9, "503": 1})
        self.running: list[int] = []
        self.asked: list[tuple[int, float | None]] = []

    def start(self, variant: Any, port: int, image: bytes, **settings: str) -> SimpleNamespace:
        assert settings == {"MMTL_DEADLINE_SECONDS": "0.3"}
        self.running.append(port)
        return SimpleNamespace(port=port, stop=lambda: self.running.remove(port))

    def run(self, target: Any, clients: int, seconds: float, warm_up: float, rate: Any = None):
        assert len(self.running) == len(VARIANTS)
        number = target.port - steps.PORT
        self.asked.append((number, rate))
        answered = int(self.rates[number] * seconds)
        found = Measured(seconds, images=answered, statuses=self.statuses)
        found.latencies, found.refusals = [0.2], [0.01]
        return found


def overload(services: Services, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    monkeypatch.setattr(steps, "start", services.start)
    monkeypatch.setattr(steps.load, "run", services.run)
    return steps.overload(VARIANTS, [b"image"], rounds=3)


def test_in_an_overload_each_service_is_asked_for_more_than_it_can_and_goes_first_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    services = Services([200, 100, 50])
    rows = overload(services, monkeypatch)
    assert [row[0] for row in rows] == [str(one.__doc__).rstrip(".") for one in VARIANTS]
    assert [row[1] for row in rows] == ["200 (200 to 200)", "100 (100 to 100)", "50 (50 to 50)"]
    assert rows[0][2:] == [f"{n} ({n} to {n})" for n in (200, 200, 1, 10)]
    open_loops = [(number, rate) for number, rate in services.asked if rate is not None]
    assert [number for number, _ in open_loops] == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    # Of what the first answers, whatever the others do.
    assert dict(open_loops) == pytest.approx({0: 240.0, 1: 240.0, 2: 240.0})
    assert not services.running


def test_where_none_was_refused_there_is_no_time_of_refusals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    services = Services([200, 100, 50])
    turns = iter([[0.01], [], [], [], [], [], [0.03], [], []])  # of 0, 1, 2, 1, 2, 0, 2, 0, 1
    run = services.run

    def run_some(*arguments: Any) -> Measured:
        found = run(*arguments)
        if arguments[4:]:
            found.refusals = next(turns)
        return found

    monkeypatch.setattr(services, "run", run_some)
    times = [row[-1] for row in overload(services, monkeypatch)]
    assert times == ["10", "none", "30"]


def test_an_overload_with_an_answer_that_is_neither_good_nor_a_refusal_is_no_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    services = Services([200, 100, 50], **{"200": 9, "500": 1})
    with pytest.raises(SystemExit, match="500"):
        overload(services, monkeypatch)
    assert not services.running
