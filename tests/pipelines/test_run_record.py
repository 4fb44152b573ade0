"""What a run says about itself, whatever its workers count."""

import json

from pipelines.run_record import Cost, RunRecord, generation_cost
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


def test_a_run_counts_once_in_the_cost_so_far_and_as_it_knows_itself(tmp_path):
    """The store may have refused its last record."""
    root = open_store(str(tmp_path))
    assert generation_cost(root, "generations/a") == Cost()
    folder = tmp_path / "generations" / "a" / "runs"
    folder.mkdir(parents=True)
    for fence, busy_s in ((6, 3.0), (7, 1.0)):
        record = {"fence": fence, "busy_s": busy_s, "gpu_s": busy_s / 2, "seconds": 10.0}
        (folder / f"{fence:06d}.json").write_text(json.dumps(record))
    now = {"fence": 7, "busy_s": 5.0, "gpu_s": 2.5, "seconds": 20.0}
    assert generation_cost(root, "generations/a").gpu_s == 2.0
    found = generation_cost(root, "generations/a", now)
    assert found == Cost(runs=2, gpu_s=4.0, cpu_s=0.0, busy_s=8.0, seconds=30.0)
