"""What a training run reads, fixed when it starts."""

from dataclasses import dataclass, replace
from typing import Any

from pipelines.prompt_files import PromptSource


@dataclass(frozen=True)
class Pins:
    """What a run reads, fixed when it starts. `versions`: manifest version → digest, of every
    version that a stage asks for; `default` is the one of stages that name none (None: no pairs).
    `prompts`: prompt files (with their `prompt_column`) in place of the pairs' own prompts. Digests
    "": not used."""

    default: int | None
    versions: dict[int, str]
    prompts: tuple[str, ...] = ()
    prompt_column: str = "prompt"
    prompts_digest: str = ""
    pictures_digest: str = ""

    @property
    def digest(self) -> str:
        """Of the default version; "" without pairs."""
        return "" if self.default is None else self.versions[self.default]

    @property
    def prompt_source(self) -> PromptSource:
        return PromptSource(self.prompts, self.prompt_column)

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Pins":
        versions = {int(version): digest for version, digest in content["versions"].items()}
        prompts = tuple(content.get("prompts", ()))
        return replace(Pins(**content), versions=versions, prompts=prompts)
