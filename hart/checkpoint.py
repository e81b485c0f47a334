"""Reads and writes the weights of a checkpoint (see :mod:`hart_runtime.common.checkpoint`).

Pickles are read with ``weights_only=True``, never otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hart_runtime.common.checkpoint import Checkpoint, Network
from hart_runtime.common.config import config_to_dict
from hart_runtime.common.errors import InputError
from hart_runtime.hart.layers import Linear
from hart_runtime.hart.model import Hart
from hart_runtime.hart.quantizer import Phi
from hart_runtime.hart.text_encoder import TextEncoder
from hart_runtime.hart.tokenizer import ImageTokenizer
from hart_runtime.hart.transformer import ScaleTransformer

UNUSED_LLM = re.compile(r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias")
"""Persistent buffers of the published transformer that its inference does not read."""
UNUSED_TOKENIZER = re.compile(r"disc\..*|vae\.quantize\.ema_vocab_hit_SV")
UNUSED_SECOND_DECODER = re.compile(r"vae\.(decoder2|post_quant_conv2)\..*")
UNUSED_TEXT = re.compile(r"(model\.)?visual\..*|lm_head\.weight|.*rotary_emb\.inv_freq")


def load_hart(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Hart:
    """Load the transformer and the image tokenizer.

    Args:
        dtype: precision of the matrix products; norms and the codebook stay float32.

    Raises:
        InputError: a file is broken, or keys are missing, unexpected or of another shape; the
            message lists them.
    """
    model = empty_hart(checkpoint)
    _fill_hart(model, checkpoint, dtype)
    return Hart(model.transformer.eval(), model.tokenizer.eval())


def empty_hart(checkpoint: Checkpoint) -> Hart:
    """Both networks as the configuration files describe them, on the meta device: without numbers."""
    image = checkpoint.tokenizer_config
    with torch.device("meta"):
        image_tokenizer = ImageTokenizer(image)
        transformer = ScaleTransformer(checkpoint.llm_config, image.vocab_size, image.z_channels)
    return Hart(transformer, image_tokenizer)


def check_hart(checkpoint: Checkpoint) -> None:
    """Compare names and shapes in the weight files with the configuration, without reading weights.

    Raises:
        InputError: as :func:`load_hart`.
    """
    _fill_hart(empty_hart(checkpoint), checkpoint, None)


def _fill_hart(model: Hart, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    ignored = [UNUSED_TOKENIZER]
    if model.tokenizer.config.double_decoder:  # the published sampler never decodes with the second
        ignored.append(UNUSED_SECOND_DECODER)
    files = checkpoint.tokenizer.files
    _fill(model.tokenizer, files, dtype, ignored, rename=lambda key: key.removeprefix("vae."))
    _fill(model.transformer, checkpoint.llm.files, dtype, [UNUSED_LLM])


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
    return encoder.eval()


def empty_text_encoder(network: Network) -> TextEncoder:
    """The text model as its configuration file describes it, on the meta device."""
    with torch.device("meta"):
        return TextEncoder(network.text_config)


def check_text_encoder(network: Network) -> None:
    """As :func:`check_hart`."""
    _fill_text_encoder(empty_text_encoder(network), network, None)


def _fill_text_encoder(encoder: TextEncoder, network: Network, dtype: torch.dtype | None) -> None:
    prefix = re.compile(r"^(model\.)?(language_model\.)?(model\.)?")
    _fill(encoder, network.files, dtype, [UNUSED_TEXT], rename=lambda key: prefix.sub("", key, count=1))


def save_model(model: nn.Module, folder: Path, prefix: str = "") -> None:
    """Write ``config.json`` and ``model.safetensors`` (float16) of one network."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_to_dict(model.config)  # type: ignore[arg-type]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {prefix + k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def matrix_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters that become half precision in a half-precision model.

    Weights and biases of matrix products; norms, tables, the codebook and the phi
    convolutions (which feed the float32 latent) stay float32.
    """
    names = set()
    for prefix, part in module.named_modules():
        if (isinstance(part, Linear | nn.Conv2d) and not isinstance(part, Phi)) or (
            isinstance(module, TextEncoder) and isinstance(part, nn.Embedding)
        ):
            names |= {f"{prefix}.{name}" for name, _ in part.named_parameters(recurse=False)}
    return names


def _fill(
    model: nn.Module,
    files: Sequence[Path],
    dtype: torch.dtype | None,
    ignored: Iterable[re.Pattern[str]],
    rename: Callable[[str], str] = str,
) -> None:
    """Load weights strictly into a model built on the meta device, tensor by tensor.

    Without a ``dtype``, names and shapes are compared and nothing is read.
    """
    expected = {name: p.shape for name, p in model.named_parameters()}
    low = matrix_parameters(model)
    state: dict[str, Tensor | None] = {}
    unexpected, wrong = [], []
    patterns = tuple(ignored)
    for file in files:
        for key, shape, read in _tensors(file):
            if any(pattern.fullmatch(key) for pattern in patterns):
                continue
            name = rename(key)
            if name not in expected:
                unexpected.append(key)
                continue
            if shape != list(expected[name]):
                wrong.append(f"{key} {shape} instead of {list(expected[name])}")
                continue
            state[name] = None if dtype is None else read().to(dtype if name in low else torch.float32)
    missing = sorted(expected.keys() - state.keys())
    problems = [
        f"{kind}: {', '.join(keys)}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("shape", wrong))
        if keys and not (kind == "missing" and wrong and len(missing) == len(wrong))
    ]
    if problems:
        names = ", ".join(str(file) for file in files)
        raise InputError(f"{names}: does not fit the model ({'; '.join(problems)})")
    if dtype is None:
        return
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False)


def _tensors(file: Path) -> Iterator[tuple[str, list[int], Callable[[], Tensor]]]:
    """Keys of a weight file, each with its shape and a function that reads the tensor."""
    if file.suffix == ".safetensors":
        with _reading(file), safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                shape = list(opened.get_slice(key).get_shape())
                yield key, shape, functools.partial(opened.get_tensor, key)
        return
    with _reading(file):
        with file.open("rb") as start:
            mapped = start.read(2) == b"PK"  # the format before torch 1.6 cannot be mapped
        state = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{file}: expected a dictionary of tensors")
    for key, value in state.items():
        yield str(key), list(value.shape), functools.partial(lambda tensor: tensor, value)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn whatever a damaged or malicious weight file causes into a sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # torch's and safetensors' errors share no base class
        if type(error).__name__ == "UnpicklingError":
            reason = "it holds more than tensors, and pickled code is never run"
        else:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{file}: cannot be read as a weight file ({reason})") from None
