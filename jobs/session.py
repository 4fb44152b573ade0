"""What every verb works with: recipe, run folder, display, and Ray when it is first needed."""

import argparse
import contextlib
import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from dmd_core.files import is_local, write_atomic
from jobs.config import Recipe, dump_recipe, load_recipe, resolve_shipped
from jobs.display import Display, loss_fields
from jobs.errors import Exit, JobError
from jobs.quiet import redirected_output
from jobs.run_settings import MAY_CHANGE, PLACES, changed_settings, flat_settings
from pipelines.storage import Store, check_writable, open_store

_LIBRARIES = ("ray", "torch", "diffusers", "transformers", "pyarrow", "s3fs", "numpy")


class Session:
    """One invocation of a verb. Close it (a `with` block) to end an embedded Ray."""

    def __init__(
        self, recipe: Recipe, display: Display, arguments: argparse.Namespace | None = None
    ) -> None:
        self.recipe = recipe
        self.display = display
        self.arguments = arguments or argparse.Namespace()  # those of the verb alone
        self.store: Store = open_store(recipe.run.dir, recipe.storage)
        self.ray_log = ""  # the file that Ray's messages go to, once it is started
        self._stack = ExitStack()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    # ------------------------------------------------------------------ the run folder

    def check_run(self) -> None:
        """Refuse a folder that cannot be written to, and one that holds another run."""
        check_writable(self.store)
        self._refuse_other_settings(MAY_CHANGE)

    def check_settings(self) -> None:
        """For what is made from a run: refuse settings that are not the run's own, but for those
        that may change and for where its teacher and pairs lie."""
        self._refuse_other_settings(MAY_CHANGE | PLACES)

    def open_run(self) -> None:
        """Check the folder, and write `config.yaml` and `versions.json`."""
        self.check_run()
        write_atomic(
            self.store.fs, self.store.path("config.yaml"), dump_recipe(self.recipe).encode()
        )
        versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
        versions |= {"python": platform.python_version(), "machine": platform.machine()}
        self.write_json("versions.json", versions)

    def write_json(self, name: str, content: Any) -> None:
        data = json.dumps(content, indent=2).encode()
        write_atomic(self.store.fs, self.store.path(name), data)

    def read_json(self, name: str) -> Any | None:
        path = self.store.path(name)
        if not self.store.fs.exists(path):
            return None
        try:
            return json.loads(self.store.fs.cat_file(path))
        except ValueError as error:
            raise JobError(f"{self.store.url}/{name} is not JSON: {error}") from error

    def _refuse_other_settings(self, may_change: Collection[str]) -> None:
        path = self.store.path("config.yaml")
        if not self.store.fs.exists(path):
            return
        import yaml

        defaults = yaml.safe_load(dump_recipe(Recipe()))  # of keys that a later release added
        then = flat_settings(defaults) | flat_settings(yaml.safe_load(self.store.fs.cat_file(path)))
        now = flat_settings(yaml.safe_load(dump_recipe(self.recipe)))
        changed = changed_settings(then, now, may_change)
        if changed and self._has_work():
            raise JobError(
                f"{self.store.url} holds a run with other settings ({'; '.join(changed)}). "
                "Give its own recipe (--config) and the same --set, use another folder "
                "(--set run.dir=…), or remove that one to start afresh.",
                Exit.REFUSED,
            )

    def _has_work(self) -> bool:
        return any(
            self.store.fs.exists(self.store.path(name)) for name in ("checkpoints", "student")
        )

    # ------------------------------------------------------------------ teacher and data

    @cached_property
    def teacher_url(self) -> str:
        """What every machine of the run resolves to its own local folder of the teacher."""
        from pipelines.teacher_source import teacher_source

        section = self.recipe.teacher
        section = section.model_copy(update={"path": resolve_shipped(section.path)})
        return teacher_source(section, self.recipe.storage).url

    @cached_property
    def teacher_dir(self) -> str:
        """The teacher as a local folder, checked."""
        from dmd_core.teacher import check_teacher
        from pipelines.teacher_source import local_teacher

        folder = local_teacher(self.teacher_url, self.recipe.storage)
        check_teacher(folder)
        return folder

    @cached_property
    def pairs_root(self) -> Store:
        return open_store(self.recipe.pairs_root, self.recipe.storage)

    # ------------------------------------------------------------------ Ray

    def start_ray(self) -> None:
        if self.ray_log:
            return
        from cluster.local import ray_cluster

        self.ray_log = self._log_path()
        self._stack.enter_context(redirected_output(self.ray_log))
        settings = self.recipe.ray
        self._stack.enter_context(
            ray_cluster(
                address=settings.address,
                num_cpus=settings.num_cpus,
                object_store_bytes=settings.object_store_mb * 2**20,
            )
        )

    @contextmanager
    def watch(
        self,
        title: str,
        total: int,
        unit: str,
        describe: Callable[[dict[str, Any]], str] = loss_fields,
    ) -> Iterator[Any]:
        """Yield a ProgressBoard handle for workers; show what they write on it. `describe`: the
        board's fields in words, beside the rate. What this process and a training's workers warn of
        is shown as it comes."""
        import ray
        from ray.exceptions import RayError

        from pipelines.progress import ProgressBoard, warnings_passed

        self.start_ray()
        board = _on_this_node(ProgressBoard).remote()
        last: tuple[int, dict[str, Any]] = (0, {})
        shown = 0

        def read() -> tuple[int, dict[str, Any]]:
            nonlocal last, shown
            with contextlib.suppress(RayError):  # a lost board must not end the work
                asked = [board.read.remote(), board.warnings.remote(shown)]
                last, warned = ray.get(asked, timeout=10)
                for one in warned:
                    self.display.warn(one.text)
                    shown = one.number
            return last

        with warnings_passed(self.display.warn):
            try:
                with self.display.stage(title, total, unit, read, describe):
                    yield board
            finally:
                with contextlib.suppress(OSError):  # a closed terminal is not the work's failure
                    if ray.is_initialized():
                        read()  # what was warned of since

    def _log_path(self) -> str:
        """Where Ray's driver-side messages go: a file of the run, or of this machine."""
        if is_local(self.store.fs):
            return self.store.path("logs", "ray.log")
        return str(Path(tempfile.mkdtemp(prefix="dmd-logs-")) / "ray.log")


def _on_this_node(actor: Any) -> Any:
    """What it holds is to outlive every node but the driver's own."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return actor.options(scheduling_strategy=here)


def open_session(
    config: str,
    overrides: list[str],
    *,
    quiet: bool = False,
    arguments: argparse.Namespace | None = None,
) -> Session:
    return Session(load_recipe(config, overrides), Display(quiet=quiet), arguments)
