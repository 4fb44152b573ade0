"""Station 10: the numbers of metrics.json as the sentences and cells of the report."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.health_record import HealthEvent
from pipelines.systems import MEAN, START, STUDENT, TEACHER, TEACHER_AGAIN, few_step_name
from pipelines.timing import NOT_MEASURED
from pipelines.unit import PICTURES


def system_names(metrics: dict[str, Any]) -> dict[str, str]:
    """System → what the report calls it, in the order of the table."""
    steps = metrics["provenance"]["steps"]
    few = metrics["provenance"]["few_steps"]
    student = metrics["systems"][STUDENT]["network_evaluations"]
    return {
        STUDENT: f"Student, {student} step{'s' * (student > 1)}",
        TEACHER: f"Teacher, {steps} steps",
        **{
            few_step_name(n): f"Teacher, {n} step{'s' * (n > 1)}" for n in sorted(few, reverse=True)
        },
        START: "Student before training",
        MEAN: "Mean picture",
        TEACHER_AGAIN: f"Teacher, {steps} steps, other noise",
    }


def reference_words(metrics: dict[str, Any]) -> str:
    """What the kernel distances are measured to."""
    return "real pictures" if metrics.get("reference") == "real" else "the teacher"


def headline(metrics: dict[str, Any]) -> str:
    """The verdict in one sentence."""
    timing, systems = metrics["timing"], metrics["systems"]
    seconds = timing["seconds_per_picture"]
    ratio, evaluations = timing["speed_up"], systems[STUDENT]["network_evaluations"]
    faster = f"{_ratio(ratio)} times faster" if ratio >= 1 else f"{_ratio(1 / ratio)} times slower"
    return (
        f"The student makes a picture in {_seconds(seconds[STUDENT]['median'])}, the teacher in "
        f"{_seconds(seconds[TEACHER]['median'])}: {faster}, with "
        f"{evaluations} network evaluation{'s' * (evaluations > 1)} instead of "
        f"{systems[TEACHER]['network_evaluations']}."
    )


def findings(metrics: dict[str, Any]) -> list[str]:
    """What the comparisons say about quality, good and bad, one sentence for each outcome."""
    few = {few_step_name(n): _in_steps(n) for n in metrics["provenance"]["few_steps"]}
    prose = {START: "the student before training", MEAN: "the mean picture"} | few
    prose[TEACHER] = "the teacher itself"
    target = reference_words(metrics)
    beyond = f"beyond the {100 * metrics['confidence']:g} % confidence interval"
    sentences = []
    for outcome, text in (
        (True, f"By kernel distance it is nearer to {target}, {beyond}, than {{}}."),
        ("undecided", "Within the confidence interval it is neither nearer nor farther than {}."),
        (False, f"By kernel distance it is farther from {target}, {beyond}, than {{}}."),
    ):
        found = [
            prose[system]
            for system, entry in metrics["comparisons"].items()
            if entry["better"] == outcome
        ]
        if found:
            sentences.append(text.format(_enumeration(found)))
    return sentences


def sample_words(metrics: dict[str, Any]) -> str:
    """What was sampled, such as "198 evaluation prompts" or "10 classes, 50,000 pictures"."""
    prompts, samples = metrics["prompts"], metrics["samples"]
    if samples == prompts:
        return f"{prompts:,} {_prompts_are(metrics)}"
    pictures = f"{samples:,} pictures"
    return pictures if prompts == 1 else f"{prompts:,} {_prompts_are(metrics)}, {pictures}"


def shown_words(metrics: dict[str, Any], count: int) -> str:
    """What the first `count` cards show."""
    repeated = metrics["samples"] != metrics["prompts"]
    return f"{count} {'pictures' if repeated else _prompts_are(metrics)}"


def kid_words(metrics: dict[str, Any]) -> str:
    """On which of the pictures KID is taken; "": on all of them."""
    taken = metrics.get("kid_samples", metrics["samples"])
    return f", on the first {taken:,} pictures," if taken < metrics["samples"] else ""


def device_words(timing: dict[str, Any]) -> str:
    """Where the times were taken, and in which dtype the networks computed."""
    threads, device = timing["threads"], timing["device"]
    if device == "cpu":
        device = f"CPU, {threads} thread{'s' * (threads > 1)}"
    dtype = timing.get("compute_dtype")  # an earlier release did not record it
    return f"{device}, {dtype}" if dtype else device


def unmeasured(metrics: dict[str, Any]) -> list[str]:
    """Why measures that a reader looks for are not there, a sentence each."""
    reasons = {"FID": [entry.get("fid_reason") for entry in metrics["systems"].values()]}
    score = metrics.get("alignment", {}).get("clip_score")
    reasons["CLIP score"] = [score] if isinstance(score, str) else []
    sentences = []
    for name, found in reasons.items():
        told = [text.removeprefix(f"{NOT_MEASURED}: ") for text in dict.fromkeys(found) if text]
        if told:
            sentences.append(f"{name}: {NOT_MEASURED} ({'; '.join(told)}).")
    return sentences


def _prompts_are(metrics: dict[str, Any]) -> str:
    """The classes of a class-conditional teacher are all there are. Of other prompts nothing says
    whether the student was trained on them."""
    return "classes" if metrics["interval_over"] == PICTURES else "evaluation prompts"


def tiles(metrics: dict[str, Any]) -> list[dict[str, str]]:
    systems, timing = metrics["systems"], metrics["timing"]
    student, teacher = systems[STUDENT], systems[TEACHER]
    shown = [
        {
            "value": f"{_ratio(timing['speed_up'])}×",
            "label": "speed-up per picture",
            "note": f"one at a time, on {device_words(timing)}",
        },
        {
            "value": f"{teacher['network_evaluations']} → {student['network_evaluations']}",
            "label": "network evaluations",
            "note": "guidance counted",
        },
        {
            "value": f"{student['kid']['value']:.3g}",
            "label": f"kernel distance to {reference_words(metrics)}",
            "note": f"before training {systems[START]['kid']['value']:.3g}",
        },
    ]
    scores = metrics.get("alignment", {}).get("clip_score")
    if isinstance(scores, dict):
        shown.append(
            {
                "value": f"{scores[STUDENT]['value']:.1f}",
                "label": "CLIP score: picture against prompt",
                "note": f"teacher {scores[TEACHER]['value']:.1f}, "
                f"difference {_interval(metrics['alignment']['clip_score_difference'])}",
            }
        )
    if student["retrieval"]:
        top, of_teacher = student["retrieval"][0], teacher["retrieval"][0]
        shown.append(
            {
                "value": _percent(top["share"]["value"]),
                "label": "nearest real picture is the right one",
                "note": f"teacher {_percent(of_teacher['share']['value'])}, "
                f"chance {_percent(top['chance'])}",
            }
        )
    return shown


def table_rows(metrics: dict[str, Any], names: dict[str, str]) -> list[dict[str, Any]]:
    """The comparison table, as text."""
    rows = []
    seconds = metrics["timing"]["seconds_per_picture"]
    for system, name in names.items():
        if system not in metrics["systems"]:
            continue
        entry = metrics["systems"][system]
        better = metrics["comparisons"].get(system, {}).get("better")
        rows.append(
            {
                "name": name,
                "is_student": system == STUDENT,
                "evaluations": entry["network_evaluations"],
                "seconds": _seconds(seconds[system]["median"]) if system in seconds else "—",
                "kid": _interval(entry["kid"]),
                "fid": f"{entry['fid']['value']:.2f}" if entry.get("fid") else "",
                "rmse": _interval(entry["rmse"]),
                "retrieval": [_percent(top["share"]["value"]) for top in entry["retrieval"] or []],
                "better": {True: "yes", False: "no", None: "—"}.get(better, better),
            }
        )
    return rows


def health_lines(events: Iterable[HealthEvent]) -> list[dict[str, Any]]:
    """Every event: its kind, its step, what was found, and what was done."""
    names = {"warn": "Warning", "rollback": "Rollback", "stop": "Stop"}
    return [
        {
            "kind": names[event.kind],
            "step": event.step,
            "found": f"{event.metric} was {_number(event.value)}; the rule: {event.rule}.",
            "done": _done(event),
        }
        for event in events
    ]


def pair_switches(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Where training went over to another version of the pairs."""
    return [
        f"After step {record['step']} it read version {record['pairs_version']:.0f} of the pairs "
        f"({record['pairs_rows']:,.0f} rows)."
        for record in records
        if "pairs_version" in record
    ]


def _done(event: HealthEvent) -> str:
    if event.kind == "warn":
        return "Training went on."
    if event.kind == "stop":
        return "Training was stopped."
    back = f"step {event.to_step}" if event.to_step else "the start"
    changes = [
        f"{factor:.3g} times the recipe's {name}"
        for name, factor in (
            ("fake_updates", event.fake_updates_factor),
            ("learning rates", event.learning_rate_factor),
        )
        if factor != 1
    ]
    settings = _enumeration(changes) if changes else "the recipe's settings"
    return f"Training went back to {back} and on from there with {settings}."


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{_three_digits(1000 * value)} ms"


def _ratio(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _interval(estimate: dict[str, float] | None) -> str:
    """Value ± half the interval, both to the second digit of the half."""
    if estimate is None:
        return "—"
    half = (estimate["high"] - estimate["low"]) / 2
    digits = 3 if half <= 0 else max(0, 1 - math.floor(math.log10(half)))
    return f"{estimate['value']:.{digits}f} ± {half:.{digits}f}"


def _in_steps(steps: int) -> str:
    return f"the teacher in {steps} step{'s' * (steps > 1)}"


def _enumeration(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
