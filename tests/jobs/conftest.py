"""Fixtures of the tests of the verbs."""

import pytest

from tests.jobs.fake_chain import FakeVerbs
from tests.jobs.fake_pipeline import Pipeline


@pytest.fixture
def pipeline(tiny_teacher_dir, tmp_path, capfd, monkeypatch) -> Pipeline:
    return Pipeline(tmp_path, tiny_teacher_dir, FakeVerbs(monkeypatch.setattr), capfd)
