"""`dmd <verb>` of the tiny recipe inside this process."""

from jobs.cli import main


def run_tiny(verb: str, base: dict[str, object], changes: dict[str, object], capsys, words=()):
    """(exit code, stderr). In `changes`, `train__learning_rate` means train.learning_rate; `words`
    are further arguments."""
    merged = base | {key.replace("__", "."): value for key, value in changes.items()}
    arguments = [verb, *words, "--config", "tiny"]
    for key, value in merged.items():
        arguments += ["--set", f"{key}={value}"]
    code = main(arguments)
    return code, capsys.readouterr().err
