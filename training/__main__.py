"""`mmtl-train`, and `python -m training`."""

import sys
from importlib.util import find_spec

from models.entry import enter


def main() -> None:
    """Run the command line."""
    if find_spec("torch") is None:
        print(
            "mmtl-train: PyTorch is not installed here, as the service does without: "
            "`make training` installs it.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    enter("training.cli")


if __name__ == "__main__":
    main()
