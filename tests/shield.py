"""A safety model whose answers are known: a tiny Gemma 2."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["<unk>", "<bos>", "Yes", "No", "flower", "weapon", "broken", "a", "blue", "red"]
TEMPLATE = "{{ bos_token }} {{ guideline }} : {{ messages[0]['content'] }}"


def write_shield(folder: Path) -> None:
    """Answers by the last word of the question alone: weapon is Yes, flower No, broken NaN."""
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, bos_token="<bos>", unk_token="<unk>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    for layer in model.model.layers:  # what remains is the last word's own embedding
        torch.nn.init.constant_(layer.post_attention_layernorm.weight, -1)  # Gemma adds 1
        torch.nn.init.constant_(layer.post_feedforward_layernorm.weight, -1)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight.mul_(50)
        rows[WORDS.index("weapon")], rows[WORDS.index("flower")] = rows[2], rows[3]
        rows[WORDS.index("broken")] = torch.nan
    model.save_pretrained(folder)
