"""Enter a command line: Ctrl-C is quiet while its modules are still imported, too."""

import gc
from importlib import import_module


def enter(module: str) -> None:
    """Import a module, and run its `main`.

    Raises:
        SystemExit: Ctrl-C was pressed (130).
    """
    try:
        # What modules make stays: to look for what nobody needs takes a tenth of their time, and
        # later as long again, over and over.
        gc.disable()
        try:
            imported = import_module(module)
        finally:
            gc.freeze()
            gc.enable()
        imported.main()
    except (KeyboardInterrupt, ImportError) as error:
        if not is_interrupt(error):
            raise
        raise SystemExit(130) from None


def is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: a compiled module makes an ImportError of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__
    return error is not None
