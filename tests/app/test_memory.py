import ctypes

import pytest

from app import memory


class Library:
    """A C library that notes what is asked of it."""

    def __init__(self) -> None:
        self.asked: dict[int, int] = {}

    def mallopt(self, name: int, value: int) -> int:
        self.asked[name] = value
        return 1


def test_glibc_is_told_to_keep_what_is_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    assert memory.keep_freed_memory()
    assert library.asked == {-1: 256 * 2**20, -3: 32 * 2**20}


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not memory.keep_freed_memory()
