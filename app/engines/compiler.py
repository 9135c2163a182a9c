"""OpenVINO's core, and its compiler in a process of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from io import BytesIO
from signal import SIGKILL
from subprocess import PIPE, Popen, TimeoutExpired
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino

# It takes about one, on two cores.
_MOST_SECONDS = 60.0
# How names of variables begin that say how the service is to work, and with which keys.
_OURS = ("MMTL_", "OTEL_")
# Bytes of a number: before each network that it gives, how long that is; after all of them, how
# much memory it took.
_NUMBER = 8


class CompilerError(Exception):
    """There is no compiler to be had, or it failed; the message says why, in one line."""


class NetworkError(Exception):
    """The compiler takes no such network; the message says why, in one line."""


@cache
def core() -> openvino.Core:
    """The one of this process: where each network had its own, it crashed at its end.

    Raises:
        ImportError: There is no OpenVINO.
        RuntimeError: Of what it consists some is missing.
    """
    # Its tools for conversion, which are imported with it where they are found, and report home.
    sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]  # not to be found
    import openvino

    return openvino.Core()


def compile_apart(
    content: bytes, sizes: Sequence[int], options: Mapping[str, object]
) -> tuple[list[memoryview], int]:
    """Compile a network for batches of each size.

    It is not done in this process, as the compiler leaves megabytes behind, and may crash over a
    network that it does not expect.

    Args:
        content: Of an ONNX file.
        sizes: Images of a batch.
        options: Of OpenVINO's CPU device, as JSON has them.

    Returns:
        In the order of the sizes, for `core().import_model` with these options, but for the number
        of threads; and how many bytes of memory the process took at most (0 where nobody tells).

    Raises:
        CompilerError: There is no OpenVINO, process, memory or time to be had, or the compiler
            crashed.
        NetworkError: It is no network.
    """
    from app.engines import one_line  # here, as the compiler needs nothing of ours

    # -P: modules are not looked for in this file's folder, where one is called as OpenVINO is.
    command = [sys.executable, "-P", __file__, json.dumps(sizes), json.dumps(options)]
    # No secrets, which it does not need. What is typed at a terminal to stop the service (Ctrl-C)
    # stops the service, which then says so.
    environment = {
        name: value for name, value in os.environ.items() if not name.upper().startswith(_OURS)
    }
    try:
        with Popen(
            command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment, process_group=0
        ) as compiler:
            try:
                core()  # imported while the compiler starts, and imports its own
                out, errors = compiler.communicate(content, _MOST_SECONDS)
            finally:
                compiler.kill()
    except (ImportError, RuntimeError) as error:  # as it says that its own files are missing
        from models.entry import is_interrupt

        if is_interrupt(error):
            raise KeyboardInterrupt from None
        raise CompilerError(
            f"OpenVINO cannot be used ({error}): it is in requirements/cpu.txt for Linux on "
            "x86-64; MMTL_RUNTIME=onnxruntime does without"
        ) from None
    except TimeoutExpired:
        raise CompilerError(
            f"OpenVINO's compiler did not end in {_MOST_SECONDS:.0f} seconds"
        ) from None
    except OSError as error:
        raise CompilerError(f"OpenVINO's compiler does not start: {error}") from None
    said = one_line(errors.decode(errors="replace"))
    if compiler.returncode < 0:
        said = "is there memory for it?" if compiler.returncode == -SIGKILL else said
        raise CompilerError(
            f"OpenVINO's compiler was ended by signal {-compiler.returncode}: {said}"
        )
    if compiler.returncode:
        raise NetworkError(said)
    networks = []
    rest = memoryview(out)
    for _ in sizes:
        end = _NUMBER + int.from_bytes(rest[:_NUMBER])
        networks.append(rest[_NUMBER:end])
        rest = rest[end:]
    if not all(networks):
        raise CompilerError("OpenVINO's compiler ended without a word")
    return networks, int.from_bytes(rest)


def compile_here(content: bytes, size: int, options: Mapping[str, object]) -> bytes:
    """What `compile_apart` has done in its process, for one size of batch."""
    model = core().read_model(BytesIO(content))
    model.reshape({i: [size, *list(i.partial_shape)[1:]] for i in model.inputs})
    exported: BytesIO = core().compile_model(model, "CPU", options).export_model()
    return exported.getvalue()


def _main() -> None:
    """From an ONNX network on standard input to compiled ones on standard output."""
    sizes, options = (json.loads(argument) for argument in sys.argv[1:])
    # What a library prints does not get into it.
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        try:
            core()  # while the other process imports its own
            content = sys.stdin.buffer.read()
            with ThreadPoolExecutor() as pool:
                for network in pool.map(lambda size: compile_here(content, size, options), sizes):
                    out.write(len(network).to_bytes(_NUMBER) + network)
            out.write(_peak().to_bytes(_NUMBER))
            failed = False
        except Exception as error:  # of whatever its front end makes of the file
            print(error, file=sys.stderr, flush=True)
            failed = True
    os._exit(failed)  # to put all away would take a tenth as long again


def _peak() -> int:
    """Bytes of memory that this process has had at most."""
    # Not `getrusage`, which counts those of the process that started this one.
    try:
        with open("/proc/self/status") as status:
            return 1024 * next(int(line.split()[1]) for line in status if line[:6] == "VmHWM:")
    except (OSError, StopIteration):
        return 0


if __name__ == "__main__":
    _main()
