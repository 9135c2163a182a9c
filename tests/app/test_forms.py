import tracemalloc
import weakref
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.forms import Form, Pieces
from app.problems import Problem

TYPE = "multipart/form-data; boundary=cut"


def part(data: bytes, disposition: str = 'form-data; name="files"; filename="a.jpg"') -> bytes:
    return f"--cut\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + data + b"\r\n"


def read(body: bytes, most: int = 10) -> list[tuple[str, bytes]]:
    form = Form(TYPE, most)
    form.write(body)
    return [(file.filename, file.pieces.take()) for file in form.end()]


@given(
    st.lists(st.binary(max_size=300).filter(lambda data: b"\r\n--cut" not in data), min_size=1),
    st.lists(st.integers(0, 3000), max_size=20),
)
def test_files_come_back_as_they_were_however_the_body_is_cut(
    files: list[bytes], cuts: list[int]
) -> None:
    body = b"".join(map(part, files)) + b"--cut--\r\n"
    form = Form(TYPE, len(files))
    places = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    for start, end in pairwise(places):
        form.write(body[start:end])
    assert [file.pieces.take() for file in form.end()] == files


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("filename*=UTF-8''na%C3%AFve.jpg", "naïve.jpg"),
        ("filename=\"M?ller.jpg\"; filename*=utf-8'de'M%C3%BCller.jpg", "Müller.jpg"),
        ("filename*=iso-8859-1''M%FCller.jpg", "Müller.jpg"),
        ("filename=\"a.jpg\"; filename*=klingon''%62.jpg", "a.jpg"),
        ("filename=\"a.jpg\"; filename*=idna''%62.jpg", "a.jpg"),
        # Of which the answer could not be written: half a character of UTF-16.
        ("filename=\"a.jpg\"; filename*=utf-7''x%2B2AA-", "a.jpg"),
        ("filename=\"a.jpg\"; filename*=unicode_escape''%5Cud800", "a.jpg"),
        ("filename*=utf-8''%ED%A0%80.jpg", "\ufffd\ufffd\ufffd.jpg"),
        ('filename="a.jpg"; filename*=b.jpg', "a.jpg"),
        ("filename=\"a; filename*=utf-8''b.jpg\"", "a; filename*=utf-8''b.jpg"),
        # What is not closed is quoted to its end.
        ("filename=a.jpg; x=\"y; filename*=utf-8''b.jpg", "a.jpg"),
        ("filename=a.jpg; x=\"\\\"; filename*=utf-8''b.jpg\\", "a.jpg"),
    ],
)
def test_a_file_name_in_either_form_that_clients_send(names: str, expected: str) -> None:
    body = part(b"one", f'form-data; name="files"; {names}') + b"--cut--\r\n"
    assert read(body) == [(expected, b"one")]


def test_a_part_without_a_name_has_not_the_one_before_it() -> None:
    nameless = b"--cut\r\nContent-Type: image/jpeg\r\n\r\ntwo\r\n"
    with pytest.raises(Problem, match="has no name"):
        read(part(b"one") + nameless + b"--cut--\r\n")


def test_an_upload_is_not_held_until_the_next_garbage_collection() -> None:
    form = Form(TYPE, 1)
    form.write(part(b"one") + b"--cut--\r\n")
    held = weakref.ref(form.end()[0].pieces)
    assert held() is not None
    del form
    assert held() is None


def test_one_file_too_many_is_refused_before_its_bytes_come() -> None:
    form = Form(TYPE, 1)
    form.write(part(b"one"))
    with pytest.raises(Problem, match="at most 1 images") as caught:
        form.write(part(b"")[:-2])
    assert caught.value.kind.name == "too-many-files"


@pytest.mark.parametrize(
    ("disposition", "match"),
    [
        ('form-data; name="image"; filename="a"', "has the field `image`"),
        ('form-data; name="files"', "which is not a file, but text"),
        ("form-data", "has no name"),
        ('form-data; name="' + "x" * 500 + '"; filename="a"', "`x{60}`"),
    ],
)
def test_what_does_not_belong_is_refused_at_its_header(disposition: str, match: str) -> None:
    with pytest.raises(Problem, match=match):
        Form(TYPE, 10).write(part(b"", disposition)[:-2])


def test_a_form_without_files_or_without_an_end() -> None:
    with pytest.raises(Problem, match="at least one image"):
        read(b"--cut--\r\n")
    with pytest.raises(Problem, match="before its closing boundary"):
        read(part(b"one"))
    with pytest.raises(Problem, match="no multipart data"):
        read(b"no form at all")


def test_a_file_name_of_any_length_up_to_4_kb() -> None:
    def named(length: int) -> bytes:
        name = "x" * length
        return part(b"one", f'form-data; name="files"; filename="{name}"') + b"--cut--\r\n"

    assert read(named(4000)) == [("x" * 4000, b"one")]
    with pytest.raises(Problem, match="with the file name, are longer than 4 kB"):
        read(named(5000))


@pytest.mark.parametrize("boundary", ["", "; boundary=", f"; boundary={'x' * 300}"])
def test_a_content_type_without_a_usable_boundary(boundary: str) -> None:
    with pytest.raises(Problem, match="boundary"):
        Form(f"multipart/form-data{boundary}", 1)


def test_a_file_that_comes_byte_by_byte_takes_little_more_than_it_is() -> None:
    pieces = Pieces()
    tracemalloc.start()
    for _ in range(100_000):
        pieces.add(memoryview(b"12")[1:])
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 200_000
    pieces.add(b"3" * 5000)
    pieces.add(b"4")
    assert pieces.take() == b"2" * 100_000 + b"3" * 5000 + b"4"
    assert pieces.take() == b""
