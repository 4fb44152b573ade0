"""Our formulas against tianweiy/DMD2 and NVlabs/FastGen, on what those computed once.

Oracle: independent implementations. `golden/*.safetensors` hold their inputs, the raw outputs of
the networks and, under "theirs.", their results; `benchmarks.parity --write` made them by running
their files, and says which. See docs/parity.md.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.parity_ours import CASES, ours
from benchmarks.parity_reference import theirs_of

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("case", CASES)
def test_our_values_are_those_of_the_reference(case):
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    theirs = theirs_of(tensors)
    mine = ours(case, tensors)
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        # The floor is one for elements far below the mean: differences of larger float32 numbers.
        floor = 1e-6 * float(expected.abs().mean())
        torch.testing.assert_close(
            mine[name].detach(),
            expected,
            rtol=1e-5,
            atol=floor,
            check_dtype=False,
            msg=lambda text, name=name: f"{case}: {name}\n{text}",
        )


def test_every_golden_file_is_compared():
    assert {path.stem for path in GOLDEN.glob("*.safetensors")} == set(CASES)
