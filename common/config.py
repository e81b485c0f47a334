"""Model configuration, read from the published ``config.json`` files.

Field names and defaults are those of the published configuration classes, so a
published file maps onto these dataclasses unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields
from typing import Any, ClassVar, Protocol, TypeVar

from hart_runtime.common import config_keys
from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.common.errors import InputError, listed, meant, shown
from hart_runtime.common.settings import SamplingSettings

log = logging.getLogger(__name__)

DEFAULT_PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
Ranges = Mapping[str, tuple[float, float]]
"""The least and the most that a number, or every number of a list, may be: what lies beyond builds no
model, or one that no memory holds."""
MOST_LEVELS, MOST_SCALES = 10, 100
WIDTH, LAYERS = (1, 1 << 20), (1, 1000)
EPSILON = (1e-30, 1.0)
HYBRID, DISCRETE = "var_hybrid", "var"
"""Kinds of image tokenizers: with the continuous residual (HART), and without (VAR)."""


class Sizes(Protocol):
    """A configuration: a dataclass that knows the ranges of its numbers."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    RANGES: ClassVar[Ranges]
    UNREAD: ClassVar[frozenset[str]]
    """Keys of published files that change nothing here."""


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

    RANGES: ClassVar[Ranges] = {
        "depth": LAYERS,
        "embed_dim": WIDTH,
        "num_heads": WIDTH,
        "mlp_ratio": (1e-3, 1024),
        "norm_eps": EPSILON,
        "context_token": (2, 1 << 16),
        "context_dim": WIDTH,
        "cond_drop_rate": (0, 1),
        "patch_nums": (1, 4096),
        "diff_width": WIDTH,
        "diff_depth": LAYERS,
    }
    UNREAD: ClassVar[frozenset[str]] = config_keys.unread(config_keys.TRANSFORMER)

    def __post_init__(self) -> None:
        """Refuse what the published code cannot run either (options that break there)."""
        _require("attn_type", self.attn_type, ("llama",))
        _require("mlp_type", self.mlp_type, ("llama", "gpt2"))
        _require("sep_aln_pooling_mode", self.sep_aln_pooling_mode, ("avg", "max"))
        _require("sampler", self.sampler, ("iddpm",))
        _require("use_cross_attn", self.use_cross_attn, (False,))
        check_values(self)
        diffusion_schedule(self.num_sampling_steps)  # refuses what it cannot parse
        if self.embed_dim % self.num_heads or self.head_dim % 4:
            raise InputError(
                f"embed_dim / num_heads must be a whole multiple of 4, "
                f"found {self.embed_dim} / {self.num_heads}"
            )
        _check_patch_nums("patch_nums", self.patch_nums, 1)

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
    def mlp_matrices(self) -> int:
        """Products of the MLP: Llama's gate is one more."""
        return 3 if self.mlp_type == "llama" else 2

    @property
    def modulated(self) -> bool:
        """Whether the blocks are modulated by a pooled condition (adaLN in either form)."""
        return not self.disable_aln or self.shared_aln

    @property
    def condition_pooling(self) -> str:
        """How the blocks pool the context; the shared form always averages."""
        return "avg" if self.disable_aln else self.sep_aln_pooling_mode


@dataclass(frozen=True)
class ClassTransformerConfig:
    """Scale transformer of VAR, conditioned on a class. Its files hold no configuration: it is read from the
    shapes of tensors (:mod:`hart_runtime.hart.var_checkpoint`).
    """

    depth: int
    embed_dim: int
    num_heads: int
    num_classes: int
    """Without the one that stands for none of them."""
    patch_nums: tuple[int, ...]
    """Weights belong to their pyramid: every position of every scale has an embedding."""
    mlp_hidden: int
    attn_l2_norm: bool
    shared_aln: bool
    """Whether one modulation serves all blocks, with an offset of their own each."""
    norm_eps: float = 1e-6

    RANGES: ClassVar[Ranges] = {
        "depth": LAYERS,
        "embed_dim": WIDTH,
        "num_heads": WIDTH,
        "num_classes": WIDTH,
        "patch_nums": (1, 4096),
        "mlp_hidden": WIDTH,
        "norm_eps": EPSILON,
    }
    UNREAD: ClassVar[frozenset[str]] = frozenset()

    mlp_matrices: ClassVar[int] = 2
    use_timestep_embed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_values(self)
        if self.embed_dim % self.num_heads:
            raise InputError(f"num_heads must divide embed_dim, found {self.num_heads} and {self.embed_dim}")
        _check_patch_nums("patch_nums", self.patch_nums, None)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


@dataclass(frozen=True)
class ClassHartConfig(ClassTransformerConfig):
    """The same with HART's residual diffusion behind it (``llm/config.json``): HART of a class."""

    diff_width: int = TransformerConfig.diff_width
    diff_depth: int = TransformerConfig.diff_depth
    num_sampling_steps: str = TransformerConfig.num_sampling_steps

    RANGES: ClassVar[Ranges] = {
        **ClassTransformerConfig.RANGES,
        "diff_width": WIDTH,
        "diff_depth": LAYERS,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        diffusion_schedule(self.num_sampling_steps)


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

    RANGES: ClassVar[Ranges] = {
        "vocab_size": (2, 1 << 20),
        "z_channels": WIDTH,
        "ch": (1, 1 << 14),
        "ch_mult": (1, 1024),
        "quant_conv_ks": (1, 31),
        "quant_resi": (-1, 1),
        "share_quant_resi": (0, 1000),
        "default_qresi_counts": (0, 1000),
        "v_patch_nums": (1, 4096),
        "beta": (0, 1e6),
    }
    UNREAD: ClassVar[frozenset[str]] = config_keys.unread(config_keys.TOKENIZER)

    def __post_init__(self) -> None:
        _require("quantizer_type", self.quantizer_type, (HYBRID, DISCRETE))
        check_values(self)
        if self.ch % 32:
            raise InputError(f"ch must be a multiple of 32 (GroupNorm groups), found {self.ch}")
        if len(self.ch_mult) > MOST_LEVELS:
            raise InputError(f"ch_mult: expected at most {MOST_LEVELS} levels, found {len(self.ch_mult)}")
        _check_patch_nums("v_patch_nums", self.v_patch_nums, 1 if self.hybrid else None)

    @property
    def hybrid(self) -> bool:
        """Whether the last scale is added as it is, for a residual to follow."""
        return self.quantizer_type == HYBRID

    @property
    def downsample(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def num_scales(self) -> int:
        return len(self.v_patch_nums)

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

    RANGES: ClassVar[Ranges] = {
        "vocab_size": WIDTH,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": WIDTH,
        "num_key_value_heads": WIDTH,
        "rms_norm_eps": EPSILON,
        "rope_theta": (1e-3, 1e15),
    }
    UNREAD: ClassVar[frozenset[str]] = config_keys.unread(config_keys.TEXT_ENCODER)

    def __post_init__(self) -> None:
        check_values(self)
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups or self.hidden_size % heads or self.head_dim % 2:
            raise InputError(
                f"heads must divide hidden_size evenly and group evenly, found hidden_size "
                f"{self.hidden_size}, {heads} heads, {groups} key and value heads"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


Transformer = TransformerConfig | ClassTransformerConfig  # of which one is with a residual
Config = TypeVar("Config", bound=Sizes)


def config_from_dict(cls: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Build ``cls`` from a parsed ``config.json``; of keys that nobody knows, a warning tells.

    Raises:
        InputError: a required key is missing or a value cannot be used; names ``source``.
    """
    known = {f.name: f for f in fields(cls)}
    if values.get("quantization_config") is not None:
        raise InputError(
            f"{source}: quantization_config: expected weights as they were trained, found quantized ones"
        )
    _tell_unknown(source, values, known, cls.UNREAD)
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


def config_to_dict(config: Sizes) -> dict[str, Any]:
    """The inverse of :func:`config_from_dict`, ready for ``json.dump``."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def _tell_unknown(source: str, values: Iterable[str], known: Iterable[str], unread: frozenset[str]) -> None:
    """A misspelt key leaves its default in place, which draws another picture or none."""
    names = [*known]
    unknown = [name for name in values if name not in {*names, *unread} and not name.startswith("_")]
    if unknown:
        log.warning("%s: unknown keys, not read: %s%s", source, listed(unknown), meant(unknown[0], names))


def _check_type(name: str, expected: object, value: object) -> None:
    """Refuse a value of another type than the field's annotation."""
    kind = str(expected)
    fine = {
        "int": type(value) is int,
        "float": isinstance(value, int | float) and not isinstance(value, bool),
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "tuple[int, ...]": isinstance(value, tuple) and len(value) > 0 and all(type(n) is int for n in value),
    }
    if not fine[kind]:
        words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
        wanted = words.get(kind, "a list of whole numbers")
        raise InputError(f"{name}: expected {wanted}, found {shown(value)}")


def check_values(config: Sizes) -> None:
    """Refuse numbers out of their ranges; raises InputError."""
    for name, (low, high) in config.RANGES.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not low <= number <= high:  # NaN is in no range
                raise InputError(f"{name}: expected {low:g} to {high:g}, found {shown(number)}")


def _require(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed or type(value) is not type(allowed[0]):
        choices = " or ".join(repr(a) for a in allowed)
        raise InputError(f"{name} must be {choices} (the published code runs no other), found {shown(value)}")


def _check_patch_nums(name: str, patch_nums: tuple[int, ...], first: int | None) -> None:
    if len(patch_nums) < 2 or patch_nums[0] != (first or patch_nums[0]):
        start = f"start at {first} and " if first else ""
        raise InputError(f"{name} must {start}hold at least two scales, found {shown([*patch_nums])}")
    if len(patch_nums) > MOST_SCALES:
        raise InputError(f"{name}: expected at most {MOST_SCALES} scales, found {len(patch_nums)}")
