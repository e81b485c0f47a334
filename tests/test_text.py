"""The text side: Qwen2 against transformers, and prompts to token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from hart_runtime.common.checkpoint import TEXT_ENCODER, Network
from hart_runtime.common.config import TextEncoderConfig
from hart_runtime.common.errors import InputError
from hart_runtime.common.json_files import read_json
from hart_runtime.common.qwen2_config import text_config_from_dict
from hart_runtime.common.text_tokenizer import PromptTokenizer
from hart_runtime.export.vocabulary import read_vocabulary
from hart_runtime.hart.checkpoint import load_text_encoder
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from tests.qwen2 import PAD, PROMPTS, TEXT, transformers, write_qwen2


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_hidden_states_are_those_of_transformers(tmp_path: Path, kv_heads: int) -> None:
    """A random Qwen2, saved by transformers and read here; prompts of different lengths."""
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
    encoder = load_text_encoder(Network(tmp_path))
    ids = torch.randint(97, (3, 12))
    mask = torch.arange(12) < torch.tensor([[3], [7], [12]])
    with torch.no_grad():
        expected = reference.model(ids, attention_mask=mask.long()).last_hidden_state
        found = encoder(ids, mask)
    valid = mask[..., None].expand_as(found)
    assert (found - expected)[valid].abs().max() < 2e-5
    assert (found - expected).abs().max() < 2e-5  # padded positions stay in HART's context


def demo_prompts(max_tokens: int = 16) -> PromptTokenizer:
    file = DEMO_CHECKPOINT / TEXT_ENCODER / "tokenizer.json"
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
    source = DEMO_CHECKPOINT / TEXT_ENCODER / "tokenizer.json"
    values = json.loads(source.read_text(encoding="utf-8"))
    values["padding"]["direction"] = "Left"
    left = PromptTokenizer(Tokenizer.from_str(json.dumps(values)), 6)
    _, mask = left(["a red circle"])
    assert mask[0].tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("name", ["whole", "pairs"])
def test_vocabularies_in_either_form(tmp_path: Path, name: str) -> None:
    """vocab.json and merges.txt give the tokens that transformers' tokenizer.json gives."""
    folder = write_qwen2(tmp_path / "qwen2", "left", width=32)
    expected = transformers.AutoTokenizer.from_pretrained(folder)
    if name == "whole":
        expected.save_pretrained(folder)
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()
    found = read_vocabulary(folder)
    assert found.padding["direction"] == "left"
    for prompt in (*PROMPTS, TEXT):
        assert found.encode(prompt).ids == expected(prompt).input_ids


def test_vocabularies_that_cannot_be_used(tmp_path: Path) -> None:
    folder = write_qwen2(tmp_path / "qwen2", "right", width=32)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for change, words in (
        ({"padding_side": "middle"}, "padding_side"),
        ({"pad_token": "<none>"}, "pad_token"),
        ({"added_tokens_decoder": {"7": {"content": PAD}}}, "number 7"),
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match=words):
            read_vocabulary(folder)
    (folder / "vocab.json").unlink()
    with pytest.raises(InputError, match=r"expected tokenizer\.json"):
        read_vocabulary(folder)


def text_config(folder: Path) -> TextEncoderConfig:
    file = folder / "config.json"
    return text_config_from_dict(read_json(file), str(file))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: type"),
        ({"rope_theta": None}, "rope_theta"),
    ],
)
def test_text_encoders_that_would_be_computed_wrongly(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    values = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    values |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    published = {"model_type": "qwen2_vl", "rope_theta": 5.0, "rope_scaling": {"mrope_section": [1, 1, 1]}}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values | published))
    assert text_config(tmp_path).use_llm_system_prompt
    file.write_text(json.dumps(values | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}))
    assert text_config(tmp_path).rope_theta == 5.0
    file.write_text(json.dumps(values | published | change))
    with pytest.raises(InputError, match=words):
        text_config(tmp_path)
