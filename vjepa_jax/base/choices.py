"""List the choices of settings by name.

Configs are validated against these lists, and the modules that implement the choices
use them.
"""

# Position embedding of a transformer, see `models.layers.position_code`.
POS_EMBEDS = ("sincos", "rope", "rope_tiled")
# MLP of a transformer block, see `models.registry.mlp_fields`.
MLPS = ("gelu", "swiglu", "swiglu_wide")
# Implementations of attention, see `models.attention.dispatch.attention`.
ATTENTIONS = ("auto", "xla", "blockwise", "cudnn", "splash")
# What a block stores for its backward pass, see `models.layers.REMAT_POLICIES`.
REMATS = ("none", "full", "dots", "dots_no_batch", "attention")
# Dtype of a model's computation.
DTYPES = ("float32", "bfloat16")
# 8-bit matmuls without a gradient, see `models.functional.quantised_dense`.
QUANTISED_DTYPES = ("int8", "float8_e4m3fn")
# Shape of the hidden tokens, see `objective.masking.MaskSpec`.
MASK_KINDS = ("multiblock", "tube")
# Which of the visible and hidden tokens are kept, see `objective.masking.MaskSpec`.
MASK_MODES = ("official", "unbiased")
# Which masks share a mask token of the predictor, see `config.defaults`.
MASK_TOKENS_PER = ("mask", "stream", "run")
# What is predicted, see `objective.masked.LossTerms`.
TARGETS = ("features", "pixels")
# Learning rate schedules, see `objective.optim`.
SCHEDULES = ("cosine", "linear", "wsd")
# How frames are chosen from a video, see `data.clips.sampling`.
SAMPLINGS = ("exact", "official")
# How frames are resized, see `data.clips.frames`.
RESIZES = ("antialias", "official")
# Content of a randomly erased box, see `data.transforms.augment`.
ERASE_MODES = ("pixel", "const")
