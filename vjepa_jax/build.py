"""From a config to modules, masks and schedules: the only reader of those keys."""

import math

from ml_collections import ConfigDict

from vjepa_jax import masking, optim
from vjepa_jax.default_config import UserError
from vjepa_jax.models import registry


def make_models(config: ConfigDict):
    """Make encoder and predictor as the config says."""
    model = config.model
    shared = {
        key: model[key]
        for key in ("pos_embed", "scan_layers", "remat", "attention", "dtype")
    }
    try:
        encoder = registry.make_encoder(**model.encoder, **shared)
    except ValueError as error:
        raise UserError(f"config.model.encoder.size: {error}") from None
    predictor = registry.make_predictor(
        **model.predictor,
        **shared,
        out_dim=encoder.width,
        num_mask_tokens=len(config.masks),
    )
    return encoder, predictor


def make_masks(config: ConfigDict, grid: masking.Grid) -> dict[str, masking.MaskSpec]:
    """Make the mask types with their token budgets filled in.

    Raises:
      UserError: a budget does not fit the grid.
    """
    specs = {}
    for name, fields in config.masks.items():
        fields = dict(fields)
        group_size = fields.pop("group_size")
        spec = masking.MaskSpec(**fields)
        context, target = spec.num_context, spec.num_target
        if not (context and target):
            try:
                budget = masking.default_budget(spec, grid, group_size)
            except ValueError as error:
                raise UserError(f"config.masks.{name}: {error}") from None
            context, target = context or budget[0], target or budget[1]
        if context + target > math.prod(grid):
            raise UserError(
                f"config.masks.{name}: num_context={context} and num_target={target} "
                f"exceed the clip's {math.prod(grid)} tokens: lower one of them"
            )
        fields |= {"num_context": context, "num_target": target}
        specs[name] = masking.MaskSpec(**fields)
    return specs


def make_schedules(config: ConfigDict) -> dict[str, optim.Schedule]:
    """Make the schedules of learning rate, weight decay and EMA momentum."""
    o, steps = config.optim, int(config.optim.schedule_scale * config.total_steps)
    return {
        "learning_rate": optim.warmup_cosine(
            o.start_learning_rate,
            o.learning_rate,
            o.final_learning_rate,
            o.warmup_steps,
            steps,
        ),
        "weight_decay": optim.cosine(o.weight_decay, o.final_weight_decay, steps),
        "ema_momentum": optim.linear(config.ema.start, config.ema.end, steps),
    }
