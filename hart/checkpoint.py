"""Reads and writes the weights of a checkpoint (see :mod:`hart_runtime.common.checkpoint`).

What files hold is asked of :mod:`hart_runtime.hart.weights`.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hart_runtime.common.checkpoint import LLM, TOKENIZER, HartCheckpoint, Network
from hart_runtime.common.config import ClassHartConfig, TransformerConfig, config_to_dict
from hart_runtime.common.errors import InputError, listed
from hart_runtime.common.weight_files import WeightFiles
from hart_runtime.hart.class_transformer import ClassHartTransformer
from hart_runtime.hart.layers import Linear
from hart_runtime.hart.model import ClassHart, Hart, HybridModel
from hart_runtime.hart.quantizer import Phi
from hart_runtime.hart.text_encoder import TextEncoder
from hart_runtime.hart.tokenizer import ImageTokenizer
from hart_runtime.hart.transformer import ScaleTransformer
from hart_runtime.hart.weights import Stored, check_kind, check_whole, fit, opened, read, sets_of

log = logging.getLogger(__name__)

UNUSED_LLM = re.compile(r"(.*\.)?(lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias)")
"""Persistent buffers of the published transformer that its inference does not read."""
UNUSED_TOKENIZER = re.compile(r"(.*\.)?(disc\..*|quantize\.ema_vocab_hit_SV)")
UNUSED_SECOND_DECODER = re.compile(r"(.*\.)?(decoder2|post_quant_conv2)\..*")
UNUSED_TEXT = re.compile(r"(.*\.)?(visual\..*|lm_head\.weight|rotary_emb\.inv_freq)")


class MisfitError(InputError):
    """Tensors that are not those of the network."""

    def __init__(self, message: str, names: Mapping[str, Sequence[str]]) -> None:
        """A message that names the first of them.

        Args:
            names: all of them, by what is wrong.
        """
        super().__init__(message)
        self.names = names


def load_hart(checkpoint: HartCheckpoint, dtype: torch.dtype = torch.float32) -> Hart:
    """As :func:`load_hybrid`, of a checkpoint that draws texts."""
    model = load_hybrid(checkpoint, dtype)
    if not isinstance(model, Hart):
        raise InputError(f"{checkpoint.root}: expected a checkpoint that draws texts, this one draws classes")
    return model


def load_hybrid(checkpoint: HartCheckpoint, dtype: torch.dtype = torch.float32) -> HybridModel:
    """Load the transformer and the image tokenizer.

    Args:
        dtype: precision of the matrix products; norms and the codebook stay float32.

    Raises:
        InputError: a file is broken, or keys are missing, unexpected or of another shape; the
            message lists them.
    """
    model = empty_hart(checkpoint)
    _fill_tokenizer(model, checkpoint, dtype)
    _fill_llm(model, checkpoint, dtype)
    for network in model:
        network.eval()
    return model


def empty_hart(checkpoint: HartCheckpoint) -> HybridModel:
    """Both networks as the configuration files describe them, on the meta device: without numbers."""
    image, config = checkpoint.tokenizer_config, checkpoint.llm_config
    sizes = image.vocab_size, image.z_channels
    with torch.device("meta"):
        image_tokenizer = ImageTokenizer(image)
        if isinstance(config, ClassHartConfig):
            return ClassHart(ClassHartTransformer(config, *sizes), image_tokenizer)
        return Hart(ScaleTransformer(config, *sizes), image_tokenizer)


def check_hart(checkpoint: HartCheckpoint) -> None:
    """Compare names, shapes and types in what weight files there are with the configuration.

    No values are read.

    Raises:
        InputError: as :func:`load_hart`.
    """
    for check in hart_checks(checkpoint).values():
        check()


def hart_checks(checkpoint: HartCheckpoint) -> dict[str, Callable[[], None]]:
    """What :func:`check_hart` does, by network; those without weight files are left out."""
    model = empty_hart(checkpoint)
    fillers: dict[str, Callable[[HybridModel, HartCheckpoint, None], None]] = {
        TOKENIZER: _fill_tokenizer,
        LLM: _fill_llm,
    }
    return {
        name: functools.partial(fill, model, checkpoint, None)
        for name, fill in fillers.items()
        if checkpoint.networks[name].has_weights
    }


def _fill_tokenizer(model: HybridModel, checkpoint: HartCheckpoint, dtype: torch.dtype | None) -> None:
    ignored = [UNUSED_TOKENIZER]
    if model.tokenizer.config.double_decoder:  # the published sampler never decodes with the second
        ignored.append(UNUSED_SECOND_DECODER)
    fill(model.tokenizer, checkpoint.tokenizer.weights, dtype, ignored, _tokenizer_tables(checkpoint))


def _fill_llm(model: HybridModel, checkpoint: HartCheckpoint, dtype: torch.dtype | None) -> None:
    llm = checkpoint.llm
    fill(model.transformer, llm.weights, dtype, [UNUSED_LLM], _llm_tables(checkpoint), ema=llm.ema)


def stored_sets(llm: Network, names: Collection[str]) -> tuple[str, ...]:
    """Keys that whole sets of a transformer's weights lie below, first of the one that is used; "" is none.

    No values are read.

    Args:
        names: of its weights, as files have them.
    """
    with opened(llm.weights) as entries:
        return sets_of(entries, names, None if llm.weights.averaged else llm.ema)


def load_text_encoder(
    network: Network, dtype: torch.dtype = torch.float32, system_prompt: Sequence[int] = ()
) -> TextEncoder:
    """Load a Qwen2 text model (the language part of a Qwen2-VL checkpoint works too).

    Args:
        system_prompt: tokens that precede every prompt, see
            :meth:`hart_runtime.common.text_tokenizer.PromptTokenizer.system_prompt`.
    """
    encoder = empty_text_encoder(network)
    _fill_text_encoder(encoder, network, dtype)
    if system_prompt:
        encoder.set_prefix(system_prompt)
        if not all(bool(buffer.isfinite().all()) for buffer in encoder.buffers()):
            raise InputError(
                f"{network.folder}: keys and values of the system prompt are not finite in {dtype}; give "
                f"`precision='fp32'`"
            )
    return encoder.eval()


def empty_text_encoder(network: Network) -> TextEncoder:
    """The text model as its configuration file describes it, on the meta device."""
    with torch.device("meta"):
        return TextEncoder(network.text_config)


def check_text_encoder(network: Network) -> None:
    """As :func:`check_hart`."""
    _fill_text_encoder(empty_text_encoder(network), network, None)


def _fill_text_encoder(encoder: TextEncoder, network: Network, dtype: torch.dtype | None) -> None:
    fill(encoder, network.weights, dtype, [UNUSED_TEXT])


def save_model(model: nn.Module, folder: Path, prefix: str = "") -> None:
    """Write ``config.json`` and ``model.safetensors`` (float16) of one network."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_to_dict(model.config)  # type: ignore[arg-type]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_half({prefix + k: v for k, v in model.state_dict().items()}, folder / "model.safetensors")


def save_half(state: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors as safetensors, floating point ones in float16."""
    state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}
    save_file(state, file, metadata={"format": "pt"})


def matrix_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters that become half precision in a half-precision model.

    Weights and biases of matrix products; norms, tables, the codebook and the phi
    convolutions (which feed the float32 latent) stay float32, and what says that it is ``exact``.
    """
    names = set()
    exact = tuple(f"{prefix}." for prefix, part in module.named_modules() if getattr(part, "exact", False))
    for prefix, part in module.named_modules():
        if f"{prefix}.".startswith(exact):
            continue
        if (isinstance(part, Linear | nn.Conv2d) and not isinstance(part, Phi)) or (
            isinstance(module, TextEncoder) and isinstance(part, nn.Embedding)
        ):
            names |= {f"{prefix}.{name}" for name, _ in part.named_parameters(recurse=False)}
    return names


def fill(
    model: nn.Module,
    weights: WeightFiles,
    dtype: torch.dtype | None,
    unused: Sequence[re.Pattern[str]],
    tables: Mapping[str, Table] | None = None,
    stored: Callable[[str], str] = str,
    ema: bool | None = False,
    strangers_refused: bool = True,
) -> None:
    """Load weights strictly into a model built on the meta device, tensor by tensor.

    Without a ``dtype``, names, shapes and types are compared and no weight is read.

    Args:
        unused: full names that inference does not read.
        tables: those of them, by their last part, that depend on the configuration.
        stored: what a parameter is called in the file.
        ema: whether averaged weights are wanted, where a file holds them beside others.
        strangers_refused: or only told of.
    """
    expected = {stored(name): list(p.shape) for name, p in model.named_parameters()}
    if dtype is not None:
        check_whole(weights)
    with opened(weights) as entries:
        fitted = fit(entries, expected, unused, None if weights.averaged else ema)
        found = fitted.tensors
        wrong = [
            f"{entry.path} {entry.shape} instead of {expected[name]}"
            for name, entry in found.items()
            if entry.shape != expected[name]
        ]
        missing = sorted(expected.keys() - found.keys())
        files = listed([str(file) for file in weights.files])
        unexpected = fitted.unexpected
        if unexpected and not strangers_refused:
            log.warning("%s: holds tensors that are not read: %s", files, listed(unexpected))
            unexpected = []
        strangers = {"missing": missing, "unexpected": unexpected, "shape": wrong}
        if problems := [f"{kind}: {listed(keys)}" for kind, keys in strangers.items() if keys]:
            raise MisfitError(f"{files}: does not fit the model ({'; '.join(problems)})", strangers)
        for name, entry in fitted.tables.items():
            if table := (tables or {}).get(name.rpartition(".")[2]):
                table(entry)
        for entry in found.values():
            check_kind(entry)
        if dtype is None:
            return
        low = matrix_parameters(model)
        state = {
            name: read(found[stored(name)], dtype if name in low else torch.float32)
            for name, _ in model.named_parameters()
        }
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False)


Table = Callable[[Stored], None]
"""Refuses a stored table that was made for another configuration."""


def _llm_tables(checkpoint: HartCheckpoint) -> dict[str, Table]:
    """The published transformer's buffers, which depend on its pyramid where nothing else does."""
    config = checkpoint.llm_config
    levels = [level for level, side in enumerate(config.patch_nums) for _ in range(side * side)]
    text = ""
    if isinstance(config, TransformerConfig):  # it begins with a text, in the place of the first token
        levels[:1] = [0] * config.context_token
        text = f"context_token {config.context_token} and "

    def refuse(entry: Stored, found: object) -> None:
        raise InputError(
            f"{entry}: {found}, but {checkpoint.llm.config_file} with {text}patch_nums "
            f"{list(config.patch_nums)} makes {len(levels)} positions of these levels"
        )

    def check_levels(entry: Stored) -> None:
        if entry.shape != [1, len(levels)]:
            refuse(entry, f"is {entry.shape}")
        if entry.readable and entry.read().flatten().tolist() != levels:
            refuse(entry, "holds other levels")

    def check_mask(entry: Stored) -> None:
        if entry.shape != [1, 1, len(levels), len(levels)]:
            refuse(entry, f"is {entry.shape}")

    return {"lvl_1L": check_levels, "attn_bias_for_masking": check_mask}


def _tokenizer_tables(checkpoint: HartCheckpoint) -> dict[str, Table]:
    """Of the tokenizer: its scales may be others (one file serves any pyramid), its codes may not."""
    size = checkpoint.tokenizer_config.vocab_size

    def check(entry: Stored) -> None:
        if len(entry.shape) != 2 or entry.shape[1] != size:
            config = checkpoint.tokenizer.config_file
            raise InputError(f"{entry}: is {entry.shape}, but {config} has vocab_size {size}")

    return {"ema_vocab_hit_SV": check}
