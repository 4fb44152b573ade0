"""Station 9: does a picture show what its prompt says, by a CLIP model's own judgement?

CLIP score: 100 × the cosine of a picture's and its prompt's embedding (Hessel et al., EMNLP 2021,
without their factor 2.5 and their floor at 0). Papers on distillation report the cosine itself.
Scores of different CLIP models cannot be compared, so the model is named in every result.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

# What a CLIP folder is made of, and what a hub is asked for: no second format of the same weights.
CLIP_FILES = ("*.json", "*.txt", "model.safetensors", "model-*.safetensors")


class ClipError(ValueError):
    """A folder that is no CLIP model as transformers saves it."""


class ClipScorer:
    """A CLIP model folder on `device`, loaded once."""

    def __init__(self, folder: str, device: str = "cpu") -> None:
        check_clip(folder)
        try:
            model: Any = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True
            )
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            # The numpy one: no torchvision.
            self._processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except OSError as error:
            raise ClipError(f"CLIP model {folder} cannot be loaded: {error}") from error
        self._model = model.float().eval().to(device)
        self._longest = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def __call__(
        self, pictures: np.ndarray, prompts: Sequence[str], *, batch_size: int = 32
    ) -> np.ndarray:
        """Pictures (N,H,W,3) uint8 and the prompt of each → scores (N,) float64, in −100 … 100."""
        if len(pictures) != len(prompts):
            raise ValueError(f"{len(pictures)} pictures, {len(prompts)} prompts; expected as many")
        parts = [
            self._scores(pictures[at : at + batch_size], prompts[at : at + batch_size])
            for at in range(0, len(prompts), batch_size)
        ]
        return np.concatenate(parts)

    def _scores(self, pictures: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        texts = self._tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self._longest,
            return_tensors="pt",
        )
        pixels = self._processor([Image.fromarray(one) for one in pictures], return_tensors="pt")
        found = self._model(
            input_ids=texts["input_ids"].to(self._model.device),
            attention_mask=texts["attention_mask"].to(self._model.device),
            pixel_values=pixels["pixel_values"].to(self._model.device),
        )
        cosine = (found.image_embeds * found.text_embeds).sum(dim=1)
        return 100.0 * cosine.double().cpu().numpy()


def check_clip(folder: str) -> None:
    """Fail at the door: is this a CLIP model, with weights and both of its processors' files?"""
    config = Path(folder) / "config.json"
    try:
        kind = json.loads(config.read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ClipError(
            f"{folder} has no readable config.json ({error}); expected a CLIP model as "
            "transformers saves it"
        ) from error
    if kind != "clip":
        raise ClipError(f"{folder} is a model of type {kind!r}; expected clip (text and picture)")
    for pattern in ("*.safetensors", "preprocessor_config.json", "tokenizer*.json"):
        if not any(Path(folder).glob(pattern)):
            raise ClipError(
                f"CLIP model {folder} has no {pattern}; expected weights (safetensors only), the "
                "picture processor's configuration and the tokenizer's files"
            )


def clip_revision(folder: str) -> str:
    """sha256 over names and contents of the model's files."""
    digest = hashlib.sha256()
    files = {file for pattern in CLIP_FILES for file in Path(folder).glob(pattern)}
    for file in sorted(files):
        with open(file, "rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()
