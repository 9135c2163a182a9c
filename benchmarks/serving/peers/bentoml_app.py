"""BentoML, batched adaptively, with a worker a core.

https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html and
/build-with-bentoml/parallelize-requests.html. Clients send a list of one image. (Decoding in a
second service that depends on the batchable one dropped connections between the two.)
"""

from pathlib import Path

import bentoml
import network
from PIL import Image


@bentoml.service(workers=network.CORES, traffic={"timeout": 60})
class Service:
    """Decodes and runs batches."""

    def __init__(self) -> None:
        self.session = network.load(threads=1)

    @bentoml.api(route="/predict", batchable=True, max_batch_size=network.MAX_BATCH)
    def predict(self, files: list[Path]) -> list[dict]:
        return network.run(self.session, [network.fit(Image.open(path)) for path in files])
