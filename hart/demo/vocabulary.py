"""The demo's text tokenizer: byte-level BPE, the algorithm of Qwen2's, with a small vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hart_runtime.hart.demo.scenes import Scene

PAD = "<|endoftext|>"


def train_vocabulary(scenes: Iterable[Scene]) -> Tokenizer:
    """Learn merges from captions; any text can be tokenized, unknown words byte by byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    captions = [scene.caption() for scene in scenes]
    captions += ["the thing on the white background", "circle, black background with a"] * 50
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(PAD), pad_token=PAD)
    return tokenizer
