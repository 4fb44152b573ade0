"""`dmd train` as the chaos tests start it: an elastic group looks for more room every second."""

import sys

from jobs.cli import main
from pipelines import workers

if __name__ == "__main__":
    workers._RESIZE_CHECK_S = 1.0
    raise SystemExit(main(["train", *sys.argv[1:]]))
