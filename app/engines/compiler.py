"""OpenVINO's compiler, in a process of its own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from io import BytesIO

import numpy as np

# Its tools for conversion, which are imported with it where they are found, and report home.
sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]  # not to be found

import openvino  # noqa: E402  # after that line, so that it holds

# One for the process: where each network had its own, a process crashed at its end after a reload.
CORE = openvino.Core()


class CompilerError(Exception):
    """A network cannot be compiled; the message says why, in one line."""


def compile_apart(content: bytes, options: Mapping[str, object]) -> openvino.Tensor:
    """Compile a network, for `CORE.import_model` with the same options.

    It is not done in this process, as the compiler leaves megabytes behind, and may crash over a
    network that it does not expect.

    Args:
        content: Of an ONNX file.
        options: Of OpenVINO's CPU device, as JSON has them.

    Raises:
        CompilerError: It is no network, or there is no process or memory to be had.
    """
    # -P: modules are not looked for in this file's folder, where one is called as OpenVINO is.
    command = [sys.executable, "-P", __file__, json.dumps(options)]
    try:
        done = subprocess.run(command, input=content, capture_output=True, check=False)
    except OSError as error:
        raise CompilerError(f"its compiler does not start: {error}") from None
    if done.returncode < 0:
        raise CompilerError(
            f"its compiler was ended by signal {-done.returncode}: is there memory for it?"
        )
    if done.returncode:
        raise CompilerError(one_line(done.stderr.decode(errors="replace")))
    # A tensor is not copied by each network that is made of it, as a stream is.
    return openvino.Tensor(np.frombuffer(done.stdout, np.uint8))


def one_line(reason: object) -> str:
    """The end of what OpenVINO says, which names the cause."""
    return re.sub(r"\s+", " ", str(reason)).strip()[-200:]


def _main() -> None:
    """From an ONNX network on standard input to a compiled one on standard output."""
    try:
        model = CORE.read_model(BytesIO(sys.stdin.buffer.read()))
        compiled = CORE.compile_model(model, "CPU", json.loads(sys.argv[1]))
        sys.stdout.buffer.write(compiled.export_model().getbuffer())
        sys.stdout.flush()
    except Exception as error:  # of whatever its front end makes of the file
        sys.exit(one_line(error))
    os._exit(0)  # to put all away would take a tenth as long again


if __name__ == "__main__":
    _main()
