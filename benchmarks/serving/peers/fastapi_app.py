"""A hand-written FastAPI app: a pool of a thread a core, each decoding and running one image.

https://fastapi.tiangolo.com/tutorial/request-files/ and /async/ (blocking work into a thread pool);
in one process, or in several (/deployment/server-workers/).
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import network
from fastapi import FastAPI, UploadFile

app = FastAPI()
session = network.load(threads=1, batch=1)
pool = ThreadPoolExecutor(network.CORES)


def answer(data: bytes) -> dict:
    """In a thread of the pool."""
    return network.run(session, [network.decode(data)])[0]


@app.post("/predict")
async def predict(files: UploadFile) -> dict:
    """One image."""
    data = await files.read()
    return await asyncio.get_running_loop().run_in_executor(pool, answer, data)
