"""Station 10: the report and its pictures."""

import base64
import copy
import io
import json
import re
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from pipelines.beside_results import Evaluated, write_result
from pipelines.health_record import HealthEvent, HealthRecordError, add_event
from pipelines.plots import loss_curve, loss_series, picture_grid, running_mean
from pipelines.report import ReportInputs, Source, collect_inputs, render_report, went_on_at
from pipelines.report_text import findings, headline, health_lines, pair_switches, table_rows
from pipelines.report_validation import read_validation
from pipelines.storage import open_store
from pipelines.stored_images import write_part
from pipelines.systems import Images

TEMPLATE = resources.files("jobs").joinpath("templates/report.html.j2").read_text("utf-8")
HOSTILE = "<script>alert('x')</script> & \"fox\""


def _pictures(count: int, size: int = 4, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def _estimate(value: float, half: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def _metrics(*, with_retrieval: bool = True) -> dict:
    def system(evaluations: int, kid: float | None, rmse: float | None) -> dict:
        share = _estimate(0.5)
        top = [{"k": k, "share": share, "chance": 0.01, "counted": 20} for k in (1, 5)]
        return {
            "kid": None if kid is None else _estimate(kid),
            "rmse": None if rmse is None else _estimate(rmse),
            "retrieval": top if with_retrieval else None,
            "network_evaluations": evaluations,
        }

    seconds = {"teacher": 1.2, "student": 0.024, "teacher_1": 0.05}
    return {
        "prompts": 20,
        "samples": 20,
        "interval_over": "prompts",
        "confidence": 0.95,
        "feature_space": "VAE latent mean",
        "feature_dimension": 64,
        "retrieval": "gallery of 9 pictures" if with_retrieval else "not measured: no gallery",
        "systems": {
            "teacher": system(100, 0.001, None),
            "student": system(1, 0.0213, 0.12),
            "teacher_again": system(100, None, 0.2),
            "start": system(1, 0.4, 0.3),
            "mean": system(0, 0.7, 0.31),
            "teacher_1": system(2, 0.02, 0.25),
        },
        "comparisons": {
            "start": {"kid_difference": _estimate(-0.4), "better": True},
            "mean": {"kid_difference": _estimate(0), "better": "undecided"},
            "teacher_1": {"kid_difference": _estimate(0.4), "better": False},
        },
        "timing": {
            "seconds_per_picture": {
                name: {"median": value, "min": value, "max": value, "repeats": 3}
                for name, value in seconds.items()
            },
            "speed_up": 50.0,
            "device": "cpu",
            "threads": 1,
            "joules_per_picture": {"value": "not measured", "reason": "no counter on cpu"},
        },
        "pictures": {"teacher": "evaluation/abc/teacher"},
        "provenance": {"steps": 50, "few_steps": [1]},
    }


def _inputs(**changes) -> ReportInputs:
    prompts = ("a fox", HOSTILE, "狐")
    pictures = {
        system: _pictures(3, seed=seed)
        for seed, system in enumerate(("teacher", "student", "start", "teacher_1"))
    }
    records = [
        {"step": step, "loss_dm": 1.0 / (step + 1), "loss_reg": float("nan"), "seconds": 1.0}
        for step in range(30)
    ]
    defaults = {
        "title": "a run",
        "metrics": _metrics(),
        "prompts": prompts,
        "pictures": pictures,
        "records": records,
        "samples": [(1, picture_grid([_pictures(2)]))],
        "sources": [Source("teacher", "abc", "metrics.json")],
    }
    return ReportInputs(**(defaults | changes))


class _Page(HTMLParser):
    """All tags with their attributes, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page() -> _Page:
    return _Page(render_report(_inputs(), TEMPLATE))


def test_page_runs_nothing_and_fetches_nothing(page):
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    targets = [tag.get("src") or tag.get("href") for name in ("img", "a", "use", "image")
               for tag in page.all(name)]  # fmt: skip
    assert all(target is None or target.startswith(("data:", "#")) for target in targets)
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    style = TEMPLATE[TEMPLATE.index("<style>") : TEMPLATE.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_the_lines_that_make_the_first_picture_again_are_shown_where_they_are_known():
    title = "To make the first student picture again"
    assert title not in render_report(_inputs(), TEMPLATE)
    metrics = _metrics() | {"again": "pipe(class_labels=[3], latents=latents)"}
    page = render_report(_inputs(metrics=metrics), TEMPLATE)
    assert title in page and "pipe(class_labels=[3], latents=latents)</code>" in page


def test_prompts_are_text_never_markup(page):
    assert page.text.count(HOSTILE) == 1  # its heading; in the attributes it is unescaped too
    assert any(image.get("alt") == f"Teacher: {HOSTILE}" for image in page.all("img"))
    assert "狐" in page.text


def test_each_card_shows_its_prompts_pictures_pixel_for_pixel(page):
    inputs = _inputs()
    shown = {image["alt"]: image for image in page.all("img")}
    labels = {"Teacher": "teacher", "Student": "student", "Start": "start", "1 step": "teacher_1"}
    for row, prompt in enumerate(inputs.prompts):
        for label, system in labels.items():
            image = shown[f"{label}: {prompt}"]
            png = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
            found = np.asarray(Image.open(io.BytesIO(png)))
            assert np.array_equal(found, inputs.pictures[system][row])
            assert image["class"] == "pixelated"


def test_every_card_can_be_enlarged_and_closed(page):
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [link["href"].removeprefix("#") for link in page.all("a")]
    assert len(links) == 2 * 3 and set(links) <= ids


def test_curves_are_drawn_for_losses_that_were_logged(page):
    figures = [svg["aria-label"] for svg in page.all("svg")]
    assert figures[0] == "loss_dm over training steps" and len(figures) == 2
    assert not any("width" in svg for svg in page.all("svg"))
    assert "loss_reg" not in page.text and "seconds" not in figures


def test_optional_parts_leave_a_plain_line():
    html = render_report(
        _inputs(metrics=_metrics(with_retrieval=False), prompts=(), pictures={}, records=(),
                samples=(), sources=()),
        TEMPLATE,
    )  # fmt: skip
    text = re.sub(r"\s+", " ", _Page(html).text)
    for line in (
        "No pictures were sampled.",
        "No training log (metrics.jsonl) in this run.",
        "No samples were saved during training.",
        "No provenance was recorded.",
        "not measured: no gallery",
        "Energy: not measured (no counter on cpu).",
    ):
        assert line in text
    assert "Retrieval top 1" not in text


@pytest.mark.parametrize("with_retrieval", [True, False])
def test_table_rows_have_as_many_cells_as_the_head(with_retrieval):
    html = render_report(_inputs(metrics=_metrics(with_retrieval=with_retrieval)), TEMPLATE)
    table = html[html.index("<table>") : html.index("</table>")]
    counts = {len(re.findall(r"<t[hd][ >]", row)) for row in table.split("<tr")[1:]}
    assert counts == {8 if with_retrieval else 6}


def test_distances_are_named_after_what_they_are_taken_to():
    assert "kernel distance to the teacher (KID)" in render_report(_inputs(), TEMPLATE)
    of_real = render_report(_inputs(metrics=_metrics() | {"reference": "real"}), TEMPLATE)
    assert "kernel distance to real pictures (KID)" in of_real
    assert "distance to the teacher (KID)" not in of_real


def _text(html: str) -> str:
    return re.sub(r"\s+", " ", _Page(html).text)


def test_prompts_are_not_said_to_be_held_out_and_classes_are_called_classes():
    prompts = _text(render_report(_inputs(), TEMPLATE))
    assert "The first 3 evaluation prompts, none left out." in prompts
    assert "20 evaluation prompts; ± is half the 95 % confidence interval over prompts" in prompts
    assert "KID is the kernel distance to an independent draw of the teacher (feat" in prompts
    of_classes = {"prompts": 10, "samples": 50_000, "interval_over": "pictures"}
    metrics = _metrics() | of_classes | {"kid_samples": 5000, "reference": "real"}
    classes = _text(render_report(_inputs(metrics=metrics), TEMPLATE))
    assert "The first 3 pictures, none left out." in classes
    assert "10 classes, 50,000 pictures; ± is half the 95 % confidence interval over pi" in classes
    assert "KID, on the first 5,000 pictures, is the kernel distance to real pictures (" in classes
    assert "held-out" not in prompts + classes
    alone = _metrics() | of_classes | {"prompts": 1}  # a teacher without classes
    assert "50,000 pictures; ±" in _text(render_report(_inputs(metrics=alone), TEMPLATE))


def test_what_was_asked_for_and_not_measured_is_told_with_the_reason():
    metrics = _metrics() | {"alignment": {"clip_score": "not measured: no CLIP model is named"}}
    for entry in metrics["systems"].values():
        entry.update(fid=None, fid_reason="5,000 pictures; expected at least 8,192")
    text = _text(render_report(_inputs(metrics=metrics), TEMPLATE))
    assert "FID: not measured (5,000 pictures; expected at least 8,192)." in text
    assert "CLIP score: not measured (no CLIP model is named)." in text
    metrics = _metrics()
    metrics["systems"]["student"]["fid"] = {"value": 4.2, "samples": 50_000}
    text = _text(render_report(_inputs(metrics=metrics), TEMPLATE))
    assert "FID: " not in text and "CLIP score" not in text and "4.20" in text


def test_the_dtype_of_the_timed_networks_stands_beside_their_device():
    metrics = _metrics()
    metrics["timing"] |= {"device": "A GPU", "compute_dtype": "bfloat16"}
    text = _text(render_report(_inputs(metrics=metrics), TEMPLATE))
    assert text.count("on A GPU, bfloat16") == 2
    assert "batch 1, on CPU, 1 thread." in _text(render_report(_inputs(), TEMPLATE))


def test_only_systems_whose_pictures_are_there_are_announced():
    text = "Small: the student before training (“Start”) and the teacher in one step."
    assert text in render_report(_inputs(), TEMPLATE)
    few = {system: _pictures(3) for system in ("teacher", "student", "start")}
    assert text not in render_report(_inputs(pictures=few), TEMPLATE)


def test_headline_says_the_speed_up_either_way():
    metrics = _metrics()
    assert headline(metrics) == (
        "The student makes a picture in 24 ms, the teacher in 1.20 s: 50 times faster, "
        "with 1 network evaluation instead of 100."
    )
    metrics["timing"]["speed_up"] = 0.5
    assert ": 2.0 times slower, with" in headline(metrics)


def test_findings_tell_better_undecided_and_worse_apart():
    better, undecided, worse = findings(_metrics())
    assert better.endswith("nearer to the teacher, beyond the 95 % confidence interval, than "
                           "the student before training.")  # fmt: skip
    assert undecided == (
        "Within the confidence interval it is neither nearer nor farther than the mean picture."
    )
    assert "farther from the teacher" in worse and worse.endswith("the teacher in 1 step.")
    (sure, *_) = findings(_metrics() | {"confidence": 0.999})
    assert "beyond the 99.9 % confidence interval" in sure
    all_better = copy.deepcopy(_metrics())
    for entry in all_better["comparisons"].values():
        entry["better"] = True
    (only,) = findings(all_better)
    assert only.endswith("the student before training, the mean picture and the teacher in 1 step.")


def test_table_gives_both_numbers_to_the_same_digit():
    metrics = _metrics()
    metrics["systems"]["student"]["kid"] = _estimate(0.08, 0.0052)
    rows = {row["name"]: row for row in table_rows(metrics, {"student": "S", "teacher": "T"})}
    assert rows["S"]["kid"] == "0.0800 ± 0.0052"
    assert rows["T"]["rmse"] == "—" and rows["S"]["better"] == "—"


def test_running_mean_is_the_mean_of_the_neighbours():
    values = np.array([1.0, 5.0, 3.0, 7.0, 2.0])
    expected = [3.0, 3.0, 5.0, 4.0, 4.5]
    np.testing.assert_allclose(running_mean(values, 1), expected)
    np.testing.assert_allclose(running_mean(values, 10), values.mean())


def test_loss_series_keeps_finite_losses_with_their_steps():
    records = [{"step": 1, "loss_a": 1.0, "lr": 0.1}, {"step": 3, "loss_a": 2, "loss_b": np.nan}]
    assert loss_series(records) == {"loss_a": ([1, 3], [1.0, 2.0])}


def test_run_without_metrics_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no metrics\.json; expected an evaluated run"):
        collect_inputs(open_store(str(tmp_path)), title="t", images=4)


# ---------------------------------------------------------------------- health and validation


def _event(kind: str, step: int, to_step: int | None = None, **changes) -> HealthEvent:
    return HealthEvent.model_validate(
        {"kind": kind, "rule": "sample_std below 0.3 on a logged line", "metric": "sample_std",
         "value": 0.1234, "step": step, "to_step": to_step, "time": "t"} | changes
    )  # fmt: skip


_EVENTS = (
    _event("warn", 5),
    _event("rollback", 20, 10, fake_updates_factor=2.25, learning_rate_factor=0.5),
    _event("rollback", 25, 0, value=None, fake_updates_factor=3.0),
    _event("stop", 29),
)


def _cells(html: str) -> list[list[str]]:
    table = html[html.index('<table class="events">') :]
    rows = table[: table.index("</table>")].split("<tr")[2:]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def test_every_health_event_is_told_with_its_step_and_what_was_changed():
    html = render_report(_inputs(events=_EVENTS), TEMPLATE)
    rule = "the rule: sample_std below 0.3 on a logged line."
    assert _cells(html) == [
        ["5", "Warning", f"sample_std was 0.123; {rule}", "Training went on."],
        ["20", "Rollback", f"sample_std was 0.123; {rule}",
         "Training went back to step 10 and on from there with 2.25 times the recipe&#39;s "
         "fake_updates and 0.5 times the recipe&#39;s learning rates."],
        ["25", "Rollback", f"sample_std was not finite; {rule}",
         "Training went back to the start and on from there with 3 times the recipe&#39;s "
         "fake_updates."],
        ["29", "Stop", f"sample_std was 0.123; {rule}", "Training was stopped."],
    ]  # fmt: skip
    assert health_lines([_event("rollback", 9, 3)])[0]["done"].endswith("the recipe's settings.")


def test_a_run_without_events_says_so(page):
    assert "No rule of train.health was broken" in page.text
    assert "Dashed" not in page.text and "Measured while it trained" not in page.text


def test_rollbacks_are_marked_where_training_went_on():
    events = (_event("rollback", 20, 10), _event("warn", 12), _event("rollback", 25, 15))
    assert went_on_at(events) == [10, 15]
    assert went_on_at((*events, _event("rollback", 28, 12))) == [10, 12]  # 15 was given up
    assert went_on_at(_EVENTS) == [0]
    html = render_report(_inputs(events=events), TEMPLATE)
    assert "Dashed: where training went on after a rollback" in html
    curve = html[html.index('aria-label="loss_dm over') :]
    assert curve[: curve.index("</svg>")].count('id="mark"') == 2


def _line_x(svg: str, gid: str) -> list[float]:
    """Where the vertical lines of this id stand, in the picture's units."""
    return [float(x) for x in re.findall(rf'<g id="{gid}">\s*<path d="M ([\d.]+) ', svg)]


def test_a_mark_stands_at_its_step():
    svg = loss_curve([0, 10, 20, 30, 40], [1.0, 1.0, 1.0, 1.0, 1.0], "l", [10, 30])
    (first, second) = _line_x(svg, "mark")
    ticks = dict(re.findall(r'<text [^>]* x="([\d.]+)"[^>]*>(\d+)</text>', svg))
    places = {int(label): float(x) for x, label in ticks.items()}
    assert (first, second) == (pytest.approx(places[10]), pytest.approx(places[30]))


def test_the_running_mean_does_not_mix_both_sides_of_a_rollback():
    def heights(marks: list[int]) -> set[str]:
        svg = loss_curve([10, 20, 30, 40], [1.0, 1.0, 5.0, 5.0], "l", marks)
        paths = re.findall(r'<path d="(M [^"]*?)" clip-path="[^"]*" style="fill: none; stroke: var'
                           r'\(--accent\); stroke-width: 1\.5', svg)  # fmt: skip
        return {y for path in paths for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path)}

    assert len(heights([20])) == 2 and len(heights([])) > 2


def test_switches_of_the_pairs_are_told():
    records = [{"step": 4, "loss_dm": 1.0}, {"step": 4, "pairs_version": 2, "pairs_rows": 1234567}]
    assert pair_switches(records) == [
        "After step 4 it read version 2 of the pairs (1,234,567 rows)."
    ]
    assert "version 2 of the pairs" in render_report(_inputs(records=records), TEMPLATE)


def _write_validation(run, step: int, metrics: dict | None, inputs: str = "a") -> None:
    content = {"step": step, "metrics": metrics, "provenance": {"inputs": inputs}}
    path = run.path("validation", f"step_{step:08d}.json")
    run.fs.makedirs(run.path("validation"), exist_ok=True)
    run.fs.pipe_file(path, json.dumps(content).encode())


def test_what_was_measured_while_it_trained_is_drawn(tmp_path):
    run = open_store(str(tmp_path))
    _write_validation(run, 100, {"kid": _estimate(0.9)}, inputs="other prompts")
    fid = {"value": 12.0}  # it has no interval
    _write_validation(run, 200, {"kid": _estimate(0.5), "rmse": _estimate(0.2), "fid": fid})
    _write_validation(run, 300, None)
    _write_validation(run, 400, {"kid": _estimate(0.25), "rmse": None, "retrieval": {"low": 1}})
    run.fs.pipe_file(run.path("validation", "notes.txt"), b"no result")
    run.fs.pipe_file(run.path("best.json"), b'{"step": 400, "metric": "kid", "value": 0.25}')
    validation = read_validation(run)
    assert validation.results == {
        200: {"kid": _estimate(0.5), "rmse": _estimate(0.2), "fid": fid},
        400: {"kid": _estimate(0.25)},
    }
    page = _Page(render_report(_inputs(validation=validation), TEMPLATE))
    text = re.sub(r"\s+", " ", page.text)
    assert "Best by KID: step 400, with 0.25." in text
    assert "The evaluation of step 300 failed." in text
    labels = [svg["aria-label"] or "" for svg in page.all("svg")]
    assert sum("(KID)" in label and "over training steps" in label for label in labels) == 1
    assert sum("RMSE" in label for label in labels) == 1
    assert sum("(FID)" in label for label in labels) == 1
    assert not any("retrieval" in label for label in labels)


def test_evaluations_that_all_failed_are_shown_with_the_reason_of_the_last(tmp_path):
    run = open_store(str(tmp_path))
    for step, error in ((200, "a disk was full"), (400, "CUDA <out of> memory.")):
        write_result(run, Evaluated(step, error=error))
    html = render_report(_inputs(validation=read_validation(run)), TEMPLATE)
    assert (
        "No evaluation beside the training gave a figure. The evaluations of steps 200, 400 "
        "failed, the last one: CUDA <out of> memory. Source: validation/."
    ) in _text(html)
    assert "CUDA <out of>" not in html


def test_a_run_is_collected_with_its_health_and_validation(tmp_path):
    run = open_store(str(tmp_path))
    nothing = np.zeros((1, 1), np.float32)
    images = Images(("fox",), (1,), nothing, _pictures(1), nothing)
    write_part(run, "evaluation/abc/teacher", 0, 1, images)
    run.fs.pipe_file(run.path("metrics.json"), json.dumps(_metrics()).encode())
    add_event(run, _EVENTS[0])
    _write_validation(run, 200, {"kid": _estimate(0.5)})
    inputs = collect_inputs(run, title="t", images=4)
    assert inputs.events == _EVENTS[:1] and list(inputs.validation.results) == [200]
    run.fs.pipe_file(run.path("health.json"), b"{")
    with pytest.raises(HealthRecordError, match=r"health\.json"):
        collect_inputs(run, title="t", images=4)


def test_grid_shows_every_picture_pixel_for_pixel():
    teacher, student = _pictures(3, seed=1), _pictures(2, seed=2)
    grid = np.asarray(Image.open(io.BytesIO(picture_grid([teacher, student]))))
    assert grid.shape == (32 * (4 + 2 + 4), 32 * (3 * 4 + 2 * 2), 3)  # a picture takes 128 pixels
    for line, row in enumerate([teacher, student]):
        for column, picture in enumerate(row):
            top, left = 32 * 6 * line, 32 * 6 * column
            assert np.array_equal(grid[top : top + 128 : 32, left : left + 128 : 32], picture)


@pytest.mark.parametrize(("size", "scale"), [(32, 4), (100, 1), (512, 1)])
def test_large_pictures_are_not_enlarged_and_cost_no_effort(size, scale, monkeypatch):
    efforts = []

    def save(self, buffer, **options):
        efforts.append(options)
        plain(self, buffer, **options)

    plain = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", save)
    pictures = _pictures(4, size=size)
    found = Image.open(io.BytesIO(picture_grid([pictures, pictures])))
    assert found.size == (scale * (4 * size + 3 * 2), scale * (2 * size + 2))
    effort = {"optimize": True} if size < 512 else {"compress_level": 1}
    assert efforts == [{"format": "PNG"} | effort]


def test_the_page_carries_wide_strips_of_samples_narrowed():
    wide = picture_grid([_pictures(5, size=600)])
    small = picture_grid([_pictures(2)])
    page = _Page(render_report(_inputs(samples=[(1, wide), (2, small)]), TEMPLATE))
    shown = [
        base64.b64decode(image["src"].split(",", 1)[1])
        for image in page.all("img")
        if (image["alt"] or "").startswith("Samples at step")
    ]
    narrow = Image.open(io.BytesIO(shown[0]))
    assert narrow.width == 2048 and narrow.height == round(600 * 2048 / (5 * 600 + 4 * 2))
    assert len(shown[0]) < len(wide) and shown[1] == small


def test_grid_refuses_pictures_of_different_sizes():
    with pytest.raises(ValueError, match=r"row 1 is uint8 \(2, 5, 5, 3\); expected uint8 \(N, 4"):
        picture_grid([_pictures(2), _pictures(2, size=5)])
