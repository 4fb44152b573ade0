"""Solving rows with a teacher that may fail: bad rows are found and put aside, the others kept.

A solve takes many rows at once and one of them can make all of it raise. Such a batch is halved
until the rows at fault stand alone. Whatever is solved is filled up to one fixed size, so that the
teacher sees one shape only (compiled networks), and what a row gets does not depend on whether its
neighbours failed.
"""

import gc
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from dmd_core.teacher import TeacherError
from pipelines.device import is_device_fault

# ε (B,C,h,w), prompts, negative prompts (None: the teacher's default) → latents (B,C,h,w)
Solve = Callable[[torch.Tensor, Sequence[str], Sequence[str | None]], torch.Tensor]

# What a teacher raises for input that it cannot take. Anything else is a fault of the program.
TEACHER_ERRORS = (RuntimeError, ValueError, LookupError, ArithmeticError, MemoryError)

# Out of memory, said otherwise than by torch.OutOfMemoryError: a library's handle or workspace
# that could not be allocated on the device, or the host's own allocator.
_MEMORY_TEXTS = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory")
_REASON_CHARACTERS = 500


class DeviceFaultError(RuntimeError):
    """The device is lost to this process, in a solve of the `rows` (indices of the call)."""

    def __init__(self, reason: str, rows: tuple[int, ...]) -> None:
        super().__init__(reason)
        self.rows = rows


@dataclass(frozen=True)
class Suspicion:
    """Of a row: how many solves with others, and how many of it alone, lost a process its device;
    the last of them for this `reason`."""

    shared: int
    alone: int
    reason: str


@dataclass(frozen=True)
class RowFault:
    """Row `index` of a call got no usable latents, after `attempts` solves that count for it.

    A solve that raised with other rows in it counts for none of them.
    """

    index: int
    reason: str
    attempts: int


@dataclass(frozen=True)
class Solved:
    """`latents[i]` (C,h,w), on the CPU and in the stored dtype, are those of row `kept[i]`."""

    kept: tuple[int, ...]
    latents: torch.Tensor
    faults: tuple[RowFault, ...]


@dataclass(frozen=True)
class _Rows:
    noise: torch.Tensor
    prompts: tuple[str, ...]
    negative_prompts: tuple[str | None, ...]


@dataclass(frozen=True)
class _Failure:
    reason: str
    out_of_memory: bool


class RowSolver:
    """Calls `solve` with batches of one fixed size and sorts out the rows it fails on.

    - Out of memory: `release()`, then half the size, for this and every later batch, down to 1;
      there it counts as a failure of the row.
    - Another error of the teacher: the batch is halved down to single rows. A row that raises alone
      `attempts` times (after the rest of its batch had its turn each time) is a fault.
    - Latents that are not finite in `dtype` are a fault at once: the row would give them again.
    - An error that leaves the device unusable is `DeviceFaultError`: a new process has to go on and
      say what is known of the rows. They are halved from process to process; one that was alone
      `attempts` times is a fault.
    - No usable row among as many in succession as fill two batches: bad rows alone, as when only
      rejected rows are tried again, or a broken teacher or device, which would reject everything
      that is left. `probe` decides, a prompt that the teacher takes if it takes any. If it is
      solved, the rows are at fault and the work goes on; if not, `TeacherError`. Fewer rows than
      two batches never end a run.
    """

    def __init__(
        self,
        solve: Solve,
        *,
        batch_size: int,
        attempts: int,
        dtype: torch.dtype,
        probe: str = "",
        release: Callable[[], None] | None = None,
    ) -> None:
        self._solve = solve
        self._size = batch_size
        self._attempts = attempts
        self._dtype = dtype
        self._probe = probe
        self._release = release or release_memory
        self._patience = 2 * batch_size
        self._failed_in_a_row = 0

    @property
    def size(self) -> int:
        """Rows of every batch from now on: the given size, or less after out of memory."""
        return self._size

    def __call__(
        self,
        noise: torch.Tensor,
        prompts: Sequence[str],
        negative_prompts: Sequence[str | None],
        suspicions: Mapping[int, Suspicion] | None = None,
    ) -> Solved:
        """Latents of the rows `noise` (B,C,h,w), `prompts`, `negative_prompts`; B may be 0.
        `suspicions`: of some of them, by index."""
        rows = _Rows(noise, tuple(prompts), tuple(negative_prompts))
        solved = self._sort_out(rows, suspicions or {})
        self._failed_in_a_row = 0 if solved.kept else self._failed_in_a_row + len(solved.faults)
        if self._failed_in_a_row >= self._patience:
            self._check_teacher(noise[:1], solved.faults[-1])
        return solved

    def check_device(self, noise: torch.Tensor) -> None:
        """In a new process after a `DeviceFaultError`: raise `TeacherError` if the device fails
        with the probe, too. `noise` (1,C,h,w) may be any."""
        self._solve_probe(noise)

    def _check_teacher(self, noise: torch.Tensor, last: RowFault) -> None:
        plain = self._solve_probe(noise)
        if plain.faults:
            raise TeacherError(
                f"none of {self._failed_in_a_row} rows in succession could be solved, nor could "
                f"{self._probe_name}: {plain.faults[0].reason} (the last row: {last.reason}). "
                "The teacher, its settings or the device is at fault, not the rows"
            )
        self._failed_in_a_row = 0

    def _solve_probe(self, noise: torch.Tensor) -> Solved:
        try:
            return self._sort_out(_Rows(noise, (self._probe,), (None,)), {})
        except DeviceFaultError as error:
            raise TeacherError(
                f"the device fails with {self._probe_name}, too: {error}. "
                "The teacher, its settings or the device is at fault, not the rows"
            ) from error

    @property
    def _probe_name(self) -> str:
        return f"the prompt {self._probe!r}" if self._probe else "the empty prompt"

    def _sort_out(self, rows: _Rows, suspicions: Mapping[int, Suspicion]) -> Solved:
        latents = torch.empty(rows.noise.shape, dtype=self._dtype)
        tried: Counter[int] = Counter()
        faults = {
            row: RowFault(row, found.reason, found.alone)
            for row, found in suspicions.items()
            if found.alone >= self._attempts
        }
        left = [row for row in range(len(rows.noise)) if row not in faults]
        pending = deque(self._groups(left, suspicions))
        while pending:
            group = pending.popleft()
            if len(group) > self._size:
                pending.extendleft([group[self._size :], group[: self._size]])
                continue
            found = self._attempt(rows, group)
            if isinstance(found, torch.Tensor):
                latents[group] = found
                continue
            if found.out_of_memory:
                self._release()
                if self._size > 1:
                    self._size //= 2
                    pending.appendleft(group)
                    continue
            if len(group) > 1:
                middle = len(group) // 2
                pending.extendleft([group[middle:], group[:middle]])
                continue
            (row,) = group
            tried[row] += 1
            if tried[row] < self._attempts:
                pending.append(group)
            else:
                faults[row] = RowFault(row, found.reason, tried[row])
        solved = [row for row in range(len(rows.noise)) if row not in faults]
        # After rounding: a latent beyond 65504 is finite in float32 and not in float16.
        finite = latents.isfinite().flatten(1).all(1).tolist()
        reason = f"the latents are not finite in {str(self._dtype).removeprefix('torch.')}"
        faults |= {r: RowFault(r, reason, tried[r] + 1) for r in solved if not finite[r]}
        kept = tuple(row for row in solved if finite[row])
        return Solved(kept, latents[list(kept)], tuple(faults[row] for row in sorted(faults)))

    def _groups(
        self, rows: Sequence[int], suspicions: Mapping[int, Suspicion]
    ) -> Iterator[list[int]]:
        """Rows that shared n solves of lost devices, in groups of a batch halved n times."""
        by_count: dict[int, list[int]] = {}
        for row in rows:
            count = suspicions[row].shared if row in suspicions else 0
            by_count.setdefault(count, []).append(row)
        for count, members in by_count.items():
            size = max(1, self._size >> count) if count else len(members)
            yield from (members[i : i + size] for i in range(0, len(members), size))

    def _attempt(self, rows: _Rows, group: list[int]) -> torch.Tensor | _Failure:
        """Latents of the rows in `group`, in the stored dtype, or what kept them from being made.

        The error itself does not leave this function: its traceback holds the failed call's
        tensors, and with them the memory that is about to be released.
        """
        padded = group + group[:1] * (self._size - len(group))
        try:
            latents = self._solve(
                rows.noise[padded],
                [rows.prompts[row] for row in padded],
                [rows.negative_prompts[row] for row in padded],
            )
            # Here too: a device reports an error of its own when its results are fetched.
            return latents[: len(group)].to(device="cpu", dtype=self._dtype)
        except TEACHER_ERRORS as error:
            memory = is_out_of_memory(error)
            if not memory and is_device_fault(error):
                raise DeviceFaultError(describe(error), tuple(group)) from error
            return _Failure(describe(error), memory)


def is_out_of_memory(error: BaseException) -> bool:
    """Would the same rows in smaller batches have a chance?"""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MEMORY_TEXTS)


def describe(error: BaseException) -> str:
    """The type of `error` and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:_REASON_CHARACTERS]


def release_memory() -> None:
    """Give back what a failed solve left behind in torch's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
