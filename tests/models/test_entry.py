import signal
import subprocess
import sys

import pytest

INTERRUPTS = "raise KeyboardInterrupt"
# As pybind11 has it.
COMPILED = "raise ImportError('initialization failed') from KeyboardInterrupt()"
ENDS = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
FAILS = "raise ImportError('no such symbol') from ValueError()"


def run(package: str, on_import: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A package as a program, in which its command line cannot be imported."""
    interrupted = f"""
import runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "{package}.cli":
            {on_import}
sys.meta_path.insert(0, Finder())
runpy.run_module("{package}", run_name="__main__")
"""
    command = [sys.executable, "-c", interrupted, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("package", ["app", "training"])
@pytest.mark.parametrize("on_import", [INTERRUPTS, COMPILED])
def test_ctrl_c_is_quiet_while_a_command_is_imported(package: str, on_import: str) -> None:
    done = run(package, on_import)
    assert (done.returncode, done.stderr) == (130, "")


def test_the_service_ends_by_sigterm_as_by_ctrl_c_while_it_is_loaded() -> None:
    # Without a handler a signal ends a program, but not the first of a container.
    done = run("app", ENDS)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_hangup_does_not_end_the_service_while_it_is_loaded() -> None:
    hangs_up = "import os, signal; os.kill(os.getpid(), signal.SIGHUP); raise KeyboardInterrupt"
    assert run("app", hangs_up, "predict").returncode == -signal.SIGHUP
    assert run("app", hangs_up, "serve").returncode == 130


def test_what_is_imported_is_not_looked_through_for_cycles_later() -> None:
    program = """
import gc, sys, types
from models.entry import enter
sys.modules["command"] = command = types.ModuleType("command")
command.main = lambda: print(gc.isenabled(), len(gc.get_objects()) < gc.get_freeze_count())
enter("command")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True True\n"


def test_what_else_fails_then_is_told() -> None:
    done = run("app", FAILS)
    assert done.returncode == 1
    assert "no such symbol" in done.stderr


@pytest.mark.parametrize(("package", "command"), [("app", "serve"), ("training", "fit")])
def test_a_package_is_a_program(package: str, command: str) -> None:
    done = subprocess.run([sys.executable, "-m", package, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert command in done.stdout
