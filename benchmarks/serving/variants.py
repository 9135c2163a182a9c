"""The service but for one thing: a function each, which says in its docstring what is other.

    variants.py NAME

starts it. Run by steps.py, which measures those that differ on its machine, in mmtl's environment:
a CPU that multiplies bfloat16 numbers runs the int8 network in OpenVINO by default, any other in
ONNX Runtime. An engine is imported by what changes it: the service loads the one that it runs, and
the other takes memory.
"""

import asyncio
import ctypes
import gc
import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import app.batcher
import app.cli
import app.engines
import app.networks
import app.pace
import app.predictor
import app.routes.predict
import app.server
import app.telemetry
import models.bundle
import models.images
import models.memory
import models.turns
from app.settings import Settings
from models.cores import available_cores

# What it runs by default here.
RUNS_OPENVINO = app.engines._prefers_openvino(Settings())
# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def as_it_is() -> None:
    """As it is."""


def fp32() -> None:
    """The fp32 network, in ONNX Runtime."""
    os.environ["MMTL_PRECISION"] = "fp32"


def without_openvino() -> None:
    """The int8 network in ONNX Runtime."""
    os.environ["MMTL_RUNTIME"] = "onnxruntime"


def without_bfloat16() -> None:
    """What stays in floats in float32."""
    os.environ["MMTL_RUNTIME"] = "openvino"
    app.engines.multiplies_bfloat16 = lambda: False


def in_openvino() -> None:
    """The int8 network in OpenVINO; floats in bfloat16, where the CPU multiplies such."""
    os.environ["MMTL_RUNTIME"] = "openvino"


def one_run_at_a_time_in_openvino() -> None:
    """One run at a time, on all cores."""
    from app.engines import openvino

    cores = available_cores()
    core: Any = type(openvino.core())
    for owner, name in ((openvino, "compile_apart"), (core, "import_model")):
        load: Any = getattr(owner, name)

        def wide(*arguments: Any, load: Any = load) -> Any:
            *others, options = arguments
            return load(*others, {**options, "INFERENCE_NUM_THREADS": cores})

        setattr(owner, name, wide)
    start: Any = openvino.OpenVinoEngine.__init__
    openvino.OpenVinoEngine.__init__ = lambda self, file, content, size, _, *others: start(
        self, file, content, size, 1, *others
    )


def compiled_in_the_service() -> None:
    """The network compiled in the service's process, where the compiler leaves memory behind."""
    from app.engines import compiler, openvino

    def here(content: bytes, sizes: Any, options: Any) -> Any:
        return [compiler.compile_here(content, size, options) for size in sizes], 0

    openvino.compile_apart = here


def single_images_on_one_core() -> None:
    """Single images run on a core each, in a network a core."""
    from app.engines import openvino

    openvino._CORES_OF_ONE = 1


def networks_of_any_size() -> None:
    """Networks that take any number of images, and plan each layer anew in every run."""
    from app.engines import openvino

    load = openvino.compile_apart

    def of_any_size(content: bytes, sizes: Any, options: Any) -> Any:
        networks, peak = load(content, [-1], options)
        return networks * len(sizes), peak

    openvino.compile_apart = of_any_size


def one_run_at_a_time_in_onnx_runtime() -> None:
    """One run at a time, on all cores."""
    from app.engines import onnx

    cores = available_cores()
    load: Any = onnx.onnxruntime.InferenceSession

    def wide(content: bytes, options: Any, **named: Any) -> Any:
        options.intra_op_num_threads = cores
        return load(content, options, **named)

    onnx.onnxruntime.InferenceSession = wide
    start: Any = onnx.OnnxEngine.__init__
    onnx.OnnxEngine.__init__ = lambda self, file, content, _, most: start(
        self, file, content, 1, most
    )


def lone_runs_on_one_core() -> None:
    """An image that is alone run on one core, like any other."""
    from app.engines import onnx

    onnx._LONE_CORES = sys.maxsize


def lone_runs_on_any_core() -> None:
    """An image that is alone run on two threads that the kernel may put on one core."""
    from app.engines import onnx

    onnx.keep_off_this_core = lambda threads: None


def weights_apart() -> None:
    """Weights of its own in each session: for batches, and for an image that is alone."""
    from app.engines import onnx

    onnx.open_sessions = lambda file, content, threads: [
        onnx.open_session(file, content, count) for count in threads
    ]


def lone_runs_without_an_arena() -> None:
    """Memory of a run that is alone asked for anew, not kept in an arena."""
    from app.engines import onnx

    ort: Any = onnx.onnxruntime
    load: Any = ort.InferenceSession

    def without(content: bytes, options: Any, **named: Any) -> Any:
        options.enable_cpu_mem_arena = options.intra_op_num_threads == 1
        return load(content, options, **named)

    ort.InferenceSession = without


def one_arena() -> None:
    """One arena for all sessions, which grows by what is asked for."""
    from app.engines import onnx

    ort: Any = onnx.onnxruntime
    kind, usual = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, ort.OrtMemType.DEFAULT
    ort.create_and_register_allocator(
        ort.OrtMemoryInfo("Cpu", kind, 0, usual), ort.OrtArenaCfg({"arena_extend_strategy": 1})
    )
    load: Any = ort.InferenceSession

    def sharing(content: bytes, options: Any, **named: Any) -> Any:
        options.add_session_config_entry("session.use_env_allocators", "1")
        # It would ask for a run's memory in one piece, which fits nowhere that another has left.
        options.enable_mem_pattern = False
        return load(content, options, **named)

    ort.InferenceSession = sharing


def without_batches() -> None:
    """Every image run on its own."""
    os.environ["MMTL_MAX_BATCH"] = "1"


def batches_of_eight() -> None:
    """Batches of 8, not 4 (a little faster, in more memory)."""
    engine: Any = import_module("app.engines.openvino" if RUNS_OPENVINO else "app.engines.onnx")
    engine.BATCH_ON_CPU = 8


def half_of_the_runs() -> None:
    """Runs on at most half of the cores while images wait to be decoded."""
    half = max(available_cores() // 2, 1)
    worth_a_run = app.batcher.Batcher._worth_a_run

    def worth_another(batcher: Any) -> bool:
        return batcher._running < half and worth_a_run(batcher)

    app.batcher.Batcher._worth_a_run = worth_another


def without_spare_worker() -> None:
    """No more workers than cores."""
    _workers_beyond_cores(0)


def two_spare_workers() -> None:
    """Two workers more than cores, not one."""
    _workers_beyond_cores(2)


def _workers_beyond_cores(count: int) -> None:
    load: Any = app.engines.load_engine

    def loaded(*arguments: Any) -> Any:
        engine = load(*arguments)
        engine.helpers = count
        return engine

    app.engines.load_engine = loaded


def arenas_not_shared() -> None:
    """An arena of malloc for each thread."""
    from app.engines import openvino

    openvino.limit_arenas = lambda most: None


def every_scan() -> None:
    """Every scan of a progressive JPEG."""
    models.images.for_an_eighth = lambda data: data


def small_blocks() -> None:
    """JPEGs read in Pillow's blocks of 64 KB."""
    models.images._READ_AT_ONCE = 65536


def through_the_router() -> None:
    """FastAPI finds every route, and reads its parameters."""

    async def through(self: Any, *request: Any) -> None:
        await self.app(*request)

    app.routes.predict.Direct.__call__ = through


def answers_by_numpy() -> None:
    """Probabilities of one image calibrated, summed and rounded by NumPy."""

    def shares(probabilities: Any) -> list[float]:
        values = probabilities.astype(np.float64).clip(0.0, 1.0)
        found: list[float] = (values / values.sum()).round(app.predictor.DIGITS).tolist()
        return found

    app.predictor._shares = shares
    app.predictor.one_melanoma_probability = lambda logit, calibration: float(
        models.bundle.melanoma_probability(np.float64(logit), calibration)
    )


def stacked_by_numpy() -> None:
    """Batches put together by numpy, which lets the interpreter go."""
    app.batcher._stack = np.stack


def frequent_collections() -> None:
    """Garbage collected after every 700 objects, not 20,000."""
    app.server._OBJECTS_PER_COLLECTION = 700


def large_images_anywhere() -> None:
    """Large images decoded by any worker, not by threads of their own."""
    models.turns._Turn.run = lambda _, work: work()


def large_images_on_all_cores() -> None:
    """A large image decoded on each core, though others wait."""
    app.batcher.Batcher.others_wait = False


def one_large_image_at_a_time() -> None:
    """One large image decoded at a time, not one a core."""
    app.server.most_at_once = lambda *_: 1


def loading_kept() -> None:
    """What loading leaves behind kept."""
    app.networks.give_back = lambda: None


def frequent_trims() -> None:
    """Memory given back to the kernel after every large image."""
    models.turns.trim_heaps_soon = models.memory.trim_heaps


def garbage_frozen() -> None:
    """Garbage collector frozen after start."""
    start = app.server.Server.startup

    async def startup(self: Any, *arguments: Any, **named: Any) -> None:
        await start(self, *arguments, **named)
        gc.collect()
        gc.freeze()

    app.server.Server.startup = startup


def short_switches() -> None:
    """Threads switched every 0.5 ms, not every 5."""
    sys.setswitchinterval(0.0005)


def nice_workers() -> None:
    """Workers behind the event loop (`nice` 5)."""
    work = app.batcher.Batcher._work

    def nice(self: Any, warms_up: bool) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
        work(self, warms_up)

    app.batcher.Batcher._work = nice


def freed_memory_kept() -> None:
    """Freed memory not given back to the kernel."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_TRIM_THRESHOLD, 268_435_456)
    mallopt(_MMAP_THRESHOLD, 33_554_432)


def large_pieces_given_back() -> None:
    """Each piece of memory of a megabyte or more given back when it is freed, others kept."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_TRIM_THRESHOLD, 67_108_864)
    mallopt(_MMAP_THRESHOLD, 1_048_576)


def quality_alone() -> None:
    """Each picture's quality measured by itself, not a batch's."""
    measure = app.networks.measure

    def alone(pixels: Any) -> dict[str, Any]:
        each = [measure(one[None]) for one in pixels]
        return {name: np.concatenate([one[name] for one in each]) for name in each[0]}

    app.networks.measure = alone


def bodies_copied() -> None:
    """Bodies copied twice, by uvicorn, before they are read."""

    def on_body(self: Any, body: bytes) -> None:
        self._bodies += 1
        self._header_bytes = 0
        if not self.transport.is_closing():
            HttpToolsProtocol.on_body(self, body)

    app.server.Protocol.on_body = on_body


def lines_together() -> None:
    """Log lines of one turn of the event loop written together."""
    write: Any = app.telemetry._Lines.info
    waiting: list[str] = []

    def write_all(lines: Any) -> None:
        write(lines, "\n".join(waiting))
        waiting.clear()

    def info(lines: Any, line: str) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # another thread's
            write(lines, line)
            return
        if not waiting:
            loop.call_soon(write_all, lines)
        waiting.append(line)

    app.telemetry._Lines.info = info


def lines_later() -> None:
    """Log lines written ten times a second."""
    waiting: deque[str] = deque()

    def write_all() -> None:
        while True:
            time.sleep(0.1)
            sys.stderr.write("".join(waiting.popleft() for _ in range(len(waiting))))
            sys.stderr.flush()

    def info(_: Any, line: str) -> None:
        waiting.append(f"{line}\n")

    app.telemetry._Lines.info = info
    threading.Thread(target=write_all, daemon=True).start()


def drawn_ids() -> None:
    """Request ids drawn without a system call, which lets the interpreter go."""

    class Drawn:
        def __init__(self) -> None:
            self.hex = f"{random.getrandbits(128):032x}"

    app.telemetry.uuid4 = Drawn


def hashed_by_its_worker() -> None:
    """An image that is alone hashed by the worker that decodes it, not meanwhile."""
    app.predictor._MOST_TO_HASH_HERE = 0


def without_hash() -> None:
    """No SHA-256 of an image."""

    class Hashed:
        def __init__(self, _: bytes) -> None:
            pass

        def hexdigest(self) -> str:
            return "0" * 64

    class Hashes:
        sha256 = Hashed

    app.predictor.hashlib = Hashes


def without_warnings() -> None:
    """No warnings about a picture's quality."""
    app.networks.measure = lambda pixels: {}
    app.predictor.find_warnings = lambda *_: []


def without_log() -> None:
    """Requests not logged."""
    os.environ["MMTL_LOG_LEVEL"] = "ERROR"


def without_watch() -> None:
    """Nobody looks whether a caller has gone."""

    async def alone(_: Any, work: Any) -> Any:
        return await work

    app.routes.predict._while_connected = alone


def all_admitted() -> None:
    """Nobody refused at once who would be answered too late, but when the image is taken up."""
    app.pace.Pace.would_be_late = lambda *_: False


def all_begun() -> None:
    """Nor then: every image begun whose deadline has not passed."""
    all_admitted()
    app.pace.Pace.needed = property(lambda _: 0.0)


Variant = Callable[[], None]
_OF_OPENVINO: tuple[Variant, ...] = (
    without_openvino,
    without_bfloat16,
    one_run_at_a_time_in_openvino,
    compiled_in_the_service,
    networks_of_any_size,
    single_images_on_one_core,
    without_spare_worker,
    arenas_not_shared,
)
_OF_ONNX_RUNTIME: tuple[Variant, ...] = (
    one_run_at_a_time_in_onnx_runtime,
    lone_runs_on_one_core,
    lone_runs_on_any_core,
    weights_apart,
    without_spare_worker,
)
UNDONE: tuple[Variant, ...] = (
    fp32,
    *(_OF_OPENVINO if RUNS_OPENVINO else _OF_ONNX_RUNTIME),
    without_batches,
    every_scan,
    small_blocks,
    through_the_router,
    bodies_copied,
    stacked_by_numpy,
    answers_by_numpy,
    hashed_by_its_worker,
    frequent_collections,
    large_images_anywhere,
    large_images_on_all_cores,
    one_large_image_at_a_time,
    loading_kept,
    frequent_trims,
)
_TRIED_IN_OPENVINO: tuple[Variant, ...] = (batches_of_eight, half_of_the_runs, two_spare_workers)
_TRIED_IN_ONNX_RUNTIME: tuple[Variant, ...] = (
    in_openvino,
    batches_of_eight,
    half_of_the_runs,
    two_spare_workers,
    lone_runs_without_an_arena,
    one_arena,
)
TRIED: tuple[Variant, ...] = (
    *(_TRIED_IN_OPENVINO if RUNS_OPENVINO else _TRIED_IN_ONNX_RUNTIME),
    garbage_frozen,
    short_switches,
    nice_workers,
    freed_memory_kept,
    large_pieces_given_back,
    quality_alone,
    lines_together,
    lines_later,
    drawn_ids,
)
OVERLOADED: tuple[Variant, ...] = (all_admitted, all_begun)
LEFT_OUT: tuple[Variant, ...] = (without_hash, without_warnings, without_log, without_watch)
ALL = {variant.__name__: variant for variant in (as_it_is, *UNDONE, *TRIED, *LEFT_OUT, *OVERLOADED)}


if __name__ == "__main__":
    ALL[sys.argv[1]]()
    sys.argv = ["mmtl", "serve"]
    app.cli.main()
