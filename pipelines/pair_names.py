"""How the files of pairs are called.

Ray sends this to every task that writes a file. It stands alone so that those tasks import neither
torch nor diffusers: that would take each of their processes seconds of a core and 350 MB.
"""

from ray.data.datasource import FilenameProvider


class FencedNames(FilenameProvider):
    """The writer's fence comes first: who wrote a file can be seen, and sorted by."""

    def __init__(self, fence: int) -> None:
        super().__init__()
        self._fence = fence

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        return f"{self._fence:06d}_{write_uuid}_{task_index:06d}"
