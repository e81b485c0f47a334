"""Names of graphs, the same in every family that has them, and where their times are counted."""

from hart_runtime.runtime import stages

TEXT_ENCODER = "text_encoder"
CONTEXT, TRANSFORMER, UNCONDITIONAL = "context", "transformer", "unconditional"
FAST = "fast_transformer"
"""The transformer with less to do: tokens or the unconditional half left out."""
SAMPLE, SMOOTH, NEXT_SCALE = "sample", "smooth", "next_scale"
RESIDUAL_CONDITION, RESIDUAL_STEP = "residual_condition", "residual_step"
MASKED_TRANSFORMER, BEGIN = "masked_transformer", "begin_denoising"
DENOISE, PLACE = "denoise", "place"
"""Of models that draw masked tokens: what is known of one, the first step of its diffusion, some more, and it
among the others."""
LATENT, DECODER = "latent", "decoder"
ENCODER = "encoder"
"""Of pictures that are given."""

IMAGE, F_HAT, INDEX, CODES = "image", "f_hat", "index", "codes"
CODED = "coded"
"""The latent that codes make without their rest."""
TOKEN_IDS = "input_ids"
"""What the text encoder takes: rows of its embedding."""

STAGES = {
    TEXT_ENCODER: stages.TEXT_ENCODER,
    CONTEXT: stages.CONTEXT,
    TRANSFORMER: stages.TRANSFORMER,
    FAST: stages.TRANSFORMER,
    UNCONDITIONAL: stages.TRANSFORMER,
    SAMPLE: stages.SAMPLING,
    SMOOTH: stages.SAMPLING,
    NEXT_SCALE: stages.SAMPLING,
    RESIDUAL_CONDITION: stages.RESIDUAL_CONDITION,
    RESIDUAL_STEP: stages.RESIDUAL_STEP,
    MASKED_TRANSFORMER: stages.MASKED_TRANSFORMER,
    BEGIN: stages.DIFFUSION,
    DENOISE: stages.DIFFUSION,
    PLACE: stages.DIFFUSION,
    LATENT: stages.DECODER,
    DECODER: stages.DECODER,
    ENCODER: stages.ENCODER,
}
