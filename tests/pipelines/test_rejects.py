import json
import re

import pytest

from dmd_core.files import write_atomic
from pipelines.rejects import RejectedRow, RejectFileError, read_rejects, write_rejects
from pipelines.storage import open_store

GENERATION = "generations/abc"


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    if request.param == "local":
        return open_store(str(tmp_path / "set"))
    return request.getfixturevalue("s3_store")


def test_what_is_written_is_read_and_the_newest_fence_counts(root):
    assert read_rejects(root, GENERATION) == {}
    odd = 'a "fox"\u2028\nof\x85 two lines'
    newest = [RejectedRow(-5, odd, "newest", 3), RejectedRow(7, "b", odd, 1)]
    path = write_rejects(root, GENERATION, newest, fence=12)
    for fence in (3, 11, 0):
        write_rejects(root, GENERATION, [RejectedRow(-5, odd, f"old {fence}", 1)], fence=fence)
    assert re.fullmatch(r".*/generations/abc/rejects/000012-[0-9a-f]{32}\.jsonl", path)
    first = json.loads(root.fs.cat_file(path).splitlines()[0])
    assert first == {
        "pair_id": -5,
        "prompt": odd,
        "reason": "newest",
        "attempts": 3,
        "fence": 12,
    }
    assert read_rejects(root, GENERATION) == {-5: "newest", 7: odd}
    assert read_rejects(root, GENERATION, fence=3) == {-5: "old 3"}
    assert read_rejects(root, GENERATION, fence=4) == {}
    assert read_rejects(root, "generations/abcd") == {}


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\xff",
        b"[1]",
        b"3",
        b"",
        b'{"pair_id": "1", "reason": "x"}',
        b'{"pair_id": true, "reason": "x"}',
        b'{"pair_id": 1}',
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, line):
    root = open_store(str(tmp_path / "set"))
    good = b'{"pair_id": 1, "reason": "x"}\n'
    path = root.path(GENERATION, "rejects", "000001-a.jsonl")
    write_atomic(root.fs, path, good + line + b"\n")
    with pytest.raises(RejectFileError, match=rf"{re.escape(path)}, line 2: not a rejected row"):
        read_rejects(root, GENERATION)
