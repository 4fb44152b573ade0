"""Asks the health rules of every logged line.

What a monitor knows is a function of the lines it has seen, so a resumed run knows the same after
`restore` with the lines that are left.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.health_settings import PAIR_METRICS, Action, HealthRule, HealthSection

_SEVERITY: dict[Action, int] = {"stop": 2, "rollback": 1, "warn": 0}


@dataclass(frozen=True)
class Verdict:
    """A rule that was violated on as many lines in a row as it allows.

    `step`: of the last of them. `since_step`: the first step that the first of them counted; what
    was saved before it is not suspect. `value`: NaN or infinite where the metric was so.
    """

    rule: HealthRule
    action: Action
    step: int
    value: float
    since_step: int


@dataclass
class _Streak:
    """The violating lines in a row that end at the newest line."""

    lines: int = 0
    since_step: int = 0
    told: bool = False


def derived(metrics: Mapping[str, Any], statistics: Mapping[str, float] | None) -> dict[str, float]:
    """What the log adds where there are pairs: the samples against the teacher's latents.

    `statistics`: those of the pairs' manifest. `sample_mean_shift` is in standard deviations of the
    latents. `sample_std_ratio` is of all entries of all samples, as the manifest's deviation is;
    `sample_std`, the mean of each sample's own, is less where samples differ in brightness.
    Empty for a line without samples, and for pairs whose statistics are not known.
    """
    if not _comparable(statistics) or not {"sample_mean", "sample_mean_square"} <= metrics.keys():
        return {}
    assert statistics is not None
    mean, square = _number(metrics["sample_mean"]), _number(metrics["sample_mean_square"])
    variance = square - mean**2
    std = math.sqrt(max(0.0, variance)) if math.isfinite(variance) else variance
    return {
        "sample_mean_shift": abs(mean - statistics["latent_mean"]) / statistics["latent_std"],
        "sample_std_ratio": std / statistics["latent_std"],
    }


class HealthMonitor:
    """`look` at every logged line, in order; on all workers, or on one that tells the others.

    `statistics`: of the pairs' manifest, None without pairs. Raises ValueError for rules that need
    statistics which are not there.
    """

    def __init__(
        self, section: HealthSection, statistics: Mapping[str, float] | None = None
    ) -> None:
        comparable = _comparable(statistics)
        self._rules = section.asked(comparable)
        self._warmup, self._statistics = section.warmup_steps, statistics
        if not comparable and any(rule.metric in PAIR_METRICS for rule in self._rules):
            raise ValueError(
                "train.health.rules: sample_mean_shift and sample_std_ratio need latent_mean and "
                f"latent_std in the pairs' manifest, found {sorted(statistics or {})}; use "
                "sample_mean and sample_std"
            )
        self._forget()

    def look(self, step: int, metrics: Mapping[str, Any]) -> Verdict | None:
        """The gravest rule that this line breaks for good; None: none.

        `metrics`: the line as logged, None or NaN for what was not finite. A warning is given once
        for each unbroken row of violations, the others at every line until the caller acts.
        """
        known = derived(metrics, self._statistics) | dict(metrics)
        broken = []
        for rule, streak in zip(self._rules, self._streaks, strict=True):
            if step <= self._warmup or rule.metric not in known:
                continue
            value = _number(known[rule.metric])
            if not _violates(rule, value):
                streak.lines, streak.told = 0, False
                continue
            if streak.lines == 0:
                streak.since_step = self._last_step + 1
            streak.lines += 1
            if streak.lines >= rule.windows and not (streak.told and rule.action == "warn"):
                verdict = Verdict(rule, rule.action, step, value, streak.since_step)
                broken.append((_SEVERITY[rule.action], verdict, streak))
        self._last_step = step
        if not broken:
            return None
        _, verdict, streak = max(broken, key=lambda found: found[0])
        streak.told = True
        return verdict

    def restore(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Forget everything, then see `lines` of metrics.jsonl again: those up to the step the
        run goes on from."""
        self._forget()
        for line in lines:
            self.look(line["step"], line)

    def needed(self, committed: Sequence[int]) -> set[int]:
        """Of the `committed` steps, the one that a rollback would go to if the present violations
        went on: a checkpoint to keep however many newer ones there are."""
        suspect = [
            streak.since_step if streak.lines else self._last_step + 1
            for rule, streak in zip(self._rules, self._streaks, strict=True)
            if rule.action == "rollback"
        ]
        return {max(good) for since in suspect if (good := _before(committed, since))}

    def _forget(self) -> None:
        self._streaks = [_Streak() for _ in self._rules]
        self._last_step = 0


def last_good(committed: Iterable[int], verdict: Verdict) -> int | None:
    """The newest of the believed committed steps from before the violations, step 0 in any case;
    None: none of them is left."""
    return max(_before(committed, verdict.since_step), default=None)


def _before(committed: Iterable[int], since_step: int) -> list[int]:
    """The steps whose state no violating line has measured: the samples of step n + 1 are those of
    the networks that were saved at step n. Step 0 is the teacher itself: other factors may help."""
    return [step for step in committed if step == 0 or step + 1 < since_step]


def _violates(rule: HealthRule, value: float) -> bool:
    if not math.isfinite(value):
        return True
    return value < rule.below if rule.below is not None else value > (rule.above or 0.0)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _comparable(statistics: Mapping[str, float] | None) -> bool:
    if not statistics or "latent_mean" not in statistics:
        return False
    return statistics.get("latent_std", 0.0) > 0
