"""What every peer shares: the ONNX file, and a full decode with Pillow as they document it.

With `SCALED` libjpeg decodes at a smaller scale, and with `UNCOPIED` an image that is RGB already
is not copied by `convert`: a line each, which none documents.

Each peer runs in an environment of its own, without mmtl. `NETWORK` is the ONNX file, `SIDE` its
input's height and width, `CORES` how many there are, `MAX_BATCH` the most images in one run; `GPU`
is set where there is one.
"""

import os
from io import BytesIO

import numpy as np
import onnxruntime
from PIL import Image

SIDE = int(os.environ["SIDE"])
CORES = int(os.environ["CORES"])
GPU = "GPU" in os.environ
SCALED = "SCALED" in os.environ
UNCOPIED = "UNCOPIED" in os.environ
MAX_BATCH = int(os.environ["MAX_BATCH"])
# What batches are filled up to, where that pays.
filled = {"to": 0}


def load(threads: int = 1, batch: int = MAX_BATCH) -> onnxruntime.InferenceSession:
    """A session with as many threads in one run; `batch` is the most images that it will get."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    providers = ["CPUExecutionProvider"]
    if GPU:
        # On a GPU, ONNX Runtime plans anew for every change of size, and for seconds.
        filled["to"] = batch
        onnxruntime.preload_dlls()
        providers.insert(0, "CUDAExecutionProvider")
    session = onnxruntime.InferenceSession(os.environ["NETWORK"], options, providers=providers)
    assert session.get_providers() == providers
    if GPU:
        run(session, [np.zeros((SIDE, SIDE, 3), np.uint8)])
    return session


def decode(data: bytes) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]."""
    image = Image.open(BytesIO(data))
    if SCALED:
        image.draft("RGB", (SIDE, SIDE))
    return fit(image)


def fit(image: Image.Image) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]."""
    if not (UNCOPIED and image.mode == "RGB"):
        image = image.convert("RGB")
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def run(session: onnxruntime.InferenceSession, images: list[np.ndarray]) -> list[dict]:
    """What is answered for each image: every output but the heat map."""
    names = [o.name for o in session.get_outputs() if o.name != "melanoma_map"]
    missing = [np.zeros_like(images[0])] * (filled["to"] - len(images))
    values = session.run(names, {"images": np.stack([*images, *missing])})
    return [
        {name: value[row].tolist() for name, value in zip(names, values, strict=True)}
        for row in range(len(images))
    ]
