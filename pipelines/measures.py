"""Station 9: the figures of an evaluation, each a function of the pictures alone.

"Better" is said only beyond the confidence interval.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dmd_core.gallery import Gallery
from dmd_core.inception import INCEPTION_SPACE
from dmd_core.metrics import (
    Estimate,
    enough_for_frechet,
    frechet_distance,
    kid,
    kid_difference,
    least_for_frechet,
    mean_estimate,
    retrieval,
)
from pipelines.inception_features import REAL
from pipelines.stored_images import Pictures, array_of
from pipelines.systems import STUDENT, TEACHER, TEACHER_AGAIN
from pipelines.timing import NOT_MEASURED
from pipelines.unit import Unit

# KID takes time in proportion to the square of the rows; its interval is narrow long before.
KID_ROWS = 5000


def own_features(images: Mapping[str, Pictures]) -> dict[str, np.ndarray]:
    """System → the teacher's own features of its first pictures, as many as KID takes: of 30,000
    large ones all would fill a machine's memory."""
    return {system: array_of(entry, "features", stop=KID_ROWS) for system, entry in images.items()}


def measure(
    images: Mapping[str, Pictures],
    features: Mapping[str, np.ndarray],
    distances: Mapping[str, np.ndarray],
    gallery: Gallery | None,
    unit: Unit,
    space: str,
) -> dict[str, Any]:
    """Every system's figures and comparisons, as plain JSON. `space` names the features; for the
    rest see `measure_system`."""
    some = {system: values[:KID_ROWS] for system, values in features.items()}
    against, prompts = reference_of(features), images[TEACHER].prompts
    some_units = unit.of(prompts[:KID_ROWS])
    gallery, why_not = usable_gallery(gallery, prompts, features[TEACHER])
    systems = {
        system: measure_system(system, images, features, distances, gallery, unit)
        for system in images
    }
    if space == INCEPTION_SPACE:
        for system, entry in systems.items():
            if entry["fid"] is None:
                entry["fid_reason"] = _why_no_fid(features[system], against)
    return {
        "prompts": len(set(prompts)),
        "samples": len(prompts),
        "confidence": unit.confidence,
        "interval_over": unit.name,
        "feature_space": space,
        "feature_dimension": features[TEACHER].shape[1],
        "kid_samples": len(some[against]),
        "reference": against,
        "systems": systems,
        "retrieval": why_not or f"gallery of {len(gallery.captions) if gallery else 0} pictures",
        "comparisons": {
            system: _compare(some[STUDENT], some[system], some[against], some_units)
            for system in images
            if system not in (STUDENT, TEACHER_AGAIN)
            and (system != TEACHER or against == REAL)  # else it would be its own yardstick
        },
    }


def measure_system(
    system: str,
    images: Mapping[str, Pictures],
    features: Mapping[str, np.ndarray],
    distances: Mapping[str, np.ndarray],
    gallery: Gallery | None,
    unit: Unit,
) -> dict[str, Any]:
    """kid, fid, rmse and retrieval of one system; None for what says nothing about it, or for too
    few pictures (fid). `features` has those of the system's first pictures, `KID_ROWS` or more
    (fid: of all), and the reference's; `distances` those to the teacher; `gallery` is a usable one,
    or None."""
    entry, ours, against = images[system], features[system], reference_of(features)
    found: dict[str, Any] = {"kid": None, "fid": None, "rmse": None, "retrieval": None}
    if system != against:
        theirs = features[against]
        some = unit.of(entry.prompts[:KID_ROWS])
        found["kid"] = asdict(kid(ours[:KID_ROWS], theirs[:KID_ROWS], **some))
        if against == REAL and enough_for_frechet(ours):
            found["fid"] = {"value": frechet_distance(ours, theirs), "samples": len(ours)}
    if system in distances:
        found["rmse"] = asdict(mean_estimate(distances[system], **unit.of(entry.prompts)))
    if gallery is not None:
        whole = ours if len(ours) == len(entry.prompts) else array_of(entry, "features")
        found["retrieval"] = _retrieval(entry.prompts, whole, gallery, unit)
    return found


def reference_of(features: Container[str]) -> str:
    """What every system is compared with: real pictures, or an independent draw of the teacher."""
    return REAL if REAL in features else TEACHER_AGAIN


def _why_no_fid(features: np.ndarray, against: str) -> str:
    count, dimension = features.shape
    if against != REAL:
        return "it is a distance to real pictures, and evaluate.real names none"
    return (
        f"{count:,} samples; expected at least {least_for_frechet(dimension):,}, for with fewer it "
        "is mostly bias"
    )


def _compare(
    student: np.ndarray, baseline: np.ndarray, reference: np.ndarray, interval: dict[str, Any]
) -> dict[str, Any]:
    """Is the student nearer to the teacher than `baseline` is?"""
    difference = kid_difference(student, baseline, reference, **interval)
    return {"kid_difference": asdict(difference), "better": verdict(difference)}


def verdict(difference: Estimate) -> bool | str:
    """True, False, or "undecided" when the interval of student − baseline holds 0."""
    if difference.high < 0:
        return True
    return False if difference.low > 0 else "undecided"


def usable_gallery(
    gallery: Gallery | None, prompts: Sequence[str], features: np.ndarray
) -> tuple[Gallery | None, str]:
    """The gallery if retrieval can be measured with it, else why not. `features`: the teacher's."""
    if gallery is None:
        return None, f"{NOT_MEASURED}: the teacher's folder has no gallery of real pictures"
    if gallery.features.shape[1] != features.shape[1]:
        return None, (
            f"{NOT_MEASURED}: the gallery's features have {gallery.features.shape[1]} dimensions, "
            f"these pictures' {features.shape[1]}"
        )
    if not set(gallery.captions) & set(prompts):
        return None, f"{NOT_MEASURED}: no prompt names a picture of the teacher's gallery"
    return gallery, ""


def _retrieval(
    prompts: Sequence[str], features: np.ndarray, gallery: Gallery, unit: Unit
) -> list[dict[str, Any]]:
    interval = unit.of(prompts)
    found = retrieval(features, prompts, gallery.features, gallery.captions, **interval)
    return [asdict(entry) for entry in found]
