"""Names of graphs, the same in every family that has them."""

TEXT_ENCODER = "text_encoder"
CONTEXT, TRANSFORMER, UNCONDITIONAL = "context", "transformer", "unconditional"
SAMPLE, SMOOTH, NEXT_SCALE = "sample", "smooth", "next_scale"
RESIDUAL_CONDITION, RESIDUAL_STEP = "residual_condition", "residual_step"
LATENT, DECODER = "latent", "decoder"

TOKEN_IDS = "input_ids"
"""What the text encoder takes: rows of its embedding."""
