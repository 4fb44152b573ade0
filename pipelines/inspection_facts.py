"""What `pipelines.inspection` finds out about a pair data set."""

from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.dataset_pins import Pin


@dataclass(frozen=True)
class VersionFacts:
    """One sealed version. `rows` belong to it; `excluded` rows lie in its files and do not.

    `asked` rows were landed for it (None: its landed table is gone), `missing` of them have no
    pair; `reasons` says why, with counts, as far as it is known.
    """

    version: int
    rows: int
    rejected: int
    excluded: int
    files: int
    bytes: int
    asked: int | None
    missing: int | None
    fingerprint_digest: str
    fingerprint: dict[str, Any]
    prompts_digest: str
    created_by: dict[str, str]
    statistics: dict[str, float]
    pinned_by: tuple[str, ...]
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationFacts:
    """A folder of rows made alike. `ledger_rows`: written rows, those of dead writers too.
    `rejected`: rows that a run rejected and none has written since.

    Cost so far, over all of its `runs`: `gpu_s`, `cpu_s`, `busy_s` and `seconds` as in
    `run_record.Cost`.
    """

    folder: str
    ledger_rows: int
    files: int
    bytes: int
    rejected: int
    runs: int
    gpu_s: float
    cpu_s: float
    busy_s: float
    seconds: float


@dataclass(frozen=True)
class Overview:
    """`void`: number in the log → why nobody has it. `problems` name what is damaged.

    `lease`: who writes now, since when, what for and how far; None: nobody.
    """

    url: str
    versions: tuple[VersionFacts, ...]
    void: dict[int, str]
    generations: tuple[GenerationFacts, ...]
    lease: dict[str, Any] | None
    pins: tuple[Pin, ...]
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
