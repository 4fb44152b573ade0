"""Where a run's curves and pictures go besides its own files: TensorBoard events, Weights & Biases.

Only the worker that writes the run's files has trackers. What they show is a copy: a run is resumed
from `metrics.jsonl` and its checkpoints, never from here.
"""

import json
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import yaml

from dmd_core.files import is_local, write_atomic
from pipelines.progress import Throttle
from pipelines.storage import Store

TrackerName = Literal["tensorboard", "wandb", "none"]
_TENSORBOARD, _WANDB = "tensorboard", "wandb.json"
_PROJECT = "one-step-dmd"
_UPLOAD_S = 60.0  # training waits for an upload
_NO_LIMIT = 0  # of multiprocessing's queues


class Tracker(Protocol):
    """Takes numbers and pictures by tag and step. Steps ascend, but for `rewind`."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """`values`: finite numbers by tag, such as `train/loss_dm`."""
        ...

    def picture(self, tag: str, step: int, picture: np.ndarray) -> None:
        """`picture`: (H,W,3) uint8."""
        ...

    def rewind(self, step: int) -> None:
        """What came after `step` was given up; the run goes on from there."""
        ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def tracker_names(report_to: str | Sequence[str]) -> tuple[str, ...]:
    """`report_to` of a recipe, one name or several, as the trackers to open; `none`: no tracker."""
    names = (report_to,) if isinstance(report_to, str) else tuple(report_to)
    if "none" in names and len(names) > 1:
        raise ValueError(f"train.report_to is {list(names)}; none stands alone")
    return tuple(dict.fromkeys(name for name in names if name != "none"))


def check_trackers(report_to: str | Sequence[str]) -> None:
    """Fail at the door: raises ValueError for a tracker whose package is missing."""
    if "wandb" in tracker_names(report_to) and find_spec("wandb") is None:
        raise ValueError(
            "train.report_to: wandb needs the package wandb; install the extra: "
            "pip install -e '.[wandb]'"
        )


def open_trackers(
    report_to: str | Sequence[str],
    store: Store,
    *,
    resume_step: int,
    settings: Mapping[str, Any] | None = None,
) -> list[Tracker]:
    """The trackers of the run in `store`, which goes on after `resume_step` (0: begins).
    `settings`: the run's, to be shown beside its curves."""
    opened: list[Tracker] = []
    for name in tracker_names(report_to):
        if name == "tensorboard":
            opened.append(TensorBoard(store, resume_step=resume_step, settings=settings))
        else:
            opened.append(WeightsAndBiases(store, settings=settings))
    return opened


class TensorBoard:
    """Event files in `<run>/tensorboard`; on an object store copies of local ones, whole, for it
    has no append: those that have grown, once a minute and at the end.

    tensorboardX writes in a thread that a full disk ends in silence, and by default it takes events
    through a queue of ten: training would wait for a place in it for ever.
    """

    def __init__(
        self, store: Store, *, resume_step: int, settings: Mapping[str, Any] | None = None
    ) -> None:
        self._store = store
        local = is_local(store.fs)
        self._folder = store.path(_TENSORBOARD) if local else tempfile.mkdtemp()
        self._due, self._uploaded = Throttle(_UPLOAD_S), dict[str, int]()  # file → bytes
        self._step = resume_step
        self._open(resume_step)
        if settings:
            code = yaml.safe_dump(dict(settings), sort_keys=False)
            self._writer.add_text("settings", f"```yaml\n{code}```", resume_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def picture(self, tag: str, step: int, picture: np.ndarray) -> None:
        self._writer.add_image(tag, picture, step, dataformats="HWC")

    def rewind(self, step: int) -> None:
        try:
            self.close()
        finally:
            self._open(step)

    def flush(self) -> None:
        """The newest events may follow with the next flush: tensorboardX writes in a thread.
        Raises OSError, once, where that thread has ended; a further file is begun then."""
        if not self._writes():
            self._open(self._step)
            raise OSError(f"TensorBoard's events up to step {self._step} may be lost")
        self._writer.flush()
        if self._due.ready():
            self._upload()

    def close(self) -> None:
        self._writer.close()
        self._upload()

    def _writes(self) -> bool:
        """Does the thread live? There is no public way to ask."""
        files: Any = self._writer.file_writer
        return files.event_writer._worker.is_alive()

    def _upload(self) -> None:
        if is_local(self._store.fs):
            return
        for file in Path(self._folder).iterdir():
            size = file.stat().st_size
            if self._uploaded.get(file.name) != size:
                self._store.fs.put_file(str(file), self._store.path(_TENSORBOARD, file.name))
                self._uploaded[file.name] = size

    def _open(self, resume_step: int) -> None:
        """A further file, from whose start TensorBoard shows nothing older after `resume_step`."""
        from tensorboardX import SummaryWriter

        folder = self._store.path(_TENSORBOARD)
        older = self._store.fs.ls(folder, detail=False) if self._store.fs.exists(folder) else []
        # File names hold the second alone: two of one second would be one file, the first one lost.
        self._writer = SummaryWriter(
            self._folder,
            purge_step=resume_step + 1,
            max_queue=_NO_LIMIT,
            flush_secs=10,
            filename_suffix=f".{len(older):05d}",
        )


class WeightsAndBiases:
    """One W&B run for the life of a run folder: its id is kept there in `wandb.json`.

    Mode, login, entity and the like are the user's own (WANDB_MODE, WANDB_PROJECT and so on, as
    wandb reads them); project and run name are ours only where they give none. wandb's local files
    lie in `<run>/wandb`, or, for a run on an object store, where wandb puts them (WANDB_DIR).

    W&B takes nothing back: after a resume or rollback the lines that were given up stay in its
    history, beside the new ones of the same `step`, which is the axis of all curves.
    """

    def __init__(self, store: Store, *, settings: Mapping[str, Any] | None = None) -> None:
        import wandb

        theirs = wandb.setup().settings
        self._run: Any = wandb.init(
            id=_run_id(store, theirs.run_id),
            resume="allow",
            project=theirs.project or _PROJECT,
            name=theirs.run_name or store.root.rsplit("/", 1)[-1],
            dir=store.root if is_local(store.fs) else None,
            config=dict(settings or {}),
            allow_val_change=True,  # a resumed run may have another number of workers
            settings=wandb.Settings(console="off"),  # Ray keeps the workers' output
        )
        # wandb's own step may only rise; a resumed run repeats steps.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._picture = wandb.Image

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def picture(self, tag: str, step: int, picture: np.ndarray) -> None:
        self._run.log({"step": step, tag: self._picture(picture)})

    def rewind(self, step: int) -> None:
        """Nothing: see above."""

    def flush(self) -> None:
        """Nothing: wandb sends by itself."""

    def close(self) -> None:
        self._run.finish()


def _run_id(store: Store, given: str | None) -> str:
    """The id this folder's W&B run has; a new one is on the store before it is used."""
    path = store.path(_WANDB)
    if store.fs.exists(path):
        try:
            found = json.loads(store.fs.cat_file(path))["id"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{store.url}/{_WANDB} does not hold {{"id": …}} ({error}); remove it to begin a '
                "new W&B run"
            ) from None
        return found
    made = given or uuid.uuid4().hex[:12]
    write_atomic(store.fs, path, json.dumps({"id": made}).encode())
    return made
