"""`dmd doctor` on this machine: Python, packages, devices, memory, disks."""

import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from jobs.config import Recipe
from jobs.doctor_checks import Check
from jobs.placement import is_embedded
from jobs.plans import size_in_words
from pipelines.costs import free_bytes
from pipelines.storage import Store

_DISTRIBUTION = "one-step-dmd"
_SHM = "/dev/shm"
_LITTLE_DISK = 2 << 30
_ALMOST_FULL = 0.95  # Ray stops to spill there
_IMPORT_SECONDS = 120


def python_version() -> Check:
    wanted, found = _declared()[0], platform.python_version()
    if wanted.contains(found):
        return Check("python", "ok", f"{found} ({sys.executable})")
    return Check("python", "fail", found, f"expected {wanted}; make a new environment")


def package_versions() -> Check:
    """Every package that this project asks for; those of extras only where they are installed."""
    problems, right = [], 0
    for requirement, extra in _declared()[1]:
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            if not extra:
                problems.append(f"{requirement.name} is not installed ({requirement.specifier})")
            continue
        if requirement.specifier.contains(found, prereleases=True):
            right += 1
        else:
            problems.append(f"{requirement.name} {found}, expected {requirement.specifier}")
    if problems:
        advice = "make install, or pip install -e . -c constraints.txt in a clean environment"
        return Check("packages", "fail", "; ".join(problems), advice)
    return Check("packages", "ok", f"{right} packages within their ranges")


def torchvision() -> Check:
    """Nothing here needs it, but diffusers and transformers import it where it is installed."""
    try:
        found = version("torchvision")
    except PackageNotFoundError:
        return Check("torchvision", "ok", "not installed, and not needed")
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import torchvision"],
            capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Check("torchvision", "warn", f"{found}: no import within {_IMPORT_SECONDS} s")
    if done.returncode == 0:
        return Check("torchvision", "ok", found)
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Check(
        "torchvision", "fail", f"{found} cannot be imported ({last}); diffusers would fail with it",
        "pip uninstall torchvision, or install the one that belongs to the installed torch",
    )  # fmt: skip


def devices(recipe: Recipe) -> Check:
    import torch

    wants = [
        key
        for key, asked in (
            ("pairs.gpus_per_actor", recipe.pairs.gpus_per_actor),
            ("train.use_gpu", recipe.train.use_gpu),
            ("evaluate.gpus_per_actor", recipe.evaluate.gpus_per_actor),
        )
        if asked
    ]
    if torch.cuda.is_available():
        names = [
            f"{p.name} ({size_in_words(p.total_memory)})"
            for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
        found = f"torch {torch.__version__}: {', '.join(names)}"
        unused = "" if wants else "the recipe asks for no GPU (pairs.gpus_per_actor, train.use_gpu)"
        return Check("devices", "warn" if unused else "ok", found, unused)
    found = f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads, no GPU"
    if not wants:
        return Check("devices", "ok", found)
    if is_embedded(recipe):
        return Check(
            "devices", "fail", f"{found}, but {', '.join(wants)} ask for some",
            "set ray.address to a cluster that has GPUs, or ask for none",
        )  # fmt: skip
    return Check("devices", "ok", f"{found}; GPUs are asked of the cluster")


def disk(stores: dict[str, Store], needed: int) -> list[Check]:
    """`needed`: bytes of the checkpoints that a training keeps (0: not known)."""
    checks = []
    for key, store in stores.items():
        free = free_bytes(store)
        if free is None:
            continue
        least = needed if key == "run.dir" else 0
        found = f"{size_in_words(free)} free at {store.url}"
        if least:
            found += f"; checkpoints need {size_in_words(least)}"
        if free < least or free < _LITTLE_DISK // 8:
            checks.append(Check(f"disk: {key}", "fail", found, "free some, or write elsewhere"))
        else:
            status = "warn" if free < least + _LITTLE_DISK else "ok"
            checks.append(Check(f"disk: {key}", status, found, "little is left" * (status != "ok")))
    return [*checks, _temporary_disk()]


def _temporary_disk() -> Check:
    folder = tempfile.gettempdir()
    usage = shutil.disk_usage(folder)
    used = 1 - usage.free / usage.total
    found = f"{size_in_words(usage.free)} free, {used:.0%} used, at {folder}"
    if used > _ALMOST_FULL:
        advice = "Ray keeps its session there and stops to spill above 95 %; free some"
        return Check("disk: temporary", "warn", found, advice)
    return Check("disk: temporary", "ok", found)


def memory(recipe: Recipe) -> Check:
    """RAM for an embedded Ray's object store; what networks need is another check."""
    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    found = f"{size_in_words(free)} of {size_in_words(total)} available"
    store = recipe.ray.object_store_mb << 20
    if is_embedded(recipe) and free < 2 * store:
        advice = f"the object store takes {size_in_words(store)}; lower ray.object_store_mb"
        return Check("memory", "warn", found, advice)
    return Check("memory", "ok", found)


def shared_memory(recipe: Recipe) -> Check:
    """Ray's object store lies in shared memory, or, much slower, on the disk."""
    if not Path(_SHM).is_dir():
        return Check("shared memory", "skip", f"no {_SHM} on {platform.system()}")
    free, store = shutil.disk_usage(_SHM).free, recipe.ray.object_store_mb << 20
    found = f"{size_in_words(free)} free in {_SHM}"
    if not is_embedded(recipe):
        return Check("shared memory", "ok", f"{found}; the object store is the cluster's")
    if free < store:
        return Check(
            "shared memory", "warn", f"{found}, the object store takes {size_in_words(store)}",
            "docker run --shm-size=…, or lower ray.object_store_mb; else Ray uses the disk",
        )  # fmt: skip
    return Check("shared memory", "ok", found)


def _declared() -> tuple[SpecifierSet, list[tuple[Requirement, str]]]:
    """The Python versions and packages that this project asks for: from its installation, or from
    pyproject.toml where it runs from a checkout. With each package its extra, or ""."""
    try:
        about = metadata(_DISTRIBUTION)
    except PackageNotFoundError:
        file = Path(__file__).parent.parent / "pyproject.toml"
        project = tomllib.loads(file.read_text())["project"]
        return SpecifierSet(project["requires-python"]), [
            (Requirement(line), extra) for line, extra in _of_project(project)
        ]
    found = []
    for line in about.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        found.append((requirement, "" if needed else "extra"))
    return SpecifierSet(about["Requires-Python"]), found


def _of_project(project: dict) -> Iterator[tuple[str, str]]:
    yield from ((line, "") for line in project["dependencies"])
    for extra, lines in project.get("optional-dependencies", {}).items():
        yield from ((line, extra) for line in lines)
