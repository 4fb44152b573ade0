"""What looks like a credential stays out of everything that is sent, saved or shown.

Ray's job server returns entrypoint, runtime environment and metadata to anyone who asks, and logs
them; a run folder keeps its recipe. Credentials belong to the machines: a role, a profile, a
mounted secret.
"""

import os
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

_WORDS = {"credential", "credentials", "pat"}
_PAIRS = {
    ("api", "key"), ("access", "key"), ("private", "key"), ("account", "key"), ("storage", "key"),
    ("signing", "key"), ("encryption", "key"), ("connection", "string"),
}  # fmt: skip
# Also at the end of a longer word: PGPASSWORD, AUTHTOKEN, SSHPASS, dbpwd.
_ENDINGS = (
    "password", "passwd", "passphrase", "pass", "pwd", "secret", "token", *map("".join, _PAIRS),
)  # fmt: skip
_ORDINARY = (
    "compass", "bypass", "surpass", "trespass", "overpass", "underpass", "lowpass", "highpass",
    "bandpass", "allpass", "onepass", "twopass", "firstpass", "secondpass", "singlepass",
    "multipass", "forwardpass", "backwardpass", "askpass", "oldpwd",
)  # fmt: skip
_REFERENCES = {"ref", "name"}  # secretKeyRef: where it is, not what
_SPOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # the words of camelCase and SNAKE_CASE
_FILES = {"path", "file", "dir"}  # AWS_SHARED_CREDENTIALS_FILE: a place, not a credential
_USER_INFO = re.compile(r"://[^/\s]+@")  # to the last @: a password may have one
_TOKENS = (
    r"(AKIA|ASIA)[0-9A-Z]{16}\b",
    r"hf_[A-Za-z0-9]{30,}",
    r"gh[opsur]_[A-Za-z0-9]{30,}",
    r"github_pat_\w{22,}",
    r"glpat-[\w-]{20,}",
    # A name has hyphens (sk-learning-rate-2); these have long parts that no word is.
    r"sk-([A-Za-z0-9]+[-_])*(?=[A-Za-z]*[0-9])[A-Za-z0-9]{20,}",
    r"sk-(proj|svcacct|admin|ant-\w+)-(?=\S*[A-Z])(?=\S*[a-z])(?=\S*[0-9])[\w-]{40,}",
)
_VALUES = (
    re.compile(rf"(?<![A-Za-z0-9])({'|'.join(_TOKENS)})"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    _USER_INFO,
)
_NAME = re.compile(r"-{0,2}[A-Za-z_][\w.-]{0,60}")  # of a setting: may be shown
_SHORTEST = 12  # characters: below, a variable's value may be an ordinary word


class SecretError(ValueError):
    """Something that looks like a credential, on its way into a place that others can read."""


def refuse_secrets(content: Any, place: str = "") -> None:
    """Raise `SecretError` for a key that names a credential, a value that looks like one, or the
    value of a variable of this environment that holds one. The error names the place alone."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            where = f"{place}.{key}" if place else str(key)
            if _is_given(value) and names_secret(str(key)):
                raise _error(where)
            refuse_secrets(value, where)
    elif isinstance(content, (list, tuple)):
        for index, value in enumerate(content):
            refuse_secrets(value, f"{place}[{index}]")
    elif isinstance(content, str):
        _refuse_text(content, place)


def names_secret(key: str) -> bool:
    """True for the name of something that is kept secret, such as `HF_TOKEN` or `access_key`."""
    spoken = [word.lower() for word in _SPOKEN.findall(key)]
    plain = re.findall(r"[a-z]+", key.lower())  # PassWord is a password, however it is written
    return _name_secret(spoken) or _name_secret(plain)


def without_user_info(text: str) -> str:
    """`text` with user and password of every URL in it masked."""
    return _USER_INFO.sub("://…@", text)


def _name_secret(words: list[str]) -> bool:
    if words == ["pwd"] or _REFERENCES & set(words[-1:]):  # PWD: the working directory
        return False
    if _WORDS & set(words) or _PAIRS & set(pairwise(words)):
        return True
    return any(
        word.endswith(_ENDINGS) and not (before + word).endswith(_ORDINARY)
        for before, word in pairwise(["", *words])
    )


def _refuse_text(text: str, place: str) -> None:
    *keys, value = text.rstrip("=").split("=")  # also --set=a.b=c; base64 ends with =
    if text.startswith("--"):
        keys, value = [*keys, text], value or "given next"
    named = next(filter(names_secret, keys), None) if value else None
    if named is None and not _is_secret(text):
        return
    key = (named or next(iter(keys), "")).strip().rsplit(maxsplit=1)[-1:]
    shown = bool(key) and _NAME.fullmatch(key[0]) and not _is_secret(key[0])
    raise _error(f"{key[0]} in {place}" if shown else place)


def _is_secret(text: str) -> bool:
    return any(pattern.search(text) for pattern in _VALUES) or any(
        secret in text for secret in _environment_secrets()
    )


def _is_given(value: Any) -> bool:
    return value not in ("", None) and not isinstance(value, bool)  # a switch


def _environment_secrets() -> list[str]:
    """Values of the variables of this environment whose names say that they are secret."""
    return [
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST
        and names_secret(name)
        and name.lower().rsplit("_", 1)[-1] not in _FILES
    ]


def _error(place: str) -> SecretError:
    return SecretError(
        f"{place or 'the text'} looks like a credential. Recipes, arguments and runtime "
        "environments are saved in run folders and shown by the job server to everyone who "
        "reaches the cluster; give the cluster's machines a role, a profile or a mounted secret, "
        "and keep credentials in the environment."
    )
