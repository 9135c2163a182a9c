"""How fast images are answered, and so whether one more would be answered in time."""

import math

# Images over which the time between two answers is averaged, more or less.
_AVERAGED = 64


class Pace:
    """What has been seen of it, in seconds."""

    def __init__(self) -> None:
        # From where an image is taken up to its answer, and how far the times are from that.
        self._needed, self._deviation = 0.0, 0.0
        # Between two answers while there is work, and when the last one was.
        self._apart, self._ended = 0.0, -math.inf

    @property
    def needed(self) -> float:
        """What few images need more than, from where they are taken up to their answer."""
        return self._needed + 4 * self._deviation

    def note_needed(self, seconds: float) -> None:
        """An image needed that long; estimated as TCP does a round trip (RFC 6298, section 2)."""
        self._deviation += (abs(seconds - self._needed) - self._deviation) / 4
        self._needed += (seconds - self._needed) / 8

    def note_done(self, count: int, taken: float, now: float) -> None:
        """The work on some images is over.

        Args:
            count: Of the images.
            taken: When one of them was taken up, on `time.monotonic`'s clock.
            now: On that clock.
        """
        # Not since the answer before, if that was earlier: there may have been no work.
        seconds = now - max(self._ended, taken)
        self._apart += (seconds / count - self._apart) * min(count / _AVERAGED, 1)
        self._ended = now

    def would_be_late(self, images: int, left: float) -> bool:
        """Whether an image would most likely be late, behind all that are not answered.

        Images take about as much more or less than the mean as the mean is: of `n`, the time varies
        by the root of `n` times that, and twice that is allowed for.

        Args:
            images: That are not answered, this one included.
            left: Seconds to its deadline. No more than half of them is kept for the image itself,
                or a guess that is too long would have it late in any case.
        """
        wait = (images - 1 + 2 * math.sqrt(images)) * self._apart
        return wait + min(self.needed, left / 2) > left
