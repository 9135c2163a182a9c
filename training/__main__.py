"""`mmtl-train`, and `python -m training`."""

from models.entry import enter


def main() -> None:
    """Run the command line."""
    enter("training.cli")


if __name__ == "__main__":
    main()
