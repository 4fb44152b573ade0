"""`dmd pipeline` on a run folder, with the verbs of tests.jobs.fake_chain."""

import json
from pathlib import Path

from jobs.cli import main
from tests.jobs.fake_chain import FakeVerbs

HELD_OUT = 10  # prompts: as few as an evaluation takes


class Pipeline:
    """The verb on a run folder; `verbs.take()` tells what it ran."""

    def __init__(self, folder: Path, teacher: str, verbs: FakeVerbs, capsys) -> None:
        self.run, self.verbs, self._capsys = folder / "run", verbs, capsys
        self.prompts, self.held_out = folder / "prompts.txt", folder / "held_out.txt"
        self.write_prompts(12)
        self.held_out.write_text("\n".join(f"held out {index}" for index in range(HELD_OUT)))
        self.base: dict[str, object] = {
            "run.dir": self.run, "teacher.path": teacher, "pairs.prompts": self.prompts,
            "evaluate.prompts": self.held_out,
        }  # fmt: skip

    def write_prompts(self, count: int) -> None:
        self.prompts.write_text("\n".join(f"prompt {index}" for index in range(count)))

    def __call__(self, *options: str, **settings: object) -> tuple[int, str, list[str]]:
        """(exit code, stderr, what ran)."""
        changed = {key.replace("__", "."): value for key, value in settings.items()}
        words = ["pipeline", "--config", "tiny", *options]
        for key, value in (self.base | changed).items():
            words += ["--set", f"{key}={value}"]
        code = main(words)
        said = self._capsys.readouterr()
        self.out = said.out
        return code, said.err, self.verbs.take()

    def latest(self) -> Path:
        """The folder of the newest training, as the chain says."""
        return Path(json.loads((self.run / "latest.json").read_text())["training"])

    def trainings(self) -> list[str]:
        return sorted(path.name for path in (self.run / "trainings").iterdir() if path.is_dir())

    def files(self) -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(self.run.rglob("*")) if p.is_file()}
