"""A teacher is the same teacher wherever it comes from, and only its data is ever fetched."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline
from fsspec.implementations.memory import MemoryFileSystem

from dmd_core.teacher import TeacherError, check_teacher, load_teacher, teacher_revision
from pipelines.config import TeacherSection
from pipelines.hub import HubError, hub_folder
from pipelines.local_folders import UnsafeNameError, made_once, nearby
from pipelines.storage import Store
from pipelines.teacher_source import TeacherSource, local_teacher, teacher_source
from tests.pipelines.hub_server import hub
from tests.pipelines.original_checkpoint import save_original

ID, COMMIT = "someone/tiny", "1234567890abcdef1234567890abcdef12345678"
PINNED = TeacherSource(ID, revision=COMMIT).url


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A machine that has fetched nothing yet. The library reads its variables on import."""
    home = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_ASSETS_CACHE", str(home / "assets"))
    return home


def point_to(monkeypatch, endpoint: str) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def published(tmp_path, tiny_teacher_dir) -> Path:
    """The tiny teacher as models are published: with other formats, variants, code and a card."""
    folder = tmp_path / "published"
    shutil.copytree(tiny_teacher_dir, folder)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_teacher_dir, dtype=torch.float16)
    pipeline.unet.save_pretrained(str(folder / "unet"), variant="fp16")
    pipeline.text_encoder.save_pretrained(str(folder / "text_encoder"), variant="fp16")
    for part in ("unet", "text_encoder"):  # saving in float16 wrote the other dtype into it
        shutil.copy(f"{tiny_teacher_dir}/{part}/config.json", folder / part)
    for name in (
        "README.md", "whole.safetensors", "whole.ckpt", "unet/diffusion_pytorch_model.bin",
        "unet/code.py", "pipeline.py", "safety_checker/model.safetensors",
    ):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be fetched")
    return folder


@pytest.fixture
def served(published, monkeypatch):
    """The names of the files that a hub gave."""
    with hub(published, ID, COMMIT) as (endpoint, given):
        point_to(monkeypatch, endpoint)
        yield given


def files_of(folder: str) -> set[str]:
    root = Path(folder)
    return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}


# ---------------------------------------------------------------------- what a recipe says


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"path": "model.ckpt"}, "is a pickle, which runs code"),
        ({"path": "org/name"}, r"give teacher.revision too.*git ls-remote .*/org/name HEAD"),
        ({"path": "org/name", "revision": "main"}, "40 hexadecimal digits of a commit"),
        ({"path": "/folder", "revision": COMMIT}, "is not the id of a hub's model"),
        ({"path": "x.safetensors"}, "give teacher.single_file_config"),
        ({"path": "x.safetensors", "revision": COMMIT}, "are for pipelines"),
        ({"path": "x.safetensors", "single_file_config": "org/name"}, "expected org/name@<commit>"),
        ({"path": "/folder", "single_file_config": "/other"}, "is not a single-file checkpoint"),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(keys, said):
    with pytest.raises((TeacherError, HubError), match=said):
        teacher_source(TeacherSection(**keys))


def test_a_folder_of_that_name_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert teacher_source(TeacherSection(path="org/name")).url == str(tmp_path / "org" / "name")


@pytest.mark.parametrize(
    "source",
    [
        TeacherSource("/a folder/with?signs&more=1"),
        TeacherSource("/a folder/with?signs&more=1#x", variant="fp16"),
        TeacherSource("s3://bucket/x y.safetensors", config=f"{ID}@{COMMIT}"),
        TeacherSource(ID, COMMIT, "fp16"),
    ],
)
def test_one_string_says_all_of_a_source(source):
    assert TeacherSource.from_url(source.url) == source


# ---------------------------------------------------------------------- a hub


def test_only_the_data_of_its_parts_is_fetched_from_a_hub(served, cache, tiny_teacher_dir):
    folder = local_teacher(PINNED)
    assert set(served) == files_of(tiny_teacher_dir)
    assert files_of(folder) == files_of(tiny_teacher_dir)
    assert len(served) == len(set(served))
    fetched = {file.read_bytes() for file in cache.rglob("*") if file.is_file()}
    assert b"not to be fetched" not in fetched


def test_its_revision_is_that_of_the_same_folder(served, tiny_teacher_dir):
    folder = local_teacher(PINNED)
    check_teacher(folder)
    assert teacher_revision(folder) == teacher_revision(tiny_teacher_dir)
    assert load_teacher(folder).latent_shape() == load_teacher(tiny_teacher_dir).latent_shape()


def test_a_variant_is_read_under_plain_names(served, published, tmp_path, tiny_teacher_dir):
    folder = local_teacher(TeacherSource(ID, COMMIT, "fp16").url)
    weights = {name for name in served if name.endswith(".safetensors")}
    assert weights == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",  # there is no other
    }
    saved = tmp_path / "saved"
    shutil.copytree(tiny_teacher_dir, saved)
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        shutil.copy(published / f"{name}.fp16.safetensors", saved / f"{name}.safetensors")
    assert teacher_revision(folder) == teacher_revision(str(saved))
    load_teacher(folder)


def test_a_variant_that_is_fetched_later_changes_no_revision(served, tiny_teacher_dir):
    folder = local_teacher(PINNED)
    local_teacher(TeacherSource(ID, COMMIT, "fp16").url)
    assert list(Path(folder).rglob("*.fp16.safetensors"))
    assert teacher_revision(folder) == teacher_revision(tiny_teacher_dir)


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards_are_fetched_by_their_index(served, published, variant, tiny_teacher_dir):
    (published / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (published / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_teacher_dir)
    for kind in (None, "fp16"):
        pipeline.unet.save_pretrained(published / "unet", variant=kind, max_shard_size="20KB")
    seen = load_teacher(local_teacher(TeacherSource(ID, COMMIT, variant).url)).pipeline.unet
    torch.testing.assert_close(
        dict(seen.named_parameters()), dict(pipeline.unet.named_parameters())
    )
    shards = [name for name in served if name.startswith("unet/") and name.endswith(".safetensors")]
    assert len(shards) > 2 and all((".fp16-" in name) == bool(variant) for name in shards)


def test_what_was_fetched_once_needs_no_network(served, monkeypatch):
    folder, given = local_teacher(PINNED), list(served)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert local_teacher(PINNED) == folder
    assert served == given


def test_a_hub_out_of_reach_is_one_paragraph_with_the_ways_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    point_to(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(HubError) as caught:
        local_teacher(PINNED)
    said = str(caught.value)
    assert "http://127.0.0.1:9 could not be reached" in said
    assert f"hf download {ID} --revision {COMMIT}" in said
    assert "local copy" in said and "HF_ENDPOINT" in said and "\n" not in said


def test_offline_says_so(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        local_teacher(PINNED)


def test_half_a_download_is_not_taken_for_a_whole_one(served, monkeypatch):
    hub_folder(ID, COMMIT, ["*.json"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="not wholly, in this machine's cache"):
        local_teacher(PINNED)


def test_a_commit_or_a_model_that_is_not_there(served):
    with pytest.raises(HubError, match="but not this commit"):
        local_teacher(TeacherSource(ID, revision="f" * 40).url)
    with pytest.raises(HubError, match="no such model"):
        local_teacher(TeacherSource("someone/else", revision=COMMIT).url)


@pytest.mark.slow
def test_workers_fetch_it_by_themselves_once_per_machine(published, tmp_path):
    """The whole of `dmd pairs`, told of the hub by nothing but environment variables."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"a red fox {i}" for i in range(16)))
    keys = {
        "run.dir": tmp_path / "run", "pairs.prompts": tmp_path / "prompts.txt", "pairs.actors": 2,
        "teacher.path": ID, "teacher.revision": COMMIT,
    }  # fmt: skip
    overrides = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "jobs.pairs", "--config", "tiny", "--json", *overrides]
    with hub(published, ID, COMMIT) as (endpoint, given):
        environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["rows"] == 16
        assert len(given) == len(set(given))
    offline = environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "other")}
    refused = subprocess.run(command, env=offline, capture_output=True, text=True)
    assert refused.returncode == 3
    assert refused.stderr.count("\n") == 1 and "HF_HUB_OFFLINE is set" in refused.stderr


# ---------------------------------------------------------------------- folders


def test_a_copy_from_s3_is_made_once_and_again_when_it_changes(s3_store, s3_options, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "vae" / "config.json").write_text("1")
    s3_store.fs.put(f"{tmp_path}/", s3_store.path("teacher"), recursive=True)
    store = s3_store.at("teacher")
    first = nearby(store)
    assert files_of(first) >= {"model_index.json", "vae/config.json"}
    stamp = Path(first, "model_index.json").stat().st_mtime_ns
    assert nearby(store) == first
    assert Path(first, "model_index.json").stat().st_mtime_ns == stamp
    store.fs.pipe_file(store.path("vae", "config.json"), b"2")  # as long as before
    assert Path(nearby(store), "vae", "config.json").read_text() == "2"
    one = nearby(store.at("vae", "config.json"))
    assert Path(one).name == "config.json" and Path(one).read_text() == "2"
    with pytest.raises(TeacherError, match="does not exist; expected"):
        local_teacher(f"{s3_store.url}/nothing", s3_options)


@pytest.fixture
def in_bucket(published, s3_store) -> str:
    """The URL of the published teacher in a bucket."""
    s3_store.fs.put(f"{published}/", s3_store.path("teacher"), recursive=True)
    return s3_store.at("teacher").url


def test_only_what_is_read_is_fetched_from_a_bucket(in_bucket, s3_options, tiny_teacher_dir, cache):
    folder = local_teacher(in_bucket, s3_options)
    assert files_of(folder) == files_of(tiny_teacher_dir)
    assert teacher_revision(folder) == teacher_revision(tiny_teacher_dir)
    view = local_teacher(TeacherSource(in_bucket, variant="fp16").url, s3_options)
    assert files_of(view) == files_of(tiny_teacher_dir)
    assert teacher_revision(view) != teacher_revision(tiny_teacher_dir)
    fetched = [file for file in cache.rglob("*") if file.is_file() and not file.is_symlink()]
    assert b"not to be fetched" not in {file.read_bytes() for file in fetched}
    weights = [file.name for file in fetched if file.parent.name == "unet" and "fp16" in file.name]
    assert weights == ["diffusion_pytorch_model.fp16.safetensors"]
    with pytest.raises(TeacherError, match=r"has no \*\.bf16\.safetensors"):
        local_teacher(TeacherSource(in_bucket, variant="bf16").url, s3_options)


def test_what_is_put_beside_a_teacher_in_a_bucket_makes_no_new_copy(
    in_bucket, s3_store, s3_options
):
    folder = local_teacher(in_bucket, s3_options)
    s3_store.fs.pipe_file(s3_store.path("teacher", "unet", "openvino_model.xml"), b"x")
    assert local_teacher(in_bucket, s3_options) == folder
    s3_store.fs.rm_file(s3_store.path("teacher", "model_index.json"))
    with pytest.raises(TeacherError, match=r"teacher s3://.* has no model_index\.json; expected"):
        local_teacher(in_bucket, s3_options)


OUT = "../../../../../out"  # of a copy's folder, and of the cache


@pytest.fixture
def strange_bucket(monkeypatch) -> Store:
    """A bucket whose objects are called as somebody likes who means harm."""

    class Bucket(MemoryFileSystem):
        store, pseudo_dirs, cachable = {}, [""], False

    bucket = Store(Bucket(), "/bucket/teacher")
    for name in ("unet", "/out", OUT):
        bucket.fs.pipe_file(f"{bucket.root}/{name}/config.json", b"{}")
    monkeypatch.setattr("pipelines.teacher_source.open_store", lambda *given: bucket)
    return bucket


@pytest.mark.parametrize("part", [OUT, "/out", "unet/..", ""])
def test_a_part_that_leads_out_of_the_cache_is_refused(strange_bucket, tmp_path, part):
    index = json.dumps({"unet": ["diffusers", "X"], part: ["diffusers", "Y"]}).encode()
    strange_bucket.fs.pipe_file(strange_bucket.path("model_index.json"), index)
    with pytest.raises(TeacherError, match=r"s3:.*/model_index\.json names a part "):
        local_teacher("s3://bucket/teacher")
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.parametrize("choose", [None, lambda names: [n for n in names if ".." in n]])
def test_a_name_that_leads_out_of_the_cache_is_not_copied(strange_bucket, tmp_path, choose):
    with pytest.raises(UnsafeNameError, match="would be copied to another folder"):
        nearby(strange_bucket, choose)
    assert not list(tmp_path.rglob("config.json"))
    folder = nearby(strange_bucket, lambda names: [n for n in names if n.startswith("unet/")])
    assert files_of(folder) == {"unet/config.json"}


def test_of_several_that_want_a_folder_one_makes_it():
    made, folders = [], []

    def make(target: Path) -> None:
        (target / "file").write_text("x")
        threading.Event().wait(0.2)
        made.append(target)

    def want() -> None:
        folders.append(made_once("test", ["inputs"], make))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(set(folders)) == 1
    assert Path(folders[0], "file").read_text() == "x"


def test_what_was_cut_short_is_made_anew():
    def cut_short(target: Path) -> None:
        (target / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once("test", ["cut"], cut_short)
    folder = made_once("test", ["cut"], lambda target: (target / "whole").touch())
    assert files_of(folder) == {"whole"}


def test_a_variant_that_is_not_there_is_refused(tiny_teacher_dir):
    with pytest.raises(TeacherError, match=r"has no \*\.fp16\.safetensors; leave the key out"):
        local_teacher(TeacherSource(tiny_teacher_dir, variant="fp16").url)


def test_an_index_that_is_renamed_lists_its_shards(tmp_path, tiny_teacher_dir):
    folder = tmp_path / "sharded"
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_teacher_dir, dtype=torch.float32)
    pipeline.save_pretrained(str(folder), variant="fp16", max_shard_size="20KB")
    assert list((folder / "unet").glob("*.safetensors.index.fp16.json"))
    seen = load_teacher(local_teacher(TeacherSource(str(folder), variant="fp16").url))
    own = pipeline.unet.state_dict()
    for name, value in seen.pipeline.unet.state_dict().items():
        torch.testing.assert_close(value, own[name])


# ---------------------------------------------------------------------- single files


@pytest.fixture
def checkpoint(tmp_path, tiny_teacher_dir) -> Path:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_teacher_dir)
    path = tmp_path / "tune.safetensors"
    save_original(pipeline, path)
    return path


@pytest.fixture
def configuration(tmp_path, tiny_teacher_dir) -> Path:
    """The tiny teacher without its weights."""
    folder = tmp_path / "configuration"
    ignore = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tiny_teacher_dir, folder, ignore=ignore)
    return folder


def single(checkpoint: Path, configuration: Path) -> str:
    keys = {"path": str(checkpoint), "single_file_config": str(configuration)}
    return teacher_source(TeacherSection(**keys)).url


def test_a_single_file_checkpoint_is_the_teacher_it_was_saved_from(
    checkpoint, configuration, tiny_teacher_dir
):
    folder = local_teacher(single(checkpoint, configuration))
    check_teacher(folder)
    found, expected = load_teacher(folder), load_teacher(tiny_teacher_dir)
    for part in ("unet", "vae", "text_encoder"):
        own = getattr(expected.pipeline, part).state_dict()
        for name, value in getattr(found.pipeline, part).state_dict().items():
            torch.testing.assert_close(value, own[name], rtol=0, atol=0)
    assert dict(found.pipeline.scheduler.config) == dict(expected.pipeline.scheduler.config)
    prompts = ["a red fox", "green apple"]
    texts = [teacher.encode_prompts(prompts).text for teacher in (found, expected)]
    torch.testing.assert_close(*texts, rtol=0, atol=0)
    stamp = Path(folder, "model_index.json").stat().st_mtime_ns
    assert local_teacher(single(checkpoint, configuration)) == folder
    assert Path(folder, "model_index.json").stat().st_mtime_ns == stamp


def test_a_checkpoint_that_lacks_a_part_is_refused(checkpoint, configuration, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint)
    save_file(
        {name: value for name, value in weights.items() if "cond_stage" not in name},
        tmp_path / "half.safetensors",
    )
    with pytest.raises(TeacherError, match=r"half\.safetensors cannot be loaded as a Stable"):
        local_teacher(single(tmp_path / "half.safetensors", configuration))


def test_a_configuration_in_a_bucket_is_fetched_without_weights(
    in_bucket, checkpoint, s3_options, cache
):
    keys = {"path": str(checkpoint), "single_file_config": in_bucket}
    check_teacher(local_teacher(teacher_source(TeacherSection(**keys)).url, s3_options))
    (copies,) = cache.rglob("copies")
    assert not list(copies.rglob("*.safetensors")) and list(copies.rglob("tokenizer.json"))


def test_a_configuration_on_a_hub_is_fetched_without_weights(served, checkpoint):
    keys = {"path": str(checkpoint), "single_file_config": f"{ID}@{COMMIT}"}
    check_teacher(local_teacher(teacher_source(TeacherSection(**keys)).url))
    assert not [name for name in served if name.endswith(".safetensors")]
