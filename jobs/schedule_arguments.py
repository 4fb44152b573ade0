"""The command line of `dmd schedule`."""

import argparse
from typing import Any

from jobs.actions import add_action

DEFAULT_STORE = "runs/schedule"

_EXAMPLES = """examples:
  dmd schedule "0 3 * * *" -- regenerate --config my.yaml      every night at three, UTC
  dmd schedule add "0 3 * * 1-5" --name nightly --timezone Europe/Berlin \\
      --store s3://bucket/schedule --address http://head:8265 -- regenerate --config my.yaml
  dmd schedule list                   the registered jobs and when each is due next
  dmd schedule run                    stay and submit what is due
  dmd schedule tick                   submit what is due and stop: for cron, systemd, Kubernetes
  dmd schedule history nightly        what became of the due slots
  dmd schedule remove nightly"""


class _Actions(argparse._SubParsersAction):
    """`dmd schedule "0 3 * * *" -- …` is short for `dmd schedule add "0 3 * * *" -- …`."""

    class _Choices(dict):
        def __contains__(self, word: object) -> bool:
            return super().__contains__(word) or _is_expression(word)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.choices = self._name_parser_map = self._Choices()

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        words = ["add", *values] if _is_expression(values[0]) else values
        super().__call__(parser, namespace, words, option_string)


def _is_expression(word: object) -> bool:
    return isinstance(word, str) and (" " in word.strip() or word.startswith(("*", "@")))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Actions of the verb, each with its own options."""
    parser.epilog = _EXAMPLES
    actions = parser.add_subparsers(dest="action", required=True, metavar="action", action=_Actions)
    add = _action(actions, "add", "register a job (the word `add` may be left out)")
    add.add_argument("expression", help='five cron fields in quotes, as in "0 3 * * *"')
    add.add_argument("job", nargs="+", help="after --: a verb of dmd with its arguments")
    add.add_argument("--name", help="of the schedule (default: the verb)")
    add.add_argument("--timezone", default="UTC", help="as in Europe/Berlin (default UTC)")
    add.add_argument("--address", help="job server of this job (default: the scheduler's)")
    add.add_argument("--working-dir", help="folder or URI to send along (default: none)")
    add.add_argument("--max-late", metavar="6h", help="give up a slot that is later than this")
    _action(actions, "list", "the registered jobs and when each is due next")
    remove = _action(actions, "remove", "end a schedule; a job that runs goes on")
    remove.add_argument("name")
    history = _action(actions, "history", "what became of the due slots, newest first")
    history.add_argument("name", nargs="?")
    history.add_argument("--limit", type=int, default=20, help="slots to show (default 20)")
    for name, text in (("tick", "submit what is due and stop"), ("run", "stay and submit")):
        scheduler = _action(actions, name, text)
        scheduler.add_argument(
            "--address",
            help="job server for the entries that name none (default: as of `dmd submit`)",
        )


def _action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser = add_action(actions, name, text, _EXAMPLES)
    store_help = f"where schedules are kept: a folder or s3:// URL (default {DEFAULT_STORE})"
    parser.add_argument("--store", default=DEFAULT_STORE, help=store_help)
    unset: Any = {"default": argparse.SUPPRESS}
    parser.add_argument(
        "--config", "--recipe", metavar="YAML", help="its storage: is used", **unset
    )
    parser.add_argument("--set", action="append", metavar="SECTION.KEY=VALUE", **unset)
    return parser
