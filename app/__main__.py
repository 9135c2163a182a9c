"""`mmtl`, and `python -m app`."""

import signal
import sys

from models.entry import enter


def main() -> None:
    """Run the command line."""
    # Until a server has one of its own: without any, the first process of a container does not end
    # by it, and another one leaves what it was going to remove.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if sys.argv[1:2] == ["serve"]:  # which SIGHUP tells to load its bundle again
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    enter("app.cli")


if __name__ == "__main__":
    main()
