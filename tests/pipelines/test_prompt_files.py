import io
import json
import sys
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from pipelines import prompt_files
from pipelines.prompt_files import PromptError, PromptSource, hash_file, list_files, read_rows
from pipelines.prompt_rows import BadCellError, PromptRow, checked_row
from pipelines.prompts import read_prompts
from pipelines.storage import no_answer
from tests.fault_proxy import Fault, FaultProxy


def rows_of(path, column="prompt"):
    (file,) = list_files(str(path), None)
    return list(read_rows(file, column))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(path, types=None, row_group_size=None, **columns):
    arrays = {name: pa.array(cells, (types or {}).get(name)) for name, cells in columns.items()}
    pq.write_table(pa.table(arrays), path, row_group_size=row_group_size)
    return path


# ---------------------------------------------------------------- blocks


BLOCKS = (1, 2, 3, 4, 5, 7, 11, 64)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_lines_are_the_same_wherever_a_block_ends(tmp_path, monkeypatch, block, bom):
    monkeypatch.setattr(prompt_files, "_BLOCK_BYTES", block)
    text = "тёмный лес\r\n\r\r\n🦊 fox\rcafe\u0301\n\n\u2028whale\u2028in one line\n last\r"
    expected = ["тёмный лес", "🦊 fox", "café", "whale\u2028in one line", "last"]
    found = rows_of(write(tmp_path / "a.txt", bom + text))
    assert [row.prompt for row in found] == expected
    objects = text.replace("last", '{"prompt": "last", "n": "\u2028"}')
    for line in ("тёмный лес", "🦊 fox", "cafe\u0301", "\u2028whale\u2028in one line"):
        objects = objects.replace(line, json.dumps({"prompt": line}, ensure_ascii=False))
    assert rows_of(write(tmp_path / "a.jsonl", bom + objects)) == found


@pytest.mark.parametrize("block", BLOCKS)
def test_csv_cells_are_the_same_wherever_a_block_ends(tmp_path, monkeypatch, block):
    monkeypatch.setattr(prompt_files, "_BLOCK_BYTES", block)
    text = '\ufeffn,prompt\r\n1,"лес, ""тёмный""\r\nand\nold\rtoo"\r\n\r\n2,🦊\n3,"a\n\nb"'
    expected = ['лес, "тёмный"\r\nand\nold\rtoo', "🦊", "a\n\nb"]
    assert [row.prompt for row in rows_of(write(tmp_path / "a.csv", text))] == expected


@pytest.mark.parametrize("block", BLOCKS)
def test_bytes_that_are_not_utf8_are_named_wherever_a_block_ends(tmp_path, monkeypatch, block):
    monkeypatch.setattr(prompt_files, "_BLOCK_BYTES", block)
    for content, message in (
        ("fox\r\nлес\n🦊".encode() + b"\xff\n", "line 3: byte 0xff"),
        ("\ufefffox\nлес\n".encode() + "🦊".encode()[:3], "line 3: byte 0xf0"),
        (b"fox\n\xd0\n", "line 2: byte 0xd0"),
    ):
        with pytest.raises(PromptError, match=rf"a\.txt, {message} is not UTF-8"):
            rows_of(write(tmp_path / "a.txt", content))


@pytest.mark.parametrize("block", BLOCKS)
def test_errors_name_the_line_wherever_a_block_ends(tmp_path, monkeypatch, block):
    monkeypatch.setattr(prompt_files, "_BLOCK_BYTES", block)
    for name, content, message in (
        ("a.txt", "fox\r\n\r\nwh\x00ale\r\n", r"line 3: control character U\+0000"),
        ("a.jsonl", '{"prompt": "fox"}\r\n\n{"prompt": ""}\n', "line 3: empty prompt"),
        ("a.csv", 'prompt\r\n"two\r\nlines"\r\n\t\r\n', "line 4: empty prompt"),
    ):
        with pytest.raises(PromptError, match=rf"{name}, {message}"):
            rows_of(write(tmp_path / name, content))


def test_a_file_without_line_ends_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_files, "_BLOCK_BYTES", 16)
    monkeypatch.setattr(prompt_files, "_LONGEST_LINE", 100)
    path = write(tmp_path / "a.txt", "fox\n" + "x" * 1_000_000)
    with pytest.raises(PromptError, match="line 2: longer than 100 characters"):
        rows_of(path)


class CountingFiles(LocalFileSystem):
    """Notes what is opened and how many bytes are asked for."""

    cachable = False

    def __init__(self):
        super().__init__()
        self.opened, self.asked = [], []

    def open(self, path, mode="rb", **kwargs):
        self.opened.append(path.rsplit("/", 1)[-1])
        stream = super().open(path, mode, **kwargs)
        read = stream.read

        class Stream(io.RawIOBase):
            def read(_, size=-1):
                self.asked.append(size)
                return read(size)

        return Stream()


def test_files_are_read_one_after_the_other_in_bounded_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_files, "_BLOCK_BYTES", 64)
    fs = CountingFiles()
    paths = [str(write(tmp_path / f"{n}.txt", "a red fox\n" * 100)) for n in range(2)]
    files = [prompt_files.PromptFile(path, "txt", fs, path) for path in paths]
    rows = (row for file in files for row in read_rows(file, "prompt"))
    assert fs.opened == []
    for done in range(1, 101):
        assert next(rows).prompt == "a red fox"
        assert fs.opened == ["0.txt"]
        assert 64 * len(fs.asked) <= 10 * done + 2 * 64
    assert next(rows).prompt == "a red fox" and fs.opened == ["0.txt", "1.txt"]
    fs.asked.clear()
    hash_file(files[0])
    assert set(fs.asked) == {64}


def test_parquet_is_read_in_batches_of_the_columns_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_files, "_PARQUET_BATCH_ROWS", 3)
    texts = [f"fox {n}" for n in range(10)]
    path = parquet(tmp_path / "a.parquet", n=[{"x": [1]}] * 10, prompt=texts, row_group_size=4)
    rows = read_rows(list_files(str(path), None)[0], "prompt")
    assert next(rows).prompt == "fox 0"
    assert [row.prompt for row in rows] == texts[1:]
    texts[7] = "wh\x00ale"
    with pytest.raises(PromptError, match=r"a\.parquet, row 8: control character"):
        rows_of(parquet(tmp_path / "a.parquet", prompt=texts, row_group_size=4))


# ---------------------------------------------------------------- columns


def test_negative_prompts_and_sizes_are_the_same_in_every_format(tmp_path):
    table = (
        {"text": "fox", "negative_prompt": " cafe\u0301 ", "height": 512, "width": 768},
        {"text": "whale", "negative_prompt": None, "height": None, "width": None},
        {"text": "apple", "negative_prompt": "blurry", "height": None, "width": None},
        {"text": "flag", "negative_prompt": None, "height": 8, "width": 65_536},
    )
    expected = [
        PromptRow("fox", "café", 512, 768),
        PromptRow("whale"),
        PromptRow("apple", "blurry"),
        PromptRow("flag", None, 8, 65_536),
    ]
    lines = [",".join("" if v is None else str(v) for v in row.values()) for row in table]
    csv = write(tmp_path / "a.csv", "\n".join([",".join(table[0]), *lines]))
    columns = {name: [row[name] for row in table] for name in table[0]}
    types = {"text": pa.dictionary(pa.int8(), pa.string()), "height": pa.uint64()}
    types["negative_prompt"] = pa.large_string()
    for path in (
        csv,
        write(tmp_path / "a.NDJSON", "\n".join(map(json.dumps, table))),
        parquet(tmp_path / "a.parquet", types, **columns),
    ):
        assert rows_of(path, "text") == expected


def test_an_empty_negative_prompt_is_kept_apart_from_none(tmp_path):
    lines = '{"prompt": "fox", "negative_prompt": " "}\n{"prompt": "fox", "negative_prompt": null}'
    expected = [PromptRow("fox", ""), PromptRow("fox", None)]
    assert rows_of(write(tmp_path / "a.jsonl", lines)) == expected
    path = parquet(tmp_path / "a.parquet", prompt=["fox", "fox"], negative_prompt=["", None])
    assert rows_of(path) == expected
    path = parquet(tmp_path / "b.parquet", prompt=["fox"], negative_prompt=[None], width=[None])
    assert rows_of(path) == [PromptRow("fox")]


def test_class_labels_are_read_in_place_of_an_absent_prompt_column(tmp_path):
    both = '{"prompt": "fox", "class_label": 3}\n{"class_label": 3}\n{"prompt": 12}'
    assert [row.prompt for row in rows_of(write(tmp_path / "a.jsonl", both))] == ["fox", "3", "12"]
    for header, expected in (("class_label,x", "7"), ("class_label,prompt", "1")):
        csv = write(tmp_path / "a.csv", f"{header}\n 007 ,1\n")
        assert [row.prompt for row in rows_of(csv)] == [expected]
    assert rows_of(parquet(tmp_path / "a.parquet", class_label=[5])) == [PromptRow("5")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": -1}, "class label -1; expected 0 or more"),
        ({"class_label": "7"}, "expected"),
        ({"prompt": None, "class_label": 7}, "expected"),
        ({"class_label": True}, "expected"),
        ({"prompt": "fox", "negative_prompt": 3}, "negative_prompt 3; expected text"),
        ({"prompt": "fox", "negative_prompt": "\x07"}, r"control character U\+0007"),
        ({"prompt": "fox", "negative_prompt": "x" * 10_001}, "a negative prompt of 10,001 char"),
        ({"prompt": "fox", "height": 512}, "height without width; expected both or neither"),
        ({"prompt": "fox", "width": 512}, "width without height; expected both or neither"),
        ({"prompt": "fox", "height": 0, "width": 8}, "height 0; expected a positive multiple of 8"),
        ({"prompt": "fox", "height": -8, "width": 8}, "height -8; expected a positive multiple"),
        ({"prompt": "fox", "height": 8, "width": 12}, "width 12; expected a positive multiple"),
        ({"prompt": "fox", "height": 8, "width": 8.0}, r"width 8\.0; expected a positive multiple"),
        ({"prompt": "fox", "height": True, "width": 8}, "height True; expected a positive"),
        ({"prompt": "fox", "height": 65_544, "width": 8}, "height 65544; .*at most 65,536"),
    ],
)
def test_bad_cells_are_refused_by_line(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", '{"prompt": "fox"}\n' + json.dumps(line))
    with pytest.raises(PromptError, match=rf"a\.jsonl, line 2: {message}"):
        rows_of(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,height,width\nfox,512,\n", "line 2: height without width"),
        ("prompt,height,width\nfox,512,abc\n", "line 2: width 'abc'; expected a positive multiple"),
        ("prompt,height,width\nfox,1e3,8\n", "line 2: height '1e3'; expected a positive multiple"),
        ("class_label\n1\nfox\n", "line 3: class label 'fox'; expected 0, 1, 2"),
        ("class_label\n-1\n", "line 2: class label '-1'"),
        ("prompt,prompt\nfox,whale\n", "2 columns 'prompt'; expected one"),
        ("prompt\nfox\na whale, blue\n", "line 3: 2 cells, the header has 1; put quotes"),
    ],
)
def test_bad_csv_is_refused_by_line(tmp_path, content, message):
    with pytest.raises(PromptError, match=rf"a\.csv.* {message}"):
        rows_of(write(tmp_path / "a.csv", content))


def test_sizes_are_multiples_of_the_teacher_s_step(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,height,width\nfox,512,768\nwhale,1080,1920\n")
    (file,) = list_files(str(path), None)
    assert [row.height for row in read_rows(file, "prompt")] == [512, 1080]
    with pytest.raises(PromptError, match=r"a\.csv, line 3: height '1080'; .* multiple of 16,"):
        list(read_rows(file, "prompt", 16))


def test_parquet_columns_of_other_types_are_refused(tmp_path):
    for columns, message in (
        ({"class_label": ["7"]}, "column 'class_label' is string; expected integer"),
        ({"prompt": ["fox"], "height": ["8"], "width": [8]}, "column 'height' is string; expected"),
        ({"prompt": ["fox"], "negative_prompt": [1]}, "'negative_prompt' is int64; expected str"),
        ({"prompt": [b"fox"]}, "column 'prompt' is binary; expected string or integer"),
    ):
        with pytest.raises(PromptError, match=message):
            rows_of(parquet(tmp_path / "a.parquet", **columns))


def test_a_column_cannot_be_prompt_and_size_at_once():
    with pytest.raises(PromptError, match="column 'height' has its own meaning"):
        PromptSource(("a.csv",), column="height")


def test_the_characters_refused_are_unicode_control_and_surrogates_but_for_white_space():
    refused = set()
    for code in range(sys.maxunicode + 1):
        try:
            checked_row(f"a{chr(code)}b", None, None, None)
        except BadCellError:
            refused.add(code)
    expected = {
        c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) in ("Cc", "Cs")
    }
    assert refused == expected - {ord(c) for c in "\t\r\n"}


# ---------------------------------------------------------------- sources


def test_globs_are_sorted_and_a_file_named_twice_is_read_once(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.txt", f"{name} fox\nfox\n")
    (tmp_path / "folder.txt").mkdir()
    write(tmp_path / "folder.txt" / "deep.txt", "deep")
    source = PromptSource((str(tmp_path / "c.txt"), f"{tmp_path}/*.txt", f"{tmp_path}/./a.txt"))
    found = read_prompts(source)
    assert found.prompts == ("c fox", "fox", "a fox", "b fox") and found.duplicates == 2
    assert len(list_files(f"{tmp_path}/**/*.txt", None)) == 4
    assert read_prompts(f"{tmp_path}/[ab].txt").prompts == ("a fox", "fox", "b fox")


def test_a_name_that_looks_like_a_glob_is_first_of_all_a_file(tmp_path):
    write(tmp_path / "fox[1].txt", "the file")
    write(tmp_path / "fox1.txt", "the match")
    assert read_prompts(str(tmp_path / "fox[1].txt")).prompts == ("the file",)


def test_an_error_in_a_glob_names_the_file(tmp_path):
    write(tmp_path / "1.txt", "fox")
    write(tmp_path / "2.txt", "fox\n\x00")
    with pytest.raises(PromptError, match=rf"{tmp_path}/2\.txt, line 2: control character"):
        read_prompts(f"{tmp_path}/*.txt")


def test_an_empty_file_among_others_is_no_error(tmp_path):
    for name, content in (("1.txt", ""), ("2.txt", "fox"), ("3.csv", "prompt\n")):
        write(tmp_path / name, content)
    assert read_prompts(f"{tmp_path}/*").prompts == ("fox",)
    with pytest.raises(PromptError, match=r"1\.txt, .*3\.csv: holds no prompts"):
        read_prompts(PromptSource((f"{tmp_path}/1.txt", f"{tmp_path}/3.csv")))


def test_sources_that_are_not_there_are_refused(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    write(tmp_path / "a.pdf", "fox")
    write(tmp_path / "a.txt", "fox")
    for name, message in (
        ("none.txt", "none.txt: no such file"),
        ("a.txt/b.txt", "b.txt: no such file"),
        ("folder.txt", "folder.txt: is a folder; expected a file of prompts"),
        ("none*.txt", r"none\*\.txt: matches no file"),
        ("folder*", r"folder\*: matches no file"),
        ("*", r"a\.pdf: expected a file that ends in \.txt, \.csv, \.jsonl or \.parquet"),
    ):
        with pytest.raises(PromptError, match=message):
            read_prompts(str(tmp_path / name))
    with pytest.raises(PromptError, match="no prompt files given"):
        read_prompts(PromptSource(()))


def test_files_on_s3_are_found_by_glob(s3_store, s3_options, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_files, "_BLOCK_BYTES", 7)
    s3_store.fs.pipe_file(s3_store.path("b", "2.txt"), "лес\r\n🦊\n".encode())
    s3_store.fs.pipe_file(s3_store.path("a", "1.jsonl"), b'{"prompt": "whale"}\n{"prompt": ""}')
    table = parquet(tmp_path / "a.parquet", prompt=["fox", "лес"]).read_bytes()
    s3_store.fs.pipe_file(s3_store.path("b", "1.parquet"), table)
    local = write(tmp_path / "local.txt", "here")
    source = PromptSource((f"{s3_store.url}/b/*", str(local), f"{s3_store.url}/b/2.txt"))
    found = read_prompts(source, s3_options)
    assert found.prompts == ("fox", "лес", "🦊", "here") and found.duplicates == 1
    with pytest.raises(PromptError, match=rf"{s3_store.url}/a/1\.jsonl, line 2: empty prompt"):
        read_prompts(f"{s3_store.url}/*/1.*", s3_options)
    for name in ("none/*", "none.txt", "../none/x*.txt"):
        with pytest.raises(PromptError, match=r"matches no file|no such file"):
            read_prompts(f"{s3_store.url}/{name}", s3_options)
    with pytest.raises(PromptError, match="matches no file"):
        read_prompts("s3://there-is-no-such-bucket/*.txt", s3_options)
    with pytest.raises(PromptError, match="is a folder"):
        read_prompts(f"{s3_store.url}/b", s3_options)


def test_a_store_that_does_not_answer_is_no_bad_file(s3_store, monkeypatch, tmp_path):
    path = parquet(tmp_path / "list.parquet", prompt=["fox"])
    s3_store.fs.put_file(str(path), s3_store.path("list.parquet"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with FaultProxy(s3_store.fs.endpoint_url) as proxy:
        (file,) = list_files(f"{s3_store.url}/list.parquet", proxy.options)
        file.fs.retries = 1
        proxy.inject(Fault.SLOW_DOWN, method="GET", times=1000)
        with pytest.raises(OSError) as caught:
            list(read_rows(file, "prompt"))
        assert proxy.hits and no_answer(caught.value)


def test_a_store_that_refuses_is_no_bad_file(monkeypatch, tmp_path):
    (file,) = list_files(str(parquet(tmp_path / "list.parquet", prompt=["fox"])), None)

    def refuse(*arguments, **options):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(LocalFileSystem, "open", refuse)
    with pytest.raises(PermissionError, match="Access Denied"):
        list(read_rows(file, "prompt"))


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = parquet(tmp_path / "list.parquet", prompt=["fox"])
    path.write_bytes(path.read_bytes()[:-6] + b"??PAR1")
    with pytest.raises(PromptError, match=r"list\.parquet: not a Parquet file"):
        read_prompts(str(path))
