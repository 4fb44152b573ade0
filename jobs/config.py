"""One YAML file per run → one validated `Recipe`.

`--set a.b=c` overrides any key. An error names the key, the value, what was expected, and the
nearest key that exists. Names in YAML come from closed lists, never from import paths.
"""

import difflib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from cluster.secrets import SecretError, refuse_secrets
from jobs.errors import Exit, JobError
from pipelines.config import (
    EvaluateSection,
    PairsSection,
    RaySection,
    RunSection,
    Section,
    StorageSection,
    TeacherSection,
    TeacherTrainSection,
)
from pipelines.costs import CostSection
from pipelines.train_config import TrainSection

_SHIPPED = {
    "shipped:emoji": "emoji-teacher",
    "shipped:demo": "demo_prompts.txt",
    "shipped:few": "few_prompts.txt",
    "shipped:held_out": "held_out_prompts.txt",
    "shipped:cifar10": "cifar10_classes.txt",
}
_MAX_CONFIG_BYTES = 1_000_000
# How pydantic names the members of a union among the parts of a key.
_MEMBER = re.compile(r"constrained-\w+|[\w-]+\[.*\]")


class Recipe(Section):
    """Everything a run needs; every section has defaults."""

    run: RunSection = Field(default_factory=RunSection)
    storage: StorageSection = Field(default_factory=StorageSection)
    ray: RaySection = Field(default_factory=RaySection)
    cost: CostSection = Field(default_factory=CostSection)
    teacher: TeacherSection = Field(default_factory=TeacherSection)
    pairs: PairsSection = Field(default_factory=PairsSection)
    train: TrainSection = Field(default_factory=TrainSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    train_teacher: TeacherTrainSection = Field(default_factory=TeacherTrainSection)

    @property
    def pairs_root(self) -> str:
        return self.pairs.root or f"{self.run.dir.rstrip('/')}/pairs"


def read_settings(name: str, overrides: list[str]) -> dict[str, Any]:
    """What a YAML path or shipped recipe and the overrides say, without defaults. A recipe is kept
    in the run's folder and sent to clusters: what looks like a credential is refused."""
    try:
        refuse_secrets(overrides, "--set")
        settings = _read_yaml(_recipe_path(name))
        for override in overrides:
            _apply_override(settings, override)
        refuse_secrets(settings)
    except SecretError as error:
        raise JobError(f"recipe {name}: {error}", Exit.USAGE) from error
    return settings


def load_recipe(name: str, overrides: list[str]) -> Recipe:
    """Read a YAML path or the name of a shipped recipe, apply overrides, validate."""
    settings = read_settings(name, overrides)
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise JobError(_explain(error, name), Exit.USAGE) from error


def shipped_recipes() -> list[str]:
    folder = resources.files("jobs") / "recipes"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def resolve_shipped(value: str) -> str:
    """`shipped:<name>` → the path inside the package; anything else unchanged."""
    if not value.startswith("shipped:"):
        return value
    if value not in _SHIPPED:
        raise JobError(f"{value!r} is not one of {', '.join(_SHIPPED)}", Exit.USAGE)
    return str(resources.files("jobs") / "assets" / _SHIPPED[value])


def dump_recipe(recipe: Recipe) -> str:
    return yaml.safe_dump(json.loads(recipe.model_dump_json()), sort_keys=False)


def _recipe_path(name: str) -> Path:
    if Path(name).suffix in (".yaml", ".yml"):
        path = Path(name)
    else:
        path = Path(str(resources.files("jobs") / "recipes" / f"{name}.yaml"))
    if not path.is_file():
        beside = f"{name}.yaml"
        there = f" Did you mean {beside}?" if Path(beside).is_file() else ""
        raise JobError(
            f"no recipe {name!r}: expected a YAML file or one of {', '.join(shipped_recipes())}."
            f"{there}",
            Exit.USAGE,
        )
    return path


class _StrictLoader(yaml.SafeLoader):
    """safe_load that refuses a key given twice (YAML would silently keep the last)."""


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: key {key!r} is given twice")
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates
)


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise JobError(f"{path} is larger than 1 MB; expected a short YAML recipe", Exit.USAGE)
    try:
        settings = _StrictLoader(path.read_text()).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise JobError(f"{path} is not valid YAML: {yaml_problem(error)}", Exit.USAGE) from error
    if not isinstance(settings, dict):
        raise JobError(f"{path} holds no settings; expected sections such as `pairs:`", Exit.USAGE)
    return settings


def yaml_problem(error: Exception) -> str:
    """What is wrong and where, without the text around it, which need not be shown."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)


def _apply_override(settings: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    parts = key.strip().split(".")
    if not separator or len(parts) < 2 or not all(parts):
        raise JobError(f"--set {key!r}: expected section.key=value", Exit.USAGE)
    try:
        parsed = _StrictLoader(value).get_single_data()
        comment = _has_comment(value)
    except yaml.YAMLError as error:
        raise JobError(
            f"--set {key!r}: its value is not valid YAML: {yaml_problem(error)}", Exit.USAGE
        ) from error
    if comment:
        raise JobError(
            f"--set {key!r}: YAML drops what follows a # after a space; quote text that holds one: "
            f"--set '{key.strip()}=\"…\"'",
            Exit.USAGE,
        )
    node = settings
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise JobError(f"--set {key!r}: {part!r} is not a section", Exit.USAGE)
    node[parts[-1]] = parsed


def _has_comment(text: str) -> bool:
    """Is there a # that YAML would not read as part of a value?"""
    end = 0
    for token in yaml.scan(text):
        if "#" in text[end : token.start_mark.index]:
            return True
        end = token.end_mark.index
    return "#" in text[end:]


def _explain(error: ValidationError, source: str) -> str:
    found: dict[str, list[str]] = {}  # key → what is wrong: of a union, for each of its members
    given: dict[str, str] = {}
    for entry in error.errors():
        location = [part for part in map(str, entry["loc"]) if not _MEMBER.fullmatch(part)]
        key = ".".join(location)
        if entry["type"] == "extra_forbidden":
            message = f"unknown key{_nearest(location)}"
        else:
            message = entry["msg"].removeprefix("Value error, ").removeprefix(f"{key}: ")
            message = message.replace("valid tuple", "valid list, as in [1, 2]")
            message = re.sub(r"valid dictionary or instance of \w+", "mapping", message)
            if entry["type"] != "missing" and not isinstance(entry["input"], dict):
                given[key] = f" (given: {entry['input']!r})"
        found.setdefault(key, []).append(message)
    lines = [f"  {key}: {_either(said)}{given.get(key, '')}" for key, said in found.items()]
    return "\n".join([f"recipe {source} is not valid:", *lines])


def _either(messages: list[str]) -> str:
    first, *others = messages
    return first + "".join(f", or {each.removeprefix('Input should be ')}" for each in others)


def _nearest(location: list[str]) -> str:
    """The valid key a typing error most likely meant, at that place or in any section."""
    here: type[BaseModel] = Recipe
    for part in location[:-1]:
        field = here.model_fields.get(part)
        if field is None:
            return ""
        candidates = [field.annotation, *get_args(field.annotation)]
        models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not models:
            return ""
        here = models[0]
    close = difflib.get_close_matches(location[-1], here.model_fields, n=1)
    if close:
        return f"; did you mean {'.'.join([*location[:-1], close[0]])}?"
    return f"; expected one of {', '.join(here.model_fields)}"
