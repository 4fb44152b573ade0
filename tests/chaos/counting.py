"""`dmd regenerate`, whose teachers note the rows of every batch that they begin.

`python -m tests.chaos.counting --config … --set …`. Ids are appended to `<data set>.begun`, a line
of JSON for each batch: what no run record and no ledger tells of a driver that was killed.
"""

import json
import os

import pyarrow as pa

from pipelines import generate
from pipelines.teacher_actor import TeacherActor


class CountingTeacher(TeacherActor):
    def __call__(self, rows: pa.Table) -> pa.Table:
        line = json.dumps(rows["pair_id"].to_pylist()) + "\n"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND  # one write: whole, or not there
        file = os.open(f"{self._task.root.root}.begun", flags, 0o644)
        os.write(file, line.encode())
        os.close(file)
        return super().__call__(rows)


if __name__ == "__main__":
    from jobs.cli import verb_main
    from tests.chaos import counting

    generate.TeacherActor = counting.CountingTeacher
    raise SystemExit(verb_main("regenerate"))
