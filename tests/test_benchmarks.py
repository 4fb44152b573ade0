"""The arithmetic of the benchmarks; what they measure is run by hand."""

import pytest

from benchmarks.pair_bench import Result, compared, steady_rate


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
