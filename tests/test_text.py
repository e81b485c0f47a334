"""The text side: Qwen2 against transformers, and prompts to token ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from hart.checkpoint import TEXT_ENCODER_FOLDER, load_text_encoder
from hart.demo import DEMO_CHECKPOINT
from hart.text_tokenizer import PromptTokenizer


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_hidden_states_are_those_of_transformers(tmp_path: Path, kv_heads: int) -> None:
    """A random Qwen2, saved by transformers and read here; prompts of different lengths."""
    transformers = pytest.importorskip("transformers", reason="part of the dev extra")
    torch.manual_seed(kv_heads)
    config = transformers.Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        rope_theta=1_000_000.0,
    )
    reference = transformers.Qwen2ForCausalLM(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    reference.save_pretrained(tmp_path)
    encoder = load_text_encoder(tmp_path)
    ids = torch.randint(97, (3, 12))
    mask = torch.arange(12) < torch.tensor([[3], [7], [12]])
    with torch.no_grad():
        expected = reference.model(ids, attention_mask=mask.long()).last_hidden_state
        found = encoder(ids, mask)
    valid = mask[..., None].expand_as(found)
    assert (found - expected)[valid].abs().max() < 2e-5
    assert (found - expected).abs().max() < 2e-5  # padded positions stay in HART's context


def demo_prompts(max_tokens: int = 16) -> PromptTokenizer:
    file = DEMO_CHECKPOINT / TEXT_ENCODER_FOLDER / "tokenizer.json"
    return PromptTokenizer(Tokenizer.from_file(str(file)), max_tokens)


def test_prompts_are_padded_and_masked() -> None:
    ids, mask = demo_prompts()(["a red circle", "a small blue ring on a white background"])
    assert ids.shape == mask.shape == (2, 16)
    assert mask.sum(1).tolist() == [3, 8]
    assert mask[0, :3].all()


def test_case_does_not_matter_to_the_demo() -> None:
    ids, _ = demo_prompts()(["A Red CIRCLE", "a red circle"])
    assert np.array_equal(ids[0], ids[1])


def test_a_long_prompt_is_cut_and_the_cut_is_named() -> None:
    prompts = demo_prompts(max_tokens=4)
    _, mask = prompts(["a red circle on a white background"])
    assert mask.all()
    assert prompts.cut_off("a red circle on a white background") == "a white background"
    assert prompts.cut_off("a red circle") == ""


def test_left_padding_follows_the_tokenizer_file(tmp_path: Path) -> None:
    source = DEMO_CHECKPOINT / TEXT_ENCODER_FOLDER / "tokenizer.json"
    values = json.loads(source.read_text(encoding="utf-8"))
    values["padding"]["direction"] = "Left"
    left = PromptTokenizer(Tokenizer.from_str(json.dumps(values)), 6)
    _, mask = left(["a red circle"])
    assert mask[0].tolist() == [False] * 3 + [True] * 3
