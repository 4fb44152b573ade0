"""The next step's data, drawn while this step trains."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from dmd_core.step_types import StepData
from pipelines.computing import prepare_computing
from pipelines.stage_settings import StageKeys
from pipelines.step_data import PairSource, Progress, StepSource


class _Request(NamedTuple):
    progress: Progress
    keys: StageKeys


class Prefetcher:
    """`draw` as `StepSource.draw`, one step ahead.

    Everything is drawn by one thread, also what was not foreseen: how many threads torch may use is
    a setting of each thread, and the last bits of a sum follow from it. It is one here: see
    `prepare_computing`.
    """

    def __init__(self, source: StepSource) -> None:
        self._source = source
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="data", initializer=prepare_computing, initargs=(1,)
        )
        self._ahead: tuple[_Request, Future[StepData]] | None = None
        self.waited_s = 0.0  # since the reader last set it to 0

    def draw(self, progress: Progress, keys: StageKeys, pairs: PairSource | None) -> StepData:
        """The data of the step from `progress` on; that of the step after it is begun."""
        request = _Request(progress, keys)
        ahead, self._ahead = self._ahead, None
        wait = ahead[1] if ahead and ahead[0] == request else self._submit(request, pairs)
        started = time.monotonic()
        data = wait.result()
        self.waited_s += time.monotonic() - started
        following = _Request(progress.after_step(keys), keys)
        self._ahead = following, self._submit(following, pairs)
        return data

    def forget(self) -> None:
        """What was drawn ahead is not what will be asked for: the streams have changed."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and not ahead[1].cancel():
            ahead[1].exception()  # wait for it; an error would come again if it still mattered

    def close(self) -> None:
        self.forget()
        self._thread.shutdown()

    def _submit(self, request: _Request, pairs: PairSource | None) -> Future[StepData]:
        return self._thread.submit(self._source.draw, request.progress, request.keys, pairs)
