from typing import Any, cast

import pytest
import torch

from pipelines.prefetch import Prefetcher
from pipelines.step_data import Progress, StepSource
from pipelines.train_config import TrainSection

((_, KEYS),) = TrainSection(lambda_reg=0.0, regression_batch_size=0).plan()


class Source:
    """Its data: the step, the thread count of whoever draws it, and of what it is drawn."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken, self.drawn = broken, []

    def draw(self, progress: Progress, keys: Any, pairs: Any) -> tuple[int, int, Any]:
        self.drawn.append(progress.step)
        if progress.step == self.broken:
            raise OSError("the store is away")
        return progress.step, torch.get_num_threads(), pairs


@pytest.fixture
def opened():
    made = []

    def open_(source: Source) -> Prefetcher:
        made.append(Prefetcher(cast(StepSource, source)))
        return made[-1]

    yield open_
    for prefetcher in made:
        prefetcher.close()


def at(step: int) -> Progress:
    progress = Progress()
    for _ in range(step):
        progress = progress.after_step(KEYS)
    return progress


def test_each_step_is_drawn_once_one_step_ahead(opened):
    source = Source()
    data = opened(source)
    assert [data.draw(at(step), KEYS, None)[0] for step in range(4)] == [0, 1, 2, 3]
    data.close()
    assert source.drawn in ([0, 1, 2, 3], [0, 1, 2, 3, 4])  # the last may not have begun


def test_what_was_not_foreseen_is_drawn_when_it_is_asked_for(opened):
    data = opened(Source())
    assert [data.draw(at(step), KEYS, None)[0] for step in (7, 2, 3)] == [7, 2, 3]


def test_after_a_change_of_the_stream_nothing_of_the_old_one_is_given(opened):
    data = opened(Source())
    data.draw(at(0), KEYS, "version 1")
    data.forget()
    assert data.draw(at(1), KEYS, "version 2")[2] == "version 2"


def test_the_data_takes_one_torch_thread_and_leaves_the_step_its_own(opened):
    """A second team of OpenMP threads slows the first one down."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        data = opened(Source())
        assert [data.draw(at(step), KEYS, None)[1] for step in range(2)] == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_error_comes_to_the_step_that_needs_the_data_and_to_no_other(opened):
    data = opened(Source(broken=1))
    assert data.draw(at(0), KEYS, None)[0] == 0
    with pytest.raises(OSError, match="the store is away"):
        data.draw(at(1), KEYS, None)
    assert data.draw(at(0), KEYS, None)[0] == 0
    data.forget()  # the error of a step that nobody asked for is nobody's
