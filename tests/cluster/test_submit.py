"""What goes to the job server, what must not, and how its answers are read."""

import os
import shlex
import zipfile

import pytest

from cluster.submit import (
    EXCLUDES,
    JobServer,
    SecretError,
    SubmitError,
    TokenError,
    entrypoint,
    job_environment,
    job_status,
    refuse_secrets,
    submit_job,
)
from tests.cluster.fake_job_server import job_server


@pytest.fixture
def server():
    with job_server() as running:
        yield running


def test_the_entrypoint_is_one_verb_whose_arguments_no_shell_can_read_differently():
    nasty = ["train-teacher", "--set", "pairs.prompts=a b; rm -rf $HOME `x` 'y'"]
    command = entrypoint(nasty)
    assert shlex.split(command) == ["python", "-m", "jobs.train_teacher", *nasty[1:]]


def test_the_same_submission_id_is_one_job(server):
    first = submit_job(server.address, ["pairs", "--help"], submission_id="a")
    again = submit_job(server.address, ["pairs", "--help"], submission_id="a")
    assert (first.already, again.already) == (False, True)
    assert list(server.jobs) == ["a"]
    assert server.jobs["a"]["entrypoint"] == "python -m jobs.pairs --help"
    assert job_status(server.address, "a") == "RUNNING"
    assert job_status(server.address, "b") is None


def test_a_lost_reply_is_a_submission(server):
    server.drop_reply = True
    assert submit_job(server.address, ["pairs"], submission_id="a").already
    assert list(server.jobs) == ["a"]


@pytest.mark.parametrize(
    ("code", "transient"), [(500, True), (503, True), (429, True), (400, False)]
)
def test_a_refusal_says_whether_to_try_again(server, code, transient):
    server.refuse_with = code
    with pytest.raises(SubmitError, match=server.address) as caught:
        submit_job(server.address, ["pairs"], submission_id="a")
    assert caught.value.transient is transient


def test_a_server_that_is_not_there_is_worth_another_try():
    with pytest.raises(SubmitError, match="does not answer") as caught:
        job_status("http://127.0.0.1:9", "a")
    assert caught.value.transient


def test_a_missing_token_is_one_line_that_says_what_to_set(server):
    """And no reason to try again: it would be missing for ever."""
    server.refuse_with = 401
    with pytest.raises(TokenError, match="RAY_AUTH_TOKEN_PATH") as caught:
        submit_job(server.address, ["pairs"], submission_id="a")
    assert not caught.value.transient and "\n" not in str(caught.value)
    server.token = "another"
    with pytest.raises(TokenError) as caught:
        JobServer(server.address)
    assert not caught.value.transient


@pytest.mark.parametrize("environment", [{}, {"RAY_AUTH_TOKEN": "old"}])
def test_a_token_that_is_given_is_the_one_that_is_sent(server, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    server.token = "given"
    found = JobServer(server.address, "given")
    submit_job(found, ["pairs"], submission_id="a")
    assert job_status(found, "a") == "RUNNING"


def test_the_address_given_wins_over_the_environment(server, monkeypatch):
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    submit_job(server.address, ["pairs"], submission_id="a")
    assert list(server.jobs) == ["a"]
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "content",
    [
        {"env_vars": {"AWS_SECRET_ACCESS_KEY": "x"}},
        {"env_vars": {"HF_TOKEN": "x"}},
        {"wandb_api_key": "x"},
        ["--set", "storage.secret=x"],
        ["--set=storage.access_key=x"],
        ["--password", "x"],
        ["s3://user:word@host/bucket"],
        {"pip": ["https://me:pw@index.example.com/simple"]},
        {"note": "AKIAABCDEFGHIJKLMNOP"},
        {"note": "hf_abcdefghijklmnopqrstuvwxyzabcdefgh"},
    ],
)
def test_credentials_are_refused_and_not_repeated(content):
    with pytest.raises(SecretError, match="looks like a credential") as caught:
        refuse_secrets(content)
    for value in ("AKIA", "hf_a", "word@", "pw@", "=x"):
        assert value not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        ["--config", "my.yaml", "--set", "train_teacher.max_tokens=77", "--json"],
        {"env_vars": {"AWS_PROFILE": "team", "OMP_NUM_THREADS": "1", "HF_TOKEN": ""}},
        {"automountServiceAccountToken": False},
        ["s3://bucket/prefix@2026", "pairs.prompts=s3://bucket/keyboards.txt"],
    ],
)
def test_ordinary_settings_pass(content):
    refuse_secrets(content)


def test_nothing_is_sent_with_a_credential_in_any_place(server):
    for options in (
        {"metadata": {"token": "x"}},
        {"runtime_env": {"env_vars": {"TOKEN": "x"}}},
        {"working_dir": "https://a:b@host/code.zip"},
    ):
        with pytest.raises(SecretError):
            submit_job(server.address, ["pairs"], submission_id="a", **options)
    with pytest.raises(SecretError):
        submit_job(server.address, ["pairs", "--set", "a.token=x"], submission_id="a")
    assert server.jobs == {}


def test_outputs_environments_and_foreign_weights_stay_at_home(tmp_path):
    """Packed by Ray's own code: what arrives on the cluster is what this test sees."""
    from ray._private.runtime_env.packaging import create_package

    kept = ["jobs/pairs.py", "my.yaml", "jobs/assets/emoji-teacher/unet/model.safetensors"]
    secret = [
        ".env",
        ".env.prod",
        "tls.pem",
        "jobs/assets/id.key",
        ".aws/config",
        "a/credentials.json",
        "prod.env",
        ".netrc",
        ".npmrc",
        ".pypirc",
        ".git-credentials",
        ".ssh/known_hosts",
        ".kube/config",
        "keys/id_rsa",
        "jobs/assets/id_ed25519.old",
        "tls.p12",
        "tls.pfx",
    ]
    left = [
        *secret,
        "a/credentials.json",
        "runs/a/pairs/x.parquet",
        ".venv/lib/y.py",
        ".git/config",
        "weights/sd15.safetensors",
        "model.ckpt",
        "jobs/__pycache__/pairs.pyc",
    ]
    source = tmp_path / "source"
    for name in kept + left:
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    environment = job_environment(str(source), {"excludes": ["*.txt"]})
    assert environment["excludes"] == [*EXCLUDES, "*.txt"]
    package = tmp_path / "package.zip"
    create_package(str(source), package, include_gitignore=True, excludes=environment["excludes"])
    assert sorted(n for n in zipfile.ZipFile(package).namelist() if not n.endswith("/")) == sorted(
        kept
    )


def test_a_working_directory_that_is_not_there_is_refused_for_good(tmp_path):
    with pytest.raises(SubmitError, match="nowhere") as caught:
        job_environment(str(tmp_path / "nowhere"), None)
    assert not caught.value.transient
    assert job_environment("s3://bucket/code.zip", None) == {"working_dir": "s3://bucket/code.zip"}
