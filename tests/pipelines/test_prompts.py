import csv
import hashlib
import io
import json
import os
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import prompt_records, prompt_sort, prompts
from pipelines.prompt_records import PreparedPrompts, PreparedTable
from pipelines.prompts import (
    PromptError,
    PromptSource,
    find_landed,
    land_prompts,
    prepare_prompts,
    read_prompts,
)
from pipelines.storage import open_store


def land(tmp_path, content, name="prompts.txt", *, seed=0, samples=1):
    source = tmp_path / name
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    root = open_store(str(tmp_path / "set"))
    landed = land_prompts(str(source), None, root, seed=seed, samples_per_prompt=samples)
    return landed, {row["pair_id"]: row for row in landed_rows(landed)}


def landed_rows(landed):
    return [row for file in landed.files for row in pq.read_table(file.path).to_pylist()]


def test_every_prompt_gets_one_row_per_sample(tmp_path):
    landed, rows = land(tmp_path, "a red fox\n\n  a blue whale  \n", samples=3)
    assert landed.rows == len(rows) == 6
    assert (
        sorted(row["prompt"] for row in rows.values()) == ["a blue whale"] * 3 + ["a red fox"] * 3
    )
    assert len({row["seed"] for row in rows.values()}) == 6
    (file,) = landed.files
    assert (file.rows, file.height, file.width) == (6, None, None)
    assert {field.name: field.type for field in pq.read_schema(file.path)} == {
        "pair_id": pa.int64(),
        "prompt": pa.string(),
        "seed": pa.int64(),
        "negative_prompt": pa.string(),
    }


def test_a_new_line_changes_no_other_row_and_order_changes_nothing(tmp_path):
    before, rows_before = land(tmp_path, "fox\nwhale\n", samples=2)
    after, rows_after = land(tmp_path, "apple\nwhale\nfox\n", samples=2)
    assert rows_before.items() <= rows_after.items()
    assert before.digest != after.digest and before.files[0].path != after.files[0].path
    moved, rows_moved = land(tmp_path, "whale\nfox", samples=2)
    assert (moved, rows_moved) == (before, rows_before)


def test_ids_and_seeds_depend_on_the_data_set_seed(tmp_path):
    _, first = land(tmp_path, "fox\nwhale", seed=0)
    _, second = land(tmp_path, "fox\nwhale", seed=1)
    assert not first.keys() & second.keys()
    assert not {r["seed"] for r in first.values()} & {r["seed"] for r in second.values()}


def test_more_samples_keep_the_first_ones(tmp_path):
    _, few = land(tmp_path, "fox\nwhale", samples=1)
    _, many = land(tmp_path, "fox\nwhale", samples=4)
    assert few.items() <= many.items() and len(many) == 8


def test_ids_and_digest_are_the_same_on_every_machine_and_in_every_release(tmp_path):
    text = "a red fox\ncafe\u0301 au lait\n  green apple \na red fox\nтёмный лес\n"
    landed, rows = land(tmp_path, text, samples=2)
    assert [(r["pair_id"], r["prompt"], r["seed"]) for r in rows.values()] == [
        (844567969526183000, "тёмный лес", 1070034243721023900),
        (1123673127933090573, "green apple", 4227503582626970124),
        (1255891346813337289, "a red fox", 3022497743115661451),
        (1703788256465126526, "тёмный лес", 5563211802399172191),
        (4286331914070054525, "café au lait", 1844700951260143456),
        (5821345752514245932, "café au lait", 7453948437184513700),
        (7449000401128287150, "green apple", 2043917737772648671),
        (8505091667739920890, "a red fox", 125528816650280637),
    ]
    assert landed.digest == "548433ce214d1201b0e273a45c30c2cfd1bd2ab27ab7bb1fe513e7128103e582"
    assert (landed.rows, landed.duplicates) == (8, 1)


def test_duplicates_collapse_also_across_spellings_of_one_text(tmp_path):
    landed, rows = land(tmp_path, "cafe\u0301\n café\ncafé\t\nfox\n")
    assert landed.duplicates == 2
    assert sorted(row["prompt"] for row in rows.values()) == ["café", "fox"]


def test_all_formats_give_the_same_rows(tmp_path):
    texts = ['a "quoted", red fox', "a whale\nin two lines", "fox"]
    flat = [text.replace("\n", " ") for text in texts]
    table = pa.table({"n": [1, 2, 3], "prompt": texts})
    pq.write_table(table, tmp_path / "in.parquet")
    files = {
        "a.csv": '\ufeffid,prompt\n1,"a ""quoted"", red fox"\n2,"a whale\nin two lines"\n\n3,fox\n',
        "a.jsonl": "\n".join(json.dumps({"x": 1, "prompt": text}) for text in texts) + "\n\n",
        "a.parquet": (tmp_path / "in.parquet").read_bytes(),
        "a.txt": "\ufeff" + "\r\n".join(flat),
    }
    digests = {name: land(tmp_path, content, name)[0].digest for name, content in files.items()}
    assert digests["a.csv"] == digests["a.jsonl"] == digests["a.parquet"] != digests["a.txt"]
    assert read_prompts(str(tmp_path / "a.txt")).prompts == tuple(flat)


def parquet_bytes(tmp_path, **columns):
    pq.write_table(pa.table(columns), tmp_path / "made.parquet")
    return (tmp_path / "made.parquet").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no prompts"),
        ("a.txt", b"\n  \n\n", "holds no prompts"),
        ("a.txt", b"fox\nwh\xff\xfeale\n", r"a\.txt, line 2: byte 0xff is not UTF-8"),
        ("a.txt", b"fox\n\x89PNG\r\n\x1a\n\x00", "line 2: byte 0x89"),
        ("a.txt", b"fox\nwh\x00ale", r"line 2: control character U\+0000"),
        ("a.txt", b"fox\n\n\x1b[31mred", r"line 3: control character U\+001B"),
        ("a.txt", b"fox\n" + b"x" * 100_000, "line 2: a prompt of 100,000 characters"),
        ("a.jsonl", b'{"prompt": "fox"}\n{"prompt": ', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "fox"}', "line 1: expected"),
        ("a.jsonl", b'{"prompt": 3.0}', "line 1: expected"),
        ("a.jsonl", b'{"prompt": true}', "line 1: expected"),
        ("a.jsonl", b'["fox"]', "line 1: expected"),
        ("a.jsonl", b'{"prompt": " "}', "line 1: empty prompt"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', r"line 1: control character U\+D800"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.csv", b"text,seed\nfox,1\n", "no column 'prompt'; found 'text', 'seed'"),
        ("a.csv", b"id,prompt\n1,fox\n2\n", "line 3: empty prompt"),
        ("a.csv", b'prompt\n"fox\n', "line 2: not CSV"),
        ("a.csv", b"", "holds no prompts"),
        ("a.parquet", b"PAR1 is not enough", r"a\.parquet: not a Parquet file"),
        ("a.parquet", b"", r"a\.parquet: not a Parquet file"),
        ("a.pdf", b"fox", r"expected a file that ends in \.txt"),
    ],
)
def test_unusable_files_are_refused_by_name_and_line(tmp_path, name, content, message):
    with pytest.raises(PromptError, match=message) as caught:
        land(tmp_path, content, name)
    assert name in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_unusable_parquet_columns_are_refused(tmp_path):
    for columns, message in (
        ({"text": ["fox"]}, "no column 'prompt'; found 'text'"),
        ({"prompt": [1.0, 2.0]}, "column 'prompt' is double; expected string or integer"),
        ({"prompt": ["fox", None]}, "row 2: empty prompt"),
    ):
        with pytest.raises(PromptError, match=message):
            land(tmp_path, parquet_bytes(tmp_path, **columns), "a.parquet")


def test_two_prompts_with_one_id_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "stable_seed", lambda *parts: 7)
    with pytest.raises(PromptError, match="'fox' and 'whale' have the same id 7"):
        land(tmp_path, "fox\nwhale")
    with pytest.raises(PromptError, match="'fox' and 'fox' have the same id 7"):
        land(tmp_path, '{"prompt": "fox"}\n{"prompt": "fox", "negative_prompt": ""}', "a.jsonl")


def test_prompts_are_read_from_and_landed_on_s3(s3_store, s3_options, tmp_path):
    s3_store.fs.pipe_file(s3_store.path("prompts.txt"), b"fox\nwhale\n")
    source = f"{s3_store.url}/prompts.txt"
    landed = land_prompts(source, s3_options, s3_store, seed=0, samples_per_prompt=1)
    local, rows = land(tmp_path, "fox\nwhale")
    assert landed.digest == local.digest
    table = pq.read_table(landed.files[0].path, filesystem=s3_store.arrow)
    assert table.to_pylist() == list(rows.values())
    assert find_landed(source, s3_options, s3_store, seed=0, samples_per_prompt=1) == landed
    with pytest.raises(PromptError, match="no such file"):
        read_prompts(f"{s3_store.url}/none.txt", s3_options)


# ---------------------------------------------------------------- many rows against a plain model


def documented_seed(*parts):
    """blake2b over (length as 8 bytes, text) of each part; the low 64 bits without the last."""
    raw = [str(part).encode() for part in parts]
    text = b"".join(len(part).to_bytes(8, "little") + part for part in raw)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") // 2


def model(rows, seed, samples):
    """(height, width) or None → rows of the table in order; all in memory."""
    tables = {}
    for prompt, negative, size in set(rows):
        for index in range(samples):
            extra = () if negative is None else ("negative", negative)
            extra += () if size is None else ("size", *size)
            tables.setdefault(size, []).append(
                {
                    "pair_id": documented_seed("pair", seed, prompt, index, *extra),
                    "prompt": prompt,
                    "seed": documented_seed("noise", seed, prompt, index, *extra),
                    "negative_prompt": negative,
                }
            )
    return {size: sorted(rows, key=lambda r: r["pair_id"]) for size, rows in tables.items()}


def model_digest(tables):
    """sha256 over one JSON list a line, in order of pair_id; rows without a negative prompt and a
    size of their own are [pair_id, prompt, seed]."""
    lines = []
    for size, rows in tables.items():
        for row in rows:
            negative = row["negative_prompt"]
            own = [] if negative is None and size is None else [negative, *(size or (None, None))]
            lines.append([row["pair_id"], row["prompt"], row["seed"], *own])
    text = "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line[0]))
    return hashlib.sha256(text.encode()).hexdigest()


def some_rows(draw, count):
    words = ["fox", "whale", "тёмный", "café", "7", 'say "hi", you', "two\nlines", "🦊"]
    rows = []
    for _ in range(count):
        prompt = " ".join(draw.choices(words, k=draw.randint(1, 3)))
        negative = draw.choice([None, None, "", "blurry", "negative"])
        rows.append((prompt, negative, draw.choice([None, None, (64, 128), (128, 64)])))
    return rows


def write_rows(path, rows):
    """A file of `rows`, in the format that its name says."""
    columns = ("prompt", "negative_prompt", "height", "width")
    cells = [(prompt, negative, *(size or (None, None))) for prompt, negative, size in rows]
    if path.suffix == ".parquet":
        types = [pa.string(), pa.string(), pa.int32(), pa.uint16()]
        schema = pa.schema(list(zip(columns, types, strict=True)))
        dicts = [dict(zip(columns, row, strict=True)) for row in cells]
        pq.write_table(pa.Table.from_pylist(dicts, schema=schema), path, row_group_size=5)
    else:
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in cells]
        path.write_text("\n".join(lines), encoding="utf-8")


def contents(landed):
    found = {}
    for file in landed.files:
        with open(file.path, "rb") as stream:
            found[os.path.basename(file.path)] = stream.read()
    return found


@pytest.mark.parametrize("trial", range(4))
def test_any_order_split_and_spilling_gives_the_rows_of_a_plain_model(tmp_path, monkeypatch, trial):
    draw = random.Random(trial)
    rows = some_rows(draw, 120)
    expected = model(rows, seed=trial, samples=2)
    root, seen = open_store(str(tmp_path / "set")), []
    for bits, chunk, files in ((0, 1000, 1), (1, 1, 3), (7, 7, 5), (20, 50, 2)):
        monkeypatch.setattr(prompt_sort, "_BUCKET_BITS", bits)
        monkeypatch.setattr(prompt_sort, "_ROW_GROUP_ROWS", 16)
        monkeypatch.setattr(prompts, "_CHUNK_ROWS", chunk)
        draw.shuffle(rows)
        folder = tmp_path / f"bits{bits}"
        folder.mkdir()
        for number in range(files):
            suffix = draw.choice(["parquet", "jsonl", "ndjson"])
            write_rows(folder / f"{number}.{suffix}", rows[number::files])
        source = PromptSource((str(folder / "*"),))
        landed = land_prompts(source, None, root, seed=trial, samples_per_prompt=2)
        seen.append((landed, contents(landed)))
        shutil.rmtree(root.path("prompts"))
    landed, files = seen[0]
    assert all(other == seen[0] for other in seen)
    assert landed.digest == model_digest(expected)
    assert landed.duplicates == len(rows) - len(set(rows))
    assert landed.rows == sum(len(table) for table in expected.values())
    sizes = [(file.height, file.width) for file in landed.files]
    assert sizes == [(None, None), (64, 128), (128, 64)]
    for file, size in zip(landed.files, (None, *sizes[1:]), strict=True):
        name = landed.digest + ("" if size is None else f"-{size[0]}x{size[1]}") + ".parquet"
        assert os.path.basename(file.path) == name
        table = pq.ParquetFile(io.BytesIO(files[name]))
        assert table.read().to_pylist() == expected[size]
        groups = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        assert set(groups[:-1]) <= {16} and groups[-1] <= 16 and sum(groups) == file.rows


def test_the_parts_in_which_rows_come_do_not_show_in_the_file(tmp_path):
    rows, draw = 150_000, random.Random(0)
    texts = [f"{n} fox " * 8 for n in range(rows)]
    table = pa.table([range(rows), texts, range(rows), [None] * rows], schema=prompt_sort.LANDED)
    sizes = pa.table({"side": pa.chunked_array([pa.nulls(rows, pa.int32())])})["side"]
    written = []
    for most in (rows, 40_000, 999):
        folder = tmp_path / str(most)
        folder.mkdir()
        files, start = prompt_sort.TableFiles(str(folder)), 0
        while start < rows:
            part = slice(start, start + draw.randint(most // 2, most))
            files.add(table[part], sizes[part], sizes[part])
            start = part.stop
        ((size, path, count),) = files.close()
        assert (size, count) == (None, rows)
        with open(path, "rb") as file:
            written.append(file.read())
    assert written[0] == written[1] == written[2]
    metadata = pq.ParquetFile(path).metadata
    groups = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    assert groups == [65_536, 65_536, 150_000 - 2 * 65_536]


def test_the_digest_tells_every_part_of_a_row(tmp_path):
    rows = [
        {"prompt": "fox"},
        {"prompt": "fox", "negative_prompt": ""},
        {"prompt": "fox", "negative_prompt": "blurry"},
        {"prompt": "fox", "height": 64, "width": 128},
        {"prompt": "fox", "height": 128, "width": 64},
        {"prompt": "fox", "negative_prompt": "", "height": 64, "width": 128},
    ]
    landed = [land(tmp_path, json.dumps(row), "a.jsonl") for row in rows]
    assert len({found.digest for found, _ in landed}) == len(rows)
    ids = [next(iter(table)) for _, table in landed]
    assert len(set(ids)) == len({next(iter(t.values()))["seed"] for _, t in landed}) == len(rows)
    together, _ = land(tmp_path, "\n".join(map(json.dumps, rows)), "a.jsonl")
    assert {row["pair_id"] for row in landed_rows(together)} == set(ids)


def test_a_csv_cell_left_empty_is_one_not_given(tmp_path):
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerows([["height", "prompt", "width", "negative_prompt"], ["", "fox", "", ""]])
    writer.writerows([["512", "fox", " 768 ", "blurry"], ["", "whale"]])
    landed, rows = land(tmp_path, table.getvalue(), "a.csv")
    expected = model([("fox", None, None), ("whale", None, None)], 0, 1)[None]
    expected += model([("fox", "blurry", (512, 768))], 0, 1)[512, 768]
    assert list(rows.values()) == expected
    assert [(file.height, file.width) for file in landed.files] == [(None, None), (512, 768)]


def test_class_labels_land_as_their_decimal_text(tmp_path):
    plain, rows = land(tmp_path, "0\n7\n999\n", samples=2)
    assert {row["prompt"] for row in rows.values()} == {"0", "7", "999"}
    files = {
        "label.csv": "image,class_label\na,0\nb,07\nc,999\n",
        "label.jsonl": '{"class_label": 0}\n{"prompt": 7}\n{"class_label": 999}',
        "label.parquet": parquet_bytes(tmp_path, class_label=pa.array([0, 7, 999], pa.uint16())),
        "own.parquet": parquet_bytes(tmp_path, prompt=[999, 7, 0]),
    }
    for name, content in files.items():
        assert land(tmp_path, content, name, samples=2)[0] == plain


def test_more_sizes_than_a_run_can_keep_apart_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "_MAX_SIZES", 2)
    monkeypatch.setattr(prompts, "_CHUNK_ROWS", 1)
    rows = [{"prompt": "fox", "height": 8 * n, "width": 8} for n in (1, 2, 3)]
    land(tmp_path, "\n".join(map(json.dumps, rows[:2])), "a.jsonl")
    with pytest.raises(PromptError, match="more than 2 different sizes"):
        land(tmp_path, "\n".join(map(json.dumps, rows)), "a.jsonl")


# ---------------------------------------------------------------- publishing and finding again

SETTINGS = {"seed": 0, "samples_per_prompt": 1}
SIZED = '{"prompt": "fox"}\n{"prompt": "whale", "height": 64, "width": 64}\n'


@pytest.fixture
def sized(tmp_path):
    """(source, root) of a list that lands as two tables."""
    (tmp_path / "in.jsonl").write_text(SIZED)
    return str(tmp_path / "in.jsonl"), open_store(str(tmp_path / "set"))


def test_landed_prompts_are_found_by_the_bytes_and_settings_they_came_from(sized, tmp_path):
    source, root = sized
    assert find_landed(source, None, root, **SETTINGS) is None
    landed = land_prompts(source, None, root, **SETTINGS)
    assert find_landed(source, None, root, **SETTINGS) == landed
    shutil.copy(source, tmp_path / "copy.ndjson")  # same bytes, same format, other name
    assert find_landed(str(tmp_path / "copy.ndjson"), None, root, **SETTINGS) == landed
    shutil.copy(source, tmp_path / "copy.txt")  # same bytes, but as lines of text
    assert find_landed(str(tmp_path / "copy.txt"), None, root, **SETTINGS) is None
    assert find_landed(source, None, root, seed=1, samples_per_prompt=1) is None
    assert find_landed(source, None, root, seed=0, samples_per_prompt=2) is None
    other = PromptSource((source,), column="text")
    assert find_landed(other, None, root, **SETTINGS) is None
    larger_step = PromptSource((source,), side_step=16)  # sizes were not checked for this one
    assert find_landed(larger_step, None, root, **SETTINGS) is None
    both = PromptSource((source, str(tmp_path / "copy.ndjson")))
    assert find_landed(both, None, root, **SETTINGS) is None
    with open(source, "a") as file:
        file.write("\n")
    assert find_landed(source, None, root, **SETTINGS) is None


def test_a_moved_data_set_still_finds_its_prompts(sized, tmp_path):
    source, root = sized
    landed = land_prompts(source, None, root, **SETTINGS)
    moved = open_store(str(tmp_path / "moved"))
    os.rename(root.root, moved.root)
    found = find_landed(source, None, moved, **SETTINGS)
    assert found is not None and found.digest == landed.digest
    assert len(landed_rows(found)) == 2


def test_a_table_that_is_gone_or_cut_is_landed_again(sized):
    source, root = sized
    landed = land_prompts(source, None, root, **SETTINGS)
    before = contents(landed)
    for file in landed.files:
        for damage in (os.remove, lambda path: os.truncate(path, 100)):
            damage(file.path)
            assert find_landed(source, None, root, **SETTINGS) is None
            assert land_prompts(source, None, root, **SETTINGS) == landed
            assert contents(landed) == before
            assert find_landed(source, None, root, **SETTINGS) == landed


def test_a_flipped_bit_of_a_table_is_seen_where_it_is_used_and_mended_by_landing_again(sized):
    source, root = sized
    landed = land_prompts(source, None, root, **SETTINGS)
    before = contents(landed)
    for file in landed.files:
        data = bytearray(Path(file.path).read_bytes())
        data[len(data) // 2] ^= 1
        Path(file.path).write_bytes(data)
        assert find_landed(source, None, root, **SETTINGS, whole=True) is None
        assert land_prompts(source, None, root, **SETTINGS) == landed
        assert contents(landed) == before
        assert find_landed(source, None, root, **SETTINGS, whole=True) == landed


def test_landing_again_leaves_the_tables_alone(sized):
    source, root = sized
    landed = land_prompts(source, None, root, **SETTINGS)
    before = [os.stat(file.path).st_ino for file in landed.files]
    land_prompts(source, None, root, **SETTINGS)
    assert [os.stat(file.path).st_ino for file in landed.files] == before
    assert sorted(os.listdir(root.path("prompts"))) == sorted([*contents(landed), "sources"])


@pytest.mark.parametrize(
    "change",
    [
        lambda record: "{" + record,
        lambda record: "[]",
        lambda record: "\x00",
        lambda record: record.replace('"rows": 2', '"rows": 3'),
        lambda record: record.replace('"rows": 1', '"rows": "1"', 1),
        lambda record: record.replace('"digest": "', '"digest": "../'),
        lambda record: record.replace('"height": 64', '"height": "../64"'),
        lambda record: record.replace('"height": 64', '"height": null'),
        lambda record: record.replace('"bytes"', '"size"'),
        lambda record: record.replace('"format": 2', '"format": 3'),
        lambda record: record.replace('"duplicates": 0', '"duplicates": -1'),
    ],
)
def test_a_damaged_record_is_named(sized, change):
    source, root = sized
    land_prompts(source, None, root, **SETTINGS)
    (path,) = root.fs.find(root.path("prompts", "sources"))
    record = root.fs.cat_file(path).decode()
    assert change(record) != record
    root.fs.pipe_file(path, change(record).encode())
    with pytest.raises(
        PromptError, match=r"not a record of landed prompts .*; remove it"
    ) as caught:
        find_landed(source, None, root, **SETTINGS)
    assert path in str(caught.value)
    os.remove(path)
    assert land_prompts(source, None, root, **SETTINGS).rows == 2
    assert root.fs.cat_file(path).decode() == record


def test_the_record_comes_after_the_tables(sized, monkeypatch):
    source, root = sized
    put, done = prompt_records._put, []

    def fail_at_second(local, store, path):
        if done:
            raise ConnectionError("gone")
        done.append(path)
        put(local, store, path)

    with monkeypatch.context() as patch:
        patch.setattr(prompt_records, "_put", fail_at_second)
        with pytest.raises(ConnectionError):
            land_prompts(source, None, root, **SETTINGS)
    assert len(done) == 1 and find_landed(source, None, root, **SETTINGS) is None
    landed = land_prompts(source, None, root, **SETTINGS)
    assert find_landed(source, None, root, **SETTINGS) == landed


def test_preparing_writes_to_the_local_folder_alone(sized, tmp_path):
    source, root = sized
    prepared = prepare_prompts(source, None, str(tmp_path / "made"), **SETTINGS)
    assert not os.path.exists(root.root)
    assert sorted(os.listdir(tmp_path / "made")) == ["64x64.parquet", "plain.parquet"]
    landed = prepared.publish(root)
    assert (landed.rows, landed.digest) == (prepared.rows, prepared.digest)
    assert find_landed(source, None, root, **SETTINGS) == landed


def test_a_file_that_changes_while_it_is_read_is_refused(sized, monkeypatch):
    source, root = sized
    read_rows = prompts.read_rows

    def read_and_append(file, *arguments):
        yield from read_rows(file, *arguments)
        with open(file.path, "a") as stream:
            stream.write('{"prompt": "late"}\n')

    monkeypatch.setattr(prompts, "read_rows", read_and_append)
    with pytest.raises(PromptError, match=r"in\.jsonl: changed while it was read"):
        land_prompts(source, None, root, **SETTINGS)
    assert not os.path.exists(root.root)


def test_a_big_table_goes_to_s3_in_parts(s3_store, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_records, "_PART_BYTES", 5 << 20)
    content = random.Random(0).randbytes(11 << 20)
    (tmp_path / "big").write_bytes(content)
    table = PreparedTable(str(tmp_path / "big"), 5, None, None)
    landed = PreparedPrompts((table,), 5, "a" * 64, 0, "key").publish(s3_store)
    assert s3_store.fs.cat_file(landed.files[0].path) == content
    assert s3_store.fs.info(landed.files[0].path)["ETag"].strip('"').endswith("-3")
