"""What a plan says of space: all verbs in the same words."""

from typing import Any

from jobs.errors import Exit, JobError
from pipelines.costs import free_bytes
from pipelines.storage import Store


def with_space(plan: dict[str, Any], needed: int, store: Store) -> dict[str, Any]:
    """`plan` with the free space where `store` lies, if that can be known; refuses a plan that
    needs more (bytes)."""
    free = free_bytes(store)
    if free is None:
        return plan
    plan = plan | {"free_bytes": free}
    if needed > free:
        raise JobError(
            f"{size_in_words(needed)} are needed at {store.url}, which has "
            f"{size_in_words(free)} free; free some, or write elsewhere",
            Exit.REFUSED,
            result=plan,
        )
    return plan


def size_in_words(size: float) -> str:
    """12.3 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size >= 100 else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
