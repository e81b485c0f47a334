"""Options that no recording covers: exported graphs against the reference model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.common.config import ClassHartConfig, TokenizerConfig, TransformerConfig
from hart_runtime.common.noise import SeededNoise
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.compare.recorded import recording
from hart_runtime.export.bundle import export_bundle
from hart_runtime.export.request import Request
from hart_runtime.hart.checkpoint import load_hart, save_model
from hart_runtime.hart.class_transformer import ClassHartTransformer
from hart_runtime.hart.generate import generate
from hart_runtime.hart.tokenizer import ImageTokenizer
from hart_runtime.hart.transformer import ScaleTransformer
from hart_runtime.runtime.backends.onnx_runtime import on_the_cpu
from hart_runtime.runtime.bundle import open_bundle
from hart_runtime.runtime.loop import draw, drawn

COMMON = {
    "attn_type": "llama",
    "depth": 2,
    "embed_dim": 48,
    "num_heads": 3,
    "context_token": 6,
    "context_dim": 20,
    "diff_width": 24,
    "diff_depth": 1,
}
VARIANTS = {
    "shared adaLN, l2-normalised attention, GPT-2 MLP, one phi a scale": (
        TransformerConfig(
            **COMMON,  # type: ignore[arg-type]
            disable_aln=True,
            shared_aln=True,
            attn_l2_norm=True,
            mlp_type="gpt2",
            patch_nums=(1, 2, 3, 4),
            num_sampling_steps="4",
        ),
        TokenizerConfig(
            vocab_size=64,
            ch=32,
            ch_mult=(1, 2),
            quantizer_type="var_hybrid",
            share_quant_resi=0,
            v_patch_nums=(1, 2, 3, 4),
        ),
    ),
    "adaLN with max pooling, context norm, one phi for all, sections of steps": (
        TransformerConfig(
            **COMMON,  # type: ignore[arg-type]
            mlp_type="llama",
            sep_aln_pooling_mode="max",
            use_context_norm=True,
            use_timestep_embed=True,
            patch_nums=(1, 3, 5),
            num_sampling_steps="3,2",
        ),
        TokenizerConfig(
            vocab_size=700,
            ch=32,
            ch_mult=(1,),
            quantizer_type="var_hybrid",
            share_quant_resi=1,
            quant_conv_ks=1,
            v_patch_nums=(1, 3, 5),
        ),
    ),
    "no conditioning, no phi": (
        TransformerConfig(
            **COMMON,  # type: ignore[arg-type]
            mlp_type="llama",
            disable_aln=True,
            patch_nums=(1, 2),
            num_sampling_steps="2",
        ),
        TokenizerConfig(
            vocab_size=40,
            ch=32,
            ch_mult=(1, 1),
            quantizer_type="var_hybrid",
            quant_resi=0.0,
            v_patch_nums=(1, 2),
        ),
    ),
}


def write_random_checkpoint(
    root: Path, llm: TransformerConfig | ClassHartConfig, tokenizer: TokenizerConfig
) -> None:
    """Random weights of healthy size in the published layout."""
    torch.manual_seed(0)
    image_tokenizer = ImageTokenizer(tokenizer)
    sizes = tokenizer.vocab_size, tokenizer.z_channels
    transformer = (
        ClassHartTransformer(llm, *sizes)
        if isinstance(llm, ClassHartConfig)
        else ScaleTransformer(llm, *sizes)
    )
    for module, folder, prefix in ((image_tokenizer, "tokenizer", "vae."), (transformer, "llm", "")):
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and "scale_mul" not in name:
                fan_in = parameter[0].numel()
                torch.nn.init.normal_(parameter, std=fan_in**-0.5)
        save_model(module, root / folder, prefix)
        state = {prefix + key: value for key, value in module.state_dict().items()}
        save_file(state, root / folder / "model.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("smooth", [False, True])
def test_graphs_follow_the_reference(
    variant: str, smooth: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.getbasetemp() / variant.replace(" ", "-")
    if not root.exists():
        write_random_checkpoint(root / "model", *VARIANTS[variant])
        export_bundle(Request(find_checkpoint(root / "model"), "fp32"), root / "bundle")
    bundle = open_bundle(root / "bundle")
    model = load_hart(find_checkpoint(root / "model"))
    config = model.transformer.config
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, config.context_token, config.context_dim, generator=generator)
    mask = torch.arange(config.context_token) < torch.tensor([[3], [5]])
    settings = SamplingSettings(
        guidance=2.0, top_k=25, top_p=0.9, smooth=smooth, steps=config.num_sampling_steps
    )
    expected: dict[str, np.ndarray] = {}
    image = generate(
        model,
        features,
        mask,
        SeededNoise([1, 2]),
        settings,
        record=lambda name, value: expected.__setitem__(name, value.numpy().copy()),
    )
    recorder, found = recording(on_the_cpu(bundle), bundle.manifest)
    given = {"features": features.numpy(), "mask": mask.numpy()}
    drawing = drawn(draw(recorder, bundle.manifest.program(settings, 2), given, SeededNoise([1, 2])))
    for k in range(len(config.patch_nums)):
        name = f"scale{k}.idx"
        assert np.array_equal(found[name].reshape(expected[name].shape), expected[name]), name
    assert bundle.manifest.sampling.steps == config.num_sampling_steps
    # Smooth sampling divides by a small temperature, as in the recorded runs.
    assert np.abs(drawing.images - image.numpy()).max() < (1e-2 if smooth else 2e-3)
