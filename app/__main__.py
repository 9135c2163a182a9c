"""`mmtl`, and `python -m app`."""

import os
import signal
import sys

from models.entry import enter

# As a shell has it of Ctrl-C.
_INTERRUPTED = 130


def main() -> None:
    """Run the command line."""
    # Until a server has one of its own: without any, the first process of a container does not end
    # by it, and another one leaves what it was going to remove.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if sys.argv[1:2] == ["serve"]:  # which SIGHUP tells to load its bundle again
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        enter("app.cli")
    except SystemExit as stop:
        if stop.code != _INTERRUPTED:
            raise
        # Where the interpreter ends while a thread loads a network, in a runtime's C++, that aborts
        # the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
