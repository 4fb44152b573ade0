"""`dmd submit`, `attach`, `jobs`, `logs`, `stop` against a job server with faults on demand."""

import json
import os
import shlex
from dataclasses import replace

import pytest

from cluster.processes import Birth
from cluster.record import default_folder
from cluster.submit import EXCLUDES
from jobs import job_client
from jobs.cli import main
from jobs.errors import Exit, JobError
from tests.cluster.fake_job_server import job_server, remember

RECIPE = "run: {dir: /shared/run}\npairs: {prompts: /shared/prompts.txt}\n"


@pytest.fixture
def fake():
    with job_server() as running:
        yield running


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user's folder, on a machine without a local cluster."""
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "my.yaml").write_text(RECIPE)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def script(monkeypatch):
    """What happens at each pause of whoever follows; the last one for ever."""
    happenings: list = []

    def pause(seconds: float) -> None:
        if happenings:
            (happenings.pop(0) if len(happenings) > 1 else happenings[0])()

    for module in ("job_client", "logs", "stop", "submit"):
        monkeypatch.setattr(f"jobs.{module}.pause", pause)
    return happenings


def _submit(fake, *words: str) -> int:
    return main(["submit", "pairs", "--config", "my.yaml", *words, "--address", fake.address])


def _only(fake) -> str:
    (identity,) = fake.jobs
    return identity


def _ends(fake, status: str = "SUCCEEDED", code: int | None = 0, log: str = ""):
    def happens() -> None:
        identity = list(fake.jobs)[-1]
        fake.logs[identity] = log
        fake.end(identity, status, code)

    return happens


# ------------------------------------------------------------------------ submit


def test_a_verb_runs_as_a_job_and_is_followed_to_its_end(fake, script, capfd):
    log = "pairs: 1/2 starting\n✓ pairs: 2 pairs\n"
    script.append(_ends(fake, log="Running entrypoint for job x: y\n" + log))
    assert _submit(fake, "--set", "pairs.steps=7") == 0
    job = fake.jobs[_only(fake)]
    assert job["entrypoint"] == "python -m jobs.pairs --config my.yaml --set pairs.steps=7"
    assert job["runtime_env"]["working_dir"].startswith("gcs://_ray_pkg_")
    said = capfd.readouterr().err
    assert log in said and "Running entrypoint" not in said
    assert "working directory: 62 B in 1 files" in said
    assert len(fake.packages) == 1


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("FAILED", 1, Exit.BUG),
        ("FAILED", 2, Exit.USAGE),
        ("FAILED", 3, Exit.REFUSED),
        ("FAILED", 4, Exit.TRANSIENT),
        ("FAILED", 5, Exit.REJECTS),
        ("FAILED", 127, Exit.BUG),
        ("FAILED", -9, Exit.TRANSIENT),
        ("FAILED", 137, Exit.TRANSIENT),
        ("FAILED", None, Exit.TRANSIENT),
        ("STOPPED", None, Exit.TRANSIENT),
    ],
)
def test_the_exit_code_is_the_jobs_own(fake, script, capfd, status, code, expected):
    script.append(_ends(fake, status, code))
    assert _submit(fake) == expected
    said = capfd.readouterr().err
    assert f"dmd submit pairs --address {fake.address} --config my.yaml` goes on" in said
    assert {-9: "signal 9", 137: "signal 9", 3: "exit code 3"}.get(code, "") in said


def test_a_runtime_environment_that_cannot_be_set_up_is_refused_for_good(fake, script, capfd):
    def fails() -> None:
        why = {"error_type": "RUNTIME_ENV_SETUP_FAILURE", "message": "no such package"}
        fake.end(_only(fake), "FAILED", None, **why)

    script.append(fails)
    assert _submit(fake) == Exit.REFUSED
    assert "no such package" in capfd.readouterr().err


def test_the_same_command_while_the_job_runs_follows_it(fake, script, capfd):
    assert _submit(fake, "--no-wait", "--set", "pairs.steps=7", "--set", "pairs.seed=1") == 0
    script.append(_ends(fake, log="pairs: 1/9 a\npairs: 2/9 b\n✓ done\n"))
    capfd.readouterr()
    assert _submit(fake, "--set", "pairs.seed=1", "--set=pairs.steps=7") == 0
    said = capfd.readouterr().err
    assert len(fake.jobs) == 1 and "is on http" in said and "already" in said


def test_other_settings_are_another_job(fake, folder):
    assert _submit(fake, "--no-wait") == 0
    assert _submit(fake, "--no-wait", "--set", "pairs.steps=7") == 0
    (folder / "my.yaml").write_text(RECIPE + "evaluate: {seed: 5}\n")
    assert _submit(fake, "--no-wait") == 0
    assert len(fake.jobs) == 3


def test_a_job_that_has_succeeded_is_run_again_only_when_asked(fake, capfd):
    assert _submit(fake, "--no-wait") == 0
    first = _only(fake)
    fake.end(first)
    assert _submit(fake) == 0
    assert list(fake.jobs) == [first] and "--again" in capfd.readouterr().err
    assert _submit(fake, "--again", "--no-wait") == 0
    assert list(fake.jobs) == [first, f"{first}-2"]
    assert _submit(fake, "--again", "--no-wait") == 0  # that one runs still
    assert len(fake.jobs) == 2


@pytest.mark.parametrize("ended", [("FAILED", 1), ("STOPPED", None)])
def test_after_a_failure_the_same_command_is_a_new_attempt(fake, ended):
    assert _submit(fake, "--no-wait") == 0
    first = _only(fake)
    fake.end(first, *ended)
    assert _submit(fake, "--no-wait") == 0
    assert _submit(fake, "--no-wait") == 0
    assert list(fake.jobs) == [first, f"{first}-2"]
    fake.end(f"{first}-2", *ended)
    assert _submit(fake, "--no-wait") == 0
    assert list(fake.jobs)[-1] == f"{first}-3"


def test_files_that_changed_since_a_success_are_new_work(fake, folder, capfd):
    assert _submit(fake, "--no-wait") == 0
    first = _only(fake)
    (folder / "prompts.txt").write_text("a fox\n")
    assert _submit(fake, "--no-wait") == 0
    assert "has changed since" in capfd.readouterr().err
    assert len(fake.jobs) == 1
    fake.end(first)
    assert _submit(fake, "--no-wait") == 0
    assert list(fake.jobs) == [first, f"{first}-2"]


def test_another_uri_than_that_of_a_success_is_new_work(fake, capfd):
    words = [
        "submit",
        "pairs",
        "--config",
        "/etc/there.yaml",
        "--address",
        fake.address,
        "--no-wait",
    ]
    for place in ("s3://bucket/code-v1.zip", "s3://bucket/code-v2.zip", "none"):
        assert main([*words, "--working-dir", place]) == 0
        fake.end(list(fake.jobs)[-1])
    assert len(fake.jobs) == 3
    assert main([*words, "--working-dir", "none"]) == 0
    assert len(fake.jobs) == 3 and "--again" in capfd.readouterr().err


def test_two_at_the_same_time_start_one_job(fake, script, capfd):
    """The other one's submission arrives between this one's question and its own submission."""

    def other(server, job: dict) -> None:
        server.jobs.setdefault(job["submission_id"], dict(job))

    fake.before_submission = other
    script.append(_ends(fake, log="✓ done\n"))
    assert _submit(fake) == 0
    assert len(fake.jobs) == 1
    said = capfd.readouterr().err
    assert "already" in said and "✓ submitted" not in said and "✓ done" in said


def test_a_lost_reply_is_a_job_that_is_followed(fake, script):
    fake.drop_reply = True
    script.append(_ends(fake))
    assert _submit(fake) == 0
    assert len(fake.jobs) == 1


def test_a_head_on_its_way_up_is_waited_for(fake, script, capfd):
    fake.refuse_with = 500
    up = lambda: setattr(fake, "refuse_with", None)  # noqa: E731
    script += [lambda: None, lambda: None, up, _ends(fake)]
    assert _submit(fake) == 0
    assert len(fake.jobs) == 1 and capfd.readouterr().err.count("trying again") == 1
    fake.refuse_with = 500
    script[:] = [lambda: None]
    assert _submit(fake, "--again") == Exit.TRANSIENT


def test_an_id_of_ones_own_is_not_shared_by_two_commands(fake, capfd):
    assert _submit(fake, "--no-wait", "--id", "mine") == 0
    assert _submit(fake, "--no-wait", "--id", "mine") == 0
    assert _submit(fake, "--no-wait", "--id", "mine", "--set", "pairs.steps=7") == Exit.REFUSED
    assert list(fake.jobs) == ["mine"] and "another command" in capfd.readouterr().err


def test_ctrl_c_leaves_the_job_running(fake, script, capfd):
    def interrupt() -> None:
        raise KeyboardInterrupt

    script.append(interrupt)
    assert _submit(fake) == Exit.TRANSIENT
    said = capfd.readouterr().err
    identity = _only(fake)
    assert f"dmd attach {identity}" in said and f"dmd stop {identity}" in said
    assert fake.details(identity)["status"] == "RUNNING"


def test_a_connection_lost_in_the_middle_is_one_line_and_no_line_of_the_job(fake, script, capfd):
    def breaks() -> None:
        fake.logs[_only(fake)] = "one\ntwo\n"
        fake.away = 6

    script += [breaks, *[lambda: None] * 8, _ends(fake, "FAILED", 5, "one\ntwo\nthree\n")]
    assert _submit(fake) == Exit.REJECTS
    said = capfd.readouterr().err
    assert [said.count(f"{word}\n") for word in ("one", "two", "three")] == [1, 1, 1]
    assert said.count("the connection is lost") == said.count("the connection is back") == 1


def test_a_head_that_was_started_anew_takes_the_same_command_again(fake, script, capfd):
    script.append(lambda: (fake.jobs.clear(), script.clear()))
    assert _submit(fake) == Exit.TRANSIENT
    assert "submit the same command again" in capfd.readouterr().err
    script.append(_ends(fake, log="✓ done\n"))
    assert _submit(fake) == 0
    assert len(fake.jobs) == 1


def test_a_cluster_that_does_not_answer_is_worth_another_try(fake, capfd):
    fake.away = 10**6
    assert _submit(fake) == Exit.TRANSIENT
    assert "does not answer" in capfd.readouterr().err


# ------------------------------------------------------------------------ at the door


def test_a_dry_run_shows_and_sends_nothing(fake, capfd):
    assert _submit(fake, "--dry-run", "--json") == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["id"].startswith("pairs-") and shown["address"] == fake.address
    assert shown["entrypoint"] == "python -m jobs.pairs --config my.yaml"
    assert shown["working_directory"] == "62 B in 1 files"
    assert fake.asked == [] and fake.jobs == {}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["jobs"], "'jobs' cannot be submitted"),
        (["schedule", "list"], "'schedule' cannot be submitted"),
        (["submit", "pairs"], "'submit' cannot be submitted"),
        (["--config", "my.yaml", "pairs"], "'my.yaml' is no verb"),
        (["pairs", "--confg", "my.yaml"], "unrecognized arguments: --confg"),
        (["pairs", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["pairs", "--set", "pairs.step=7"], "did you mean pairs.steps?"),
        (["pairs", "--config", "../out.yaml"], "outside the working directory"),
        (["pairs", "--config", "hidden.yaml"], "does not travel"),
        (["pairs", "--set", "pairs.prompts=?.ignored"], "a.ignored does not travel"),
        (["pairs", "--set", "teacher.path=sd15"], "sd15/unet.safetensors does not travel"),
        (["pairs", "--working-dir", "nowhere"], "nowhere does not exist"),
        (["pairs", "--id", "../x"], "expected letters"),
        (["pairs", "--runtime-env", "my.yml"], "my.yml"),
        (["pairs", "--runtime-env", "list.yaml"], "expected a mapping"),
        (["pairs", "--runtime-env", "excludes.yaml"], "expected a list of patterns"),
        (["pairs", "--runtime-env", "variables.yaml"], "variables.yaml: runtime_env['env_vars']"),
        (["pairs", "--runtime-env", "folder.yaml"], "as --working-dir"),
    ],
)
def test_what_would_fail_there_is_refused_here(fake, folder, capfd, words, expected):
    (folder.parent / "out.yaml").write_text(RECIPE)
    (folder / ".gitignore").write_text("hidden.yaml\n*.ignored\n")
    (folder / "list.yaml").write_text("- a\n")
    (folder / "excludes.yaml").write_text("excludes: data\n")
    (folder / "variables.yaml").write_text("env_vars: {A: 1}\n")
    (folder / "folder.yaml").write_text("working_dir: s3://bucket/code.zip\n")
    for name in ("hidden.yaml", "a.ignored", "sd15/unet.safetensors", "sd15/model_index.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(RECIPE)
    assert main(["submit", *words, "--address", fake.address]) == Exit.USAGE
    assert expected in capfd.readouterr().err
    assert fake.asked == []


_LPIPS = {"train.regression_loss": "lpips", "train.perceptual_trunk": "FILE"}
_NO_PAIRS = {"train.lambda_reg": "0", "train.regression_batch_size": "0"}
_GAN = _NO_PAIRS | {"train.gan_weight": "0.1", "train.real_pictures": "FILE"}
_BESIDE = {"train.evaluation.steps": "500"}
_INCEPTION = {"evaluate.features": "inception"}


@pytest.mark.parametrize(
    ("verb", "key", "settings"),
    [
        ("train", "train.unpaired_prompts", {}),
        ("train", "train.perceptual_trunk", _LPIPS),
        ("pipeline", "train.perceptual_trunk", _LPIPS),
        ("train", "train.regression_decoder", {"train.regression_loss": "st-lpips"}),
        ("train", "train.real_pictures", _GAN),
        ("train", "pairs.prompts", _NO_PAIRS),
        ("train", "pairs.prompts", _GAN | {"train.real_pictures": "emoji"}),
        ("train", "evaluate.prompts", _BESIDE),
        ("train", "evaluate.inception", _BESIDE | _INCEPTION),
        ("evaluate", "evaluate.prompts", {}),
        ("evaluate", "evaluate.inception", _INCEPTION),
        ("pipeline", "evaluate.real", _INCEPTION),
        ("evaluate", "evaluate.clip_model", {}),
        ("train-teacher", "train_teacher.start_from", {"train_teacher.vae_steps": "0"}),
        ("train-teacher", "train_teacher.pixel.path",
         {"train_teacher.data": "cifar10", "train_teacher.vae_steps": "4000"}),
    ],
)  # fmt: skip
def test_every_file_that_a_verb_reads_must_travel(fake, folder, capfd, verb, key, settings):
    """Left out (weights), not there at all, and sent along."""
    (folder / "weights").mkdir()
    (folder / "weights" / "own.pth").write_text("")
    for path, expected in (
        ("weights/own.pth", f"{key} is 'weights/own.pth', but weights/own.pth does not travel"),
        ("nowhere.txt", f"{key} is 'nowhere.txt', and the working directory has no such file"),
    ):
        given = {name: path if value == "FILE" else value for name, value in settings.items()}
        words = [f"{name}={value}" for name, value in (given | {key: path}).items()]
        assert _submit_verb(fake, verb, *words) == Exit.USAGE
        assert expected in capfd.readouterr().err
    assert fake.jobs == {}
    (folder / "sent").write_text("")
    given = {name: "sent" if value == "FILE" else value for name, value in settings.items()}
    words = [f"{name}={value}" for name, value in (given | {key: "sent"}).items()]
    assert _submit_verb(fake, verb, *words) == 0


@pytest.mark.parametrize(
    ("verb", "settings"),
    [
        ("train", _GAN | {"train.real_pictures": "emoji"}),
        ("train", {"train.regression_decoder": "weights/unused"}),
        ("train", {"train.unpaired_prompts": "s3://bucket/prompts.txt"}),
        ("train", {"evaluate.prompts": "later.txt"}),
        ("evaluate", {"train.unpaired_prompts": "then.txt", "pairs.prompts": "then.txt"}),
        ("report", {"evaluate.prompts": "then.txt"}),
        ("pipeline", {"evaluate.prompts": "shipped:held_out", "evaluate.clip_model": "a/b@c"}),
    ],
)
def test_what_a_verb_does_not_read_need_not_travel(fake, verb, settings):
    assert _submit_verb(fake, verb, *(f"{name}={value}" for name, value in settings.items())) == 0


def _submit_verb(fake, verb: str, *settings: str) -> int:
    words = [part for setting in settings for part in ("--set", setting)]
    return main(
        ["submit", verb, "--config", "my.yaml", *words, "--address", fake.address, "--no-wait"]
    )


def test_a_recipe_is_named_by_its_place_in_the_working_directory(fake, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for config in (["--config", "project/my.yaml"], [f"--recipe={folder}/my.yaml"]):
        words = ["submit", "pairs", *config, "--working-dir", "project", "--no-wait"]
        assert main([*words, "--address", fake.address]) == 0
    assert fake.jobs[_only(fake)]["entrypoint"] == "python -m jobs.pairs --config my.yaml"


def test_what_stands_behind_two_dashes_is_the_verbs(fake):
    assert _submit(fake, "--no-wait", "--", "--json") == 2  # --address now is the verb's too
    words = ["submit", "pairs", "--address", fake.address, "--no-wait", "--", "--json"]
    assert main(words) == 0
    assert fake.jobs[_only(fake)]["entrypoint"] == "python -m jobs.pairs --json"


def test_a_package_that_is_on_the_cluster_needs_no_folder(fake):
    words = ["submit", "pairs", "--config", "/etc/there.yaml", "--working-dir", "none", "--no-wait"]
    assert main([*words, "--address", fake.address]) == 0
    job = fake.jobs[_only(fake)]
    assert job["runtime_env"] == {} and fake.packages == {}
    assert job["entrypoint"] == "python -m jobs.pairs --config /etc/there.yaml"


def test_a_folder_of_one_machine_is_pointed_out(fake, capfd):
    assert _submit(fake, "--set", "run.dir=runs/here", "--no-wait") == 0
    assert "run.dir is 'runs/here', a folder of one job" in capfd.readouterr().err


def test_a_folder_without_the_program_is_pointed_out(fake, folder, capfd):
    assert _submit(fake, "--no-wait") == 0
    assert "has no folder jobs/" in capfd.readouterr().err
    (folder / "jobs").mkdir()
    (folder / "jobs" / "more.txt").write_text("another folder to send, so another job")
    assert _submit(fake, "--no-wait", "--id", "second") == 0
    assert "has no folder jobs/" not in capfd.readouterr().err


def test_too_large_a_folder_is_refused_with_its_largest_files(fake, folder, monkeypatch, capfd):
    monkeypatch.setattr("ray._private.runtime_env.packaging.GCS_STORAGE_MAX_SIZE", 5000)
    for index in range(8):
        (folder / f"film{index}.avi").write_bytes(bytes(700 + index))
    (folder / "weights.safetensors").write_bytes(bytes(9000))
    assert _submit(fake) == Exit.USAGE
    said = capfd.readouterr().err
    assert "5.7 kB in 9 files" in said and ".rayignore" in said
    named = [f"film{index}.avi ({700 + index} B)" for index in (7, 6, 5, 4, 3)]
    assert ", ".join(named) in said and "film2." not in said and "weights." not in said
    (folder / ".rayignore").write_text("*.avi\n")
    assert _submit(fake, "--no-wait") == 0
    assert "avi" not in capfd.readouterr().err


def test_the_runtime_environment_adds_to_what_stays_at_home(fake, folder):
    (folder / "env.yaml").write_text("excludes: ['*.csv', runs/]\nenv_vars: {OMP_NUM_THREADS: '4'}")
    assert _submit(fake, "--runtime-env", "env.yaml", "--no-wait") == 0
    sent = fake.jobs[_only(fake)]["runtime_env"]
    assert sent["env_vars"] == {"OMP_NUM_THREADS": "4"}
    assert sent["excludes"] == [*EXCLUDES, "*.csv"]


def test_the_address_comes_from_the_environment_when_it_is_one(fake, monkeypatch, capfd):
    words = ["submit", "pairs", "--config", "my.yaml", "--no-wait"]
    assert main(words) == Exit.USAGE
    assert "--address http://head:8265" in capfd.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert main(words) == Exit.USAGE
    monkeypatch.setenv("RAY_ADDRESS", fake.address)
    assert main(words) == 0
    assert len(fake.jobs) == 1


def test_the_variable_of_a_job_server_is_one_without_a_scheme_too(fake, monkeypatch, capfd):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", fake.address.removeprefix("http://"))
    assert main(["jobs"]) == 0
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "ray://head:10001")
    assert main(["jobs"]) == Exit.USAGE
    assert "RAY_API_SERVER_ADDRESS ray://head:10001: expected" in capfd.readouterr().err


@pytest.mark.parametrize("variable", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_the_local_cluster_is_the_default_with_its_own_token(
    fake, tmp_path, monkeypatch, capfd, variable
):
    """Ray was imported before, in another mode, and the environment names another cluster's."""
    import ray  # noqa: F401

    monkeypatch.setenv(variable, "/another/cluster's")
    remember(fake, tmp_path, "secret")
    assert main(["submit", "pairs", "--config", "my.yaml", "--no-wait"]) == 0
    assert main(["jobs"]) == main(["jobs", "--address", fake.address + "/"]) == 0
    (tmp_path / "token").write_text("old")
    assert main(["jobs"]) == Exit.REFUSED
    assert "wants another token" in capfd.readouterr().err
    (tmp_path / "token").unlink()
    assert main(["jobs"]) == Exit.REFUSED
    assert "`dmd cluster up` make a new one" in capfd.readouterr().err


def test_a_local_cluster_without_a_token_is_sent_none(fake, tmp_path):
    remember(fake, tmp_path, None)
    assert main(["jobs"]) == 0
    assert set(fake.given) == {""}  # with a header Ray looks for no token


def test_a_local_cluster_that_is_gone_has_no_say_in_its_address(fake, tmp_path):
    """As after its machine was started anew: another job server may be there."""
    head = replace(Birth.of(os.getpid()), created=1.0, ticks="1")
    remember(fake, tmp_path, "old", head=head)
    fake.token = None
    assert main(["jobs", "--address", fake.address]) == 0
    assert "Bearer old" not in fake.given
    assert main(["jobs"]) == Exit.USAGE


def test_a_damaged_record_is_no_reason_to_refuse_another_address(fake, capfd):
    default_folder().mkdir(parents=True)
    (default_folder() / "cluster.json").write_text("{")
    assert main(["jobs", "--address", fake.address]) == 0
    assert main(["jobs"]) == Exit.REFUSED
    assert "cluster.json is not the record" in capfd.readouterr().err


def test_an_address_is_one_of_a_job_server(fake, tmp_path):
    remember(fake, tmp_path, None)
    assert job_client.find_address(None) == fake.address
    assert job_client.find_address(fake.address + "/") == fake.address
    assert job_client.find_address("elsewhere:8265") == "http://elsewhere:8265"
    with pytest.raises(JobError, match="expected the job server's"):
        job_client.find_address("ray://head:10001")


# ------------------------------------------------------------------------ the other verbs


def _other(fake, *words: str) -> int:
    return main([*words, "--address", fake.address])


def test_attach_finds_the_newest_job_that_runs(fake, script, capfd):
    for identity in ("old", "ended"):
        fake.start(identity)
    fake.start("foreign", entrypoint="python train.py")
    fake.end("ended")
    fake.logs["old"] = "pairs: 1/9 a\npairs: 2/9 b\nnote\npairs: 3/9 c\n"

    def ends() -> None:
        fake.logs["old"] += "pairs: 4/9 d\npairs: 5/9 e\n"
        fake.end("old", "FAILED", 3)

    script.append(ends)
    assert _other(fake, "attach") == Exit.REFUSED
    said = capfd.readouterr().err
    assert "old (RUNNING)" in said
    assert "pairs: 1/9" not in said  # progress of the past: its last line
    assert said.index("pairs: 2/9 b\nnote\npairs: 3/9 c\npairs: 4/9 d\npairs: 5/9 e\n")


def test_attach_without_a_running_job_says_so(fake, capfd):
    assert _other(fake, "attach") == Exit.REFUSED
    fake.start("one")
    fake.end("one", "FAILED", 2)
    assert _other(fake, "attach") == Exit.REFUSED
    assert "the newest, one, is FAILED" in capfd.readouterr().err
    assert _other(fake, "attach", "one") == Exit.USAGE  # the job's own
    assert _other(fake, "attach", "two") == Exit.REFUSED


def test_jobs_are_listed_with_state_age_and_progress(fake, capfd):
    fake.start("a", entrypoint="python -m jobs.train_teacher --config x")
    fake.start("b")
    fake.start("c", entrypoint="python other.py")
    fake.start("d")
    fake.end("b", "FAILED", 3, message="Job failed, last logs:\nerror: no prompts\n")
    fake.end("d")
    fake.logs["a"] = "hello\nvae: 3/8 1.0 steps/s\n"
    assert _other(fake, "jobs", "--json") == 0
    found = json.loads(capfd.readouterr().out)["jobs"]
    assert [row["id"] for row in found] == ["a", "d", "b"]
    assert [row["state"] for row in found] == ["RUNNING", "SUCCEEDED", "FAILED"]
    assert found[0]["verb"] == "train-teacher" and found[0]["age"] > 0
    assert [row["progress"] for row in found] == [
        "vae: 3/8 1.0 steps/s", "", "error: no prompts",
    ]  # fmt: skip
    assert _other(fake, "jobs", "--all", "--limit", "3") == 0
    table = capfd.readouterr().out.splitlines()
    assert len(table) == 4 and "python other.py" in table[1] and " d  " in table[2]


def test_logs_are_printed_as_they_are(fake, script, capfd):
    fake.start("a")
    fake.logs["a"] = "one\n[x] :fox: 2/3\n"
    assert _other(fake, "logs", "a") == 0
    assert capfd.readouterr().out == fake.logs["a"]
    script.append(_ends(fake, "FAILED", 5, "one\n[x] :fox: 2/3\nthree\n"))
    assert _other(fake, "logs", "a", "--follow") == Exit.REJECTS
    assert capfd.readouterr().out == fake.logs["a"]
    assert _other(fake, "logs", "b") == Exit.REFUSED


def test_a_jobs_words_are_shown_as_text(fake, script, capfd):
    """Not as markup, and without what moves the cursor or sets the window's title."""
    script.append(_ends(fake, log="[bold]x[/bold] :fox: \x1b[2J\x1b[31my\n\x1b]0;title\x07\n"))
    assert _submit(fake) == 0
    said = capfd.readouterr().err
    assert "[bold]x[/bold] :fox: y\n" in said and not {"\x1b", "\x07"} & set(said)


def test_stop_waits_until_the_job_has_ended_and_says_how_to_go_on(fake, script, capfd):
    assert _submit(fake, "--no-wait", "--set", "pairs.negative_prompt=a b") == 0
    identity = _only(fake)
    capfd.readouterr()
    assert _other(fake, "stop", identity, "--dry-run") == 0
    assert fake.details(identity)["status"] == "RUNNING"
    fake.slow_stop = 3
    script.append(lambda: None)
    assert _other(fake, "stop", identity) == 0
    said = capfd.readouterr().err
    assert "STOPPED" in said and "what was done stays" in said
    assert (
        f"submit pairs --address {fake.address} --config my.yaml --set 'pairs.negative_prompt=a b'"
        in said
    )
    assert _other(fake, "stop", identity) == 0
    assert "ended before" in capfd.readouterr().err
    assert _other(fake, "stop", "unknown") == Exit.REFUSED


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "words",
    [
        ["--config", "project/my.yaml", "--working-dir", "project"],
        ["--working-dir", "none", "--recipe=/etc/there.yaml", "--set", "pairs.steps=7"],
        ["--id", "mine", "--runtime-env", "env.yaml", "--", "--json", "--config", "tiny"],
    ],
)
def test_the_command_to_go_on_with_is_the_one_that_was_given(
    fake, folder, monkeypatch, capfd, words, named
):
    """`named`: is the cluster by the environment, or by an option of every command?"""
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", fake.address if named else "http://elsewhere:1")
    where = [] if named else ["--address", fake.address]
    (folder.parent / "env.yaml").write_text("env_vars: {OMP_NUM_THREADS: '4'}\n")
    assert main(["submit", "pairs", "--no-wait", *where, *words]) == 0
    first = _only(fake)
    capfd.readouterr()
    assert main(["stop", *where, first]) == 0
    command = capfd.readouterr().err.partition("to go on: ")[2]
    dmd, submit, verb, *again = shlex.split(command)
    assert (dmd, submit, verb) == ("dmd", "submit", "pairs")
    assert main(["submit", "pairs", "--no-wait", *again]) == 0
    assert list(fake.jobs) == [first, f"{first}-2"]
    before, after = fake.jobs.values()
    for key in ("entrypoint", "runtime_env", "metadata"):
        assert before[key] == after[key]
