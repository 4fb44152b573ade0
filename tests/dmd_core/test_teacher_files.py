"""A teacher is made of the files that loading it reads, and of nothing that lies beside them."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from dmd_core.teacher import TeacherError, check_teacher, load_teacher, teacher_revision
from dmd_core.teacher_files import PartFiles, plain_name

WHOLE = {
    "model_index.json": '{"_class_name": "StableDiffusionPipeline"}',
    "vae/config.json": "{}",
    "vae/diffusion_pytorch_model.safetensors": "vae",
    "text_encoder/config.json": "{}",
    "text_encoder/model.safetensors": "text encoder",
    "tokenizer/merges.txt": "a b",
    "tokenizer/spiece.model": "pieces",
    "tokenizer/vocab.json": "{}",
    "unet/config.json": "{}",
    "unet/diffusion_pytorch_model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "unet-1.safetensors", "b": "unet-2.safetensors"}}
    ),
    "unet/unet-1.safetensors": "one",
    "unet/unet-2.safetensors": "two",
    "scheduler/scheduler_config.json": "{}",
}
BESIDE = (
    "README.md", "safety_checker/model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.non_ema.safetensors", "vae/openvino_model.xml", "vae/model.onnx",
    "vae/diffusion_pytorch_model.bin", "vae/.DS_Store", "text_encoder/model.onnx_data",
    "text_encoder/model.fp16-00001-of-00002.safetensors", "text_encoder/onnx/config.json",
    "text_encoder/pytorch_model.bin.index.json", "text_encoder/model.safetensors.index.fp16.json",
    "unet/diffusion_pytorch_model.safetensors", "unet/code.py",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    _write(tmp_path / "teacher", WHOLE)
    return tmp_path / "teacher"


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def _digest(files: dict[str, str], parts: tuple[str, ...]) -> str:
    """The formula that stored data sets' revisions are by."""
    lines = [
        f"{name} {hashlib.sha256(files[name].encode()).hexdigest()}\n"
        for part in parts
        for name in sorted(files)
        if name.split("/")[0] == part
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_revision_is_that_of_stored_data_sets(folder):
    order = "model_index.json", "vae", "text_encoder", "tokenizer", "unet", "scheduler"
    revision = teacher_revision(str(folder))
    assert revision == _digest(WHOLE, order)
    assert revision == "218edfbf305767798fa5b65e50d0a228ae418df2238bc09aef0fc80d6b179b14"


def test_what_is_not_loaded_is_no_part_of_the_revision(folder):
    revision = teacher_revision(str(folder))
    _write(folder, dict.fromkeys(BESIDE, "fetched or made later"))
    assert teacher_revision(str(folder)) == revision


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_loaded_is(folder, name):
    revision = teacher_revision(str(folder))
    (folder / name).write_text(WHOLE[name] + " ")
    assert teacher_revision(str(folder)) != revision


def test_weights_are_those_that_the_libraries_load(tiny_teacher_dir, tmp_path):
    """Whole and in shards at once, of other values: diffusers takes the shards, transformers the
    whole file."""
    both = Path(shutil.copytree(tiny_teacher_dir, tmp_path / "both"))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_teacher_dir)
    for part in ("unet", "text_encoder"):
        network = getattr(pipeline, part)
        for parameter in network.parameters():
            parameter.data.zero_()
        network.save_pretrained(tmp_path / part, max_shard_size="20KB")
        for file in (tmp_path / part).glob("*safetensors*"):
            shutil.copy(file, both / part)
    loaded = load_teacher(str(both)).pipeline
    assert not any(p.any() for p in loaded.unet.parameters())
    assert any(p.any() for p in loaded.text_encoder.parameters())
    found = PartFiles.in_folder(both / "unet").weights()
    assert found[0].endswith(".index.json") and len(found) > 2
    assert PartFiles.in_folder(both / "text_encoder").weights() == ["model.safetensors"]


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        ("model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors"),
        ("model.fp16.safetensors.index.json", "model-00001-of-00001.fp16.safetensors"),
    ],
)
def test_shards_of_a_variant_are_those_of_its_index(tmp_path, index, shard):
    _write(
        tmp_path, {index: json.dumps({"weight_map": {"a": shard}}), shard: "", "config.json": ""}
    )
    part = PartFiles.in_folder(tmp_path)
    assert part.weights("fp16") == [index, shard] and part.weights() == []
    assert part.loaded() == ["config.json"]
    assert plain_name(index, "fp16") == "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ('{"weight_map": {"a": "lost.safetensors"}}', r"lists lost\.safetensors, which is not bes"),
        ("{", "unet/diffusion_pytorch_model.safetensors.index.json does not list shards"),
    ],
)
def test_an_index_without_its_shards_is_refused(tiny_teacher_dir, tmp_path, index, said):
    copy = Path(shutil.copytree(tiny_teacher_dir, tmp_path / "copy"))
    (copy / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    with pytest.raises(TeacherError, match=said):
        check_teacher(str(copy))


def test_a_variant_alone_is_refused_with_the_key_that_reads_it(tiny_teacher_dir, tmp_path):
    copy = Path(shutil.copytree(tiny_teacher_dir, tmp_path / "copy"))
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    with pytest.raises(TeacherError, match=r"not loaded by that name.*teacher.variant: fp16"):
        check_teacher(str(copy))


@pytest.mark.parametrize("name", ["DDPMPipeline", "DDIMPipeline"])
def test_classes_in_a_pipeline_without_labels_are_refused(families, tmp_path, name):
    copy = Path(shutil.copytree(families.folder("ddpm"), tmp_path / "copy"))
    check_teacher(str(copy))  # a ConsistencyModelPipeline, which takes labels
    _edit(copy / "model_index.json", _class_name=name)
    with pytest.raises(TeacherError, match=f"is a {name}, which .* a ConsistencyModelPipeline"):
        check_teacher(str(copy))
    _edit(copy / "unet" / "config.json", num_class_embeds=None)
    check_teacher(str(copy))
    _edit(copy / "unet" / "config.json", class_embed_type="timestep")
    with pytest.raises(TeacherError, match="class_embed_type timestep and no num_class_embeds"):
        check_teacher(str(copy))


def _edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
