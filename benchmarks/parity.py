"""Do our formulas say what the public implementations say? Their files are run beside ours.

    python -m benchmarks.parity --dmd2 <clone> --fastgen <clone> [--write]

Prints, per quantity, the largest relative difference, twice: stage by stage, given what theirs
gave the stage, and end to end through the same networks. With `--write` the inputs and their
results become the golden data of `tests/dmd_core/test_parity.py`, which so needs no clone. What
was found: `docs/parity.md`.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save

from benchmarks import parity_dmd2, parity_fastgen
from benchmarks.parity_ours import ours
from benchmarks.parity_reference import Case, Networks, theirs_of

GOLDEN = Path(__file__).parent.parent / "tests" / "dmd_core" / "golden"
SEED = 9  # early and late times in every batch
# End to end the float32 rounding of the networks comes on top, multiplied by σ_t/α_t on its way to
# x₀, and by 1/σ_t when two x₀ are subtracted.
TOLERANCE, END_TO_END_TOLERANCE = 1e-5, 1e-3
# An element far below its tensor's mean is a difference of larger numbers; it is compared with
# this share of the mean instead.
FLOOR = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity")
    parser.add_argument("--dmd2", type=Path, required=True, help="clone of tianweiy/DMD2")
    parser.add_argument("--fastgen", type=Path, required=True, help="clone of NVlabs/FastGen")
    parser.add_argument("--write", action="store_true", help="renew the golden data")
    options = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation, so that the golden data can be made again
    agree = True
    for clone, reference in ((options.dmd2, parity_dmd2), (options.fastgen, parity_fastgen)):
        for case in reference.run(clone, SEED):
            agree &= report(case)
            if options.write:
                write_golden(case, clone)
    verdict = "agree" if agree else "DIFFER"
    print(f"{verdict} (tolerances {TOLERANCE:.0e} by stage, {END_TO_END_TOLERANCE:.0e} end to end)")
    return int(not agree)


def report(case: Case) -> bool:
    """Print one table; whether every difference is within its tolerance."""
    print(f"\n{case.name}: {', '.join(case.files)}")
    by_stage = differences(case, None)
    end_to_end = differences(case, case.networks) if case.networks else {}
    for quantity, difference in by_stage.items():
        shown = f"{end_to_end[quantity]:10.1e}" if end_to_end else ""
        print(f"  {quantity:20} {difference:10.1e} {shown}")
    whole = all(difference <= END_TO_END_TOLERANCE for difference in end_to_end.values())
    return whole and all(difference <= TOLERANCE for difference in by_stage.values())


def differences(case: Case, networks: Networks | None) -> dict[str, float]:
    """Largest relative difference of each quantity that the reference of `case` computed."""
    mine, theirs = ours(case.name, case.tensors, networks), theirs_of(case.tensors)
    if mine.keys() != theirs.keys():
        raise ValueError(f"{case.name}: {sorted(mine)} are ours; theirs are {sorted(theirs)}")
    return {name: relative_difference(mine[name], theirs[name]) for name in theirs}


def relative_difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """max |ours − theirs| / max(|theirs|, FLOOR · mean|theirs|); NaN where either has one."""
    if mine.shape != theirs.shape:
        raise ValueError(f"ours is {tuple(mine.shape)}; theirs is {tuple(theirs.shape)}")
    mine, theirs = mine.detach().double(), theirs.double()
    scale = theirs.abs().clamp_min(FLOOR * float(theirs.abs().mean()))
    return float(((mine - theirs).abs() / scale).max())


def write_golden(case: Case, clone: Path) -> None:
    """One safetensors file per case; it names the files that were run, by path and digest."""
    digests = {file: hashlib.sha256((clone / file).read_bytes()).hexdigest() for file in case.files}
    tensors = {name: value.contiguous().clone() for name, value in case.tensors.items()}
    GOLDEN.mkdir(exist_ok=True)
    path = GOLDEN / f"{case.name}.safetensors"
    # One entry: safetensors writes several in no fixed order.
    path.write_bytes(save(tensors, {"run": json.dumps({"seed": SEED, "sha256": digests})}))


if __name__ == "__main__":
    raise SystemExit(main())
