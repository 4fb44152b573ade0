"""Names in a run's folder that more than one module knows."""

CHECKPOINTS = "checkpoints"
