"""Ray Serve: a replica a core, each batching what it gets.

https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html and /performance.html;
compare.py switches its proxy (HAProxy) and its mode for high throughput on.
"""

import asyncio
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import network
from ray import serve
from starlette.requests import Request


@serve.deployment(
    num_replicas=network.CORES,
    ray_actor_options={"num_cpus": 1, "num_gpus": 1 / network.CORES if network.GPU else 0},
    max_ongoing_requests=128,
)
class Predict:
    """Decodes in a thread and runs batches."""

    def __init__(self) -> None:
        self.session = network.load(threads=1)
        self.runner = ThreadPoolExecutor(1)  # no run waits for images that are decoded

    @serve.batch(max_batch_size=network.MAX_BATCH, batch_wait_timeout_s=0.01)
    async def run(self, images: list) -> list[dict]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.runner, network.run, self.session, images)

    async def __call__(self, request: Request) -> dict:
        form = await request.form()
        data = await form["files"].read()
        return await self.run(await asyncio.to_thread(network.decode, data))


if __name__ == "__main__":
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Predict.bind(), route_prefix="/predict")
    while True:
        time.sleep(3600)
