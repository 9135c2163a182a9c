"""Thirty kinds of what nobody should post, for the drill."""

import random
from io import BytesIO

from PIL import Image

BOUNDARY = "drill"


def garbage(picture: bytes) -> list[tuple[str, bytes, bytes]]:
    """Thirty kinds of what nobody should send: name, head of the request, body."""

    def multipart(body: bytes, name: str = "files", boundary: str = BOUNDARY) -> bytes:
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="x"\r\n\r\n'
        )
        return head.encode() + body + f"\r\n--{boundary}--\r\n".encode()

    form = f"multipart/form-data; boundary={BOUNDARY}".encode()
    png = BytesIO()
    Image.new("RGB", (64, 64), (200, 150, 120)).save(png, "PNG")
    huge = png.getvalue()[:16] + (50_000).to_bytes(4, "big") * 2 + png.getvalue()[24:]
    gif = BytesIO()
    Image.new("P", (8, 8)).save(gif, "GIF")
    noise = random.Random(1).randbytes(5000)
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='9' height='9'/></svg>"
    flipped = bytearray(picture)
    for place in range(200, len(flipped), 97):
        flipped[place] ^= 0x55
    kinds: list[tuple[str, bytes, bytes]] = [
        ("empty body", form, b""),
        ("empty file", form, multipart(b"")),
        ("text", form, multipart(b"this is no picture")),
        ("noise", form, multipart(noise)),
        ("half a JPEG", form, multipart(picture[: len(picture) // 2])),
        ("JPEG header alone", form, multipart(picture[:20])),
        ("a JPEG with flipped bits", form, multipart(bytes(flipped))),
        ("a PNG that declares 50,000 x 50,000", form, multipart(huge)),
        ("half a PNG", form, multipart(png.getvalue()[:60])),
        ("GIF", form, multipart(gif.getvalue())),
        ("SVG", form, multipart(svg)),
        ("PDF", form, multipart(b"%PDF-1.7\n" + noise)),
        ("ZIP", form, multipart(b"PK\x03\x04" + noise)),
        ("another field", form, multipart(picture, "image")),
        ("another boundary", form, multipart(picture, boundary="other")),
        ("no end of the form", form, multipart(picture)[:-12]),
        ("a part without a head", form, b"--drill\r\n" + picture),
        ("10,000 parts", form, multipart(b"x")[:-11] * 10_000),
        ("33 files", form, multipart(picture[:500])[:-11] * 33 + b"--drill--\r\n"),
        ("no boundary", b"multipart/form-data", multipart(picture)),
        ("a boundary of 200 characters", form + b"x" * 200, multipart(picture)),
        ("JSON", b"application/json", b'{"files": ["x"]}'),
        ("text/plain", b"text/plain", picture),
        ("a raw body that is no JPEG", b"image/jpeg", noise),
        ("a raw GIF", b"image/gif", gif.getvalue()),
        ("no content type", b"", picture),
        ("a content type of noise", b"\xff\xfe;;;==", picture),
        ("a null byte in the name", form, multipart(noise, "fi\0les")),
        ("a very long field name", form, multipart(noise, "f" * 20_000)),
        ("a JPEG followed by a ZIP", form, multipart(picture[:3000] + b"PK\x03\x04" + noise)),
    ]
    assert len(kinds) == 30
    return kinds
