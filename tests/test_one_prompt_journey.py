"""One prompt through all ten stations, through the public commands, on real Ray."""

import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from diffusers import DiffusionPipeline

from dmd_core.checkpoint import load_checkpoint
from dmd_core.noise import sample_noise, stable_seed
from dmd_core.teacher import load_teacher
from jobs.cli import main
from pipelines.batches import PairReader
from pipelines.manifest import latest_manifest
from pipelines.storage import open_store
from pipelines.stored_images import open_images
from tests.pipelines.made_pairs import made_batch, write_file
from tests.pipelines.sealed_sets import commit_files
from tests.report_lines import picture_again

PROMPTS = ["a red fox", *(f"a blue whale number {index}" for index in range(15))]


def test_one_prompt_walks_all_ten_stations(tiny_teacher_dir, tmp_path, ray_cluster, capsys):
    prompt_file, run = tmp_path / "prompts.txt", tmp_path / "run"
    prompt_file.write_text("\n".join(PROMPTS) + "\n")
    settings = {
        "run.dir": run,
        "teacher.path": tiny_teacher_dir,
        "pairs.prompts": prompt_file,
        "evaluate.prompts": prompt_file,
    }
    options = ["--config", "tiny", "--json"]
    options += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]

    def dmd(verb: str) -> dict:
        assert main([verb, *options]) == 0
        printed = capsys.readouterr().out  # Ray's own messages may come before the result
        return json.JSONDecoder().raw_decode(printed[printed.index("{\n") :])[0]

    # 1 prompt, 2 noise, 3 teacher ODE, 4 Parquet row
    assert dmd("pairs")["rows"] == len(PROMPTS)
    assert dmd("pairs")["generated"] is False
    table, latents = _read_as_the_readme_says(run / "pairs")
    assert latents.shape == (len(PROMPTS), 4, 4, 4)
    row = table["prompt"].to_pylist().index("a red fox")
    assert table["pair_id"][row].as_py() == stable_seed("pair", 0, "a red fox", 0)
    seed = table["seed"][row].as_py()
    assert seed == stable_seed("noise", 0, "a red fox", 0)
    shape = json.loads(table.schema.field("noise").metadata[b"shape"])
    stored = np.frombuffer(table["noise"][row].as_py(), np.float16).reshape(shape)
    noise = sample_noise([seed], shape, torch.float16)
    assert np.array_equal(stored, noise[0].numpy())
    teacher = load_teacher(tiny_teacher_dir)
    again = teacher.pipeline(  # the teacher's own scheduler is the recipe's solver
        "a red fox", latents=noise.float(), num_inference_steps=4, guidance_scale=2.0,
        output_type="latent",
    ).images  # fmt: skip
    latent = np.frombuffer(table["latent"][row].as_py(), np.float16).reshape(shape)
    np.testing.assert_allclose(latent, again[0].numpy(), atol=4e-3)

    # 5 training batch
    root = open_store(str(run / "pairs"))
    manifest = latest_manifest(root)
    assert manifest is not None
    reader = PairReader(root, manifest, seed=1)
    epoch = [prompt for k in range(4) for prompt in reader.batch(k, 4).prompts]
    assert sorted(epoch) == sorted(PROMPTS)

    # 6 losses, 7 checkpoint
    assert dmd("train")["step"] == 6
    assert dmd("train")["trained"] is False
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    checkpoint = load_checkpoint(root.fs, str(run / "checkpoints"))
    assert checkpoint is not None and checkpoint.state["pairs_digest"] == manifest.digest

    # 8 export: the student of the checkpoint, sampled by plain diffusers
    student = DiffusionPipeline.from_pretrained(dmd("export")["student"])
    weights = student.unet.state_dict()
    assert all(
        torch.equal(value, weights[name]) for name, value in checkpoint.parts["generator"].items()
    )

    # 9 evaluation, 10 report
    metrics = dmd("evaluate")
    assert metrics["systems"]["student"]["network_evaluations"] == 1
    assert metrics["systems"]["teacher"]["network_evaluations"] == 8
    report = (run / "report.html") if dmd("report") else None
    assert report is not None
    page = report.read_text()
    assert "a red fox" in page and manifest.digest[:12] in page

    # The report's noise gives the report's picture, with plain diffusers.
    listing = json.loads((run / "evaluation" / "latents.json").read_text())
    prompts = [entry["prompt"] for entry in listing]
    noise = safetensors.torch.load_file(run / "evaluation" / "latents.safetensors")["latents"]
    shown = open_images(open_store(str(run)), metrics["pictures"]["student"]).first(1000)
    fox = prompts.index("a red fox")
    picture = student(
        "a red fox", latents=noise[fox : fox + 1], num_inference_steps=1, guidance_scale=0
    ).images[0]
    theirs = shown.pictures[shown.prompts.index("a red fox")]
    assert np.abs(np.asarray(picture).astype(int) - theirs.astype(int)).max() <= 1
    again = picture_again(report)
    assert np.abs(again.astype(int) - shown.pictures[0].astype(int)).max() <= 1

    # The whole again does nothing.
    assert set(dmd("demo")) == {"student", "report"}


def test_the_readme_reads_the_rows_of_the_newest_version_and_no_others(tmp_path):
    root = open_store(str(tmp_path / "pairs"))
    write_file(root, "a-0.parquet", range(8))
    write_file(root, "b-0.parquet", range(5, 14))  # begins with rows that are there already
    write_file(root, "c-0.parquet", range(20, 24))  # of no version
    retired = {"a-0.parquet": [0, 3], "b-0.parquet": [5, 6, 7, 13]}
    commit_files(root, ["a-0.parquet", "b-0.parquet"])
    manifest = commit_files(root, ["a-0.parquet", "b-0.parquet"], excluded=retired)
    table, latents = _read_as_the_readme_says(Path(root.root))
    kept = [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert table["pair_id"].to_pylist() == kept and len(kept) == manifest.rows
    assert np.array_equal(latents, made_batch(kept).latents.numpy())


def _read_as_the_readme_says(root: Path):
    """Run the README's pyarrow snippet on another folder: (table, latents)."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    snippet = next(part for part in readme.split("```python\n")[1:] if "manifests" in part)
    code = snippet.split("```")[0].replace("runs/demo/pairs", str(root))
    names: dict = {}
    exec(code, names)
    return names["table"], names["latents"]
