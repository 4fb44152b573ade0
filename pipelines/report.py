"""Station 10: everything above → one HTML page that needs no network and runs no script.

Every number on it names the file it came from. Prompts are untrusted text: the template escapes
all that it is given, and the page's own policy forbids everything but inline style and pictures.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import jinja2
import numpy as np
from markupsafe import Markup

from pipelines.commits import list_files
from pipelines.evaluation import METRICS, NOISE, NOISE_PROMPTS
from pipelines.health_record import HEALTH, HealthEvent, read_events
from pipelines.manifest_model import canonical_digest
from pipelines.plots import (
    Interval,
    encode_png,
    interval_plot,
    loss_curve,
    loss_series,
    narrowed_png,
)
from pipelines.report_text import (
    device_words,
    findings,
    headline,
    health_lines,
    kid_words,
    pair_switches,
    reference_words,
    sample_words,
    shown_words,
    system_names,
    table_rows,
    tiles,
    unmeasured,
)
from pipelines.report_validation import (
    BEST,
    NO_VALIDATION,
    VALIDATION,
    Validation,
    best_sentence,
    failed_sentence,
    read_validation,
    validation_curves,
)
from pipelines.sample_files import SAMPLES, SampleFile, sample_files
from pipelines.storage import Store
from pipelines.stored_images import open_images
from pipelines.systems import START, STUDENT, TEACHER, few_step_name

TRAINING_LOG = "metrics.jsonl"
# What a card shows: two pictures large, then the baselines small.
_LABELS = {TEACHER: "Teacher", STUDENT: "Student", START: "Start", few_step_name(1): "1 step"}
_SAMPLES_SHOWN = 5
_SAMPLES_WIDTH = 2048  # pixels of a strip
_PIXELATED_UP_TO = 128  # pixels; larger pictures are shown smoothly


@dataclass(frozen=True)
class Source:
    """One line of the provenance table: a value and the file that holds it."""

    name: str
    value: str
    file: str


@dataclass(frozen=True)
class ReportInputs:
    """What the report shows. Whatever is empty leaves its section with a plain line.

    `metrics` is the content of metrics.json; `pictures` system → (N,H,W,3) uint8 of `prompts`;
    `records` the training log; `samples` (step, PNG) of training up to the last line of the log,
    oldest first; `events` those of the health rules; `validation` what was measured while it
    trained.
    """

    title: str
    metrics: dict[str, Any]
    prompts: Sequence[str] = ()
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)
    records: Sequence[dict[str, Any]] = ()
    samples: Sequence[tuple[int, bytes]] = ()
    sources: Sequence[Source] = ()
    events: Sequence[HealthEvent] = ()
    validation: Validation = NO_VALIDATION


def collect_inputs(
    run: Store, *, title: str, images: int, json_files: Sequence[str] = ("versions.json",)
) -> ReportInputs:
    """Read a run directory. Only metrics.json must exist; every value of `json_files` that exist
    goes into the provenance table. `images`: how many prompts to show, from the top of the list.
    What is read here is what `inputs_digests` must cover."""
    metrics, records = _read_metrics(run), _read_log(run)
    shown = {
        system: open_images(run, folder).first(images)
        for system, folder in _picture_folders(metrics).items()
    }
    sources = list(_flatten(metrics["provenance"], METRICS))
    for name in json_files:
        if run.fs.exists(run.path(name)):
            sources += _flatten(json.loads(run.fs.cat_file(run.path(name))), name)
    return ReportInputs(
        title=title,
        metrics=metrics,
        prompts=shown[TEACHER].prompts,
        pictures={system: entry.pictures for system, entry in shown.items()},
        records=records,
        samples=_read_samples(run, records),
        sources=sources,
        events=read_events(run),
        validation=read_validation(run),
    )


def inputs_digests(run: Store, *, json_files: Sequence[str] = ("versions.json",)) -> dict[str, str]:
    """Every file and folder that `collect_inputs` reads → a digest of it: of the contents, of
    pictures of the names and sizes. The page is up to date as long as these are the same."""
    records, metrics = _read_log(run), _read_metrics(run)
    validations = [f"{VALIDATION}/{name}" for name in list_files(run, run.path(VALIDATION))]
    texts = (METRICS, TRAINING_LOG, HEALTH, BEST, *json_files)
    found = {name: _content_digest(run, name) for name in texts if run.fs.exists(run.path(name))}
    for folder in _picture_folders(metrics).values():
        files: Any = run.fs.find(run.path(folder), detail=True)
        sizes = {path.rsplit("/", 1)[-1]: entry["size"] for path, entry in files.items()}
        found[folder] = canonical_digest(sizes)
    samples = {str(file.step): file.size for file in _shown_samples(run, records)}
    return found | {
        VALIDATION: canonical_digest({name: _content_digest(run, name) for name in validations}),
        SAMPLES: canonical_digest(samples),
    }


def render_report(inputs: ReportInputs, template: str) -> str:
    """The page, from the text of a jinja2 template."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    metrics = inputs.metrics
    names = system_names(metrics)
    series, marks = loss_series(inputs.records), went_on_at(inputs.events)
    return environment.from_string(template).render(
        title=inputs.title,
        headline=headline(metrics),
        findings=findings(metrics),
        tiles=tiles(metrics),
        cards=_cards(inputs),
        shown=shown_words(metrics, len(inputs.prompts)),
        student_steps=metrics["systems"][STUDENT]["network_evaluations"],
        again=metrics.get("again", ""),
        curves=[
            {"name": name, "svg": Markup(loss_curve(steps, values, name, marks))}
            for name, (steps, values) in series.items()
        ],
        marks=marks,
        pair_switches=pair_switches(inputs.records),
        health=health_lines(inputs.events),
        validation=[
            {"name": name, "svg": Markup(svg)}
            for name, svg in validation_curves(inputs.validation, marks).items()
        ],
        best=best_sentence(inputs.validation),
        failed=failed_sentence(inputs.validation),
        rows=table_rows(metrics, names),
        intervals=Markup(_kid_plot(metrics, names)),
        sampled=sample_words(metrics),
        kid_on=kid_words(metrics),
        timed_on=device_words(metrics["timing"]),
        unmeasured=unmeasured(metrics),
        energy=metrics["timing"]["joules_per_picture"],
        samples=[
            {"step": step, "src": _data_uri(narrowed_png(png, _SAMPLES_WIDTH))}
            for step, png in _evenly(inputs.samples)
        ],
        metrics=metrics,
        confidence=f"{100 * metrics['confidence']:g} %",
        sources=inputs.sources,
        files={
            "metrics": METRICS, "log": TRAINING_LOG, "noise": NOISE,
            "noise_prompts": NOISE_PROMPTS, "health": HEALTH, "validation": f"{VALIDATION}/",
            "best": BEST,
        },
    )  # fmt: skip


def went_on_at(events: Sequence[HealthEvent]) -> list[int]:
    """Where the curves join what was trained under different settings: the steps that rollbacks
    went back to, without those that a later one went back behind."""
    targets = [event.to_step for event in events if event.to_step is not None]
    standing = {step for at, step in enumerate(targets) if step <= min(targets[at:])}
    return sorted(standing)


def _cards(inputs: ReportInputs) -> list[dict[str, Any]]:
    """One per prompt: teacher and student large, the baselines small."""
    cards = []
    for index, prompt in enumerate(inputs.prompts):
        pictures = [
            {
                "label": _LABELS[system],
                "src": _data_uri(encode_png(inputs.pictures[system][index])),
                "pixelated": max(inputs.pictures[system][index].shape[:2]) <= _PIXELATED_UP_TO,
            }
            for system in _LABELS
            if system in inputs.pictures
        ]
        cards.append({"prompt": prompt, "main": pictures[:2], "baselines": pictures[2:]})
    return cards


def _kid_plot(metrics: dict[str, Any], names: dict[str, str]) -> str:
    rows = [
        Interval(name, kid["value"], kid["low"], kid["high"], highlight=system == STUDENT)
        for system, name in names.items()
        if (kid := metrics["systems"].get(system, {}).get("kid"))
    ]
    target = reference_words(metrics)
    return interval_plot(rows, f"kernel distance to {target} (KID), lower is nearer")


def _read_metrics(run: Store) -> dict[str, Any]:
    if not run.fs.exists(run.path(METRICS)):
        raise FileNotFoundError(f"{run.url} has no {METRICS}; expected an evaluated run")
    return json.loads(run.fs.cat_file(run.path(METRICS)))


def _read_log(run: Store) -> list[dict[str, Any]]:
    if not run.fs.exists(run.path(TRAINING_LOG)):
        return []
    return [json.loads(line) for line in run.fs.cat_file(run.path(TRAINING_LOG)).splitlines()]


def _picture_folders(metrics: Mapping[str, Any]) -> dict[str, str]:
    """System → folder of the pictures that cards show."""
    folders = metrics["pictures"]
    return {system: folders[system] for system in _LABELS if system in folders}


def _read_samples(run: Store, records: Sequence[dict[str, Any]]) -> list[tuple[int, bytes]]:
    chosen = _evenly(_shown_samples(run, records))
    return [(file.step, cast(bytes, run.fs.cat_file(file.path))) for file in chosen]


def _shown_samples(run: Store, records: Sequence[dict[str, Any]]) -> list[SampleFile]:
    """None after the last line of the log: those are of steps that were lost or given up. Without
    a log nothing says which."""
    last = max((record["step"] for record in records), default=math.inf)
    return [file for file in sample_files(run) if file.step <= last]


def _content_digest(run: Store, name: str) -> str:
    return hashlib.sha256(cast(bytes, run.fs.cat_file(run.path(name)))).hexdigest()


def _evenly(items: Sequence[Any]) -> list[Any]:
    """The first, the last and some between."""
    if len(items) <= _SAMPLES_SHOWN:
        return list(items)
    return [items[int(index)] for index in np.linspace(0, len(items) - 1, _SAMPLES_SHOWN).round()]


def _flatten(content: dict[str, Any], file: str, prefix: str = "") -> Iterator[Source]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, file, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield Source(prefix + key, text, file)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
