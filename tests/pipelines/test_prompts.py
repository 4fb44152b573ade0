import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import prompts
from pipelines.prompts import PromptError, land_prompts, read_prompts
from pipelines.storage import open_store


def land(tmp_path, content, name="prompts.txt", *, seed=0, samples=1):
    source = tmp_path / name
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    root = open_store(str(tmp_path / "set"))
    landed = land_prompts(str(source), None, root, seed=seed, samples_per_prompt=samples)
    return landed, {row["pair_id"]: row for row in pq.read_table(landed.path).to_pylist()}


def test_every_prompt_gets_one_row_per_sample(tmp_path):
    landed, rows = land(tmp_path, "a red fox\n\n  a blue whale  \n", samples=3)
    assert landed.rows == len(rows) == 6
    assert (
        sorted(row["prompt"] for row in rows.values()) == ["a blue whale"] * 3 + ["a red fox"] * 3
    )
    assert len({row["seed"] for row in rows.values()}) == 6
    assert pq.read_schema(landed.path).types == [pa.int64(), pa.string(), pa.int64()]


def test_a_new_line_changes_no_other_row_and_order_changes_nothing(tmp_path):
    before, rows_before = land(tmp_path, "fox\nwhale\n", samples=2)
    after, rows_after = land(tmp_path, "apple\nwhale\nfox\n", samples=2)
    assert rows_before.items() <= rows_after.items()
    assert before.digest != after.digest and before.path != after.path
    moved, rows_moved = land(tmp_path, "whale\nfox", samples=2)
    assert (moved.digest, moved.path, rows_moved) == (before.digest, before.path, rows_before)


def test_ids_and_seeds_depend_on_the_data_set_seed(tmp_path):
    _, first = land(tmp_path, "fox\nwhale", seed=0)
    _, second = land(tmp_path, "fox\nwhale", seed=1)
    assert not first.keys() & second.keys()
    assert not {r["seed"] for r in first.values()} & {r["seed"] for r in second.values()}


def test_more_samples_keep_the_first_ones(tmp_path):
    _, few = land(tmp_path, "fox\nwhale", samples=1)
    _, many = land(tmp_path, "fox\nwhale", samples=4)
    assert few.items() <= many.items() and len(many) == 8


def test_ids_are_the_same_on_every_machine(tmp_path):
    _, rows = land(tmp_path, "a red fox")
    assert rows == {
        1255891346813337289: {
            "pair_id": 1255891346813337289,
            "prompt": "a red fox",
            "seed": 3022497743115661451,
        }
    }


def test_landing_again_writes_the_same_bytes(tmp_path):
    landed, _ = land(tmp_path, "fox\nwhale")
    with open(landed.path, "rb") as file:
        before = file.read()
    land(tmp_path, "fox\nwhale")
    with open(landed.path, "rb") as file:
        assert file.read() == before


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
        ("a.jsonl", b'{"prompt": 3}', "line 1: expected"),
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
        ({"prompt": [1, 2]}, "column 'prompt' is int64; expected string"),
        ({"prompt": ["fox", None]}, "row 2: empty prompt"),
    ):
        with pytest.raises(PromptError, match=message):
            land(tmp_path, parquet_bytes(tmp_path, **columns), "a.parquet")


def test_missing_files_and_folders_are_refused(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    for name, message in (("none.txt", "no such file"), ("folder.txt", "is a folder")):
        with pytest.raises(PromptError, match=message):
            read_prompts(str(tmp_path / name))


def test_two_prompts_with_one_id_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "stable_seed", lambda *parts: 7)
    with pytest.raises(PromptError, match="'fox' and 'whale' have the same id 7"):
        land(tmp_path, "fox\nwhale")


def test_prompts_are_read_from_and_landed_on_s3(s3_store, s3_options, tmp_path):
    s3_store.fs.pipe_file(s3_store.path("prompts.txt"), b"fox\nwhale\n")
    source = f"{s3_store.url}/prompts.txt"
    landed = land_prompts(source, s3_options, s3_store, seed=0, samples_per_prompt=1)
    local, rows = land(tmp_path, "fox\nwhale")
    assert landed.digest == local.digest
    table = pq.read_table(landed.path, filesystem=s3_store.arrow)
    assert table.to_pylist() == list(rows.values())
    with pytest.raises(PromptError, match="no such file"):
        read_prompts(f"{s3_store.url}/none.txt", s3_options)
