"""What an optimizer step's update is multiplied by: the learning rate, and clipping.

Pure: loads without torch or Ray.
"""

from __future__ import annotations

import math

from actors.engine.training_config import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, num_steps: int) -> float:
    """Return the learning rate of `step`, counted from 0, of a run of `num_steps`.

    It rises by equal amounts from above 0 to the peak, which step `warmup_steps` has, then falls
    along half a cosine to `final_fraction` of the peak, which the last step has (Loshchilov and
    Hutter 2017, SGDR, equation 5 without restarts).

    Raises:
        ValueError: The step is not one of the run.
    """
    if not 0 <= step < num_steps:
        raise ValueError(f"step {step} is not one of a run of {num_steps} steps, counted from 0")
    peak, warmup_steps = settings.learning_rate, settings.warmup_steps
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
    above = (1 + math.cos(math.pi * progress)) / 2
    return peak * (settings.final_fraction + (1 - settings.final_fraction) * above)


def clip_scale(gradient_norm: float, clip_norm: float | None) -> float:
    """Return what gradients of that norm are multiplied by, as torch's clip_grad_norm_ does.

    Raises:
        ValueError: The norm is not finite.
    """
    if not math.isfinite(gradient_norm):
        raise ValueError(
            f"the gradient norm is {gradient_norm}: the loss has diverged; "
            "lower optimizer.learning_rate or lengthen optimizer.warmup_steps"
        )
    if clip_norm is None:
        return 1.0
    return min(1.0, clip_norm / (gradient_norm + 1e-6))
