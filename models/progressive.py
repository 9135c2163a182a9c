"""The scans of a JPEG: whether there are many, and which do not show at an eighth of its size.

At an eighth a pixel is the mean of an 8x8 block: its first coefficient. A progressive file sends
the others in scans of their own, most of its bytes, and a decoder reads them all to throw them
away. Without them the pixels are the same, to the bit, at about half the time.

Kept are the scans of the colour channels, which may be stored at half the size and then need more
coefficients, and brightness' first look at its coefficients from the second on, without which
libjpeg takes the image for one that is still loading, and smooths it (ITU-T T.81, annex G;
libjpeg-turbo's jdcoefct.c, `smoothing_ok`).
"""

import re

_SCAN, _END = 0xDA, 0xD9
_PROGRESSIVE = 0xC2
# Of T.81, table B.1: frames of any coding; those that are not progressive; and what may stand
# before a scan with its length: tables, restart intervals, applications' segments and comments.
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = {0xC0, 0xC1}
_LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
_TABLES = {0xC4, 0xCC, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}
# Within a scan's data 0xFF is followed by 0x00, or by a restart marker, or stands for itself again.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def has_several_scans(data: bytes | memoryview) -> bool:
    """Whether a JPEG is held in memory whole, at any scale (libjpeg's `has_multiple_scans`).

    It is not where its first scan holds all channels. Where a decoder might read the way there
    otherwise than this does, it is taken to be.

    Args:
        data: A JPEG file.
    """
    channels = None
    at = 2
    while data[at : at + 1] == b"\xff" and at + 5 <= len(data):
        marker, body = data[at + 1], at + 4
        if marker == _SCAN:
            return channels is None or data[body] < channels
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in FRAMES:
            whole = body + 5 < min(end, len(data))
            if marker not in _SEQUENTIAL or channels is not None or not whole:
                return True
            channels = data[body + 5]
        elif marker not in _TABLES:
            return True
        at = end
    return True


def most_scans(data: bytes) -> int:
    """No fewer than a JPEG has scans.

    Where a decoder might read the way to its end otherwise than this does, their marker counts
    wherever it stands, by chance or in a thumbnail, too.

    Args:
        data: A JPEG file.
    """
    at, scans = 2, 0
    while data[at : at + 1] == b"\xff" and at + 2 <= len(data):
        marker = data[at + 1]
        if marker == _END and scans:  # before any, a decoder goes on: tables may come by themselves
            return scans  # a motion photo's video follows, for one
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _SCAN:
            scans += 1
            following = _MARKER.search(data, end)
            if following is None:
                return scans
            end = following.start()
        elif marker not in FRAMES and marker not in _TABLES:
            break
        at = end
    return data.count(bytes([0xFF, _SCAN]))


def may_be_lossless(data: bytes | memoryview) -> bool:
    """Whether a JPEG's frame is of the lossless kind, which has no smaller scales.

    Asked for one, Pillow would make room for rows of that scale, and libjpeg write whole ones.
    Where a decoder might read the way to the frame otherwise than this does, it is taken to be.

    Args:
        data: A JPEG file.
    """
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker = data[at + 1]
        if marker not in _TABLES:
            return marker not in FRAMES - _LOSSLESS
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def for_an_eighth(data: bytes) -> bytes:
    """The same JPEG with fewer scans; as it is where it is not whole, or of another kind.

    Args:
        data: A progressive JPEG file.
    """
    parts: list[bytes] = [data[:2]]
    brightness = None
    looked = False
    at = 2
    while data[at : at + 1] == b"\xff" and at + 2 <= len(data):
        marker = data[at + 1]
        if marker == _END:
            break
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at + 4 : at + 2 + length]
        end = at + 2 + length
        keep = True
        if marker == _PROGRESSIVE:
            brightness = _of_full_size(segment)
        elif marker == _SCAN:
            following = _MARKER.search(data, end)
            if following is None or len(segment) < 6:
                return data
            end = following.start()
            first, approximation = segment[-3], segment[-1]
            if segment[0] == 1 and segment[1] == brightness and first:
                keep = first == 1 and not approximation >> 4
                looked |= keep
        if keep:
            parts.append(data[at:end])
        at = end
    else:
        return data
    return b"".join([*parts, data[at:]]) if looked else data


def _of_full_size(frame: bytes) -> int | None:
    """The first component of a frame, where none is sampled more finely than it."""
    samplings = frame[7::3]
    if not samplings or any(s >> 4 > samplings[0] >> 4 for s in samplings):
        return None
    return None if any(s & 15 > samplings[0] & 15 for s in samplings) else frame[6]
