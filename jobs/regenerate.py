"""`dmd regenerate`: bring the pair data set up to date, keep the newest versions, drop the rest."""

from typing import Any

from jobs import pairs
from jobs.session import Session


def run(session: Session) -> dict[str, Any]:
    """Compare prompts, teacher and sampler with the newest version; make what is missing, seal,
    collect. Does nothing when nothing has changed."""
    outcome = pairs.fill(session, "regenerate", keep=session.recipe.pairs.keep_versions)
    return pairs.summary(outcome, session)


def plan(session: Session) -> dict[str, Any]:
    """What `run` would do; writes nothing."""
    return pairs.plan(session) | {"keeps_versions": session.recipe.pairs.keep_versions}


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("regenerate"))
