"""What every peer shares: the ONNX file, and a full decode with Pillow as they document it.

Each peer runs in an environment of its own, without mmtl. `NETWORK` is the ONNX file, `SIDE` its
input's height and width, `CORES` how many there are.
"""

import os
from io import BytesIO

import numpy as np
import onnxruntime
from PIL import Image

SIDE = int(os.environ["SIDE"])
CORES = int(os.environ["CORES"])
MAX_BATCH = 8


def load(threads: int = 1) -> onnxruntime.InferenceSession:
    """A session with as many threads in one run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        os.environ["NETWORK"], options, providers=["CPUExecutionProvider"]
    )


def decode(data: bytes) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]."""
    return fit(Image.open(BytesIO(data)))


def fit(image: Image.Image) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def run(session: onnxruntime.InferenceSession, images: list[np.ndarray]) -> list[dict]:
    """What is answered for each image: every output but the heat map."""
    names = [o.name for o in session.get_outputs() if o.name != "melanoma_map"]
    values = session.run(names, {"images": np.stack(images)})
    return [
        {name: value[row].tolist() for name, value in zip(names, values, strict=True)}
        for row in range(len(images))
    ]
