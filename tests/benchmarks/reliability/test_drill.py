"""What the drill makes of a service that does not do what it promises."""

from collections import Counter
from typing import Any

import pytest

from app.telemetry import Metrics
from benchmarks.reliability.drill import COUNTED, counters, failures, phases, shares

EVENTS = [
    (0.0, "32 clients"),
    (100.0, "reload of the successor by POST: 200"),
    (200.0, "one run hangs"),
    (300.0, "SIGTERM"),
    (301.0, "the process ended with 0"),
]


def served() -> list[tuple[str, Counter[str]]]:
    """At each of the events."""
    return [
        ("1", Counter()),
        ("2", Counter({"1": 900})),
        ("1", Counter({"1": 900, "2": 1000})),
        ("1", Counter({"1": 1500, "2": 1000})),
        ("1", Counter({"1": 1510, "2": 1000})),
    ]


def result(**other: Any) -> dict[str, Any]:
    good = {
        "wrong_in_all": 0,
        "faults_not_taken": [],
        "exit_status": 0,
        "tracebacks": 0,
        "slowest_seconds": 6.0,
        "counters": COUNTED,
        "answered_since": shares(EVENTS, served()),
    }
    return {**good, **other}


def test_who_answered_is_told_from_event_to_event_until_the_stop() -> None:
    found = shares(EVENTS, served())
    assert [row["answered"] for row in found] == [{"1": 900}, {"2": 1000}, {"1": 600}]
    assert [row["serves"] for row in found] == ["1", "2", "1"]
    assert [row["a_second"] for row in found] == [9.0, 10.0, 6.0]


def test_a_service_that_keeps_its_promises_has_no_failures() -> None:
    assert failures(result()) == []


def silent_after_the_hang() -> list[dict[str, Any]]:
    counts = served()
    counts[3:] = [("1", counts[2][1]), ("1", counts[2][1])]
    return shares(EVENTS, counts)


def the_reload_changed_nothing() -> list[dict[str, Any]]:
    counts = served()
    counts[2:] = [("1", Counter({"1": n})) for n in (1900, 2500, 2500)]
    return shares(EVENTS, counts)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"wrong_in_all": 2}, "2 answers were wrong"),
        ({"faults_not_taken": ["hang"]}, "No run met a fault: hang"),
        ({"exit_status": -9}, "ended with -9"),
        ({"tracebacks": 1}, "1 tracebacks"),
        ({"slowest_seconds": 45.0}, "took 45.0 s"),
        ({"counters": {**COUNTED, "mmtl_network_replacements_total": 0.0}}, "The service counted"),
        ({"counters": {}}, "The service counted"),
        ({"answered_since": silent_after_the_hang()}, "1 answered nothing after: one run hangs"),
        ({"answered_since": the_reload_changed_nothing()}, "2 answered nothing after: reload"),
    ],
)
def test_each_broken_promise_is_one_sentence(other: dict[str, Any], says: str) -> None:
    (sentence,) = failures(result(**other))
    assert says in sentence


def test_a_service_that_answers_few_after_a_fault_fails() -> None:
    counts = served()
    counts[3:] = [("1", Counter({"1": 1000, "2": 1000})), ("1", Counter({"1": 1000, "2": 1000}))]
    (sentence,) = failures(result(answered_since=shares(EVENTS, counts)))
    assert sentence == "So few were answered after: one run hangs (1 a second, of 10)."


def test_the_counters_are_those_that_the_service_has() -> None:
    metrics = Metrics(8, [])
    metrics.reloads.labels("switched").inc(2)
    metrics.replacements.inc()
    metrics.failed_runs.inc()
    assert counters(metrics.expose("")[0].decode()) == COUNTED


def test_memory_is_told_by_network() -> None:
    memory = [(float(at), 200.0 + at / 60) for at in range(120)]
    (first,) = phases(memory, EVENTS)  # and after 120 s the service had died
    assert first["since"] == "32 clients"
    assert first["slope_a_minute"] == pytest.approx(1.0)
    assert first["most"] == pytest.approx(200 + 99 / 60)
