"""Station 10: pictures of the run — sample grids as PNG, curves and intervals as inline SVG."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

_ENLARGED_TO = 128  # pixels of a picture's longer side; larger ones are shown as they are
_OPTIMIZED_UP_TO = 2**20  # pixels; beyond, a training would wait for smaller files
_GAP = 2  # pixels between pictures, before scaling
_BACKGROUND = (255, 255, 255)
# Drawn in these colours, then replaced: the page's style decides, in light and in dark.
_INK, _ACCENT = "#010203", "#040506"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dmd",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    **{
        key: _INK
        for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    },
}
_LOG_FROM = 20.0  # ratio of largest to smallest value from which a logarithmic axis reads better
_SMOOTHING = 0.05  # share of the curve that the running mean spans


def picture_grid(rows: Sequence[np.ndarray]) -> bytes:
    """A PNG with one row of pictures per array (N,H,W,3) uint8; small pictures are enlarged.

    Enlarged by repeating pixels, so that what is seen is what the network made. Rows may differ in
    N; all pictures must have one size. Raises ValueError otherwise.
    """
    if not rows:
        raise ValueError("picture_grid got no rows; expected at least one (N,H,W,3) array")
    height, width = rows[0].shape[1:3]
    for index, row in enumerate(rows):
        if row.dtype != np.uint8 or row.ndim != 4 or row.shape[1:] != (height, width, 3):
            raise ValueError(
                f"row {index} is {row.dtype} {row.shape}; expected uint8 (N, {height}, {width}, 3)"
            )
    columns = max(len(row) for row in rows)
    canvas = np.empty(
        (len(rows) * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), dtype=np.uint8
    )
    canvas[:] = _BACKGROUND
    for line, row in enumerate(rows):
        for column, picture in enumerate(row):
            top, left = line * (height + _GAP), column * (width + _GAP)
            canvas[top : top + height, left : left + width] = picture
    scale = max(1, _ENLARGED_TO // max(height, width))
    return encode_png(canvas.repeat(scale, axis=0).repeat(scale, axis=1))


def encode_png(picture: np.ndarray) -> bytes:
    """(H,W,3) uint8 → PNG bytes."""
    buffer = io.BytesIO()
    small = picture.shape[0] * picture.shape[1] <= _OPTIMIZED_UP_TO
    effort: dict[str, Any] = {"optimize": True} if small else {"compress_level": 1}
    Image.fromarray(picture).save(buffer, format="PNG", **effort)
    return buffer.getvalue()


def narrowed_png(png: bytes, width: int) -> bytes:
    """The same picture at most `width` pixels wide, for a page that carries it; one that is no
    wider, or too large to be opened safely, as it is."""
    try:
        picture = Image.open(io.BytesIO(png))
    except Image.DecompressionBombError:
        return png
    if picture.width <= width:
        return png
    picture.thumbnail((width, picture.height))
    return encode_png(np.asarray(picture.convert("RGB")))


def loss_curve(
    steps: Sequence[int], values: Sequence[float], label: str, marks: Sequence[int] = ()
) -> str:
    """One loss over steps as an SVG element: the raw values thin, a running mean over them; a
    dashed line at each step of `marks`, where the running mean begins anew."""
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2, 2.3), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(x, y, color=_ACCENT, alpha=0.25, linewidth=0.7)
        half = max(1, round(len(y) * _SMOOTHING))
        for part in np.split(np.arange(len(x)), np.searchsorted(x, np.unique(marks), "right")):
            axes.plot(x[part], running_mean(y[part], half), color=_ACCENT)
        _draw_marks(axes, marks)
        if len(y) and y.min() > 0 and y.max() / y.min() > _LOG_FROM:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
        axes.set_xlabel("step")
        return _svg(figure, f"{label} over training steps")


def interval_curve(
    steps: Sequence[int],
    values: Sequence[float],
    lows: Sequence[float],
    highs: Sequence[float],
    label: str,
    *,
    best: int | None = None,
    marks: Sequence[int] = (),
) -> str:
    """A measure over steps as an SVG element: a dot with its confidence interval each, that of the
    step `best` larger; a dashed line at each step of `marks`."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2, 2.3), layout="constrained")
        axes = figure.add_subplot()
        axes.fill_between(steps, lows, highs, color=_ACCENT, alpha=0.12, linewidth=0)
        axes.vlines(steps, lows, highs, color=_ACCENT, linewidth=1.2, alpha=0.7)
        axes.plot(steps, values, "-", color=_ACCENT, linewidth=1)
        axes.plot(steps, values, "o", color=_ACCENT, markersize=3)
        if best is not None and best in steps:
            at = list(steps).index(best)
            axes.plot([best], [values[at]], "o", color=_ACCENT, markersize=6)
            axes.annotate(
                "best", (best, highs[at]), xytext=(0, 3), textcoords="offset points", ha="center"
            )
        _draw_marks(axes, marks)
        axes.margins(y=0.15)
        axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
        axes.set_xlabel("step")
        return _svg(figure, f"{label} over training steps")


def _draw_marks(axes: Any, marks: Sequence[int]) -> None:
    for step in marks:
        axes.axvline(step, color=_INK, alpha=0.6, linewidth=1, linestyle=(0, (4, 3)), gid="mark")


def running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Mean over each point and `half` neighbours on both sides (fewer at the ends): (N,)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = (index - half).clip(0), (index + half + 1).clip(max=len(values))
    return (sums[last] - sums[first]) / (last - first)


@dataclass(frozen=True)
class Interval:
    """One line of an interval plot."""

    label: str
    value: float
    low: float
    high: float
    highlight: bool = False


def interval_plot(rows: Sequence[Interval], label: str) -> str:
    """A dot with its confidence interval per row, first row on top, as an SVG element."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 0.5 + 0.3 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for line, row in enumerate(rows):
            colour = _ACCENT if row.highlight else _INK
            axes.plot([row.low, row.high], [line, line], color=colour, linewidth=1.4, alpha=0.8)
            axes.plot([row.value], [line], "o", color=colour, markersize=5)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.axvline(0, color=_INK, alpha=0.35, linewidth=0.6)
        axes.grid(axis="x", color=_INK, alpha=0.12, linewidth=0.6)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(label)
        return _svg(figure, label)


def _svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element that takes its width and colours from the page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without XML and document type declarations
    svg = re.sub(r"font-family:[^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace(_INK, "currentColor").replace(_ACCENT, "var(--accent)")
    safe = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{safe}"', 1)


def loss_series(records: Sequence[dict]) -> dict[str, tuple[list[int], list[float]]]:
    """Every numeric `loss_*` key of the training log → its steps and values."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith("loss") and isinstance(value, int | float) and math.isfinite(value):
                steps, values = series.setdefault(key, ([], []))
                steps.append(record["step"])
                values.append(float(value))
    return series
