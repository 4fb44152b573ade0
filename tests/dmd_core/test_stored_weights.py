"""Teachers whose files are in half precision have the numbers of those that are loaded in float32,
which takes twice the memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import nn

from dmd_core.precision import hold, stored_dtype
from dmd_core.teacher import TeacherError, load_teacher
from tests.dmd_core.tiny_families import BUILDERS, save_family

HALVES = [torch.float16, torch.bfloat16]


def _save(name: str, folder: Path, dtype: torch.dtype) -> str:
    def change(part: nn.Module) -> None:
        with torch.no_grad():
            for parameter in part.parameters():  # norms, too: nothing that bfloat16 has exactly
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
        nn.Module.to(part, dtype)

    return save_family(name, folder, change)


def _networks(pipeline: Any) -> dict[str, nn.Module]:
    parts = pipeline.components.items()
    return {name: part for name, part in parts if isinstance(part, nn.Module)}


def _numbers(network: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are in no file are among them: position tables, computed when it is made."""
    return dict([*network.named_parameters(), *network.named_buffers()])


@pytest.fixture
def seen(monkeypatch):
    """Part → dtypes of its weights as diffusers hands it over."""
    found: dict[str, set[torch.dtype]] = {}
    original = DiffusionPipeline.from_pretrained.__func__  # type: ignore[attr-defined]

    def spy(cls: type, *arguments: Any, **settings: Any) -> Any:
        pipeline = original(cls, *arguments, **settings)
        for name, part in _networks(pipeline).items():
            found[name] = {parameter.dtype for parameter in part.parameters()}
        return pipeline

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(spy))
    return found


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart", "edm", "ddpm"])
def test_it_is_what_loading_in_float32_gives(name, dtype, tmp_path, seen):
    folder = _save(name, tmp_path / "teacher", dtype)
    plain = _networks(DiffusionPipeline.from_pretrained(folder, dtype=torch.float32))
    for compute in (torch.float32, torch.bfloat16):
        seen.clear()
        teacher = load_teacher(folder, compute_dtype=compute)
        assert all(dtype in dtypes for dtypes in seen.values()) and len(seen) == len(plain)
        denoiser = {"unet", "transformer"} & set(plain)
        for part, network in _networks(teacher.pipeline).items():
            if part.startswith("text_encoder") or part in denoiser:
                hold(plain[part].requires_grad_(False), compute)
            expected, found = _numbers(plain[part]), _numbers(network)
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
            if compute == torch.float32:
                assert {v.dtype for v in found.values() if v.is_floating_point()} == {compute}


def test_of_parts_in_several_dtypes_each_is_read_in_its_own(tmp_path, seen):
    torch.manual_seed(0)
    pipeline = BUILDERS["sd"]()
    pipeline.text_encoder.half()
    pipeline.vae.to(torch.bfloat16)
    pipeline.unet.half().conv_in.float()
    pipeline.save_pretrained(tmp_path / "teacher")
    load_teacher(str(tmp_path / "teacher"))
    assert seen == {
        "text_encoder": {torch.float16},
        "vae": {torch.bfloat16},
        "unet": {torch.float32},  # a part in two of them
    }


def test_of_a_part_in_shards_all_are_looked_at(tmp_path, seen):
    torch.manual_seed(0)
    pipeline = BUILDERS["sd"]()
    pipeline.unet.half()
    pipeline.save_pretrained(tmp_path / "teacher", max_shard_size="40KB")
    shards = sorted((tmp_path / "teacher" / "unet").glob("*.safetensors"))
    assert len(shards) > 2 and stored_dtype(shards) == torch.float16
    load_teacher(str(tmp_path / "teacher"))
    assert seen["unet"] == {torch.float16}


def test_a_file_that_is_none_is_named(tmp_path):
    folder = Path(_save("sd", tmp_path / "teacher", torch.float16))
    (file,) = (folder / "unet").glob("*.safetensors")
    file.write_bytes(b"x" * 100)
    with pytest.raises(TeacherError, match=r"cannot be loaded: .*/unet/.*\.safetensors: "):
        load_teacher(str(folder))


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([torch.float16], torch.float16),
        ([torch.bfloat16, torch.int64, torch.bool], torch.bfloat16),
        ([torch.float32], torch.float32),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.float16, torch.float32], torch.float32),
        ([torch.float16, torch.float8_e4m3fn], torch.float32),
        ([torch.float64], torch.float32),
        ([torch.int64], torch.float32),
        ([], torch.float32),
    ],
    ids=str,
)
def test_the_dtype_of_files_is_that_of_all_their_floating_point_tensors(
    tensors, expected, tmp_path
):
    """One tensor in each file."""
    files = [tmp_path / f"{index}.safetensors" for index in range(len(tensors))]
    for file, dtype in zip(files, tensors, strict=True):
        save_file({"weight": torch.zeros(2, dtype=dtype)}, file)
    assert stored_dtype(files) == expected
