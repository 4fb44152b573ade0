"""Training metrics as JSON lines, without gaps or double steps across interruptions."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from dmd_core.files import is_local, write_atomic
from pipelines.storage import Store


class MetricsLog:
    """The JSON lines of a run, one line per logged step, and TensorBoard events beside it.

    An object store has no append, so the file is rewritten whole (some megabytes for a long run);
    `flush` decides when. Lines after `resume_step` belong to work that was lost, and go.
    """

    def __init__(
        self, store: Store, name: str = "metrics.jsonl", *, resume_step: int, tensorboard: bool
    ) -> None:
        self._store = store
        self._path = store.path(name)
        self._lines = [line for line in self._read() if line["step"] <= resume_step]
        self._writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            local = is_local(store.fs)
            self._events = store.path("tensorboard") if local else tempfile.mkdtemp()
            self._writer = SummaryWriter(self._events, purge_step=resume_step + 1, flush_secs=10)

    def append(self, record: dict[str, Any]) -> None:
        """`record` holds an int `step` and numbers; one that is not finite is written as null,
        for JSON has no other word for it."""
        record = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self._lines.append(record)
        if self._writer is not None:
            for key, value in record.items():
                if key != "step" and value is not None:
                    self._writer.add_scalar(f"train/{key}", value, record["step"])

    def add_picture(self, tag: str, step: int, picture: Any) -> None:
        """`picture`: (H,W,3) uint8."""
        if self._writer is not None:
            self._writer.add_image(tag, picture, step, dataformats="HWC")

    def flush(self) -> None:
        text = "".join(json.dumps(line) + "\n" for line in self._lines)
        write_atomic(self._store.fs, self._path, text.encode())
        if self._writer is not None:
            self._writer.flush()
            if not is_local(self._store.fs):
                for file in Path(self._events).iterdir():
                    self._store.fs.put_file(str(file), self._store.path("tensorboard", file.name))

    def _read(self) -> list[dict[str, Any]]:
        if not self._store.fs.exists(self._path):
            return []
        return [json.loads(line) for line in self._store.fs.cat_file(self._path).splitlines()]
