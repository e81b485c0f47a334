"""What other tools call what is here: told to who uses their names, and listed in docs/coming-from.md."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

DIFFUSERS, SD_CPP, SAMPLE = "diffusers", "stable-diffusion.cpp", "sample.py"


@dataclass(frozen=True)
class OtherName:
    """A name of other tools, in the form of a Python parameter."""

    name: str
    tools: tuple[str, ...]
    ours: tuple[str, ...]
    """Parameters here, in requests the second where that is another; one of a command behind its name."""
    note: str = ""
    """What differs; why there is none."""


_GUIDANCE = "4.5 here is 5.5 there: it is what is added, and rises from the first scale to the last"
_ONE_SIZE = "a square of a size that the bundle was exported with: size of Pipeline.load, or of a request"
_NO_NEGATIVE = "guidance is away from the empty prompt, and the model was trained with no other"
_NO_SAMPLER = "scales are drawn one after the other, and no diffusion of the whole picture has a sampler"
_STEPS = "those of the residual alone: how many scales are drawn is the model's"
_NO_ADAPTERS = "only whole checkpoints are exported"

OTHER_NAMES = (
    OtherName(
        "prompt", (DIFFUSERS, SD_CPP, SAMPLE), ("prompts", "prompt"), "the argument PROMPT of hart-run"
    ),
    OtherName("prompt_list", (SAMPLE,), ("hart-run prompts_file",), "a file, one prompt a line"),
    OtherName("negative_prompt", (DIFFUSERS, SD_CPP), (), _NO_NEGATIVE),
    OtherName("prompt_embeds", (DIFFUSERS,), ("Pipeline.from_features",), "features and their mask"),
    OtherName("guidance_scale", (DIFFUSERS,), ("guidance",), _GUIDANCE),
    OtherName("cfg_scale", (SD_CPP,), ("guidance",), _GUIDANCE),
    OtherName("cfg", (SAMPLE,), ("guidance",), "the same number"),
    OtherName("num_inference_steps", (DIFFUSERS,), ("steps",), _STEPS),
    OtherName("steps", (SD_CPP,), ("steps",), _STEPS),
    OtherName("scheduler", (DIFFUSERS, SD_CPP), (), _NO_SAMPLER),
    OtherName("sampling_method", (SD_CPP,), (), _NO_SAMPLER),
    OtherName("timesteps", (DIFFUSERS,), (), _NO_SAMPLER),
    OtherName("sigmas", (DIFFUSERS, SD_CPP), (), _NO_SAMPLER),
    OtherName("eta", (DIFFUSERS, SD_CPP), (), _NO_SAMPLER),
    OtherName("height", (DIFFUSERS, SD_CPP), (), _ONE_SIZE),
    OtherName("width", (DIFFUSERS, SD_CPP), (), _ONE_SIZE),
    OtherName(
        "num_images_per_prompt",
        (DIFFUSERS,),
        ("num_images", "n"),
        "each has a seed of its own, one after another",
    ),
    OtherName("batch_count", (SD_CPP,), ("num_images", "n"), "batch is how many are drawn at once"),
    OtherName("generator", (DIFFUSERS,), ("seed",), "a number: the same bytes whatever the batch"),
    OtherName(
        "seed", (SD_CPP, SAMPLE), ("seed",), "0 if not given; the numbers behind it are of another generator"
    ),
    OtherName("latents", (DIFFUSERS,), (), "what is random comes of the seed alone"),
    OtherName("more_smooth", (SAMPLE,), ("smooth",), "on in published checkpoints, too"),
    OtherName(
        "clip_skip", (DIFFUSERS, SD_CPP), (), "the text encoder is one that the transformer was trained with"
    ),
    OtherName("output_type", (DIFFUSERS,), (), "pictures are PIL images"),
    OtherName(
        "callback_on_step_end", (DIFFUSERS,), ("callback",), "after each scale, with its picture if asked"
    ),
    OtherName("preview", (SD_CPP,), ("previews",), "for the callback, which is called after each scale"),
    OtherName(
        "from_pretrained", (DIFFUSERS,), ("Pipeline.load",), "of a bundle; hart-export takes the hub's ids"
    ),
    OtherName("torch_dtype", (DIFFUSERS,), ("hart-export precision",), "decided when a bundle is made"),
    OtherName("type", (SD_CPP,), ("hart-export precision",), "fp32, fp16 or int8"),
    OtherName("model", (SD_CPP,), ("hart-run bundle",), "a bundle, which hart-export makes of a checkpoint"),
    OtherName("vae", (SD_CPP,), ("hart-export tokenizer",), "of a VAR; a HART brings its own"),
    OtherName("llm", (SD_CPP,), ("hart-export text_encoder",)),
    OtherName("lora_model_dir", (SD_CPP,), (), _NO_ADAPTERS),
    OtherName("cross_attention_kwargs", (DIFFUSERS,), (), _NO_ADAPTERS),
    OtherName("threads", (SD_CPP,), ("hart-run threads",)),
    OtherName("output", (SD_CPP,), ("hart-run output",), "of several, a number is added to each"),
    OtherName("device_map", (DIFFUSERS,), ("hart-run device",), "one device draws a picture"),
    OtherName(
        "safety_checker", (DIFFUSERS,), ("hart-run safety_model",), "off unless it is named; asks prompts"
    ),
    OtherName("model_path", (SAMPLE,), ("hart-export checkpoint",), "once; hart-run draws with the bundle"),
    OtherName("text_model_path", (SAMPLE,), ("hart-export text_encoder",)),
    OtherName("use_ema", (SAMPLE,), ("hart-export ema",), "averaged weights come first, too"),
    OtherName(
        "max_token_length", (SAMPLE,), (), "300, which the system prompt's keys and values are computed for"
    ),
    OtherName(
        "use_llm_system_prompt",
        (SAMPLE,),
        ("hart-export system_prompt",),
        "part of the bundle; none leaves it out",
    ),
    OtherName(
        "shield_model_path",
        (SAMPLE,),
        ("hart-run safety_model",),
        "off unless it is named; a refused prompt ends the run instead of becoming another",
    ),
    OtherName(
        "sample_folder_dir", (SAMPLE,), ("hart-run output",), "names the file; hart-batch writes folders"
    ),
    OtherName("store_seperately", (SAMPLE,), (), "every picture is a file of its own"),
)


def told_of_another(name: object, known: Collection[str]) -> str:
    """What ends a message about a name that is not ``known``; "" unless another tool calls something so.

    Why there is no such thing is only told where drawings are asked for, by who knows ``guidance``.
    """
    for other in OTHER_NAMES:
        if other.name == name:
            ours = next((ours for ours in other.ours if ours in known), None)
            of = f"; {other.name}, of {' and '.join(other.tools)},"
            if ours is not None:
                return f"{of} is {ours} here" + (f": {other.note}" if other.note else "")
            if not other.ours and "guidance" in known:
                return f"{of} is nothing here: {other.note}"
    return ""
