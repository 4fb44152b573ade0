"""How `dmd inspect` shows what it has found: tables and lines."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from pipelines.inspection_facts import GenerationFacts, Overview, VersionFacts

_DIGEST_CHARACTERS = 16
_REASONS = 5
_MADE_WITH = ("torch", "diffusers")
COST_NOTE = (
    "teacher-s: seconds that teachers computed; GPU-s: those on GPUs, times the GPUs of a teacher; "
    "loading and waiting are in neither"
)


def versions_table(facts: Overview) -> Table:
    numbers = ("rows", "rejected", "excluded", "missing", "files", "size")
    table = _table("versions", "version", *numbers)
    table.add_column("fingerprint", no_wrap=True)
    table.add_column("notes")
    lines = {version.version: _version_row(version) for version in facts.versions}
    for number in facts.void:
        lines[number] = [str(number), *["–"] * len(numbers), "", "void"]
    for number in sorted(lines):
        _add_row(table, lines[number], style="dim" if number in facts.void else "")
    return table


def _version_row(version: VersionFacts) -> list[str]:
    return [
        str(version.version),
        f"{version.rows:,}",
        f"{version.rejected:,}",
        f"{version.excluded:,}",
        "?" if version.missing is None else f"{version.missing:,}",
        f"{version.files:,}",
        decimal(version.bytes),
        version.fingerprint_digest[:_DIGEST_CHARACTERS],
        "pinned" if version.pinned_by else "",
    ]


def fingerprint_lines(versions: Sequence[VersionFacts]) -> Iterator[str]:
    """What made the versions, once for each fingerprint, and with which libraries at last."""
    newest = {version.fingerprint_digest: version for version in versions}
    for digest, version in newest.items():
        made = [f"{name} {version.created_by.get(name, '?')}" for name in _MADE_WITH]
        short, sampler = digest[:_DIGEST_CHARACTERS], sampler_in_words(version.fingerprint)
        yield f"{short}: {sampler} ({', '.join(made)})"


def sampler_in_words(fingerprint: dict[str, Any]) -> str:
    return (
        f"{fingerprint.get('solver')}, {fingerprint.get('steps')} steps, "
        f"guidance {fingerprint.get('guidance_scale')}, "
        f"teacher {str(fingerprint.get('teacher_revision'))[:_DIGEST_CHARACTERS]}"
    )


def version_lines(version: VersionFacts) -> Iterator[str]:
    name = f"version {version.version}"
    if version.statistics:
        figures = (f"{key.replace('_', ' ')} {v:.4g}" for key, v in version.statistics.items())
        yield f"{name}: {', '.join(figures)}"
    if version.asked is None:
        yield f"{name}: its landed prompts {version.prompts_digest[:_DIGEST_CHARACTERS]} are gone"
    else:
        yield f"{name}: {version.rows:,} of {version.asked:,} rows that were asked for"
    reasons = list(version.reasons.items())
    for reason, count in reasons[:_REASONS]:
        yield f"{name}: {count:,} rejected: {reason}"
    if len(reasons) > _REASONS:
        rest = sum(count for _, count in reasons[_REASONS:])
        yield f"{name}: {rest:,} rejected for {len(reasons) - _REASONS} other reasons"


def generations_table(generations: Sequence[GenerationFacts]) -> Table:
    """What each holds, and its cost so far; `COST_NOTE` says what the columns mean."""
    numbers = ("rows written", "rejected", "files", "size", "runs", "GPU-s", "teacher-s", "run s")
    table = _table("generations, and their cost so far", "folder", *numbers)
    for item in generations:
        name = item.folder.rsplit("/", 1)[-1]
        cells = [name, f"{item.ledger_rows:,}", f"{item.rejected:,}", f"{item.files:,}"]
        cells += [decimal(item.bytes), str(item.runs)]
        _add_row(table, [*cells, *(f"{v:,.0f}" for v in (item.gpu_s, item.busy_s, item.seconds))])
    return table


def lease_line(lease: dict[str, Any] | None) -> str:
    if lease is None:
        return "nobody is writing"
    holder = lease.get("holder") or {}
    progress = (lease.get("progress") or {}).items()
    shown = ", ".join(f"{key} {value}" for key, value in progress if key != "count")
    return (
        f"lease {lease.get('fence')}: {lease.get('purpose')}, since {lease.get('since')}, by "
        f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        + (f" ({shown})" if shown else "")
    )


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _add_row(table: Table, cells: Sequence[str], style: str = "") -> None:
    """Plain text: a name or a reason may hold what looks like markup."""
    table.add_row(*(Text(cell) for cell in cells), style=style)


def listed(head: str, problems: Sequence[str]) -> str:
    return f"{head}:\n" + "\n".join(f"  {problem}" for problem in problems)


def shortened(text: str, width: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"
