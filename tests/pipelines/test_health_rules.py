"""Health rules: when they speak, what survives a resume, and which checkpoints are believed."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dmd_core.condition import Condition
from dmd_core.health import Tally, sample_health
from dmd_core.step_types import GeneratorStep
from pipelines.health_record import (
    HealthEvent,
    HealthRecordError,
    Remedies,
    add_event,
    believed,
    event_of,
    read_events,
    remedies,
    rollbacks,
    settled,
)
from pipelines.health_rules import HealthMonitor, Verdict, derived, last_good
from pipelines.health_settings import HealthRule, HealthSection, check_health
from pipelines.health_watch import HealthWatch, StoppedError
from pipelines.storage import Store, open_store
from pipelines.workers import Group

STATISTICS = {"latent_mean": 0.5, "latent_std": 2.0, "latent_min": -9.0, "latent_max": 9.0}


def _rule(metric: str = "sample_std", **changes) -> dict:
    return {"metric": metric, "below": 0.5, "action": "rollback"} | changes


def _section(*rules: dict, **keys) -> HealthSection:
    return HealthSection.model_validate({"warmup_steps": 0, "rules": rules, **keys})


def _samples(mean: float, std: float) -> dict:
    """A line's, of samples that are alike."""
    return {
        "sample_mean": mean,
        "sample_std": std,
        "sample_mean_square": mean**2 + std**2,
        "nonfinite_entries": 0,
    }


def _looks(monitor: HealthMonitor, values: list, *, every: int = 10, metric: str = "sample_std"):
    """The verdict at each line of a log of one metric."""
    return [
        monitor.look(every * (index + 1), {metric: value}) for index, value in enumerate(values)
    ]


def _at(verdicts: list) -> list[int]:
    return [verdict.step for verdict in verdicts if verdict is not None]


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (_rule(above=1.0), "exactly one of below and above"),
        (_rule(below=None), "exactly one of below and above"),
        (_rule(below=math.nan), "finite number"),
        (_rule(metric="loss"), "metric"),
        (_rule(windows=0), "windows"),
        (_rule(action="panic"), "action"),
    ],
)
def test_rules_that_mean_nothing_are_refused(rule, words):
    with pytest.raises(ValidationError, match=words):
        _section(rule)


@pytest.mark.parametrize(
    ("key", "value"),
    [("fake_updates_factor", 0.9), ("learning_rate_factor", 1.1), ("learning_rate_factor", 0.0)],
)
def test_a_remedy_only_calms(key, value):
    with pytest.raises(ValidationError, match=key):
        _section(**{key: value})


def test_a_rollback_that_changes_nothing_is_refused():
    with pytest.raises(ValidationError, match="the same steps would follow"):
        _section(_rule(), fake_updates_factor=1, learning_rate_factor=1)
    _section(_rule(action="stop"), fake_updates_factor=1, learning_rate_factor=1)


@pytest.mark.parametrize("metric", ["sample_mean_shift", "sample_std_ratio"])
def test_a_comparison_with_pairs_needs_pairs(metric):
    section = _section(_rule(), _rule(metric))
    with pytest.raises(ValueError, match=rf"train\.health\.rules\.1: {metric} .*lambda_reg"):
        check_health(section, has_pairs=False)
    check_health(section, has_pairs=True)
    with pytest.raises(ValueError, match=r"need latent_mean and latent_std .* found \['rows'\]"):
        HealthMonitor(section, {"rows": 3.0})


def test_default_rules_fit_runs_with_and_without_pairs():
    for has_pairs in (True, False):
        check_health(HealthSection(), has_pairs)
        actions = {rule.action for rule in HealthSection().asked(has_pairs)}
        assert actions == {"warn", "stop"}


def test_default_rules_are_silent_on_healthy_samples_and_stop_at_a_constant_picture():
    healthy = [_samples(0.5 + 0.1 * math.sin(i), 1.8) for i in range(100)]
    dead = _samples(0.5, 0.0)
    for statistics in (STATISTICS, None):
        monitor = HealthMonitor(HealthSection(), statistics)
        verdicts = [monitor.look(10 * i, line) for i, line in enumerate(healthy)]
        assert verdicts == [None] * 100
        found = [verdict for i in range(10) if (verdict := monitor.look(1000 + 10 * i, dead))]
        assert found[-1].action == "stop" and found[-1].step == 1090
        assert {verdict.action for verdict in found[:-1]} <= {"warn"}


# ---------------------------------------------------------------------- when a rule speaks


def test_derived_metrics_compare_with_the_latents():
    line = _samples(-2.5, 1.0)
    assert derived(line, STATISTICS) == {"sample_mean_shift": 1.5, "sample_std_ratio": 0.5}
    assert derived(line, None) == derived({"loss_dm": 1.0}, STATISTICS) == {}
    assert derived(line, STATISTICS | {"latent_std": 0.0}) == {}
    lost = derived(line | {"sample_mean": None}, STATISTICS)
    assert all(math.isnan(value) for value in lost.values())


def test_the_spread_of_samples_is_taken_as_that_of_the_latents_is():
    """Flat pictures of different brightness: each has no deviation, all together they have it."""
    latents = torch.randn(8, 1, 1, 1, dtype=torch.float64).expand(8, 4, 6, 6)
    tally = Tally()
    none = torch.zeros(0)
    step = GeneratorStep(none, none, none, latents, Condition(), {}, torch.tensor(0))
    sample_health(step, tally)
    mean, std = latents.mean(), latents.std(correction=0)
    of_pairs = {"latent_mean": float(mean), "latent_std": float(std)}
    assert tally.means()["sample_std"] == 0
    assert derived(tally.means(), of_pairs)["sample_std_ratio"] == pytest.approx(1)


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_a_rule_speaks_at_the_last_of_its_windows_and_says_where_they_began(windows):
    monitor = HealthMonitor(_section(_rule(windows=windows)))
    verdicts = _looks(monitor, [0.9, 0.1, 0.1, 0.1])
    first = verdicts[windows]
    assert verdicts[:windows] == [None] * windows
    # The first bad line is that of step 20 and counts steps 11 to 20.
    assert (first.step, first.value, first.since_step) == (10 * (windows + 1), 0.1, 11)
    assert first.rule.words.startswith("sample_std below 0.5 on ")


def test_a_good_line_begins_the_count_again():
    monitor = HealthMonitor(_section(_rule(windows=2)))
    verdicts = _looks(monitor, [0.1, 0.5, 0.1, 0.5, 0.1, 0.1])  # the bound itself is good
    assert _at(verdicts) == [60] and verdicts[-1].since_step == 41


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bound", [{"below": -5.0}, {"below": None, "above": 5.0}])
def test_what_is_not_finite_breaks_every_rule(value, bound):
    (verdict,) = _looks(HealthMonitor(_section(_rule() | bound)), [value])
    assert verdict is not None and not math.isfinite(verdict.value)


def test_above_is_the_other_side():
    monitor = HealthMonitor(_section(_rule("loss_fake", below=None, above=2.0)))
    assert _at(_looks(monitor, [1.0, 2.0, 2.1], metric="loss_fake")) == [30]


def test_lines_without_the_metric_say_nothing_either_way():
    monitor = HealthMonitor(_section(_rule(windows=2)))
    assert monitor.look(10, {"sample_std": 0.1}) is None
    assert monitor.look(10, {"pairs_version": 2, "pairs_rows": 5}) is None
    verdict = monitor.look(20, {"sample_std": 0.1})
    assert verdict is not None and verdict.since_step == 1


def test_rules_are_not_asked_during_the_warmup():
    monitor = HealthMonitor(_section(_rule(windows=2), warmup_steps=20))
    verdicts = _looks(monitor, [0.1, 0.1, 0.1, 0.1])
    assert _at(verdicts) == [40] and verdicts[-1].since_step == 21


def test_the_gravest_rule_speaks_first_and_a_warning_once():
    rules = [_rule(action=action) for action in ("warn", "stop", "rollback")]
    monitor = HealthMonitor(_section(*rules))
    assert [verdict.action for verdict in _looks(monitor, [0.1, 0.1])] == ["stop", "stop"]
    warning = HealthMonitor(_section(_rule(action="warn")))
    assert _at(_looks(warning, [0.1, 0.1, 0.9, 0.1, 0.1])) == [10, 40]
    two = HealthMonitor(_section(_rule(action="warn"), _rule("loss_dm", action="warn")))
    line = {"sample_std": 0.1, "loss_dm": 0.1}
    found = [two.look(step, line) for step in (10, 20, 30)]
    assert {verdict.rule.metric for verdict in found[:2]} == {"sample_std", "loss_dm"}
    assert found[2] is None


def test_pair_metrics_are_derived_where_the_line_lacks_them():
    monitor = HealthMonitor(_section(_rule("sample_std_ratio")), STATISTICS)
    assert monitor.look(10, _samples(0.0, 1.1)) is None
    verdict = monitor.look(20, _samples(0.0, 0.9))
    assert verdict is not None and verdict.value == pytest.approx(0.45)


_VALUES = st.one_of(st.sampled_from([0.1, 0.9, None]), st.floats(0, 1))


@given(values=st.lists(_VALUES, min_size=1, max_size=20), cut=st.integers(0, 20), windows=st.data())
def test_a_restored_monitor_goes_on_like_one_that_was_never_stopped(values, cut, windows):
    """Through JSON, as metrics.jsonl does it."""
    actions = windows.draw(st.permutations(["warn", "rollback", "stop"]))
    section = _section(
        *[_rule(action=action, windows=windows.draw(st.integers(1, 4))) for action in actions],
        warmup_steps=15,
    )
    cut = min(cut, len(values))
    lines = [{"step": 10 * (i + 1), "sample_std": value} for i, value in enumerate(values)]
    whole, resumed = HealthMonitor(section), HealthMonitor(section)
    _looks(resumed, [0.1] * 7)  # what it knew before is forgotten
    expected = [whole.look(line["step"], line) for line in lines][cut:]
    resumed.restore(json.loads(json.dumps(lines[:cut])))
    found = [resumed.look(line["step"], line) for line in lines[cut:]]
    assert repr(found) == repr(expected)  # NaN is not equal to itself


def test_logged_values_are_replayed_whatever_the_statistics_are_now():
    section = _section(_rule("sample_std_ratio", windows=2))
    line = _samples(0.0, 0.9)
    logged = {"step": 10, **line, **derived(line, STATISTICS)}
    later = HealthMonitor(section, STATISTICS | {"latent_std": 1.0})
    later.restore([logged])
    assert later.look(20, _samples(0.0, 0.1)) is not None


# ---------------------------------------------------------------------- checkpoints


def _verdict(step: int = 100, since_step: int = 51, **changes) -> Verdict:
    rule = HealthRule.model_validate(_rule(windows=5) | changes)
    return Verdict(rule, rule.action, step, 0.1, since_step)


def test_the_last_good_checkpoint_is_from_before_the_violations():
    # The violations began with the samples of step 51: those of the networks saved at step 50.
    assert last_good([10, 49, 50, 51, 90], _verdict()) == 49
    assert last_good([50, 51, 90], _verdict()) is None
    assert last_good([], _verdict()) is None


def test_step_0_is_good_and_kept_though_the_first_line_broke_a_rule():
    assert last_good([0, 2, 4], _verdict(5, since_step=1)) == 0
    assert last_good([2, 4], _verdict(5, since_step=1)) is None
    monitor = HealthMonitor(_section(_rule(windows=3)))
    _looks(monitor, [0.1, 0.1])
    assert monitor.needed([0, 10, 20]) == {0}


def test_the_checkpoint_a_rollback_would_need_is_named_before_it_is_needed():
    monitor = HealthMonitor(_section(_rule(windows=3), _rule("loss_dm", action="stop")))
    _looks(monitor, [0.9, 0.9])
    assert monitor.needed([10, 15, 20]) == {15}  # that of step 20 is measured by the next line
    monitor.look(30, {"sample_std": 0.1})
    monitor.look(40, {"sample_std": 0.1})
    assert monitor.needed([10, 15, 20, 30, 40]) == {15}  # though newer ones exist
    verdict = monitor.look(50, {"sample_std": 0.1})
    assert verdict is not None and last_good([10, 15, 20, 30, 40], verdict) == 15
    assert HealthMonitor(_section(_rule(action="stop"))).needed([10]) == set()


def _event(kind: str = "rollback", step: int = 100, to_step: int | None = 50, **changes):
    return HealthEvent.model_validate(
        {"kind": kind, "rule": "r", "metric": "sample_std", "value": 0.1, "step": step,
         "to_step": to_step, "time": "t"} | changes
    )  # fmt: skip


def test_checkpoints_of_given_up_steps_are_not_believed():
    saved = {25: 0, 50: 0, 75: 0, 100: 0}
    assert believed([], saved) == [25, 50, 75, 100]
    once = [_event(step=100, to_step=50)]
    assert believed(once, saved) == [25, 50]
    assert believed(once, saved | {75: 1, 100: 1}) == [25, 50, 75, 100]
    # A second, deeper rollback takes back what the first one had left.
    twice = [*once, _event(step=100, to_step=25)]
    assert believed(twice, {25: 0, 50: 0, 75: 1, 100: 1}) == [25]
    assert believed(twice, {25: 0, 50: 2, 75: 1}) == [25, 50]
    assert believed([_event(step=10, to_step=0)], {5: 0, 10: 0}) == []


def test_warnings_do_not_touch_belief():
    assert believed([_event("warn", 60, None), _event("stop", 90, None)], {50: 0}) == [50]


def test_a_checkpoint_from_after_a_rollback_that_is_not_recorded_is_an_error():
    with pytest.raises(HealthRecordError, match=r"step 75 was saved after 1 rollbacks.*lists 0"):
        believed([], {50: 0, 75: 1})


# ---------------------------------------------------------------------- the record


@pytest.fixture
def store(tmp_path) -> Store:
    return open_store(str(tmp_path / "run"))


def test_events_come_back_as_they_were_written(store):
    assert read_events(store) == ()
    section = _section(_rule(), fake_updates_factor=1.5, learning_rate_factor=0.5)
    events = ()
    for step in (100, 120):
        verdict = _verdict(step)
        events = add_event(store, event_of(verdict, events, section, time="then", to_step=50))
    assert read_events(store) == events and len(events) == 2
    assert events[0].rule == "sample_std below 0.5 on 5 logged lines in a row"
    assert remedies(events) == Remedies(fake_updates_factor=2.25, learning_rate_factor=0.25)
    assert remedies(events[:1]) == Remedies(1.5, 0.5) and remedies(()) == Remedies(1.0, 1.0)


def test_a_warning_keeps_the_remedies_that_are_in_force(store):
    section = _section(_rule(), fake_updates_factor=2)
    events = add_event(store, event_of(_verdict(), (), section, time="t", to_step=50))
    warning = event_of(_verdict(200, action="warn"), events, section, time="t")
    assert warning.fake_updates_factor == 2 and warning.to_step is None
    assert remedies(add_event(store, warning)) == Remedies(2.0, 0.5)


def test_what_was_not_finite_is_written_as_null(store):
    verdict = Verdict(_verdict().rule, "stop", 100, math.nan, 51)
    add_event(store, event_of(verdict, (), _section(), time="t"))
    content = json.loads(store.fs.cat_file(store.path("health.json")))
    assert content["events"][0]["value"] is None
    assert read_events(store)[0].value is None


def test_a_rollback_with_nothing_to_go_back_to_is_a_stop(store):
    watch = HealthWatch(_section(_rule()), store, Group(0, 1), None)
    with pytest.raises(StoppedError, match="no checkpoint from before step 51 is left"):
        watch.record(_verdict())
    [event] = read_events(store)
    assert event.kind == "stop" and event.to_step is None and event.step == 100
    assert watch.rollbacks == 0 and watch.remedies == Remedies()


@pytest.mark.parametrize("kind", ["warn", "stop"])
def test_a_repeated_step_adds_no_second_event(store, kind):
    """A kill after the event, before the next checkpoint: the same lines come again."""
    add_event(store, _event(kind, 100, None))
    assert len(add_event(store, _event(kind, 100, None, time="later"))) == 1
    assert len(add_event(store, _event(kind, 110, None))) == 2
    add_event(store, _event(step=120, to_step=50))
    assert len(add_event(store, _event(kind, 100, None))) == 4  # after a rollback it is news


def test_the_same_rollback_again_is_a_second_one(store):
    add_event(store, _event())
    assert len(rollbacks(add_event(store, _event()))) == 2


def test_rollbacks_beyond_the_limit_are_stops():
    section = _section(_rule(), max_rollbacks=2)
    verdict, events = _verdict(), [_event("warn", 10, None), _event()]
    assert settled(verdict, events, section).action == "rollback"
    assert settled(verdict, [*events, _event()], section).action == "stop"
    assert settled(_verdict(action="warn"), [_event()] * 3, section).action == "warn"
    assert settled(verdict, [], _section(_rule(), max_rollbacks=0)).action == "stop"


@pytest.mark.parametrize(
    ("factor", "of_recipe", "expected"),
    [(1.0, 5, 5), (1.5, 5, 8), (1.5**2, 4, 9), (1.1**2, 100, 121), (1.01, 1, 2)],
)
def test_fake_updates_are_rounded_up_but_not_for_a_rounding_error(factor, of_recipe, expected):
    assert Remedies(factor, 1.0).fake_updates(of_recipe) == expected


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"schema_version": 1}',
        '{"schema_version": 2, "events": []}',
        '{"schema_version": 1, "events": [{"kind": "rollback"}]}',
    ],
)
def test_a_record_that_cannot_be_read_is_named(store, content):
    store.fs.makedirs(store.root)
    store.fs.pipe_file(store.path("health.json"), content.encode())
    with pytest.raises(HealthRecordError, match=r"run/health\.json is not a record .*run\.dir"):
        read_events(store)
    with pytest.raises(HealthRecordError):
        add_event(store, _event())
    assert store.fs.cat_file(store.path("health.json")).decode() == content  # left as it was


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"to_step": None}, "to_step belongs to a rollback"),
        ({"kind": "warn"}, "to_step belongs to a rollback"),
        ({"to_step": 100}, "must be before step"),
        ({"learning_rate_factor": 2.0}, "learning_rate_factor"),
    ],
)
def test_an_event_that_contradicts_itself_is_refused(changes, words):
    with pytest.raises(ValidationError, match=words):
        _event(**changes)


class _Run:
    """A run of one number: healthy for as long as its learning rate is low enough, and repeatable.

    Its checkpoints are (step → rollbacks, rate seen so far); `kill_at` counts what it does.
    """

    def __init__(self, store: Store, max_rollbacks: int) -> None:
        self.store, self.disk, self.left = store, {"log": ()}, math.inf
        self.section = _section(
            _rule(windows=2), learning_rate_factor=0.5, max_rollbacks=max_rollbacks
        )

    def _act(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def start(self, kill_after: float = math.inf) -> str:
        self.left = kill_after
        monitor = HealthMonitor(self.section)
        events = read_events(self.store)
        while True:
            step, path = self._restore(monitor, events)
            verdict = None
            while verdict is None and step < 100:
                step += 10
                rate = remedies(events).learning_rate_factor
                path = (*path, (step, rate))
                line = {"step": step, "sample_std": 0.1 if step > 100 * (1 - rate) else 0.9}
                self.disk["log"] = (*self.disk["log"], line)
                verdict = monitor.look(step, line)
                if verdict is None and step % 20 == 0:
                    self._act()
                    self.disk[step] = (len(rollbacks(events)), path)
            if verdict is None:
                return repr(path)
            verdict = settled(verdict, events, self.section)
            if verdict.action == "stop":
                return f"stopped at {step} after {path}"
            to_step = last_good(self._believed(events), verdict) or 0
            self._act()
            event = event_of(verdict, events, self.section, time="t", to_step=to_step)
            events = add_event(self.store, event)
            self._act()

    def _believed(self, events) -> list[int]:
        steps = {step: saved[0] for step, saved in self.disk.items() if step != "log"}
        return believed(events, steps)

    def _restore(self, monitor: HealthMonitor, events) -> tuple[int, tuple]:
        step = max(self._believed(events), default=0)
        self.disk["log"] = tuple(line for line in self.disk["log"] if line["step"] <= step)
        monitor.restore(self.disk["log"])
        return step, self.disk[step][1] if step else ()


@pytest.mark.parametrize(("limit", "rolled_back", "end"), [(5, 4, "((10, "), (3, 3, "stopped at")])
def test_a_kill_at_any_moment_of_a_rollback_changes_nothing(tmp_path, limit, rolled_back, end):
    whole = _Run(open_store(str(tmp_path / "whole")), limit)
    expected = whole.start()
    record = read_events(whole.store)
    assert len(rollbacks(record)) == rolled_back and expected.startswith(end)
    for moment in range(20):
        killed = _Run(open_store(str(tmp_path / str(moment))), limit)
        try:
            killed.start(kill_after=moment)
        except KeyboardInterrupt:
            pass
        assert killed.start() == expected, f"killed at action {moment}"
        assert read_events(killed.store) == record
