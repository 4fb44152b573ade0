"""Imports go one way: tests → everything; jobs → pipelines → dmd_core; jobs → cluster."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "dmd_core": {"dmd_core"},
    "pipelines": {"pipelines", "dmd_core"},
    "cluster": {"cluster"},
    "jobs": {"jobs", "pipelines", "dmd_core", "cluster"},
}
BANNED = {"dmd_core": {"ray", "pyarrow", "pydantic"}, "cluster": {"torch"}}
ONLY_JOBS_MAY = ("environ", "getenv")


def _imports(tree: ast.AST) -> set[str]:
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            roots.add(node.module.split(".")[0])
    return roots


def violations(package: str, source: str) -> set[str]:
    """The names that `source`, a module of `package`, must not import."""
    roots = _imports(ast.parse(source))
    foreign = (set(MAY_IMPORT) | {"tests", "benchmarks"}) - MAY_IMPORT[package]
    return roots & (foreign | BANNED.get(package, set()))


@pytest.mark.parametrize("package", list(MAY_IMPORT))
def test_imports_go_one_way(package):
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in (ROOT / package).rglob("*.py")
        if (wrong := violations(package, path.read_text()))
    }
    assert not found


@pytest.mark.parametrize("package", ["dmd_core", "pipelines"])
def test_library_code_reads_no_environment(package):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ONLY_JOBS_MAY, f"{path}:{node.lineno} reads the environment"


def test_a_task_that_writes_pairs_imports_no_network():
    """It is sent the names of the files: see there."""
    code = (
        "import pipelines.pair_names, sys; print(sorted({'torch', 'diffusers'} & {*sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_the_rule_catches_what_it_should():
    assert violations("dmd_core", "import ray") == {"ray"}
    assert violations("dmd_core", "def f():\n    from pipelines import pairs") == {"pipelines"}
    assert violations("pipelines", "from jobs.config import Recipe") == {"jobs"}
    assert violations("jobs", "import cluster.local, ray") == set()
