"""OpenVINO's core, and its compiler in a process of its own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from signal import SIGKILL

import numpy as np

# Its tools for conversion, which are imported with it where they are found, and report home.
sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]  # not to be found

import openvino  # noqa: E402  # after that line, so that it holds

# One for the process: where each network had its own, a process crashed at its end after a reload.
CORE = openvino.Core()
# It takes about one, on two cores.
_MOST_SECONDS = 60.0
# Bytes before each network that it gives, which say how long that is.
_LENGTH = 8


class CompilerError(Exception):
    """There is no compiler to be had, or it failed; the message says why, in one line."""


class NetworkError(Exception):
    """The compiler takes no such network; the message says why, in one line."""


def compile_apart(
    content: bytes, sizes: Sequence[int], options: Mapping[str, object]
) -> list[openvino.Tensor]:
    """Compile a network for batches of each size, for `CORE.import_model` with the same options.

    It is not done in this process, as the compiler leaves megabytes behind, and may crash over a
    network that it does not expect.

    Args:
        content: Of an ONNX file.
        sizes: Images of a batch.
        options: Of OpenVINO's CPU device, as JSON has them.

    Raises:
        CompilerError: There is no process, memory or time to be had, or the compiler crashed.
        NetworkError: It is no network.
    """
    # -P: modules are not looked for in this file's folder, where one is called as OpenVINO is.
    command = [sys.executable, "-P", __file__, json.dumps(sizes), json.dumps(options)]
    # No secrets, which it does not need. What is typed at a terminal to stop the service (Ctrl-C)
    # stops the service, which then says so.
    environment = {name: value for name, value in os.environ.items() if name[:5] != "MMTL_"}
    try:
        done = subprocess.run(
            command,
            input=content,
            capture_output=True,
            check=False,
            env=environment,
            process_group=0,
            timeout=_MOST_SECONDS,
        )
    except OSError as error:
        raise CompilerError(f"OpenVINO's compiler does not start: {error}") from None
    except subprocess.TimeoutExpired:
        raise CompilerError(
            f"OpenVINO's compiler did not end in {_MOST_SECONDS:.0f} seconds"
        ) from None
    said = one_line(done.stderr.decode(errors="replace"))
    if done.returncode < 0:
        said = "is there memory for it?" if done.returncode == -SIGKILL else said
        raise CompilerError(f"OpenVINO's compiler was ended by signal {-done.returncode}: {said}")
    if done.returncode:
        raise NetworkError(said)
    networks = []
    rest = memoryview(done.stdout)
    while rest:
        length = int.from_bytes(rest[:_LENGTH])
        # A tensor is not copied by each network that is made of it, as a stream is.
        whole = np.frombuffer(rest[_LENGTH : _LENGTH + length], np.uint8)
        networks.append(openvino.Tensor(whole))
        rest = rest[_LENGTH + length :]
    return networks


def one_line(reason: object) -> str:
    """The end of what OpenVINO says, which names the cause."""
    return re.sub(r"\s+", " ", str(reason)).strip()[-200:]


def _main() -> None:
    """From an ONNX network on standard input to compiled ones on standard output."""
    sizes, options = (json.loads(argument) for argument in sys.argv[1:])
    # What a library prints does not get into it.
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        content = sys.stdin.buffer.read()

        def compiled(size: int) -> memoryview:
            model = CORE.read_model(BytesIO(content))
            model.reshape({i: [size, *list(i.partial_shape)[1:]] for i in model.inputs})
            exported: BytesIO = CORE.compile_model(model, "CPU", options).export_model()
            return exported.getbuffer()

        try:
            with ThreadPoolExecutor() as pool:
                for network in pool.map(compiled, sizes):
                    out.write(len(network).to_bytes(_LENGTH))
                    out.write(network)
            failed = False
        except Exception as error:  # of whatever its front end makes of the file
            print(one_line(error), file=sys.stderr, flush=True)
            failed = True
    os._exit(failed)  # to put all away would take a tenth as long again


if __name__ == "__main__":
    _main()
