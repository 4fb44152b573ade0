"""Sorting out rows against a teacher in closed form, row by row, that fails as it is told to."""

import random
import weakref
import zlib
from collections import Counter
from itertools import pairwise

import pytest
import torch

from dmd_core.noise import sample_noise
from dmd_core.teacher import TeacherError
from pipelines.row_solver import DeviceFaultError, RowSolver, Suspicion

SHAPE = (2, 3, 3)
NOT_FINITE = "the latents are not finite in float16"


def latent_of(eps, prompt, negative):
    """Depends on every input of its row and on nothing else."""
    return eps.float() * 0.5 + zlib.crc32(f"{prompt}|{negative}".encode()) % 97


class MadeTeacher:
    """Raises for the `bad` prompts, gives NaN for the `barren`, holds `limit` rows at most.

    `flaky` says how often a prompt raises alone before it is solved.
    """

    def __init__(self, bad=(), barren=(), limit=1000, flaky=None, error=ValueError):
        self.bad, self.barren, self.limit = set(bad), set(barren), limit
        self.flaky = dict(flaky or {})
        self.error = error
        self.sizes: list[int] = []
        self.alone: Counter[str] = Counter()

    def __call__(self, eps, prompts, negatives):
        assert len(eps) == len(prompts) == len(negatives)
        self.sizes.append(len(eps))
        if len(eps) > self.limit:
            raise torch.OutOfMemoryError(f"out of memory with {len(eps)} rows")
        if len(set(prompts)) == 1:
            self.alone[prompts[0]] += 1
        wrong = self.bad & set(prompts)
        if wrong:
            raise self.error(f"cannot draw {min(wrong)}\nand more")
        if set(prompts) & self.flaky.keys():
            if len(set(prompts)) == 1:
                self.flaky[prompts[0]] -= 1
                if not self.flaky[prompts[0]]:
                    del self.flaky[prompts[0]]
            raise RuntimeError("a passing fault")
        latents = torch.stack(
            [latent_of(*row) for row in zip(eps, prompts, negatives, strict=True)]
        )
        for row, prompt in enumerate(prompts):
            if prompt in self.barren:
                latents[row, 0, 0, 0] = float("nan")
        return latents


def solver_of(teacher, batch_size=4, attempts=2, **options):
    return RowSolver(
        teacher, batch_size=batch_size, attempts=attempts, dtype=torch.float16, **options
    )


def rows_of(indices):
    """(noise, prompts, negative prompts); every third has a negative prompt of its own."""
    prompts = [f"p{i}" for i in indices]
    negatives = [None if i % 3 else f"n{i}" for i in indices]
    return sample_noise(list(indices), SHAPE, torch.float16), prompts, negatives


def assert_solved(solved, rows, lost):
    """Kept are all rows but `lost`, with the latents that each has on its own, bit for bit."""
    noise, prompts, negatives = rows
    kept = [i for i, prompt in enumerate(prompts) if prompt not in lost]
    assert solved.kept == tuple(kept)
    assert solved.latents.dtype == torch.float16 and len(solved.latents) == len(kept)
    for i, latent in zip(kept, solved.latents, strict=True):
        assert torch.equal(latent, latent_of(noise[i], prompts[i], negatives[i]).half())
    assert {prompts[fault.index] for fault in solved.faults} == set(lost) & set(prompts)


@pytest.mark.parametrize("seed", range(40))
def test_kept_are_exactly_the_good_rows_whatever_fails_beside_them(seed):
    random_ = random.Random(seed)
    batch_size = random_.randint(1, 9)
    attempts = random_.randint(1, 3)
    total = random_.randint(1, 40)
    share = random_.choice([0.05, 0.3, 0.9])
    chosen = {f"p{i}": random_.random() for i in range(total)}
    bad = {prompt for prompt, draw in chosen.items() if draw < share / 2}
    barren = {prompt for prompt, draw in chosen.items() if share / 2 <= draw < share}
    limit = random_.choice([1, 2, 3, 5, 1000])
    teacher = MadeTeacher(bad, barren, limit)
    solver = solver_of(teacher, batch_size, attempts, release=lambda: None)
    start = 0
    while start < total:
        stop = min(total, start + random_.choice([batch_size, random_.randint(1, 12)]))
        rows = rows_of(range(start, stop))
        solved = solver(*rows)
        assert_solved(solved, rows, bad | barren)
        for fault in solved.faults:
            prompt = rows[1][fault.index]
            if prompt in bad:
                assert fault.reason == f"ValueError: cannot draw {prompt}"
                assert fault.attempts == teacher.alone[prompt] == attempts
            else:
                assert (fault.reason, fault.attempts) == (NOT_FINITE, 1)
        start = stop

    # Static shapes: each size is tried until the first that does not fit, then never again.
    halvings = [batch_size]
    while halvings[-1] > limit:
        halvings.append(halvings[-1] // 2)
    counts = Counter(teacher.sizes)
    assert sorted(counts, reverse=True) == halvings and solver.size == halvings[-1]
    assert all(counts[size] == 1 for size in halvings[:-1])
    assert all(before >= after for before, after in pairwise(teacher.sizes))


def test_one_bad_row_costs_two_calls_for_each_halving():
    teacher = MadeTeacher(bad=["p5"])
    solver_of(teacher, batch_size=16, attempts=3)(*rows_of(range(16)))
    assert len(teacher.sizes) == 1 + 2 * 4 + 2


def test_a_row_that_is_solved_at_its_last_attempt_is_kept():
    teacher = MadeTeacher(flaky={"p1": 2, "p2": 3})
    rows = rows_of(range(4))
    solved = solver_of(teacher, attempts=3)(*rows)
    assert_solved(solved, rows, {"p2"})
    (fault,) = solved.faults
    assert (fault.index, fault.reason, fault.attempts) == (2, "RuntimeError: a passing fault", 3)


def test_no_rows_are_no_work():
    teacher = MadeTeacher()
    solved = solver_of(teacher)(*rows_of([]))
    assert (solved.kept, solved.latents.shape, solved.faults) == ((), (0, *SHAPE), ())
    assert teacher.sizes == []


# ---------------------------------------------------------------- memory


def test_the_failed_batch_is_gone_when_memory_is_released():
    """Else the memory that is to be freed is held by the error that says it is short."""
    held, alive = [], []

    class Buffer:
        pass

    def solve(eps, prompts, negatives):
        big = Buffer()
        held.append(weakref.ref(big))
        if len(eps) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return eps

    def release():
        alive.append([ref() for ref in held if ref() is not None])

    solver = solver_of(solve, batch_size=8, release=release)
    assert solver(*rows_of(range(8))).kept == tuple(range(8))
    assert alive == [[], []] and solver.size == 2


@pytest.mark.parametrize(
    "shortage",
    [
        lambda: torch.empty(1 << 55),  # the host's allocator, for real
        lambda: (_ for _ in ()).throw(MemoryError()),
        lambda: (_ for _ in ()).throw(torch.AcceleratorError("CUDA error: out of memory")),
        lambda: (_ for _ in ()).throw(
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")
        ),
    ],
)
def test_every_way_to_say_out_of_memory_halves_the_batch(shortage):
    def solve(eps, prompts, negatives):
        if len(eps) > 1:
            shortage()
        return eps

    solver = solver_of(solve)
    assert solver(*rows_of(range(4))).kept == (0, 1, 2, 3) and solver.size == 1


def test_a_row_that_does_not_fit_alone_is_rejected_and_the_others_are_kept():
    class Wide(MadeTeacher):
        def __call__(self, eps, prompts, negatives):
            if "p2" in prompts:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().__call__(eps, prompts, negatives)

    rows = rows_of(range(4))
    solved = solver_of(Wide(), attempts=3, release=lambda: None)(*rows)
    assert_solved(solved, rows, {"p2"})
    assert solved.faults[0].reason == "OutOfMemoryError: CUDA out of memory."
    assert solved.faults[0].attempts == 3


# ---------------------------------------------------------------- what is not a row's fault


LOST_DEVICE = [
    torch.AcceleratorError("CUDA error: unknown error"),
    RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be…"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
]


@pytest.mark.parametrize("error", [TypeError("a fault of the program"), KeyboardInterrupt()])
def test_a_fault_of_the_program_is_passed_on_at_once(error):
    calls = []

    def solve(eps, prompts, negatives):
        calls.append(len(eps))
        raise error

    with pytest.raises(type(error)) as caught:
        solver_of(solve)(*rows_of(range(4)))
    assert caught.value is error and calls == [4]


@pytest.mark.parametrize("error", LOST_DEVICE)
def test_a_lost_device_names_the_rows_of_the_solve_at_once(error):
    calls = []

    def solve(eps, prompts, negatives):
        calls.append(len(eps))
        if "p5" in prompts:
            raise error
        return eps

    with pytest.raises(DeviceFaultError, match=f"^{type(error).__name__}: .*$") as caught:
        solver_of(solve)(*rows_of(range(8)))
    assert caught.value.rows == (4, 5, 6, 7) and calls == [4, 4]


@pytest.mark.parametrize(("batch_size", "attempts"), [(8, 3), (6, 1), (1, 2)])
def test_from_process_to_process_the_rows_at_fault_are_found(batch_size, attempts):
    """Each turn of the loop is a new process that is told what those before it have seen."""
    cursed, processes, suspicions = {"p2", "p7"}, 0, {}

    class Cursed(MadeTeacher):
        def __call__(self, eps, prompts, negatives):
            if cursed & set(prompts):
                raise torch.AcceleratorError("CUDA error: unspecified launch failure")
            return super().__call__(eps, prompts, negatives)

    rows = rows_of(range(10))
    while True:
        processes += 1
        try:
            solved = solver_of(Cursed(), batch_size, attempts)(*rows, suspicions)
            break
        except DeviceFaultError as fault:
            alone = len(fault.rows) == 1
            for row in fault.rows:
                seen = suspicions.get(row, Suspicion(0, 0, ""))
                suspicions[row] = Suspicion(seen.shared + (not alone), seen.alone + alone, "lost")
    assert_solved(solved, rows, cursed)
    assert {(fault.reason, fault.attempts) for fault in solved.faults} == {("lost", attempts)}
    halvings = batch_size.bit_length() - 1
    assert processes <= 1 + len(cursed) * (halvings + attempts)


def test_a_device_that_fails_with_the_probe_is_at_fault_itself():
    def solve(eps, prompts, negatives):
        raise torch.AcceleratorError("CUDA error: unknown error")

    noise, _, _ = rows_of(range(1))
    with pytest.raises(
        TeacherError, match=r"the device fails with the prompt 'x', too: Acc.* CUDA"
    ):
        solver_of(solve, probe="x").check_device(noise)
    solver_of(MadeTeacher(bad=[""])).check_device(noise)  # whatever else it cannot do


def test_an_error_that_shows_when_the_results_are_fetched_is_the_teacher_s():
    class Late(torch.Tensor):
        def to(self, *args, **kwargs):
            raise RuntimeError("shown late")

    def solve(eps, prompts, negatives):
        return eps.as_subclass(Late) if "p1" in prompts else eps

    solved = solver_of(solve)(*rows_of(range(3)))
    assert solved.kept == (0, 2) and solved.faults[0].reason == "RuntimeError: shown late"


class BrokenTeacher(MadeTeacher):
    """Works for `until` calls."""

    def __init__(self, until=0, nan=False):
        super().__init__()
        self.until, self.nan = until, nan

    def __call__(self, eps, prompts, negatives):
        latents = super().__call__(eps, prompts, negatives)
        if len(self.sizes) <= self.until:
            return latents
        if self.nan:
            return latents * float("nan")
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("until", [0, 3])
def test_a_broken_teacher_is_an_error_after_two_batches_of_rows(batch_size, nan, until):
    teacher = BrokenTeacher(until, nan)
    solver = solver_of(teacher, batch_size)
    for _ in range(until):
        assert not solver(*rows_of(range(batch_size))).faults
    assert len(solver(*rows_of(range(batch_size))).faults) == batch_size
    cause = NOT_FINITE if nan else "RuntimeError: mat1 and mat2 shapes cannot be multiplied"
    with pytest.raises(TeacherError, match=f"{2 * batch_size} rows in succession.*{cause}"):
        solver(*rows_of(range(batch_size)))


def test_short_batches_count_by_their_rows():
    solver = solver_of(BrokenTeacher(), batch_size=4)
    for _ in range(3):
        assert len(solver(*rows_of(range(2))).faults) == 2
    with pytest.raises(TeacherError, match="none of 8 rows"):
        solver(*rows_of(range(2)))


def test_one_solved_row_starts_the_count_anew():
    solver = solver_of(MadeTeacher(bad={"", "p0", "p1", "p2", "p3", "p4", "p5", "p6"}), 4)
    for _ in range(2):
        assert len(solver(*rows_of(range(4))).faults) == 4
        assert solver(*rows_of(range(4, 8))).kept == (3,)
    solver(*rows_of(range(4)))
    with pytest.raises(TeacherError, match="none of 8 rows"):
        solver(*rows_of(range(4)))


def test_bad_rows_alone_never_end_a_run():
    """As in a run that tries nothing but the rows again that were rejected before."""
    bad = {f"p{i}" for i in range(40)}
    teacher = MadeTeacher(bad)
    solver = solver_of(teacher)
    for start in range(0, 40, 4):
        assert len(solver(*rows_of(range(start, start + 4))).faults) == 4
    assert teacher.alone[""] == 5  # the empty prompt, once for every two batches
    rows = rows_of(range(40, 44))
    assert_solved(solver(*rows), rows, ())
