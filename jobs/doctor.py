"""`dmd doctor`: check machine, store, cluster and teacher before anything costs money."""

import argparse
from collections.abc import Iterator
from typing import Any

from dmd_core.files import is_local
from jobs import doctor_machine as machine
from jobs import doctor_store as stores
from jobs.doctor_checks import Check, summary, table_of
from jobs.doctor_cluster import check_cluster
from jobs.errors import Exit, JobError
from jobs.session import Session
from pipelines.storage import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `dmd doctor` takes beside the common options."""
    parser.add_argument(
        "--address",
        metavar="URL",
        help="check this job server (http://head:8265) or cluster (host:6379, auto) in place of "
        "the recipe's",
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="ask a large teacher's network what it predicts, though there is no GPU here",
    )


def run(session: Session) -> dict[str, Any]:
    """Every check, as a table; raises `JobError` with exit code 3 where one fails."""
    checks = []
    for check in _checks(session):
        checks.append(check)
    session.display.console.print(table_of(checks))
    result = summary(checks)
    failed = [check.name for check in checks if check.status == "fail"]
    if failed:
        raise JobError(
            f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}; the table says "
            "what to do",
            Exit.REFUSED,
            result=result,
        )
    session.display.done(f"doctor: nothing stands in the way; {result['warn']} warnings")
    return result


def plan(session: Session) -> dict[str, Any]:
    """What `run` would do; touches nothing."""
    return {
        "machine": "Python, packages, torchvision, devices, memory, shared memory",
        "cluster": session.arguments.address or session.recipe.ray.address or "none named",
        "writes_and_removes": ", ".join(
            f"{store.url}/.doctor-…" for store in _stores(session).values()
        ),
        "teacher": f"{session.recipe.teacher.path}: parts, memory of a training, prediction type",
        "prompts": session.recipe.pairs.prompts,
    }


def _checks(session: Session) -> Iterator[Check]:
    recipe, say = session.recipe, session.display.say
    yield machine.python_version()
    yield machine.package_versions()
    yield machine.torchvision()
    yield machine.devices(recipe)
    yield machine.memory(recipe)
    yield machine.shared_memory(recipe)
    say("doctor: looking at the store and the cluster")
    yield from _store_checks(session)
    yield from check_cluster(recipe, session.arguments.address)
    say("doctor: looking at the teacher")
    from jobs.doctor_teacher import prompts, teacher_checks

    yield prompts(session)
    found, needed = teacher_checks(session, deep=session.arguments.deep)
    yield from found
    yield from machine.disk(_stores(session), needed)


def _store_checks(session: Session) -> Iterator[Check]:
    options = session.recipe.storage
    if any(not is_local(store.fs) for store in _stores(session).values()):
        found = stores.credentials(options)
        yield found
        reached = stores.endpoint(options)
        if reached is not None:
            yield reached
        if "fail" in (found.status, reached.status if reached else ""):
            return
    for key, store in _stores(session).items():
        yield from stores.check_store(key, store)


def _stores(session: Session) -> dict[str, Store]:
    """run.dir, and pairs.root where it lies elsewhere."""
    run, pairs = session.store, session.pairs_root
    within = type(run.fs) is type(pairs.fs) and f"{pairs.root}/".startswith(f"{run.root}/")
    return {"run.dir": run} if within else {"run.dir": run, "pairs.root": pairs}


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("doctor"))
