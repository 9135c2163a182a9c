import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.pace import Pace

seconds = st.floats(0.001, 100)


def seen(pace: Pace, count: int, apart: float, batch: int = 1, start: float = 1000.0) -> float:
    """Answers so far apart, the workers never idle; when the last one was."""
    for n in range(1, count + 1):
        pace.note_done(batch, start, start + n * batch * apart)
    return start + count * batch * apart


@given(images=st.integers(1, 10_000), left=seconds)
def test_before_the_first_answer_nobody_is_called_late(images: int, left: float) -> None:
    assert not Pace().would_be_late(images, left)


@pytest.mark.parametrize("batch", [1, 4, 256])
def test_who_waits_behind_more_than_there_is_time_for_would_be_late(batch: int) -> None:
    pace = Pace()
    seen(pace, 1000 // batch + 20, apart=0.1, batch=batch)
    pace.note_needed(0.1)
    assert pace.would_be_late(300, 30.0)
    assert pace.would_be_late(290, 30.0)  # as images differ
    assert not pace.would_be_late(200, 30.0)
    assert not pace.would_be_late(1, 1.0)


@given(apart=seconds, batches=st.lists(st.integers(1, 1000), min_size=1, max_size=50))
def test_the_time_between_answers_is_never_thought_longer_than_it_was(
    apart: float, batches: list[int]
) -> None:
    pace, now = Pace(), 0.0
    for count in batches:
        pace.note_done(count, now, now + count * apart)
        now += count * apart
        assert 0 <= pace._apart <= apart * (1 + 1e-9)


def test_hours_without_an_image_do_not_count() -> None:
    busy, idle = Pace(), Pace()
    for pace in (busy, idle):
        ended = seen(pace, 300, apart=0.1)
    later = ended + 10_000
    idle.note_done(1, later, later + 0.1)
    busy.note_done(1, ended, ended + 0.1)
    assert idle._apart == pytest.approx(busy._apart)


def test_work_side_by_side_counts_once() -> None:
    pace, now = Pace(), 0.0
    for _ in range(300):  # two workers, with an image each, of 0.2 seconds
        pace.note_done(1, now, now + 0.2)
        pace.note_done(1, now, now + 0.2)
        now += 0.2
    assert pace._apart == pytest.approx(0.1, rel=0.05)


def test_a_pace_that_changes_is_followed() -> None:
    pace = Pace()
    ended = seen(pace, 300, apart=1.0)
    assert pace.would_be_late(50, 30.0)
    seen(pace, 300, apart=0.01, start=ended)
    assert not pace.would_be_late(50, 30.0)


@given(st.lists(seconds, min_size=1), seconds)
def test_however_long_an_image_is_thought_to_need_half_of_its_time_may_be_waited_for(
    needed: list[float], left: float
) -> None:
    pace = Pace()
    for one in needed:
        pace.note_needed(one)
    assert not pace.would_be_late(100, left)


@given(st.integers(1, 1000), seconds)
def test_who_has_all_the_time_in_the_world_is_never_late(images: int, apart: float) -> None:
    pace = Pace()
    seen(pace, 10, apart)
    pace.note_needed(apart)
    assert not pace.would_be_late(images, math.inf)


@given(st.integers(1, 1000), st.floats(-100, 0, exclude_max=True))
def test_who_has_no_time_left_is_late(images: int, left: float) -> None:
    assert Pace().would_be_late(images, left)
