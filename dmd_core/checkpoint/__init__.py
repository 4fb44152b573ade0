"""Station 7: training state ↔ a folder whose marker is written last.

A checkpoint is `checkpoint-<step>/` with `<part>-<rank>.safetensors`, `index.json` (which piece of
which tensor lies where), `state.json`, and `MANIFEST.json` (size and sha256 of every file), written
after everything else. No manifest: the folder does not exist for us. A manifest whose files do not
match is an error, never "start at step 0". torch.distributed.checkpoint plans what each rank writes
and reads, so that a state fits any number of ranks; the storage is ours, without pickle.

`format.py`: names, index and errors. `folder.py`: marker and verified files. `writer.py`,
`reader.py`: torch's storage interface on them. `ranks.py`: all ranks succeed or fail together.
`saver.py`: writing, also in the background. `loading.py`: reading. `steps.py`: which steps there
are, retention, orphans. `optimizer.py`: an optimizer's state as named tensors.
"""

from dmd_core.checkpoint.format import MARKER, CheckpointError, Tensors, checkpoint_path
from dmd_core.checkpoint.loading import (
    damage,
    load_checkpoint,
    read_state,
    restore_checkpoint,
    stored_tensors,
)
from dmd_core.checkpoint.optimizer import pack_optimizer, unpack_optimizer
from dmd_core.checkpoint.saver import Checkpoint, CheckpointSaver, save_checkpoint
from dmd_core.checkpoint.steps import (
    collect_orphans,
    committed_steps,
    discard_checkpoint,
    prune_checkpoints,
    remove_checkpoint,
)

__all__ = [
    "MARKER",
    "Checkpoint",
    "CheckpointError",
    "CheckpointSaver",
    "Tensors",
    "checkpoint_path",
    "collect_orphans",
    "committed_steps",
    "damage",
    "discard_checkpoint",
    "load_checkpoint",
    "pack_optimizer",
    "prune_checkpoints",
    "read_state",
    "remove_checkpoint",
    "restore_checkpoint",
    "save_checkpoint",
    "stored_tensors",
    "unpack_optimizer",
]
