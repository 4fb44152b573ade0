"""`dmd pipeline` where only the place of the timing is another: what was measured stays."""

import pytest

from jobs.errors import Exit


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("evaluate__gpus_per_actor", 1),
        ("pairs__threads_per_actor", 2),
        ("evaluate__placement", "{accelerator_type: H100}"),
    ],
)
def test_the_metrics_stay_for_the_verb_to_go_on_with(pipeline, key, value):
    pipeline()
    metrics = pipeline.latest() / "metrics.json"
    written = metrics.stat().st_mtime_ns
    code, said, ran = pipeline(**{key: value})
    assert code == Exit.OK and ran == ["evaluate"] and key.replace("__", ".") in said
    assert metrics.stat().st_mtime_ns == written
    assert pipeline(**{key: value})[2] == []


def test_they_go_where_more_is_due(pipeline):
    pipeline()
    metrics, place = pipeline.latest() / "metrics.json", {"evaluate__gpus_per_actor": 1}
    for options, settings in (
        ((), place | {"evaluate__batch_size": 4}),
        (("--from", "evaluate"), {}),
        (("--from", "evaluate"), place),
    ):
        written = metrics.stat().st_mtime_ns
        code, said, ran = pipeline(*options, **settings)
        assert code == Exit.OK and ran[0] == "evaluate", said
        assert metrics.stat().st_mtime_ns != written

    (pipeline.latest() / "evaluation" / "noise").unlink()
    written = metrics.stat().st_mtime_ns
    assert pipeline()[2] == ["evaluate"]  # of the first settings, without its noise
    assert metrics.stat().st_mtime_ns != written
