"""A credential is refused wherever it would be sent or saved, and is found nowhere afterwards."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.job_server import JobServer, SubmitError
from cluster.secrets import SecretError, names_secret, refuse_secrets, without_user_info
from cluster.submit import EXCLUDES
from jobs.cli import main
from jobs.config import Recipe
from jobs.errors import Exit
from tests.cluster.fake_job_server import job_server

ROOT = Path(__file__).parent.parent.parent
CANARY = "c4n4ryZ9qT7vK2mX5wB8nL3pR6s"

# ------------------------------------------------------------------------ refused at the door


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def fake():
    with job_server() as running:
        yield running


_IN_RECIPES = {
    "storage.secret_key": f"storage: {{secret_key: {CANARY}}}",
    "storage.endpoint_url": f"storage: {{endpoint_url: 'http://key:{CANARY}@host:9000'}}",
    "run.dir": f"run: {{dir: 's3://key:{CANARY}@bucket/run'}}",
    "pairs.prompts[1]": f"pairs: {{prompts: [a.txt, 'https://me:{CANARY}@host/b.txt']}}",
    "train.wandb_api_key": f"train: {{wandb_api_key: {CANARY}}}",
}


@pytest.mark.parametrize("verb", ["pairs", "train", "submit"])
@pytest.mark.parametrize("place", _IN_RECIPES)
def test_a_recipe_with_a_credential_is_refused(folder, fake, capfd, verb, place):
    (folder / "my.yaml").write_text(_IN_RECIPES[place])
    words = ["submit", "pairs", "--address", fake.address] if verb == "submit" else [verb]
    _refused([*words, "--config", "my.yaml"], place, capfd)
    _nothing_happened(folder, fake)


_IN_ARGUMENTS = {
    "storage.secret_key in": ["--set", f"storage.secret_key={CANARY}"],
    "storage in": ["--set", f"storage={{endpoint_url: 'http://key:{CANARY}@host'}}"],
    "train.health.token": ["--set", "train.health={token: not-in-the-environment}"],
    "pairs.prompts in": ["--set", f"pairs.prompts=s3://key:{CANARY}@bucket/p.txt"],
    "run.dir in": ["--set", "pairs.steps=4", "--set", f"run.dir=/x/{CANARY}"],
}


@pytest.mark.parametrize("verb", ["pairs", "submit"])
@pytest.mark.parametrize("place", _IN_ARGUMENTS)
def test_an_argument_with_a_credential_is_refused(folder, fake, capfd, monkeypatch, verb, place):
    """Also by its value alone: a variable of the environment has it."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    words = ["submit", "pairs", "--address", fake.address] if verb == "submit" else [verb]
    _refused([*words, *_IN_ARGUMENTS[place]], place, capfd)
    _nothing_happened(folder, fake)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("runtime_env.env_vars.AWS_SECRET_ACCESS_KEY", ["--runtime-env", "env.yaml"]),
        ("--address", ["--address", f"http://me:{CANARY}@head:8265"]),
        ("working_dir", ["--working-dir", f"https://me:{CANARY}@host/code.zip"]),
    ],
)
def test_a_submission_with_a_credential_is_refused(folder, fake, capfd, place, words):
    environment = {"env_vars": {"AWS_SECRET_ACCESS_KEY": CANARY}}
    (folder / "env.yaml").write_text(yaml.safe_dump(environment))
    _refused(["submit", "pairs", "--address", fake.address, *words], place, capfd)
    assert fake.asked == []


def _refused(words: list[str], place: str, capfd) -> None:
    assert main(words) == Exit.USAGE
    out, err = capfd.readouterr()
    assert place in err and "looks like a credential" in err
    assert CANARY not in out + err and "key:" not in out + err


def _nothing_happened(folder: Path, fake) -> None:
    assert [path.name for path in folder.iterdir() if path.name != "my.yaml"] == []
    assert fake.asked == []


@pytest.mark.parametrize(
    "text", ["storage={{token: {}}}", "train.health={{token: {}", "run.dir.x={}"]
)
def test_an_override_that_is_none_is_not_repeated_with_its_value(folder, capfd, text):
    assert main(["pairs", "--set", "run.dir=/x", "--set", text.format(CANARY)]) == Exit.USAGE
    said = capfd.readouterr().err
    assert text.split("=")[0] in said and CANARY not in said


def test_a_broken_recipe_is_not_repeated(folder, capfd):
    (folder / "my.yaml").write_text(f"storage:\n  secret_key: {{{CANARY}")
    for words in (
        ["pairs", "--config", "my.yaml"],
        ["submit", "pairs", "--runtime-env", "my.yaml"],
    ):
        assert main(words) == Exit.USAGE
        said = capfd.readouterr().err
        assert "my.yaml" in said and "line 2" in said and CANARY not in said


def test_the_environments_own_secrets_are_known_by_value(monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", CANARY)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/.ray/auth_token")
    monkeypatch.setenv("SHORT_PASSWORD", "test")
    with pytest.raises(SecretError, match=r"metadata\.note looks like"):
        refuse_secrets({"metadata": {"note": f"see {CANARY}."}})
    refuse_secrets(["--set", "run.dir=/home/me/.ray/auth_token", "a test"])


def test_no_value_beside_the_key_is_repeated(monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", CANARY)
    for text, place in (
        (f"a={CANARY} token=x", "token in arguments[0] looks"),
        (f"{CANARY}=5", "arguments[0] looks"),
        (f"-----BEGIN PRIVATE KEY-----\n{CANARY}==", "arguments[0] looks"),
    ):
        with pytest.raises(SecretError) as caught:
            refuse_secrets([text], "arguments")
        assert CANARY not in str(caught.value) and str(caught.value).startswith(place)


def test_no_setting_of_a_recipe_has_a_name_that_would_be_refused():
    def names(schema: object) -> Iterator[str]:
        if isinstance(schema, dict):
            yield from schema.get("properties", {})
            for value in schema.values():
                yield from names(value)
        elif isinstance(schema, list):
            for value in schema:
                yield from names(value)

    every = set(names(Recipe.model_json_schema()))
    assert "learning_rate" in every and not [name for name in every if names_secret(name)]


@pytest.mark.parametrize(
    "name",
    [
        "PGPASSWORD", "SSHPASS", "SMTP_PASS", "dbPass", "MYSQL_PWD", "dbpwd", "PassWord",
        "PASSword1", "MY_AUTHTOKEN", "HFToken", "idToken2", "HF_PAT", "clientSecret",
        "secretAccessKey", "AWSACCESSKEY", "APIKey", "myapikey", "AZURE_STORAGE_KEY",
        "AZURE_STORAGE_CONNECTION_STRING", "connectionString", "KEY_PASSPHRASE",
        "GOOGLE_CREDENTIALS",
    ],
)  # fmt: skip
def test_names_of_credentials(name):
    assert names_secret(name)
    with pytest.raises(SecretError, match=rf"env_vars\.{name} looks"):
        refuse_secrets({"env_vars": {name: "x"}})
    with pytest.raises(SecretError, match=f"{name} in arguments"):
        refuse_secrets([f"{name}=x"], "arguments")


@pytest.mark.parametrize(
    "name",
    [
        "PWD", "OLDPWD", "SSH_ASKPASS", "compass", "myCompass", "bypass", "low_pass", "HighPass",
        "passes", "PATH", "PYTHONPATH", "pattern", "patience", "compat", "tokenizer", "max_tokens",
        "TOKENIZERS_PARALLELISM", "secretary", "secretKeyRef", "storage", "keys",
        "monkey", "key", "connection",
    ],
)  # fmt: skip
def test_names_of_other_things(name):
    assert not names_secret(name)
    refuse_secrets({"env_vars": {name: "x"}, "arguments": [f"{name}=x"]})


_DIGITS = "0aB1cD2eF3gH4iJ5kL6mN7oP8qR9sT"


@pytest.mark.parametrize(
    "value",
    [
        f"hf_{_DIGITS}ABcd", f"see my_hf_{_DIGITS}ABcd", f"ghp_{_DIGITS}abcdef", f"gho_{_DIGITS}",
        f"github_pat_{_DIGITS}_{_DIGITS}", f"glpat-{_DIGITS[:20]}", f"sk-{_DIGITS}",
        "AKIA" + "A0" * 8, f"sk-proj-{_DIGITS}-{_DIGITS}", f"sk-ant-api03-{_DIGITS}",
        "sk-or-v1-" + "0f" * 32,
        "sk-proj-" + "aB3-dE6_" * 6, "sk-ant-api03-" + "aB3-dE6_" * 6,
        "DefaultEndpointsProtocol=https;AccountKey=abc==",
    ],
)  # fmt: skip
def test_values_that_are_credentials(value):
    with pytest.raises(SecretError):
        refuse_secrets({"note": value})
    with pytest.raises(SecretError):
        refuse_secrets([f"run.dir=/x/{value}"])


@pytest.mark.parametrize(
    "value",
    [
        "/models/hf_stable_diffusion_v15", "hf_internal_testing_tiny_stable_diffusion_xl_pipe",
        "runs/sk-learning-rate-sweep-1", "runs/sk-internationalization-2", "sk-20240101T120000Z",
        "runs/sk-proj-stable-diffusion-fine-tuning-of-the-second-teacher-12", "task-" + _DIGITS,
        "ghp_pages_of_a_documentation_site_2", "runs/disk-0123456789abcdefghijkl", "password=",
    ],
)  # fmt: skip
def test_values_that_are_names(value):
    refuse_secrets({"teacher": {"path": value}, "arguments": [f"run.dir={value}"]})


def test_an_address_with_a_password_is_shown_without(fake, monkeypatch, capfd):
    """In the environment it may stand, for a proxy in front of the cluster."""
    address = fake.address.replace("://", f"://me:{CANARY}@")
    assert JobServer(address).shown == fake.address.replace("://", "://…@")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    assert main(["jobs"]) == 0
    fake.refuse_with, fake.away = 500, 10**6
    assert main(["jobs"]) == Exit.TRANSIENT
    out, err = capfd.readouterr()
    assert CANARY not in out + err and "://…@" in err
    with pytest.raises(SubmitError) as caught:
        JobServer(f"http://me:{CANARY}@127.0.0.1:9")
    assert CANARY not in str(caught.value)
    assert without_user_info("a b://c:d@e f://g@h") == "a b://…@e f://…@h"
    assert without_user_info("b://me:p@ss@host:8265") == "b://…@host:8265"


def test_rays_own_client_leaves_out_the_same_files():
    given = yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text())
    assert given == {"excludes": list(EXCLUDES)}
    refuse_secrets(given)


def test_no_secret_of_this_test_is_in_the_environment_by_default():
    assert CANARY not in json.dumps(dict(os.environ))
