"""LitServe, batched, with a worker a core.

https://lightning.ai/docs/litserve/features/batching and /features/parallel-processing (workers);
`fast_queue` is what LitServer's docstring advises for more than 100 requests a second.
"""

import sys

import litserve
import network


class Api(litserve.LitAPI):
    """Decode, run, encode."""

    def setup(self, device: str) -> None:
        self.session = network.load(threads=1)

    def decode_request(self, request):
        return network.decode(request["files"].file.read())

    def batch(self, inputs):
        return inputs

    def predict(self, images):
        return network.run(self.session, images)

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return output


if __name__ == "__main__":
    api = Api(max_batch_size=network.MAX_BATCH, batch_timeout=0.01)
    server = litserve.LitServer(
        api,
        accelerator="cuda" if network.GPU else "cpu",
        devices=1,
        workers_per_device=network.CORES,
        fast_queue=True,
    )
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)
