"""Records the reference model at work (needs torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hart_runtime.common.checkpoint import Checkpoint
from hart_runtime.common.errors import InputError
from hart_runtime.common.noise import Noise, RecordedNoise, SeededNoise
from hart_runtime.common.schedule import scale_steps
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.compare.metrics import Array
from hart_runtime.compare.recorded import Tensors, given_of, recorded_names
from hart_runtime.compare.reference import Reference, system_prompt_identity
from hart_runtime.hart import checkpoints
from hart_runtime.hart.checkpoint import load_text_encoder
from hart_runtime.hart.generate import Record
from hart_runtime.hart.model import Mar, Model, ScaleModel
from hart_runtime.hart.sampling import smooth_codes, windows
from hart_runtime.hart.text_encoder import TextEncoder
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.class_names import ClassNames
from hart_runtime.runtime.families.names import ENCODER
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.text import open_tokenizer


@dataclass(frozen=True)
class Source:
    """The checkpoint of a bundle, and what else the reference has to know to be the same model."""

    checkpoint: Checkpoint
    system_prompt: tuple[int, ...]
    """Tokens in front of every prompt."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, manifest: Manifest) -> Source:
        prompt = manifest.checkpoint.get("system_prompt")
        return cls(checkpoint, tuple(prompt["tokens"]) if prompt else ())

    def load(self, dtype: torch.dtype, device: str) -> tuple[Model, TextEncoder | None]:
        model = checkpoints.load(self.checkpoint, dtype)
        network = self.checkpoint.text_encoder
        text = load_text_encoder(network, dtype, self.system_prompt) if network else None
        for part in model:
            part.to(device)
        return model, text.to(device) if text else None


def torch_device(wanted: str) -> str:
    """CUDA for the reference too where torch has it, without TF32: the ruler is float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def capture_prompts(
    source: Source,
    bundle: Bundle,
    prompts: Sequence[str],
    device: str,
    at_once: int,
    settings: SamplingSettings | None = None,
) -> Reference:
    """Draw prompts with the reference in float32 (seeds 0, 1, ...), ``at_once``, and record everything.

    Args:
        settings: how; the bundle's own if left out.
    """
    model, text = source.load(torch.float32, device)
    manifest = bundle.manifest
    settings = settings or manifest.sampling
    if text is None and not manifest.model.num_classes:
        raise InputError(
            f"{bundle.folder}: this bundle has no text encoder, so there are no prompts to compare; "
            f"export it again with one (`text_encoder`)"
        )
    rows = _rows(bundle, prompts)
    batches: list[Tensors] = []
    for start in range(0, len(prompts), at_once):
        part = [array[start : start + at_once] for array in rows]
        inputs = [torch.from_numpy(array).to(device) for array in part]
        encoded: dict[str, Array] = {}
        if text is not None:
            encoded["input_ids"], _ = part
            ids, mask = inputs
            with torch.inference_mode():
                inputs = [text(ids, mask), mask]
        noise = SeededNoise(range(start, min(start + at_once, len(prompts))))
        tensors = capture(model, inputs, noise, settings, manifest)
        batches.append({**encoded, **tensors})
    return describe(source.checkpoint, manifest, settings, batches, device, prompts)


def _rows(bundle: Bundle, prompts: Sequence[str]) -> Sequence[Array]:
    """What is known of prompts before any network runs: tokens and their mask, or labels."""
    if bundle.manifest.model.num_classes:
        return [*ClassNames.of(bundle)(prompts).values()]
    return open_tokenizer(bundle)(prompts)


def describe(
    checkpoint: Checkpoint,
    manifest: Manifest,
    settings: SamplingSettings,
    batches: list[Tensors],
    device: str,
    prompts: Sequence[str] = (),
) -> Reference:
    """Recorded batches together with where they came from."""
    return Reference(
        prompts=tuple(prompts),
        settings=settings,
        patch_nums=manifest.model.patch_nums,
        weights={**checkpoint.weights, "system_prompt": system_prompt_identity(manifest)},
        made_with={
            "checkpoint": checkpoint.root.resolve().name,
            "llm_weights": "EMA" if manifest.averaged else "plain",
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "torch": torch.__version__,
        },
        half_errors=None,
        batches=batches,
    )


def capture(
    model: Model,
    inputs: Sequence[Tensor],
    noise: Noise,
    settings: SamplingSettings,
    manifest: Manifest,
) -> dict[str, Array]:
    """One batch from what its first graph takes, as arrays by recorded name.

    The smooth mixtures are recorded in every mode, so that the smooth graph always has a
    reference: ``scaleK.h_smooth`` (B, n * n, Cv) and ``scaleK.gumbel_exp``.
    """
    tensors: dict[str, Array] = {}
    wanted = recorded_names(manifest, settings)

    def record(name: str, value: Tensor) -> None:
        if name in wanted:
            tensors[name] = value.cpu().numpy().copy()

    patch_nums = manifest.model.patch_nums
    checkpoints.draw(model, inputs, noise, settings, patch_nums, record, manifest.model.reach)
    if not isinstance(model, Mar):
        _mixed(model, tensors, noise, settings, patch_nums)
        if ENCODER in manifest.graphs:
            tensors |= _encoded(model, tensors["image"], patch_nums)
    return tensors


def _mixed(
    model: ScaleModel,
    tensors: dict[str, Array],
    noise: Noise,
    settings: SamplingSettings,
    patch_nums: tuple[int, ...],
) -> None:
    """Add the smooth mixtures of recorded logits."""
    codebook, hybrid = model.tokenizer.quantize.embedding.weight, model.tokenizer.config.hybrid
    for step in scale_steps(patch_nums, settings, len(codebook), hybrid):
        name = f"scale{step.index}"
        pool, start = map(torch.from_numpy, noise.exponential(step.index, step.num_tokens, len(codebook)))
        exponential = windows(pool, start, len(codebook))
        tensors[f"{name}.gumbel_exp"] = exponential.numpy()
        logits = torch.from_numpy(tensors[f"{name}.logits_kept"])
        mixed = smooth_codes(logits, exponential, codebook.cpu(), step)
        tensors[f"{name}.h_smooth"] = mixed.numpy()


@torch.inference_mode()
def _encoded(model: ScaleModel, pictures: Array, patch_nums: tuple[int, ...]) -> dict[str, Array]:
    """What the encoder makes of drawn pictures, given back to it."""
    quantizer = model.tokenizer.quantize
    images = torch.from_numpy(pictures).to(quantizer.embedding.weight.device) * 2 - 1
    latent = model.tokenizer.latent(images)
    indices = quantizer.encode(latent, patch_nums).indices
    index = torch.cat(indices, dim=1)
    f_hats = quantizer.accumulate(indices, patch_nums, quantizer.phi_on_last)
    found = {
        "given.image": images,
        "given.latent": latent,
        "given.idx": index,
        "given.codes": quantizer.embedding(index),
        "given.coded": f_hats[-1],
    }
    return {name: value.cpu().numpy().copy() for name, value in found.items()}


def record_again(
    model: Model, tensors: Tensors, settings: SamplingSettings, manifest: Manifest, record: Record
) -> None:
    """Run the reference once more over a recorded batch, with another recorder."""
    device = next(model.transformer.parameters()).device
    inputs = [torch.from_numpy(value).to(device) for value in given_of(tensors, manifest).values()]
    noise = RecordedNoise(tensors)
    spec = manifest.model
    checkpoints.draw(model, inputs, noise, settings, spec.patch_nums, record, spec.reach)
