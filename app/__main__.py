"""`mmtl`, and `python -m app`."""

from models.entry import enter


def main() -> None:
    """Run the command line."""
    enter("app.cli")


if __name__ == "__main__":
    main()
