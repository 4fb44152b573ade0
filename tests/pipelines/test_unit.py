import pytest

from pipelines.unit import PICTURES, PROMPTS, Unit


@pytest.mark.parametrize(
    ("name", "prompts", "refused"),
    [
        (PROMPTS, ["cat", "dog", "fox"] * 10, "gives 3 distinct prompts; expected at least 10"),
        (PROMPTS, [f"cat {n}" for n in range(10)], ""),
        (PICTURES, ["0", "1", "2"] * 4, ""),  # the classes of a teacher of three
        (PICTURES, ["0", "1", "2"] * 3, "gives 9 pictures; expected at least 10"),
    ],
)
def test_intervals_need_enough_of_what_they_are_over(name, prompts, refused):
    found = Unit(0.95, name).too_few(prompts)
    assert refused in found and bool(refused) == bool(found)
