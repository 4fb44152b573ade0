"""The arithmetic of the benchmarks; what they measure is run by hand."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from benchmarks.architectures import watched
from benchmarks.cifar10 import fid_of_all
from benchmarks.pair_bench import Result, compared, steady_rate
from benchmarks.train import leaner
from benchmarks.train_networks import Case, write_teacher
from benchmarks.train_ours import ours
from benchmarks.train_windows import rate_after, seconds_per_save
from benchmarks.train_work import peak_between, weights_of
from benchmarks.two_losses import compare
from dmd_core.metrics import frechet_distance


def test_the_steady_rate_leaves_out_the_first_batch_and_what_came_before_it():
    stamps = [(7, 100.0, 64), (7, 102.0, 64), (7, 104.0, 32)]
    assert steady_rate(stamps) == pytest.approx(96 / 4)


def test_two_workers_count_from_when_both_have_finished_a_batch():
    """Worker 1 works alone until 12 and after 14; 10 rows/s each while both work."""
    one = [(1, 10.0 + k, 10) for k in range(9)]
    two = [(2, 12.0, 10), (2, 13.0, 10), (2, 14.0, 10)]
    assert steady_rate(two + one) == pytest.approx((60 + 20) / 6)
    assert steady_rate(two + one, until_first_ends=True) == pytest.approx(20)


def test_a_batch_under_way_at_the_start_counts_by_its_share():
    one, two = [(1, 0.0, 10), (1, 4.0, 8), (1, 6.0, 8)], [(2, 3.0, 5), (2, 6.0, 30)]
    assert steady_rate(one + two) == pytest.approx((8 / 4 + 8 + 30) / 3)


@pytest.mark.parametrize("stamps", [[], [(1, 5.0, 64)], [(1, 5.0, 64), (1, 6.0, 64), (2, 6.0, 64)]])
def test_too_few_batches_have_no_rate(stamps):
    with pytest.raises(ValueError, match="batches"):
        steady_rate(stamps)


def test_the_ratio_is_that_of_the_median_round():
    """A slow round slows both contenders: their medians come from different rounds."""
    rates = [(10.0, 10.0), (30.0, 20.0), (24.0, 30.0)]
    rounds = [{"ours": {"rate": a}, "theirs": {"rate": b}} for a, b in rates]
    result = compared("x", 0.97, rounds, "ours", "theirs")
    assert (result.measured, result.reference, result.ratio) == (24.0, 20.0, 1.0)
    assert result.spread == (0.8, 1.5)
    assert [found["ratio"] for found in result.rounds] == pytest.approx([1.0, 1.5, 0.8])
    assert result.met


def test_a_limit_is_met_by_less_and_a_ratio_by_more():
    spread = (0.0, 1.0)
    assert Result("x", 60.0, None, "s", 60, False, spread).met
    assert not Result("x", 60.1, None, "s", 60, False, spread).met
    assert Result("x", 1.0, 100.0, "rows/s", 0.7, True, spread, 0.7).met
    assert not Result("x", 100.0, 1.0, "rows/s", 0.7, True, spread, 0.69).met


def test_the_rate_of_a_run_leaves_out_its_first_steps():
    """100 samples in 1 s are not counted; then 200 in 4 s and 100 in 1 s."""
    windows = [(10, 100.0), (30, 50.0), (40, 100.0)]
    assert rate_after(windows, 10, 10) == pytest.approx(300 / 5)
    with pytest.raises(ValueError, match="step 40"):
        rate_after(windows, 40, 10)


def test_what_a_save_costs_is_told_from_a_machine_that_slows_down():
    """Windows of 10, 11, 12 … s, and 3 and 2 s more after each save; one is due after every 4."""
    windows = [10.0 + n + (3 * (n % 4 == 0) + 2 * (n % 4 == 1)) * (n >= 4) for n in range(15)]
    assert seconds_per_save(windows, 4) == pytest.approx([5.0, 5.0])


def test_the_peak_counts_what_was_held_before_and_not_what_was_freed_before():
    """Bytes held: 7, then 3 at the start; 8 and 1 in the window; 21 after it. Not in order."""
    changes = [(30, -7), (2, 7), (5, -4), (20, 5), (99, 20)]
    assert peak_between(changes, 10, 50) == {"peak": 8, "rest": 3}
    assert peak_between(changes, 40, 50) == {"peak": 1, "rest": 1}


def test_less_memory_is_better():
    found = {"ours": {"peak": 3_000_000}, "dmd2": {"peak": 4_000_000}}
    result = leaner("x", found)
    assert (result.measured, result.reference, result.ratio) == (3.0, 4.0, 0.75)
    assert result.met
    assert not leaner("x", {"ours": found["dmd2"], "dmd2": found["ours"]}).met


def test_the_memory_of_a_command_is_that_of_its_largest_descendant():
    """A grandchild takes 200 MB and gives them back before it ends."""
    grow = "import time; x = bytes(1) * 200_000_000; time.sleep(2); del x; time.sleep(1)"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grow!r}])"
    process = subprocess.Popen([sys.executable, "-c", start])
    with watched(process.pid, gpu=False) as seen:
        process.wait()
    assert 200e6 < max(seen) < 300e6 and seen[-1] < 200e6


def test_our_side_takes_a_step_of_every_loss(tmp_path):
    write_teacher("tiny", tmp_path / "teacher")
    case = Case("sd", True, "bf16", 2, 2, "tiny", str(tmp_path / "teacher"), clone="unused")
    side = ours(case)
    before = [next(module.parameters()).clone() for module in side.modules]
    side.step()
    after = [next(module.parameters()) for module in side.modules]
    assert [bool((a != b).any()) for a, b in zip(after, before, strict=True)] == [
        False,  # the teacher
        True,
        True,
        True,
    ]
    assert len(weights_of(side)) == 4


def test_runs_that_differ_in_more_than_the_loss_are_not_compared(tmp_path):
    for name, rate in (("both", 1e-4), ("regression", 2e-4)):
        train = {"dm_weight": float(name == "both"), "learning_rate": rate}
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text("{}")
        content = yaml.safe_dump({"train": train, "pairs": {}})
        (tmp_path / name / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"differ in \['train.dm_weight', 'train.learning_rate'\]"):
        compare(tmp_path / "both", tmp_path / "regression")


@pytest.mark.slow
def test_the_factory_s_benchmark_runs(tmp_path):
    """Not what it measures: that both sides of each comparison do their work."""
    out = tmp_path / "pairs.json"
    parts = "overhead,pipeline,single,sealing,reading"
    command = [sys.executable, "-m", "benchmarks.pairs", "--quick", "--repeats", "1"]
    subprocess.run([*command, "--only", parts, "--out", str(out)], check=True, timeout=900)
    results = json.loads(out.read_text())["results"]
    assert len(results) >= 5
    assert all(found["measured"] > 0 for found in results)


def test_fid_of_few_pictures_tells_what_many_would_have():
    """On Gaussians that are alike, whose FID is all bias: averaged over draws, what 800 rows are
    extrapolated to is what 50,000 have."""
    rng = np.random.default_rng(0)
    told, true, few = [], [], []
    for _ in range(20):
        train, test = rng.normal(size=(50_000, 8)), rng.normal(size=(2_000, 8))
        few.append(frechet_distance(train[:800], test))
        found = fid_of_all(train[:800], test, few[-1])
        assert found is not None
        told.append(found["extrapolated to 50000"])
        true.append(frechet_distance(train, test))
    assert np.mean(few) > 3 * np.mean(true)
    assert abs(np.mean(told) - np.mean(true)) < 0.1 * np.mean(few)
    assert fid_of_all(train[:60], test, 0.0) is None
