r"""EPIC-KITCHENS-100, what is done a second from now: V-JEPA 2's action anticipation.

Contexts of 32 frames, 8 a second, that end one second before an action; the encoder's
tokens and the predictor's for 2 frames of the action; 20 heads with a query each for
verb, noun and action; 20 epochs. Class-mean recall at 5 of actions, in percent:

| variant      | published | encoder EFLOP | heads EFLOP | H100 h |
|--------------|-----------|---------------|-------------|--------|
| `vitl16`     | 32.7      | 2 x 6         | 2 x 47      | 75     |
| `vith16`     | 36.5      | 2 x 11        | 2 x 67      | 111    |
| `vitg16`     | 38.0      | 2 x 17        | 2 x 79      | 135    |
| `vitg16_384` | 39.7      | 2 x 54        | 2 x 250     | 430    |

V-JEPA 2.1, by its paper: ViT-g 384 38.4, ViT-G 384 40.8. Published numbers are those of
the head that is best on the validation set (`official_best_on_test_action_recall_at_5`
here); by which of the two anchors is not known, see docs/anticipation.md. Twice: both
anchors, each with heads of its own; one takes half
(`--config.data.anchors="('paper',)"`). Hours are of one H100 at 40 % of its bf16 peak
for encoder, predictor and heads, by `vjepa_jax/program/flops.py`: an estimate, none was
run here. `mask_index` is that of the released code; for a run that has trained one mask
token alone, `--config.mask_index=0`.

Command; DIR is a run (`--workdir`) or converted weights with a predictor:

    python -m vjepa_jax.probe --config=configs/probe_ek100.py:vitl16 --checkpoint=DIR \
        --config.data.train_path=EPIC_100_train.csv \
        --config.data.test_path=EPIC_100_validation.csv \
        --config.data.videos_path=EPIC-KITCHENS
"""

from vjepa_jax.evals import settings

VARIANTS = ("vitl16", "vith16", "vitg16", "vitg16_384")


def get_config(arg=""):
    """Return the config of a variant, by default V-JEPA 2's ViT-L."""
    variant = arg or VARIANTS[0]
    settings.require_variant(variant, VARIANTS)
    config = settings.anticipation()
    config.name = "ek100"
    config.data.resolution = settings.VARIANTS[variant]
    config.head.update(remat="full", dtype="bfloat16")
    config.clips_per_call = 16
    config.test_batch_size = 16
    config.heads_at_once = 4
    return config.lock()
