"""Changed checkpoints: loaded as the export loads them, and compared with what their files say."""

from __future__ import annotations

import gc
import hashlib
import json
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

from hart_runtime.common.checkpoint import (
    LLM,
    SAMPLING_FILE,
    TEXT_ENCODER,
    TOKENIZER,
    Checkpoint,
    find_checkpoint,
)
from hart_runtime.common.config import TextEncoderConfig, TokenizerConfig, TransformerConfig
from hart_runtime.export.request import Request
from tests.torture.changes import change_json, change_safetensors, change_tokenizer
from tests.torture.outcomes import Outcome, of_error
from tests.torture.subjects import Ground, Judged, another_thing, linked, put

CONFIGS: dict[str, Any] = {
    LLM: TransformerConfig,
    TOKENIZER: TokenizerConfig,
    TEXT_ENCODER: TextEncoderConfig,
}
State = dict[str, str]
"""Hashes of tensors by name."""


def _stored(file: Path) -> set[str]:
    """Hashes of the tensors of a weight file that can be weights, as the library itself reads them."""
    import torch
    from safetensors.torch import load_file

    values = load_file(file).values()
    return {
        _hash(value) for value in values if value.is_floating_point() and torch.isfinite(value.float()).all()
    }


def _hash(tensor: Any) -> str:
    return hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).hexdigest()


class Checkpoints:
    """Configurations, weights and tokenizers of a checkpoint."""

    def __init__(self, ground: Ground) -> None:
        import torch

        torch.set_num_threads(1)
        self.source = ground.checkpoint
        self.loaded = self._load(self.source)
        self.described = find_checkpoint(self.source).describe()

    def trial(self, folder: Path, rng: random.Random) -> Judged:
        """Change one file of a copy and load it."""
        linked(self.source, folder)
        files = sorted(
            str(f.relative_to(folder)) for f in folder.rglob("*") if f.suffix in (".json", ".safetensors")
        )
        name = rng.choice(files)
        if rng.random() < 0.06:
            said = f"{name}: {another_thing(folder / name, rng)}"
        else:
            changer = change_json if name.endswith(".json") else change_safetensors
            if name.endswith("tokenizer.json"):
                changer = change_tokenizer
            change = changer((folder / name).read_bytes(), rng)
            put(folder / name, change.data)
            said = f"{name}: {change.said}"
        try:
            found = self._load(folder)
        except Exception as error:
            outcome, message = of_error(error)
            return outcome, f"{said}: {message}"
        finally:
            gc.collect()
        wrong = self._contradiction(folder, found)
        if wrong:
            return Outcome.WRONG, f"{said}: {wrong}"
        same = found == self.loaded and find_checkpoint(folder).describe() == self.described
        return (Outcome.EQUAL if same else Outcome.EFFECT), said

    def _load(self, folder: Path) -> dict[str, State]:
        """All that an export reads before it traces."""
        import torch

        from hart_runtime.common.text_tokenizer import PromptTokenizer
        from hart_runtime.hart.checkpoint import load_hart, load_text_encoder

        checkpoint = find_checkpoint(folder)
        request = Request(checkpoint, "fp32", system_prompt="none")
        request.check()
        vocabulary = request.vocabulary
        model = load_hart(checkpoint, torch.float32)
        parts = {LLM: model.transformer, TOKENIZER: model.tokenizer}
        if checkpoint.text_encoder is not None and vocabulary is not None:
            PromptTokenizer(vocabulary, model.transformer.config.context_token)(["a red circle"])
            parts[TEXT_ENCODER] = load_text_encoder(checkpoint.text_encoder, torch.float32, [])
        return {name: {key: _hash(p) for key, p in part.named_parameters()} for name, part in parts.items()}

    def _contradiction(self, folder: Path, found: dict[str, State]) -> str | None:
        """In what a loaded checkpoint is not what its files say."""
        checkpoint = find_checkpoint(folder)
        if wrong := _other_config(checkpoint):
            return wrong
        for network, state in found.items():
            stored = _stored(folder / network / "model.safetensors")
            if other := [name for name, value in state.items() if value not in stored]:
                return f"{network}: {other[0]} is no finite tensor of its file"
        numbers = json.loads((folder / TEXT_ENCODER / "tokenizer.json").read_bytes())["model"][
            "vocab"
        ].values()
        if checkpoint.text_config is not None and max(numbers) >= checkpoint.text_config.vocab_size:
            return f"token {max(numbers)} of {checkpoint.text_config.vocab_size}"
        return None


def _other_config(checkpoint: Checkpoint) -> str | None:
    described = checkpoint.describe()
    files = {name: part.config_file for name, part in checkpoint.networks.items()}
    for network, file in files.items():
        values = json.loads(file.read_bytes())
        for field in fields(CONFIGS[network]):
            said, read = values.get(field.name), described[network][field.name]
            if field.name == "num_sampling_steps":
                said, read = None, None  # has spellings
            if said is not None and said != read:
                return f"{network}: {field.name} is {said!r}, read was {read!r}"
    sampling = checkpoint.root / SAMPLING_FILE
    values = json.loads(sampling.read_bytes()) if sampling.is_file() else {}
    for name, said in values.items():
        if said is not None and str(said) != str(getattr(checkpoint.sampling, name)):
            return f"sampling: {name} is {said!r}, read was {getattr(checkpoint.sampling, name)!r}"
    return None
