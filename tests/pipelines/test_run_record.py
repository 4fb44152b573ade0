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


def test_the_cost_so_far_is_the_sum_of_the_runs_on_gpus_and_without(tmp_path):
    root = open_store(str(tmp_path))
    assert generation_cost(root, "generations/a") == Cost()
    folder = tmp_path / "generations" / "a" / "runs"
    folder.mkdir(parents=True)
    for fence, gpu_s in ((6, 1.5), (7, 0.0)):
        record = {"fence": fence, "busy_s": 3.0, "gpu_s": gpu_s, "seconds": 10.0}
        (folder / f"{fence:06d}.json").write_text(json.dumps(record))
    found = generation_cost(root, "generations/a")
    assert found == Cost(runs=2, gpu_s=1.5, cpu_s=3.0, busy_s=6.0, seconds=20.0)
    assert found.plus({}) == found
    more = found.plus({"fence": 8, "busy_s": 2.0, "gpu_s": 1.0, "seconds": 4.0})
    assert more == Cost(runs=3, gpu_s=2.5, cpu_s=3.0, busy_s=8.0, seconds=24.0)
