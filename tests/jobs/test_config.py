"""Bad configuration is refused before anything starts, with the key and what was expected."""

import pytest

from jobs.config import load_recipe, shipped_recipes
from jobs.errors import Exit, JobError


def _error(tmp_path, text: str, *overrides: str) -> str:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(JobError) as caught:
        load_recipe(str(recipe), list(overrides))
    assert caught.value.code == Exit.USAGE
    return str(caught.value)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid(name):
    load_recipe(name, [])


def test_an_endpoint_holds_no_credentials_and_an_error_does_not_repeat_them(tmp_path):
    for url in ("http://key:se/cret@host", "https://key:se/cret@host:9000/x", "key:se/cret@host"):
        message = _error(tmp_path, f"storage: {{endpoint_url: '{url}'}}")
        assert "storage.endpoint_url: a store URL must not hold credentials" in message
        assert not any(part in message for part in ("key:", "se/", "cret@"))
    for url in ("minio:9000", "ftp://host", "http://"):
        message = _error(tmp_path, f"storage: {{endpoint_url: '{url}'}}")
        assert "expected http://host:port" in message and url in message
    recipe = load_recipe("demo", ["storage.endpoint_url=http://minio:9000"])
    assert recipe.storage.endpoint_url == "http://minio:9000"


@pytest.mark.parametrize("address", ["http://head:8265", "https://ray.example.org"])
def test_a_job_server_is_no_cluster_to_run_on(tmp_path, address):
    message = _error(tmp_path, f"ray: {{address: '{address}'}}")
    assert "ray.address" in message and "use `dmd submit --address`" in message
    assert "ray.address" in _error(tmp_path, "run: {}", f"ray.address={address}")
    assert load_recipe("tiny", ["ray.address=head:6379"]).ray.address == "head:6379"


def test_a_bare_no_means_no(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {mixed_precision: no}")
    assert load_recipe(str(recipe), []).train.mixed_precision == "no"


def test_a_misspelt_key_names_its_nearest(tmp_path):
    message = _error(tmp_path, "train:\n  learning_rat: 1e-5\n")
    assert "train.learning_rat" in message and "did you mean train.learning_rate?" in message


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (
            "pairs.actors=-1",
            "pairs.actors: Input should be greater than 0, or a mapping (given: -1)",
        ),
        (
            "pairs.actors={min: 3, max: 1}",
            "pairs.actors: Input should be a valid integer, or max (1)",
        ),
        (
            "pairs.actors={mn: 3, max: 4}",
            "pairs.actors.mn: unknown key; did you mean pairs.actors.min?",
        ),
        (
            "train.student_timesteps=399",
            "train.student_timesteps: Input should be a valid list, as in",
        ),
        (
            "train.report_to=wand",
            "train.report_to: Input should be 'tensorboard', 'wandb' or 'none', or",
        ),
        ("train.stages=[{steps: x}]", "train.stages.0.steps: Input should be a valid integer"),
        ("train.gan_weight=1", "  train: gan_weight > 0 needs train.real_pictures"),
    ],
)
def test_an_error_names_the_key_as_it_is_written(setting, expected):
    """Not pydantic's names for the members of a union, nor a section for one of its keys."""
    with pytest.raises(JobError) as error:
        load_recipe("demo", [setting])
    assert expected in str(error.value)
    assert "{'" not in str(error.value)


def test_an_unknown_section_lists_the_sections(tmp_path):
    assert "evaluate" in _error(tmp_path, "evaluation_of_everything: {}\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {t_min_fraction: 0.9, t_max_fraction: 0.5}", "t_min_fraction (0.9) must be below"),
        ("train: {lambda_reg: 0.5, regression_batch_size: 0}", "needs regression_batch_size"),
        ("train: {dm_weight: 0, lambda_reg: 0}", "nothing to train"),
        ("train: {num_workers: 8, train_batch_size: 4}", "at least num_workers"),
        ("train: {learning_rate: -1}", "train.learning_rate"),
        ("train: {guidance_scale: 0}", "train.guidance_scale: expected 1 (no guidance) or more"),
        ("train: {stages: [{steps: 1, guidance_scale: 0.5}]}", "guidance_scale: expected 1 (no"),
        ("pairs: {solver: euler_ancestral}", "pairs.solver"),
        ("pairs: {batch_size: 10, rows_per_block: 64}", "multiple of"),
        ("pairs: {steps: fifty}", "'fifty'"),
    ],
)
def test_impossible_values_name_the_key_and_the_value(tmp_path, text, expected):
    assert expected in _error(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {a: 1, a: 2}", "given twice"),
        ("- a\n- b\n", "no settings"),
        ("train: [", "not valid YAML"),
        ("x: !!python/object/apply:os.system [true]", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, expected):
    assert expected in _error(tmp_path, text)


def test_missing_recipe_lists_the_shipped_ones():
    with pytest.raises(JobError, match="demo"):
        load_recipe("nonesuch", [])


def test_overrides(tmp_path):
    recipe = load_recipe("demo", ["train.learning_rate=1e-3", "pairs.steps=7"])
    # YAML 1.1 reads 1e-3 as a string; pydantic makes it the number that was meant.
    assert recipe.train.learning_rate == 1e-3 and recipe.pairs.steps == 7
    assert "--set" in _error(tmp_path, "run: {}", "train.learning_rate")
    assert "not a section" in _error(tmp_path, "run: {dir: here}", "run.dir.x=1")


@pytest.mark.parametrize(
    "value", ["blurry, #1 hit", "#1 hit", "'quoted' # not", "{max: 2} #", "a: b\n# c\nd: e"]
)
def test_an_override_says_no_less_than_was_typed(tmp_path, value):
    message = _error(tmp_path, "run: {}", f"pairs.negative_prompt={value}")
    assert "--set 'pairs.negative_prompt'" in message
    assert "quote text that holds one: --set 'pairs.negative_prompt=\"…\"'" in message


@pytest.mark.parametrize(
    ("value", "expected"),
    [('"blurry, #1 hit"', "blurry, #1 hit"), ("'a # b'", "a # b"), ("C#, a#b", "C#, a#b")],
)  # fmt: skip
def test_an_override_may_hold_a_number_sign(value, expected):
    assert load_recipe("demo", [f"pairs.negative_prompt={value}"]).pairs.negative_prompt == expected


def test_a_key_given_twice_in_an_override_is_refused(tmp_path):
    message = _error(tmp_path, "run: {}", "pairs.actors={max: 2, max: 8}")
    assert "--set 'pairs.actors'" in message and "key 'max' is given twice" in message
