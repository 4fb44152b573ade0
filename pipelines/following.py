"""Which version of the pairs a run reads from where on: its segments.

A segment starts with a batch, so that no batch mixes versions, and reads the stream of epochs of
its version from the beginning. `train.follow_pairs` says when a newer version may start one:

- epoch: with the first batch that starts a whole number of epochs (or more) after the segment's
  start; the batch across the end of an epoch is still the old version's.
- stage: with the first batch of a stage.

The look is part of the step before that batch. Segments are part of the run's state, so what a
resumed run reads follows from its checkpoint, and it looks again only where an undisturbed run
would.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from dmd_core.checkpoint import CheckpointError
from dmd_core.noise import stable_seed
from dmd_core.types import PairBatch
from pipelines.batches import PairPrompts, PairReader
from pipelines.dataset_pins import pin_versions
from pipelines.manifest import ManifestError, list_versions, load_manifest
from pipelines.manifest_model import Manifest
from pipelines.pair_fit import PairFit
from pipelines.pins import Pins
from pipelines.stage_settings import StageKeys
from pipelines.step_data import Progress
from pipelines.storage import Store
from pipelines.train_config import TrainSection


@dataclass(frozen=True)
class Segment:
    """From these positions of the run's streams on (in samples), `version` is read."""

    version: int
    digest: str
    pairs: int = 0
    prompts: int = 0


@dataclass(frozen=True)
class PinHolder:
    """Who pins in the data set, as `pin_versions` is told."""

    name: str
    holder: str
    created: str

    def pin(self, root: Store, versions: Iterable[int]) -> None:
        pin_versions(root, self.name, versions, holder=self.holder, created=self.created)


class FollowedPairs:
    """The pairs of all segments as one stream: what stands at a position is fixed by them."""

    def __init__(self, versions: "PairVersions") -> None:
        self._versions = versions

    def batch_from(
        self, position: int, global_batch: int, rank: int = 0, world_size: int = 1
    ) -> PairBatch:
        segment = next(s for s in reversed(self._versions.segments) if s.pairs <= position)
        reader = self._versions.reader(segment.version, segment.digest)
        return reader.batch_from(position - segment.pairs, global_batch, rank, world_size)


class FollowedPrompts:
    """The prompts of the pairs of all segments, in an order of their own."""

    def __init__(self, versions: "PairVersions") -> None:
        self._versions = versions

    def batch_from(
        self, position: int, global_batch: int, rank: int = 0, world_size: int = 1
    ) -> tuple[str, ...]:
        segment = next(s for s in reversed(self._versions.segments) if s.prompts <= position)
        prompts = self._versions.prompts_of(segment)
        return prompts.batch_from(position - segment.prompts, global_batch, rank, world_size)


class PairVersions:
    """The versions that a run reads: those pinned at its start, and those it went over to."""

    def __init__(self, root: Store, pins: Pins, seed: int) -> None:
        self._root, self._pins, self._seed = root, pins, seed
        self._readers: dict[int, PairReader] = {}
        self._prompts: dict[int, PairPrompts] = {}
        self._statistics: dict[int, dict[str, float]] = {}
        first = pins.default
        self.segments: tuple[Segment, ...] = () if first is None else (Segment(first, pins.digest),)
        for version, digest in pins.versions.items():
            self.reader(version, digest)  # what is not there is an error now, not in a late stage

    def stream(self, keys: StageKeys) -> FollowedPairs | PairReader | None:
        """The pairs of a stage; None: it needs none."""
        if not keys.needs_pairs:
            return None
        if keys.pairs_version is not None:
            return self.reader(keys.pairs_version, self._pins.versions[keys.pairs_version])
        return FollowedPairs(self)

    def first(self) -> PairReader:
        """The version that the run started with."""
        assert self._pins.default is not None
        return self.reader(self._pins.default, self._pins.digest)

    def reader(self, version: int, digest: str) -> PairReader:
        if version not in self._readers:
            manifest = load_manifest(self._root, version)
            if manifest.digest != digest:
                raise CheckpointError(
                    f"{self._root.url} version {version} has digest {manifest.digest[:12]}…, "
                    f"expected {digest[:12]}… as pinned by this run"
                )
            self._statistics[version] = manifest.statistics
            seed = stable_seed(self._seed, "pairs")
            self._readers[version] = PairReader(self._root, manifest, seed)
        return self._readers[version]

    def prompts_of(self, segment: Segment) -> PairPrompts:
        if segment.version not in self._prompts:
            reader = self.reader(segment.version, segment.digest)
            self._prompts[segment.version] = reader.prompts(stable_seed(self._seed, "prompts"))
        return self._prompts[segment.version]

    def statistics(self) -> dict[str, float] | None:
        """Of the latents of the version that is read by default; None without pairs."""
        if not self.segments:
            return None
        segment = self.segments[-1]
        self.reader(segment.version, segment.digest)
        return self._statistics[segment.version]

    # ------------------------------------------------------------------ going on

    def epoch_ends(self, before: int, after: int) -> bool:
        """Is `after` the first batch past the end of an epoch, if the last started at `before`?"""
        segment = self.segments[-1]
        rows = len(self.reader(segment.version, segment.digest))
        return (after - segment.pairs) // rows > (before - segment.pairs) // rows

    def go_over(self, segment: Segment) -> None:
        """Read `segment` from its positions on, and let go of what was followed before."""
        self.segments += (segment,)
        kept = {*self._pins.versions, segment.version}
        self._readers = {v: reader for v, reader in self._readers.items() if v in kept}
        self._prompts = {}

    def state(self) -> list[dict[str, Any]]:
        return [asdict(segment) for segment in self.segments]

    def restore(self, state: list[dict[str, Any]]) -> None:
        self.segments = tuple(Segment(**segment) for segment in state)

    @property
    def numbers(self) -> set[int]:
        """All versions that the run has read or may read: a kept checkpoint may need any."""
        return {*self._pins.versions, *(segment.version for segment in self.segments)}


class NewerVersions:
    """Looks for a newer version that fits, and pins it: the part of one worker alone.

    `say` is told once for each version that does not fit why the run stays with the old one.
    """

    def __init__(
        self, root: Store, fit: PairFit, pin: PinHolder | None, say: Callable[[str], None]
    ) -> None:
        self._root, self._fit, self._pin, self._say = root, fit, pin, say
        self._told: set[int] = set()

    def take(self, versions: PairVersions) -> Manifest | None:
        """The newest version that fits, if it is newer than the one that is read.

        One that is collected between the look and the pin is looked for again, once; then it is a
        `ManifestError`.
        """
        try:
            return self._find_and_pin(versions)
        except ManifestError:
            return self._find_and_pin(versions)

    def _find_and_pin(self, versions: PairVersions) -> Manifest | None:
        found = self._find(versions.segments[-1].version)
        if found is not None and self._pin is not None:
            self._pin.pin(self._root, {*versions.numbers, found.version})
        return found

    def _find(self, current: int) -> Manifest | None:
        for version in reversed(list_versions(self._root)):
            if version <= current:
                return None
            manifest = load_manifest(self._root, version)
            misfit = self._fit.misfit(self._root, manifest)
            if not misfit:
                return manifest
            if version not in self._told:
                self._told.add(version)
                self._say(
                    f"staying with version {current}: {self._root.url} version {version} {misfit}"
                )
        return None


class Follower:
    """Takes a run over to newer versions where `section.follow_pairs` says so, on all workers at
    the same step: `newer` is of the worker that looks (None: of the others), and `share` hands what
    that worker gives to all of them."""

    def __init__(
        self,
        section: TrainSection,
        versions: PairVersions,
        newer: NewerVersions | None,
        share: Callable[[Any], Any],
    ) -> None:
        self._mode, self._plan = section.follow_pairs, section.plan()
        self._versions, self._newer, self._share = versions, newer, share

    def follow(self, before: Progress, now: Progress) -> dict[str, int] | None:
        """Called by all workers between the step from `before` and the next. Returns what the log
        should say of a switch; None: there was none."""
        if not self._look_is_due(before, now):
            return None
        manifest = self._newer.take(self._versions) if self._newer else None
        found = self._share(
            manifest and {"version": manifest.version, "digest": manifest.digest,
                          "rows": manifest.rows}
        )  # fmt: skip
        if found is None:
            return None
        segment = Segment(found["version"], found["digest"], now.pairs, now.prompts)
        self._versions.go_over(segment)
        return {"pairs_version": found["version"], "pairs_rows": found["rows"]}

    def _look_is_due(self, before: Progress, now: Progress) -> bool:
        if self._mode == "stage":
            return now.stage > before.stage and self._plan[now.stage][1].follows
        if self._mode == "epoch":
            follows = self._plan[before.stage][1].follows
            return follows and self._versions.epoch_ends(before.pairs, now.pairs)
        return False
