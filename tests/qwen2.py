"""A small random Qwen2 in a published folder's files, and what transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from hart_runtime.export.graphs import Graph, graph_of
from hart_runtime.export.text_modules import TextEncoderGraph
from hart_runtime.hart.text_encoder import TextEncoder
from hart_runtime.runtime.contract import specs_of
from hart_runtime.runtime.families.hart import GRAPHS
from hart_runtime.runtime.families.names import TEXT_ENCODER
from hart_runtime.runtime.spec import ModelSpec

transformers = pytest.importorskip("transformers", reason="part of the dev extra")

Array = NDArray[Any]
PAD = "<|endoftext|>"
TEXT = "Draw what the user describes: colours, shapes, light. It's 1024 by 1024 pixels.\n\nUser:\n"
TOKENS = 300
PROMPTS = [
    "a red circle",
    "!",
    "  Two\tcats, it's 1987;\r\n\n  naïve e\u0301clair 東京 ½ 🎨 they'LL see   ",
    f"before {PAD} after",
    "a long story of circles and squares " * 60,
]


def graph_for(encoder: TextEncoder) -> Graph:
    """The text encoder's graph for prompts of TOKENS, of a model that is nothing else."""
    size = encoder.config.hidden_size
    model = ModelSpec((1, 2), 1, 4, 1, 9, 1, 2, TOKENS, size, diff_width=1)
    spec = specs_of(GRAPHS, model, "fp32")[TEXT_ENCODER]
    return graph_of(TEXT_ENCODER, spec, TextEncoderGraph(encoder), {})


def write_qwen2(folder: Path, side: str, width: int) -> Path:
    """A random Qwen2 with a tokenizer of its own, in the files of a published folder."""
    torch.manual_seed(1)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator([TEXT, *PROMPTS], trainer)
    folder.mkdir()
    trained.model.save(str(folder))
    number = trained.get_vocab_size()
    added = {"content": PAD, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": PAD,
        "padding_side": side,
        "added_tokens_decoder": {str(number): added | {"single_word": False}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = transformers.Qwen2Config(
        vocab_size=number + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def published_context(folder: Path, text: str | None) -> dict[str, Array]:
    """What the published sampler makes of PROMPTS, with transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ids = tokenizer(
        PROMPTS, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    mask = ids != tokenizer.pad_token_id
    system = tokenizer([text], return_tensors="pt").input_ids if text else ids[:1, :0]
    rows = torch.cat([system.expand(len(ids), -1), ids], dim=1)
    seen = torch.cat([torch.ones(len(ids), system.shape[1], dtype=torch.bool), mask], dim=1)
    with torch.no_grad():
        hidden = model(rows, attention_mask=seen, output_hidden_states=True).hidden_states[-1]
    return {
        "ids": ids.numpy(),
        "mask": mask.numpy(),
        "positions": (mask.cumsum(1) - 1).numpy(),
        "features": hidden[:, system.shape[1] :].numpy(),
    }
