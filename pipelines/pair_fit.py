"""Can a student of this teacher learn from this version? Asked before training and at each switch
to a newer version."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.commits import list_files
from pipelines.landed import landed_tables
from pipelines.manifest_model import Manifest
from pipelines.pair_files import PairFiles
from pipelines.storage import Store

_SIZE = re.compile(r"-(\d+)x(\d+)\.parquet$")


@dataclass(frozen=True)
class PairFit:
    """`revision` of the teacher; `latent_shape(height, width)` in pixels (None: the teacher's own)
    gives its (C,h,w); training runs at `height` × `width`."""

    revision: str
    latent_shape: Callable[[int | None, int | None], tuple[int, ...]]
    height: int | None
    width: int | None

    def misfit(self, root: Store, manifest: Manifest) -> str:
        """What is wrong with the version, as the end of a sentence about it; "": it fits.

        Reads a listing and one footer. Every other file is compared with that one when it is read.
        """
        made_by = manifest.fingerprint["teacher_revision"]
        if made_by != self.revision:
            return (
                f"was made by teacher {made_by[:16]}…, but this teacher is {self.revision[:16]}…; "
                "a student learns from its own teacher's pairs only"
            )
        shapes = self._landed_shapes(root, manifest)
        if len(shapes) > 1:
            names = ", ".join(map(str, sorted(shapes)))
            return (
                f"holds latents of several shapes: {names}; training reads one: keep prompts of "
                "another size in a data set of their own"
            )
        stored = PairFiles(root, manifest, verify=False).layout().shape
        wanted = self.latent_shape(self.height, self.width)
        if stored != wanted:
            return (
                f"holds latents of shape {stored}; the teacher with pairs.height {self.height} and "
                f"pairs.width {self.width} has {wanted}"
            )
        return ""

    def _landed_shapes(self, root: Store, manifest: Manifest) -> set[tuple[int, ...]]:
        """Of the sizes that the version's prompts asked for; empty: their tables are gone."""
        names = landed_tables(manifest.prompts_digest, list_files(root, root.path("prompts")))
        own = manifest.fingerprint["height"], manifest.fingerprint["width"]
        sizes = [_SIZE.search(name) for name in names]
        return {self.latent_shape(*(map(int, size.groups()) if size else own)) for size in sizes}
