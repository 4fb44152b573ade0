"""What a check of `dmd doctor` finds, and how the table shows it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table

Status = Literal["ok", "warn", "fail", "skip"]
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


@dataclass(frozen=True)
class Check:
    """`found` in words; `advice`: what to do, where something is to be done."""

    name: str
    status: Status
    found: str
    advice: str = ""


def table_of(checks: Iterable[Check]) -> Table:
    table = Table(show_lines=False, pad_edge=False, box=None, header_style="bold")
    for column in ("check", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        style = _STYLES[check.status]
        table.add_row(
            check.name, f"[{style}]{check.status}[/]", _plain(check.found), _plain(check.advice)
        )
    return table


def summary(checks: Iterable[Check]) -> dict[str, Any]:
    """For `--json`: the number of each status, and every check."""
    checks = list(checks)
    counts = {status: sum(check.status == status for check in checks) for status in _STYLES}
    return counts | {"checks": [asdict(check) for check in checks]}


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
