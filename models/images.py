"""Bytes to pixels: the one decode, resize and crop that training and serving share.

A JPEG is decoded at the smallest of libjpeg's DCT scales (1/1, 1/2, 1/4, 1/8) that still covers
the network's input, so a 24-megapixel original costs little more than its thumbnail; of a
progressive one, only the scans that show at that scale.
"""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, TiffTags, UnidentifiedImageError

from models.colours import in_srgb
from models.headers import MOST_PIECES, in_too_many_pieces, is_whole_png
from models.progressive import for_an_eighth, has_several_scans, may_be_lossless, most_scans
from models.tiff import (
    MOST_ENTRIES,
    MOST_PLAIN_STRIPS,
    MOST_STRIPS,
    read_directory,
    takes_long,
)
from models.turns import in_turn

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
MEDIA_TYPES = {
    "image/jpeg": "JPEG",
    "image/png": "PNG",
    "image/webp": "WEBP",
    "image/tiff": "TIFF",
    "image/bmp": "BMP",
}
# Of their files.
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"})
MEGA = 1_000_000
MAX_ASPECT = 4 / 3

# Pillow's own limit is one number for every format, and warns instead of refusing. Ours, below, are
# checked on the header, before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None
# Characters of a PNG's texts, compressed to little, which Pillow keeps; XMP has some thousands.
PngImagePlugin.MAX_TEXT_MEMORY = 4 * MEGA
# How many dots an inch has is nothing to us, and Pillow reads all values that it is given, before
# any limit; of some it then says that this is no image.
JpegImagePlugin.JpegImageFile._read_dpi_from_exif = lambda self: None  # type: ignore[method-assign]

# Bytes that Pillow feeds its decoder at a time. In its usual blocks of 64 KB, threads wait for the
# interpreter at each, and a long row is put together anew at each.
_READ_AT_ONCE = 1_000_000_000
# An encoder writes about ten; each costs a pass over the whole picture.
MOST_SCANS = 100
# As long as a JPEG's may be. Pillow keeps a pointer to each row, and has a block of memory for it.
_LONGEST_SIDE = 65_535
# Pixels from which an image that is held whole waits for its turn.
_LARGE = 4 * MEGA
# Of TIFF: none, LZW, JPEG, Deflate, PackBits, Zstandard. Those of fax machines know no colours, and
# libtiff writes a line of its own for each of theirs that is damaged.
_TIFF_COMPRESSIONS = {1, 5, 7, 8, 32773, 32946, 50000}
# How often a TIFF's strips or tiles may hold its bytes, all told; each is read, whoever shares it.
_MOST_SHARED = 2
# How Pillow begins to say so of a PNG.
_METADATA_TOO_LARGE = ("Decompressed data too large", "Too much memory used in text chunks")
_DAMAGED = "The image is damaged or cut short: its pixels cannot be decoded. Take a whole copy."
_ORIENTATION_TAG = 0x0112
# Of TIFF 6.0; and where a PNG's header says how many bits a channel has (ISO/IEC 15948).
_BITS_TAG, _PHOTOMETRIC_TAG, _WHITE_IS_ZERO = 258, 262, 0
_EXTRA_SAMPLES_TAG = 338
_PNG_DEPTH = 24
# Likewise of a BMP (`biBitCount` of BITMAPINFOHEADER).
_BMP_DEPTH, _OS2_BMP_DEPTH = 28, 24
# Characters of EXIF as ImageMagick writes it into a PNG; a camera's has at most 64 kB.
_RAW_EXIF, _MOST_RAW_EXIF = "Raw profile type exif", 200_000
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = {5, 6, 7, 8}


class ImageError(ValueError):
    """An image that cannot be used; the message says why and what to do."""


class EmptyImageError(ImageError):
    """There are no bytes."""


class UnsupportedImageError(ImageError):
    """The bytes are not an image in one of `FORMATS`."""


class CorruptImageError(ImageError):
    """The header is that of an image, but its pixels cannot be decoded."""


class ImageTooLargeError(ImageError):
    """More bytes or more pixels than the limits allow."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an image may be before it is decoded.

    Attributes:
        max_bytes: The encoded size, in bytes.
        max_pixels: Width times height of a JPEG of one scan, which is decoded at a smaller scale.
        max_pixels_in_full: Pixels in memory at once. Width times height of other formats and of a
            JPEG of several scans (progressive), which are decoded at full size; of a JPEG of one
            scan, at the scale that it is decoded at: more only where it is long and thin.
    """

    max_bytes: int = 50 * MEGA
    max_pixels: int = 100 * MEGA
    max_pixels_in_full: int = 30 * MEGA


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image as the network takes it.

    Attributes:
        pixels: uint8 [height, width, 3], RGB, at the network's input size.
        width: Of the original, in pixels, as a viewer shows it (EXIF orientation applied).
        height: Likewise.
        format: One of `FORMATS`.
    """

    pixels: NDArray[np.uint8]
    width: int
    height: int
    format: str


DEFAULT_LIMITS = Limits()


def decode(
    data: bytes | memoryview,
    height: int,
    width: int,
    limits: Limits = DEFAULT_LIMITS,
    wait: bool = True,
    sparing: bool = False,
) -> DecodedImage:
    """Decode an image and fit it to `height` x `width`.

    What is wider than 4:3 (or narrower than 3:4) loses its ends; the rest is stretched to the
    target (bilinear, antialiased), so that no part of an ordinary photograph is cut away. EXIF
    orientation is applied; transparency is laid on white; greyscale, palette and CMYK become RGB;
    RGB of another colour profile becomes sRGB.

    Args:
        data: The encoded image.
        height: Of the result, in pixels.
        width: Of the result, in pixels.
        limits: Checked before any pixel is decoded.
        wait: For the turn of a large image: few are decoded at once.
        sparing: Decode fewer of them at once, as other images wait.

    Returns:
        The pixels and what the original was.

    Raises:
        EmptyImageError: `data` is empty.
        UnsupportedImageError: Not one of `FORMATS`, several frames, or a pixel type without a
            defined range (32-bit integers and floats).
        ImageTooLargeError: Over one of `limits`.
        CorruptImageError: The bytes end early or contradict themselves.
        models.turns.NotItsTurn: It is large, others have all turns that may be used, and `wait` is
            false.
    """
    if len(data) == 0:
        raise EmptyImageError("The image is empty (0 bytes): send the file itself.")
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(
            f"The image has {len(data):,} bytes; at most {limits.max_bytes:,} are accepted. Send a "
            "smaller copy."
        )
    if bytes(data[:2]) in (b"II", b"MM"):
        _check_tiff(data, limits)
    if bytes(data[:2]) == b"BM" and _is_run_length_encoded(data):
        raise UnsupportedImageError(
            "BMP with run lengths is not supported: Pillow decodes it in Python, while all others "
            "wait. Save it without compression, or as PNG."
        )
    if in_too_many_pieces(data):
        raise ImageTooLargeError(
            f"The file has more than {MOST_PIECES} pieces of metadata, or much between them that "
            "is none. Save the image anew."
        )
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnsupportedImageError(
            f"The bytes are not an image of a supported format ({', '.join(FORMATS)})."
        ) from None
    except MemoryError:  # which says nothing of the image
        raise
    except Exception as error:  # Pillow's parsers raise whatever an image's bytes lead them to
        if str(error).startswith(_METADATA_TOO_LARGE):
            raise ImageTooLargeError(
                "The PNG's text or colour profile is too large. Save it without."
            ) from None
        raise CorruptImageError("The image's header is damaged: take a whole copy.") from None
    with image:
        if image.format == "BMP" and image.mode == "1" and data[_depth_in(data)] != 1:
            # Of two colours, black and white, Pillow takes each for one bit, however many it has.
            raise UnsupportedImageError(
                "BMP of black and white alone is not supported in more than one bit a pixel. Save "
                "it as PNG."
            )
        # A phone's MPO is a JPEG with previews appended; its first frame is the photograph.
        image_format = "JPEG" if image.format == "MPO" else str(image.format)
        in_full = image_format != "JPEG" or has_several_scans(data)
        held = _held_pixels(image.size, in_full, height, width)
        _check_size(image, image_format, in_full, held, limits)

        def whole() -> DecodedImage:
            try:
                if in_full and image_format == "JPEG" and most_scans(bytes(data)) > MOST_SCANS:
                    raise ImageTooLargeError(
                        f"The JPEG has more than {MOST_SCANS} scans. Save it anew."
                    )
                return _fit(image, image_format, data, height, width)
            finally:
                image.close()  # with its pixels

        return in_turn(whole, wait, sparing) if held > _LARGE else whole()


def _fit(
    image: Image.Image, image_format: str, data: bytes | memoryview, height: int, width: int
) -> DecodedImage:
    if image.mode in ("I", "F"):
        raise UnsupportedImageError(
            "Images of 32 bits a channel, or of signed ones, are not supported; send 8 or 16, "
            "unsigned."
        )

    try:
        several = image.format not in ("MPO", "TIFF") and getattr(image, "is_animated", False)
        if several:
            raise UnsupportedImageError("The image has several frames or pages; send one.")
        if image_format == "PNG" and not is_whole_png(data):
            raise CorruptImageError(_DAMAGED)
        if image_format == "TIFF":
            _forget_further_directories(image)
        if image_format == "BMP":
            image.decodermaxblock = _READ_AT_ONCE  # type: ignore[attr-defined]  # an ImageFile
        if image_format != "JPEG":
            # Before the orientation is read: PNG's getexif() decodes the pixels, and what fails
            # there once is not tried again.
            image.load()
    except (ImageError, MemoryError):
        raise
    except Exception:
        raise CorruptImageError(_DAMAGED) from None
    orientation = _orientation(image)
    profile = image.info.get("icc_profile")
    swaps = orientation in _SWAPS_SIDES
    shown_width, shown_height = image.size[::-1] if swaps else image.size
    target = (height, width) if swaps else (width, height)
    try:
        if image_format == "JPEG" and not may_be_lossless(data):
            whole = image.width
            image.draft("RGB", target)
            if image.info.get("progressive") and whole > 4 * image.width:
                image = Image.open(BytesIO(for_an_eighth(bytes(data))), formats=["JPEG"])
                image.draft("RGB", target)
            image.decodermaxblock = _READ_AT_ONCE  # type: ignore[attr-defined]  # an ImageFile
        resized = _laid_on_white(
            _to_channels(image, data).resize(
                target, Image.Resampling.BILINEAR, box=centred_box(image.size)
            )
        )
    except MemoryError:
        raise
    except Exception:
        raise CorruptImageError(_DAMAGED) from None
    resized = in_srgb(resized, profile)
    if orientation in _TRANSPOSE:
        resized = resized.transpose(_TRANSPOSE[orientation])
    return DecodedImage(np.asarray(resized), shown_width, shown_height, image_format)


def _held_pixels(size: tuple[int, int], in_full: bool, height: int, width: int) -> int:
    """How many of an image are in memory at once: at most, however it is turned."""
    fits = 1 if in_full else min(size) // max(height, width)
    scale = max((each for each in (2, 4, 8) if each <= fits), default=1)
    return size[0] * size[1] // scale**2


def _check_size(
    image: Image.Image, image_format: str, in_full: bool, held: int, limits: Limits
) -> None:
    width, height = image.size
    if max(width, height) > _LONGEST_SIDE:
        raise ImageTooLargeError(
            f"The image has {width} x {height} pixels; at most {_LONGEST_SIDE:,} a side are "
            "accepted. Send a smaller copy."
        )
    most = min(limits.max_pixels, limits.max_pixels_in_full) if in_full else limits.max_pixels
    several = in_full and image_format == "JPEG"
    kind = "JPEG of several scans (progressive)" if several else image_format
    if width * height <= most and held > max(limits.max_pixels_in_full, _LARGE):
        most, kind = limits.max_pixels_in_full, f"{kind} as long and thin as that"
    if width * height > most:
        raise ImageTooLargeError(
            f"The image has {width} x {height} = {width * height / MEGA:,.1f} megapixels; "
            f"at most {most / MEGA:g} are accepted for {kind}. Send a smaller copy."
        )


def _check_tiff(data: bytes | memoryview, limits: Limits) -> None:
    directory = read_directory(data)
    if directory is None:
        raise UnsupportedImageError("The TIFF's header is damaged, or that of a BigTIFF.")
    if directory.several_pages:
        raise UnsupportedImageError("The image has several frames or pages; send one.")
    if directory.preview:
        raise UnsupportedImageError(
            "The TIFF's first picture is a small copy of another one, as in a camera's raw files. "
            "Send the picture itself, as JPEG or TIFF."
        )
    if directory.compression not in _TIFF_COMPRESSIONS:
        raise UnsupportedImageError(
            f"TIFF compression {directory.compression} is not supported; send Deflate, LZW or JPEG."
        )
    too_much = directory.tiles_pixels > max(2 * limits.max_pixels_in_full, _LARGE)
    too_much |= directory.stored_bytes > _MOST_SHARED * len(data)
    too_much |= directory.longest_list > MOST_STRIPS or directory.takes_long
    if directory.tile_pixels > _LARGE or too_much:
        raise ImageTooLargeError(
            f"The TIFF has tiles of more than {_LARGE / MEGA:g} megapixels, tiles far larger than "
            f"the picture, lists of more than {MOST_STRIPS:,} entries, strips that share their "
            f"bytes, more of them than the picture has or (uncompressed) {MOST_PLAIN_STRIPS:,}, or "
            f"more than {MOST_ENTRIES:,} pieces of metadata. Save it anew, or as PNG."
        )

    if directory.misread:
        raise UnsupportedImageError(
            "The TIFF's numbers have signs, its samples are stored apart (planar) or subsampled in "
            "a way that is not supported, or it does not say what its colours are. Save it anew, "
            "or as PNG."
        )
    if directory.ends_early:  # of which libtiff may decode what there is, and says nothing
        raise CorruptImageError(_DAMAGED)


def _depth_in(bmp: bytes | memoryview) -> int:
    """Where a BMP says how many bits a pixel has; in OS/2's header of twelve bytes, earlier."""
    return _OS2_BMP_DEPTH if int.from_bytes(bmp[14:18], "little") == 12 else _BMP_DEPTH


def _is_run_length_encoded(bmp: bytes | memoryview) -> bool:
    """Whether it says so: RLE8 or RLE4 (`biCompression` of BITMAPINFOHEADER, and what has more)."""
    header, compression = (int.from_bytes(bmp[at : at + 4], "little") for at in (14, 30))
    return header >= 40 and compression in (1, 2)


def _forget_further_directories(image: Image.Image) -> None:
    """Let a TIFF's EXIF, GPS and the like be: Pillow reads them with the pixels, all in Python."""
    _orientation(image)  # keeps what it has read, though it may fail at some of it
    exif = image.getexif()
    for tag in TiffTags.TAGS_V2_GROUPS:
        if tag in exif:
            del exif[tag]


def _orientation(image: Image.Image) -> int:
    # A damaged EXIF block says nothing about the pixels, so it does not refuse them.
    try:
        if len(image.info.get(_RAW_EXIF, "")) > _MOST_RAW_EXIF:
            return 1
        if (exif := _exif(image)) and takes_long(exif):
            return 1
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except MemoryError:
        raise
    except Exception:
        return 1


def _exif(image: Image.Image) -> bytes:
    """From its byte order on, as Pillow finds it; nothing of a TIFF, which is one itself."""
    exif = image.info.get("exif")
    if exif is None:
        exif = bytes.fromhex("".join(image.info.get(_RAW_EXIF, "").split("\n")[3:]))
    for _ in range(2):
        exif = exif.removeprefix(b"Exif\0\0")
    return exif


def _to_channels(image: Image.Image, data: bytes | memoryview) -> Image.Image:
    """As RGB, or RGBA where something is transparent; not copied where it is that already."""
    if image.mode.startswith("I;16"):
        return _of_sixteen_bits(image)
    if image.format == "PNG" and "transparency" in image.info:
        _scale_transparent_colour(image, depth=data[_PNG_DEPTH])
    if image.mode == "La":  # which knows no way to RGBA
        image = image.convert("LA")
    if image.mode == "RGBA" and _has_no_alpha(image):
        image = image.convert("RGB")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _has_no_alpha(image: Image.Image) -> bool:
    """Whether the fourth sample is none: that of a BMP is left at 0, of a TIFF not said to be."""
    if image.format == "TIFF":
        return _EXTRA_SAMPLES_TAG not in getattr(image, "tag_v2", ())
    return image.format == "BMP" and not image.getchannel("A").getbbox()


def _of_sixteen_bits(image: Image.Image) -> Image.Image:
    """Grey ones. Pillow leaves to others what a TIFF or PNG says of its values."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    shift = tags.get(_BITS_TAG, (16,))[0] - 8  # a TIFF may have twelve bits
    grey = (values >> shift).astype(np.uint8)
    if tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO:
        grey = ~grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
        return Image.fromarray(np.stack([grey, grey, grey, alpha], axis=2), "RGBA")
    return Image.fromarray(grey).convert("RGB")


def _scale_transparent_colour(image: Image.Image, depth: int) -> None:
    """Give the one colour that is transparent in eight bits, as Pillow gives the pixels alone."""
    colour = image.info["transparency"]
    if isinstance(colour, int) and image.mode == "L" and depth < 8:
        image.info["transparency"] = colour * 255 // (2**depth - 1)
    elif isinstance(colour, tuple) and depth > 8:
        image.info["transparency"] = tuple(each >> 8 for each in colour)


def _laid_on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def centred_box(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest box in the middle of `size` (width, height) with an aspect ratio up to 4:3."""
    width = min(float(size[0]), size[1] * MAX_ASPECT)
    height = min(float(size[1]), size[0] * MAX_ASPECT)
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return (left, top, left + width, top + height)
