"""A CLIP model of random weights: 32×32 pixels, 16 tokens."""

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from dmd_core.miniature import MiniatureSize, Vocabulary, make_tokenizer


def save_tiny_clip(folder: Path) -> str:
    kept = json.loads((Path(__file__).parent / "tiny_vocabulary.json").read_text())
    vocabulary = Vocabulary(kept["tokens"], tuple(map(tuple, kept["merges"])))
    tokenizer = make_tokenizer(vocabulary, MiniatureSize(max_tokens=16))
    towers = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    words = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config=towers | words,
        vision_config=towers | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return str(folder)
