"""Fuzz what reads bytes that nobody vouches for: the decoder of images, and the loader of bundles.

.venv-fuzz/bin/python -m benchmarks.reliability.fuzz images [-runs=1000000] [CORPUS...]
.venv-fuzz/bin/python -m benchmarks.reliability.fuzz bundle [-runs=20000]

Atheris (libFuzzer for Python) mutates a small corpus that this program draws: an image of each
format that is taken, and of some that are not. Only the errors that the contract names may come
out; any other exception, a crash, or an input that takes longer than five seconds ends the run with
the input in a file. `make fuzz` runs both, and the API's fuzzer beside them.
"""

import io
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["PIL", "models"]):
    from PIL import Image

    Image.init()  # its parsers, which it imports at the first image otherwise, unseen

    from models.bundle import BundleError, load_bundle
    from models.images import ImageError, Limits, decode

LIMITS = Limits(2_000_000, 4_000_000, 1_000_000)
SIZE = 32


def seeds() -> dict[str, bytes]:
    """Small images, by name."""
    picture = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 20).convert("RGB")
    found = {}
    for image_format, options in {
        "JPEG": {"quality": 60},
        "PNG": {},
        "WEBP": {"quality": 50},
        "TIFF": {"compression": "tiff_lzw"},
        "BMP": {},
        "GIF": {},
        "MPO": {},
    }.items():
        buffer = io.BytesIO()
        picture.save(buffer, image_format, **options)
        found[image_format.lower()] = buffer.getvalue()
    for name, image_format, options in (
        ("progressive", "JPEG", {"progressive": True}),
        ("grey", "JPEG", {}),
        ("cmyk", "JPEG", {}),
        ("exif", "JPEG", {"exif": _turned()}),
        ("palette", "PNG", {}),
        ("alpha", "PNG", {}),
        ("sixteen", "PNG", {}),
    ):
        mode = {"grey": "L", "cmyk": "CMYK", "palette": "P", "alpha": "RGBA", "sixteen": "I;16"}
        changed = picture
        if name in mode:
            changed = picture.convert("L" if name == "sixteen" else mode[name])
            changed = changed.convert("I;16") if name == "sixteen" else changed
        buffer = io.BytesIO()
        changed.save(buffer, image_format, **options)
        found[name] = buffer.getvalue()
    return found


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def one_image(data: bytes) -> None:
    """An image as it is posted."""
    try:
        found = decode(data, SIZE, SIZE, LIMITS)
    except ImageError:
        return
    assert found.pixels.shape == (SIZE, SIZE, 3), found.pixels.shape


class OneBundle:
    """A bundle whose manifest is what the fuzzer says."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "model.onnx").write_bytes(b"not a network")

    def __call__(self, data: bytes) -> None:
        """A manifest as it lies on a disk."""
        (self.folder / "bundle.json").write_bytes(data)
        try:
            load_bundle(self.folder)
        except BundleError:
            return


def main() -> None:
    """Fuzz; the program ends with the first input that breaks a promise."""
    target, *options = sys.argv[1:]
    corpus = Path(tempfile.mkdtemp())
    if target == "images":
        for name, data in seeds().items():
            (corpus / name).write_bytes(data)
        entry = one_image
    else:
        manifest = Path("models/default/bundle.json").read_bytes()
        (corpus / "shipped").write_bytes(manifest)
        (corpus / "short").write_bytes(manifest[:2000] + b"}")
        (corpus / "other").write_bytes(b'{"format": 1, "name": "x", "tasks": []}')
        entry = OneBundle()
    atheris.Setup(
        [sys.argv[0], "-timeout=5", "-rss_limit_mb=4096", "-max_len=20000", *options, str(corpus)],
        entry,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
