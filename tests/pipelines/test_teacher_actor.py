"""The worker's part alone, without Ray."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from dmd_core.noise import sample_noise
from dmd_core.teacher import Teacher, TeacherError, teacher_revision
from pipelines import teacher_actor
from pipelines.config import PairsSection, StorageSection
from pipelines.pairs import decode_negative_prompts, decode_pairs, fingerprint_of
from pipelines.storage import open_store
from pipelines.teacher_actor import TeacherActor, TeacherTask

SECTION = PairsSection(
    solver="ddim",
    steps=2,
    batch_size=4,
    rows_per_block=4,
    threads_per_actor=1,
    dtype="float16",
    attempts=2,
)


@pytest.fixture
def make_actor(tiny_teacher_dir, tmp_path):
    def make(
        section=SECTION, revision=None, teacher_url=tiny_teacher_dir, storage=None, **task
    ) -> TeacherActor:
        here = tiny_teacher_dir if teacher_url.startswith("s3://") else teacher_url
        fingerprint = fingerprint_of(section, revision or teacher_revision(here))
        root = open_store(str(tmp_path / "set"))
        storage = storage or StorageSection()
        return TeacherActor(
            TeacherTask(section, teacher_url, storage, root, fingerprint, {}, **task)
        )

    return make


def rows(count, prompts=None, negative_prompts=None):
    columns = {
        "pair_id": pa.array(range(count), pa.int64()),
        "prompt": prompts or [f"a red fox {i}" for i in range(count)],
        "seed": pa.array(range(100, 100 + count), pa.int64()),
    }
    if negative_prompts is not None:
        columns["negative_prompt"] = pa.array(negative_prompts, pa.string())
    return pa.table(columns)


def rejects_in(folder):
    """The lines of all reject files, by pair_id."""
    paths = (folder / "set" / "generations").glob("*/rejects/*.jsonl")
    found = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return sorted(found, key=lambda row: row["pair_id"])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_stored_noise_is_the_noise_that_was_integrated(make_actor, monkeypatch, dtype):
    integrated = []
    solve = Teacher.solve

    def watched(self, eps, *args, **options):
        integrated.append(eps)
        return solve(self, eps, *args, **options)

    monkeypatch.setattr(Teacher, "solve", watched)
    table = make_actor(SECTION.model_copy(update={"dtype": dtype}))(rows(4))
    found = decode_pairs(table)
    expected = sample_noise(range(100, 104), (4, 4, 4), getattr(torch, dtype))
    assert torch.equal(found.noise, expected) and torch.equal(integrated[0], expected)
    assert table["seed"].to_pylist() == [100, 101, 102, 103]


def test_a_short_batch_is_filled_up_and_the_filling_leaves_no_trace(make_actor, monkeypatch):
    actor = make_actor()
    shapes = []
    solve = Teacher.solve

    def watched(self, eps, prompts, **options):
        shapes.append((len(eps), len(prompts)))
        return solve(self, eps, prompts, **options)

    monkeypatch.setattr(Teacher, "solve", watched)
    whole, short = decode_pairs(actor(rows(4))), decode_pairs(actor(rows(3)))
    assert shapes == [(4, 4), (4, 4)]
    assert short.pair_ids == (0, 1, 2)
    torch.testing.assert_close(short.latents, whole.latents[:3], atol=2e-3, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])
def test_rows_without_a_usable_latent_leave_the_stream(make_actor, monkeypatch, tmp_path, bad):
    """1e5 is finite, but not as float16."""

    def solve(self, eps, prompts, **options):
        latents = eps.float().clone()
        latents[1, 0, 0, 0] = bad
        return latents

    monkeypatch.setattr(Teacher, "solve", solve)
    table = make_actor(fence=7)(rows(4))
    found = decode_pairs(table)
    assert found.pair_ids == (0, 2, 3) and table["seed"].to_pylist() == [100, 102, 103]
    assert torch.equal(found.noise, sample_noise([100, 102, 103], (4, 4, 4), torch.float16))
    assert rejects_in(tmp_path) == [
        {
            "pair_id": 1,
            "prompt": "a red fox 1",
            "reason": "the latents are not finite in float16",
            "attempts": 1,
            "fence": 7,
        }
    ]
    (path,) = (tmp_path / "set" / "generations").glob("*/rejects/*.jsonl")
    assert path.name.startswith("000007-")


def test_a_batch_of_rejects_is_an_empty_table_of_pairs(make_actor, monkeypatch):
    monkeypatch.setattr(Teacher, "solve", lambda self, eps, *_, **__: eps.float() * float("nan"))
    assert len(decode_pairs(make_actor()(rows(2)))) == 0


def test_a_batch_without_rows_is_an_empty_table_of_pairs(make_actor):
    assert len(decode_pairs(make_actor()(rows(2).slice(0, 0)))) == 0


def test_another_size_gives_latents_of_that_size(make_actor):
    section = SECTION.model_copy(update={"height": 24, "width": 32})
    assert decode_pairs(make_actor(section)(rows(2))).latents.shape == (2, 4, 6, 8)
    # The prompt file's own size comes first, each side for itself.
    actor = make_actor(section, height=8)
    assert decode_pairs(actor(rows(2))).latents.shape == (2, 4, 2, 8)


def test_each_row_is_solved_with_its_own_negative_prompt(make_actor):
    section = SECTION.model_copy(update={"negative_prompt": "apple", "dtype": "float32"})
    negatives = [None, "whale", "apple", ""]
    table = make_actor(section)(rows(4, negative_prompts=negatives))
    assert decode_negative_prompts(table) == negatives
    mixed = decode_pairs(table).latents
    for text, members in (("apple", [0, 2]), ("whale", [1]), ("", [3])):
        same = make_actor(section.model_copy(update={"negative_prompt": text}))
        expected = decode_pairs(same(rows(4))).latents
        torch.testing.assert_close(mixed[members], expected[members], atol=1e-5, rtol=0)
        others = [i for i in range(4) if i not in members]
        difference = (mixed[others] - expected[others]).abs().flatten(1).amax(1)
        assert bool((difference > 1e-3).all())


def test_the_board_hears_of_rows_rejects_and_busy_seconds(make_actor, monkeypatch):
    told = []

    class Advance:
        def remote(self, rows, rejected=0, busy_s=0.0):
            told.append((rows, rejected, busy_s))

    class Board:
        advance = Advance()
        device_faults = SimpleNamespace(remote=list)

    def solve(self, eps, prompts, **options):
        now[0] += 8.0
        latents = eps.float().clone()
        latents[2] = float("nan")
        return latents

    now = [50.0]
    monkeypatch.setattr(Teacher, "solve", solve)
    monkeypatch.setattr(teacher_actor.ray, "get", lambda found: found)
    actor = make_actor(board=Board())
    monkeypatch.setattr(teacher_actor.time, "perf_counter", lambda: now[0])
    actor(rows(3))
    assert told == [(3, 1, 8.0)]


# ------------------------------------------------- devices that are lost


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def board(monkeypatch):
    """A `ProgressBoard` without Ray, and processes that end by raising `Ended`."""
    kept = SimpleNamespace(faults=[])

    def end(code):
        raise Ended

    monkeypatch.setattr(teacher_actor.os, "_exit", end)
    monkeypatch.setattr(teacher_actor.ray, "get", lambda found: found)
    for name, method in {
        "advance": lambda *rows, **fields: None,
        "device_faults": lambda: list(kept.faults),
        "note_device_fault": kept.faults.append,
    }.items():
        setattr(kept, name, SimpleNamespace(remote=method))
    return kept


def lose_the_device(monkeypatch, word):
    solve = Teacher.solve

    def losing(self, eps, prompts, **options):
        if any(word in prompt for prompt in prompts):
            raise torch.AcceleratorError("CUDA error: an illegal memory access\nmore of it")
        return solve(self, eps, prompts, **options)

    monkeypatch.setattr(Teacher, "solve", losing)


def test_a_row_that_takes_its_device_along_is_rejected_by_later_processes(
    make_actor, board, monkeypatch, tmp_path
):
    lose_the_device(monkeypatch, "fox 2")
    for _ in range(2 + SECTION.attempts):  # four rows, two rows, then the row alone
        with pytest.raises(Ended):
            make_actor(board=board)(rows(4))
    assert [fault.pair_ids for fault in board.faults] == [(0, 1, 2, 3), (2, 3), (2,), (2,)]
    found = decode_pairs(make_actor(board=board)(rows(4)))
    assert found.pair_ids == (0, 1, 3)
    (rejected,) = rejects_in(tmp_path)
    reason = "AcceleratorError: CUDA error: an illegal memory access"
    assert (rejected["pair_id"], rejected["attempts"]) == (2, SECTION.attempts)
    assert rejected["reason"] == board.faults[0].reason == reason


def test_a_device_that_is_lost_again_without_a_row_ends_the_run(make_actor, board, monkeypatch):
    lose_the_device(monkeypatch, "")
    with pytest.raises(Ended):
        make_actor(board=board)(rows(4))
    with pytest.raises(TeacherError, match="the device fails with the empty prompt, too: Acc"):
        make_actor(board=board)(rows(4))
    assert len(board.faults) == 1


def test_without_a_board_a_lost_device_is_an_error(make_actor, monkeypatch):
    lose_the_device(monkeypatch, "fox")
    with pytest.raises(TeacherError, match="the device is lost: AcceleratorError: CUDA error"):
        make_actor()(rows(4))


# ------------------------------------------------- teachers that are damaged for some prompts

PROMPTS = ["a red fox", "a blue whale", "flag", "a fox", "blue", "a red flag"]


def damaged(folder, source, damage):
    """A copy of the teacher `source` whose `damage(pipeline)` was done."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        source, safety_checker=None, requires_safety_checker=False
    )
    damage(pipeline)
    pipeline.save_pretrained(folder)
    return str(folder)


def highest_token(pipeline):
    """(the highest token that any of the prompts has, the prompts that have it)."""
    tokens = pipeline.tokenizer(PROMPTS).input_ids
    highest = max(max(row) for row in tokens)
    return highest, [i for i, row in enumerate(tokens) if highest in row]


def test_a_token_whose_embedding_is_not_finite_rejects_its_prompts_only(
    make_actor, tiny_teacher_dir, tmp_path
):
    marked = []

    def damage(pipeline):
        token, members = highest_token(pipeline)
        marked.extend(members)
        pipeline.text_encoder.get_input_embeddings().weight.data[token] = float("nan")

    section = SECTION.model_copy(update={"batch_size": 8, "rows_per_block": 8})
    teacher = damaged(tmp_path / "damaged", tiny_teacher_dir, damage)
    found = decode_pairs(make_actor(section, teacher_url=teacher)(rows(6, PROMPTS)))
    good = [i for i in range(6) if i not in marked]
    assert 0 < len(marked) < 6 and found.pair_ids == tuple(good)
    healthy = decode_pairs(make_actor(section)(rows(6, PROMPTS)))
    assert torch.equal(found.latents, healthy.latents[good])
    reason = "the latents are not finite in float16"
    assert [(row["pair_id"], row["reason"]) for row in rejects_in(tmp_path)] == [
        (i, reason) for i in marked
    ]


def test_a_token_without_an_embedding_rejects_its_prompts_after_all_attempts(
    make_actor, tiny_teacher_dir, tmp_path, monkeypatch
):
    marked, highest, shapes = [], [], set()
    solve = Teacher.solve

    def damage(pipeline):
        token, members = highest_token(pipeline)
        marked.extend(members)
        highest.append(token)
        encoder = pipeline.text_encoder
        weight = encoder.get_input_embeddings().weight.data[:token].clone()
        encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(weight))
        encoder.config.vocab_size = token

    def watched(self, eps, *args, **options):
        shapes.add(len(eps))
        return solve(self, eps, *args, **options)

    monkeypatch.setattr(Teacher, "solve", watched)
    section = SECTION.model_copy(update={"batch_size": 8, "rows_per_block": 8})
    teacher = damaged(tmp_path / "damaged", tiny_teacher_dir, damage)
    found = decode_pairs(make_actor(section, teacher_url=teacher)(rows(6, PROMPTS)))
    good = [i for i in range(6) if i not in marked]
    assert 0 < len(marked) < 6 and found.pair_ids == tuple(good)
    healthy = decode_pairs(make_actor(section)(rows(6, PROMPTS)))
    torch.testing.assert_close(found.latents, healthy.latents[good], atol=2e-3, rtol=0)
    for row, index in zip(rejects_in(tmp_path), marked, strict=True):
        assert (row["pair_id"], row["attempts"]) == (index, 2)
        assert row["reason"].startswith(
            f"IndexError: prompt {PROMPTS[index]!r} has token {highest[0]}, but"
        )
    assert shapes == {8}


def test_a_teacher_that_changed_during_the_run_is_refused(make_actor):
    with pytest.raises(TeacherError, match=r"expected bbbbbbbbbbbbbbbb .it changed"):
        make_actor(revision="b" * 64)


def test_a_teacher_on_s3_is_the_same_teacher(make_actor, s3_store, s3_options, tiny_teacher_dir):
    s3_store.fs.put(tiny_teacher_dir, s3_store.path("teacher"), recursive=True)
    remote = make_actor(teacher_url=f"{s3_store.url}/teacher", storage=s3_options)
    assert remote(rows(4)).equals(make_actor()(rows(4)))


def test_the_revision_is_of_what_is_read_and_of_nothing_beside_it(tiny_teacher_dir, tmp_path):
    copy = shutil.copytree(tiny_teacher_dir, tmp_path / "copy")
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"the same weights as a pickle")
    assert teacher_revision(str(copy)) == teacher_revision(tiny_teacher_dir)
    config = copy / "unet" / "config.json"
    config.write_text(config.read_text() + " ")
    assert teacher_revision(str(copy)) != teacher_revision(tiny_teacher_dir)


@pytest.mark.parametrize("family", ["ddpm", "edm", "unconditional", "sd"])
def test_bad_rows_alone_end_no_run_of_any_kind_of_teacher(
    make_actor, families, monkeypatch, family
):
    """Two batches that are all rejected: "ddpm" has three classes and no label for "no class"."""
    solve = Teacher.solve

    def refusing(self, eps, prompts, **options):
        if "ship 9" in prompts:
            raise IndexError("'ship 9' is not a class of the teacher")
        return solve(self, eps, prompts, **options)

    monkeypatch.setattr(Teacher, "solve", refusing)
    solver = "edm_heun" if family == "edm" else "ddim"
    section = SECTION.model_copy(update={"solver": solver, "guidance_scale": 1.0})
    actor = make_actor(section, teacher_url=families.folder(family))
    for _ in range(2):
        assert len(actor(rows(4, ["ship 9"] * 4))) == 0
    assert len(actor(rows(4, ["0"] * 4))) == 4


def test_the_thread_that_makes_the_actor_starts_no_team_beside_that_of_its_calls(
    make_actor, one_thread
):
    """Ray Data makes it in one thread and calls it in another."""
    section = SECTION.model_copy(update={"threads_per_actor": 2})
    with ThreadPoolExecutor(1) as maker, ThreadPoolExecutor(1) as caller:
        actor = maker.submit(make_actor, section).result()
        caller.submit(actor, rows(2)).result()
        found = [thread.submit(torch.get_num_threads).result() for thread in (maker, caller)]
    assert found == [1, 2]


@pytest.mark.slow  # a compiler runs
def test_a_compiled_teacher_makes_the_same_pairs_to_rounding(make_actor):
    plain, compiled = (
        make_actor(SECTION.model_copy(update={"dtype": "float32", "compile": on}))
        for on in (False, True)
    )
    counters = torch._dynamo.utils.counters
    counters.clear()
    expected, found = (decode_pairs(actor(rows(6))) for actor in (plain, compiled))
    assert counters["stats"]["unique_graphs"] >= 1  # it did compile, for one shape:
    assert not counters["recompiles"]  # six rows are a full batch and another, filled up
    assert torch.equal(found.noise, expected.noise)
    assert not torch.equal(found.latents, expected.latents)  # other kernels
    torch.testing.assert_close(found.latents, expected.latents, atol=1e-4, rtol=1e-4)


def test_a_machine_without_a_compiler_says_so_before_any_row(make_actor, monkeypatch, tmp_path):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (str(tmp_path / "no-compiler"),))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    torch._dynamo.reset()
    with pytest.raises(TeacherError, match=r"C\+\+ compiler .* set pairs.compile to false"):
        make_actor(SECTION.model_copy(update={"compile": True}))


def test_a_teacher_that_is_overwritten_while_it_works_makes_no_more_rows(
    make_actor, tiny_teacher_dir, tmp_path
):
    """Its float32 weights are the file's own pages: what is written there runs."""
    folder = shutil.copytree(tiny_teacher_dir, tmp_path / "teacher")
    actor = make_actor(teacher_url=str(folder))
    before = actor(rows(4))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    other = tmp_path / "other"
    save_file({name: 2 * value for name, value in load_file(file).items()}, other)
    # In its place is no harm: the pages of the old file stay.
    os.replace(shutil.copy(file, tmp_path / "same"), file)
    assert actor(rows(4))["latent"].equals(before["latent"])
    actor = make_actor(teacher_url=str(folder))
    with open(file, "r+b") as stream:
        stream.write(other.read_bytes())
    with pytest.raises(TeacherError, match=r"changed during the run: \S+safetensors was written"):
        actor(rows(4))
