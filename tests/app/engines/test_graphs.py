import gc
import threading
import weakref

import numpy as np
import pytest

from app.engines.graphs import Graphs, Pixels, Run
from models.bundle import Outputs


class Recorder:
    """Records what a GPU would: the sizes, and which threads asked."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.threads: set[int] = set()

    def __call__(self, example: Pixels) -> Run:
        self.recorded.append(len(example))

        def run(images: Pixels) -> Outputs:
            self.threads.add(threading.get_ident())
            assert len(images) == len(example)
            return {"mean": images.mean(axis=(1, 2, 3), dtype=np.float32)}

        return run


def batch(*values: int) -> Pixels:
    return np.stack([np.full((2, 2, 3), value, np.uint8) for value in values])


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_there_is_a_graph_for_every_power_of_two(most: int, sizes: list[int]) -> None:
    assert Graphs(most).sizes == sizes


def test_a_batch_is_filled_up_to_the_next_size_and_answered_as_it_was() -> None:
    recorder = Recorder()
    graphs = Graphs(4)
    for values in ((9,), (1, 2, 3), (4, 5, 6, 7), (8, 7, 6)):
        assert graphs.run(batch(*values), recorder)["mean"].tolist() == list(values)
    assert recorder.recorded == [1, 4]


def test_more_than_the_largest_batch_is_run_in_parts() -> None:
    recorder = Recorder()
    assert Graphs(4).run(batch(*range(9)), recorder)["mean"].tolist() == list(range(9))
    assert recorder.recorded == [4, 1]


def test_one_thread_runs_what_several_ask_for() -> None:
    recorder = Recorder()
    graphs = Graphs(4)
    wrong = []

    def ask(value: int) -> None:
        for _ in range(50):
            if graphs.run(batch(value, value), recorder)["mean"].tolist() != [value, value]:
                wrong.append(value)

    asking = [threading.Thread(target=ask, args=[value]) for value in (1, 2, 3)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert not wrong
    assert len(recorder.threads) == 1


def test_what_fails_is_told_to_who_asked_and_the_next_batch_is_run() -> None:
    recorder = Recorder()

    def record(example: Pixels) -> Run:
        if example.max() == 13:
            raise RuntimeError("CUDA out of memory")
        return recorder(example)

    graphs = Graphs(4)
    with pytest.raises(RuntimeError, match="out of memory"):
        graphs.run(batch(13), record)
    assert graphs.run(batch(1), record)["mean"].tolist() == [1]


def test_graphs_that_nobody_has_are_freed_with_their_thread() -> None:
    before = set(threading.enumerate())
    graphs = Graphs(4)
    (thread,) = set(threading.enumerate()) - before
    graphs.run(batch(1), Recorder())
    gone = weakref.ref(graphs)
    del graphs
    gc.collect()
    assert gone() is None
    thread.join(5)
    assert not thread.is_alive()
