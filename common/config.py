"""Model configuration, read from the published ``config.json`` files.

Field names and defaults are those of the published configuration classes, so a
published file maps onto these dataclasses unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.common.errors import InputError
from hart_runtime.common.settings import SamplingSettings

DEFAULT_PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@dataclass(frozen=True)
class TransformerConfig:
    """Scale transformer and residual diffusion head (``llm/config.json``)."""

    depth: int = 16
    embed_dim: int = 1024
    num_heads: int = 16
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    attn_type: str = "gpt2"
    mlp_type: str = "gpt2"
    attn_l2_norm: bool = False
    disable_aln: bool = False
    shared_aln: bool = False
    sep_aln_pooling_mode: str = "max"
    use_timestep_embed: bool = False
    use_context_norm: bool = False
    use_cross_attn: bool = False
    context_token: int = 77
    context_dim: int = 768
    cond_drop_rate: float = 0.1
    patch_nums: tuple[int, ...] = DEFAULT_PATCH_NUMS
    diff_width: int = 1024
    diff_depth: int = 6
    num_sampling_steps: str = SamplingSettings.steps
    sampler: str = "iddpm"

    def __post_init__(self) -> None:
        """Refuse what the published code cannot run either (options that break there)."""
        _require("attn_type", self.attn_type, ("llama",))
        _require("mlp_type", self.mlp_type, ("llama", "gpt2"))
        _require("sep_aln_pooling_mode", self.sep_aln_pooling_mode, ("avg", "max"))
        _require("sampler", self.sampler, ("iddpm",))
        _require("use_cross_attn", self.use_cross_attn, (False,))
        for name in ("depth", "embed_dim", "num_heads", "context_dim", "diff_width"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, found {getattr(self, name)}")
        diffusion_schedule(self.num_sampling_steps)  # refuses what it cannot parse
        if self.embed_dim % self.num_heads or self.head_dim % 4:
            raise InputError(
                f"embed_dim / num_heads must be a whole multiple of 4, "
                f"found {self.embed_dim} / {self.num_heads}"
            )
        if self.context_token < 2:
            raise InputError(f"context_token must be at least 2, found {self.context_token}")
        _check_patch_nums("patch_nums", self.patch_nums)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Width of the MLP: Llama's 8/3 rule rounded up to 256, or GPT-2's plain ratio."""
        if self.mlp_type == "llama":
            return int((self.embed_dim * self.mlp_ratio * 2) / 3 + 255) // 256 * 256
        return round(self.embed_dim * self.mlp_ratio)

    @property
    def modulated(self) -> bool:
        """Whether the blocks are modulated by a pooled condition (adaLN in either form)."""
        return not self.disable_aln or self.shared_aln

    @property
    def condition_pooling(self) -> str:
        """How the blocks pool the context; the shared form always averages."""
        return "avg" if self.disable_aln else self.sep_aln_pooling_mode


@dataclass(frozen=True)
class TokenizerConfig:
    """Hybrid image tokenizer (``tokenizer/config.json``)."""

    vocab_size: int = 4096
    z_channels: int = 32
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    quant_conv_ks: int = 3
    quant_resi: float = 0.5
    share_quant_resi: int = 4
    default_qresi_counts: int = 0
    v_patch_nums: tuple[int, ...] = DEFAULT_PATCH_NUMS
    beta: float = 0.25
    quantizer_type: str = "var"
    double_decoder: bool = False

    def __post_init__(self) -> None:
        _require("quantizer_type", self.quantizer_type, ("var_hybrid",))
        if self.ch < 1 or self.ch % 32:
            raise InputError(f"ch must be a multiple of 32 (GroupNorm groups), found {self.ch}")
        _check_patch_nums("v_patch_nums", self.v_patch_nums)

    @property
    def downsample(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def num_phi(self) -> int:
        """How many phi convolutions the checkpoint stores (0 when the ratio switches them off)."""
        if abs(self.quant_resi) <= 1e-6:
            return 0
        if self.share_quant_resi == 0:
            return self.default_qresi_counts or len(self.v_patch_nums)
        return self.share_quant_resi


@dataclass(frozen=True)
class TextEncoderConfig:
    """The part of a Qwen2 ``config.json`` that decides its hidden states."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    use_llm_system_prompt: bool = True
    """Whether the transformer was trained with a system prompt in front of the user's. Ours: a
    Qwen2 file does not say, and the published sampler's default is yes."""

    def __post_init__(self) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if not groups or not heads or heads % groups or self.hidden_size % heads or self.head_dim % 2:
            raise InputError(
                f"heads must divide hidden_size evenly and group evenly, found hidden_size "
                f"{self.hidden_size}, {heads} heads, {groups} key and value heads"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


Config = TypeVar("Config", TransformerConfig, TokenizerConfig, TextEncoderConfig)


def config_from_dict(cls: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Build ``cls`` from a parsed ``config.json``; keys it does not know are ignored.

    Raises:
        InputError: a required key is missing or a value cannot be used; names ``source``.
    """
    known = {f.name: f for f in fields(cls)}
    missing = [name for name, f in known.items() if f.default is MISSING and values.get(name) is None]
    if missing:
        raise InputError(f"{source}: missing {', '.join(missing)}")
    values = {**values}
    if "num_sampling_steps" in values:  # null stands for all steps, a list for sections
        steps = values["num_sampling_steps"]
        parts = steps if isinstance(steps, list) else [""] if steps is None else [steps]
        values["num_sampling_steps"] = ",".join(str(part) for part in parts)
    chosen: dict[str, Any] = {
        name: tuple(values[name]) if isinstance(values[name], list) else values[name]
        for name in known
        if values.get(name) is not None
    }
    for name, value in chosen.items():
        _check_type(f"{source}: {name}", known[name].type, value)
    try:
        return cls(**chosen)
    except (InputError, TypeError) as error:
        raise InputError(f"{source}: {error}") from error


def text_config_from_dict(values: Mapping[str, Any], source: str) -> TextEncoderConfig:
    """The parsed ``config.json`` of a text encoder, also where Qwen2-VL nests the text model's part.

    Raises:
        InputError: a key is missing, or it asks for what the text encoder here does not compute.
    """
    values = {**values, **(values.get("text_config") or {})}
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}  # newer files, older files
    found = {
        "model_type": str(values.get("model_type", "qwen2")).removesuffix("_text"),
        "hidden_act": values.get("hidden_act", "silu"),
        "use_sliding_window": values.get("use_sliding_window") or False,
        # Sections split positions between text, rows and columns; for text they are all equal.
        "rope_type": "default"
        if "mrope_section" in rope
        else rope.get("rope_type", rope.get("type", "default")),
    }
    known: dict[str, tuple[object, ...]] = {
        "model_type": ("qwen2", "qwen2_vl"),
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "rope_type": ("default",),
    }
    for name, value in found.items():
        if value not in known[name]:
            expected = " or ".join(map(repr, known[name]))
            raise InputError(f"{source}: {name}: expected {expected}, found {value!r}")
    theta = values.get("rope_theta", rope.get("rope_theta"))
    if theta is None:
        raise InputError(f"{source}: missing rope_theta")
    return config_from_dict(TextEncoderConfig, {**values, "rope_theta": theta}, source)


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object from ``path``; a missing or broken file is an :class:`InputError`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def config_to_dict(config: TransformerConfig | TokenizerConfig | TextEncoderConfig) -> dict[str, Any]:
    """The inverse of :func:`config_from_dict`, ready for ``json.dump``."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def _check_type(name: str, expected: object, value: object) -> None:
    """Refuse a value of another type than the field's annotation, and sizes below 1."""
    kind = str(expected)
    fine = {
        "int": isinstance(value, int) and not isinstance(value, bool) and value >= 0,
        "float": isinstance(value, int | float) and not isinstance(value, bool),
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "tuple[int, ...]": isinstance(value, tuple) and all(type(n) is int and n > 0 for n in value),
    }
    if not fine[kind]:
        raise InputError(f"{name}: expected {kind}, found {value!r}")


def _require(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        choices = " or ".join(repr(a) for a in allowed)
        raise InputError(f"{name} must be {choices} (the published code runs no other), found {value!r}")


def _check_patch_nums(name: str, patch_nums: tuple[int, ...]) -> None:
    if len(patch_nums) < 2 or patch_nums[0] != 1 or min(patch_nums) < 1:
        raise InputError(f"{name} must start at 1 and hold at least two scales, found {list(patch_nums)}")
