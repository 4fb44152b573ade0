"""What a training run reads, fixed when it starts."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Pins:
    """What a run reads, fixed when it starts. `versions`: manifest version → digest, of every
    version that a stage asks for; `default` is the one of stages that name none (None: no pairs).
    `prompts`: a prompt file in place of the pairs' own prompts. Digests "": not used."""

    default: int | None
    versions: dict[int, str]
    prompts: str = ""
    prompts_digest: str = ""
    pictures_digest: str = ""

    @property
    def digest(self) -> str:
        """Of the default version; "" without pairs."""
        return "" if self.default is None else self.versions[self.default]

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Pins":
        versions = {int(version): digest for version, digest in content["versions"].items()}
        return replace(Pins(**content), versions=versions)
