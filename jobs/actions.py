"""Verbs that have actions, such as `dmd cluster up`: what all their command lines share."""

import argparse
from typing import Any


def add_action(actions: Any, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    """The parser of one action, with the options of every verb once more, so that they may stand
    behind the action too."""
    parser = actions.add_parser(
        name,
        help=text,
        description=text,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    unset: Any = {"action": "store_true", "default": argparse.SUPPRESS}
    parser.add_argument("--json", help="results as JSON on stdout", **unset)
    parser.add_argument("--dry-run", help="print the plan and stop", **unset)
    return parser
