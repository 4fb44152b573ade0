"""What a run says about itself, whatever its workers count."""

import json

from pipelines.run_record import RunRecord
from pipelines.storage import open_store


def test_a_block_that_was_repeated_is_not_counted_twice(tmp_path, monkeypatch):
    """Twelve rows, four were stored before; a worker died, and its block of eight came again."""
    root = open_store(str(tmp_path))
    record = RunRecord(root, "generations/a", gpus_per_actor=0.0)
    record.begin(7, 12, 4, board=object())
    counted = 4 + 8 + 8, {"rejected": 2, "busy_s": 3.0}
    monkeypatch.setattr(record, "_read", lambda: counted)
    record.phase = "sealing"
    assert record.progress() == {"phase": "sealing", "rows": "12 of 12"}
    assert record.spent["rows"] == 8
    record.finish(rows=11, rejected=1)
    assert (record.spent["rows"], record.spent["rejected"], record.spent["busy_s"]) == (8, 1, 3.0)
    stored = (tmp_path / "generations" / "a" / "runs" / "000007.json").read_text()
    assert json.loads(stored) == record.spent
