"""When a run has diverged. Pure functions of losses."""

import math

STUCK = 0.98  # share of the unigram model's loss that a run must get below by its end
ABOVE = 1.02  # times the initial loss: a single batch of an unchanged model may lie a little above it
PATIENCE = 10  # the loss may lie above the initial loss for less than 1/10 of the budget
LEAST_STEPS = 5  # above the initial loss, however small the budget: a single step of ten says nothing


class Divergence:
    """Watches the training loss, step by step.

    "non_finite": a loss or gradient norm is not a number. "above_initial": the loss lay above the initial loss (by more
    than 2 %) for 10 % of the budget's steps, at least 5, without a break. The third kind, "stuck", is seen at the end
    (`end_kind`).
    """

    def __init__(self, steps: int):
        self.limit = max(LEAST_STEPS, math.ceil(steps / PATIENCE))
        self.initial = math.inf
        self.above = 0

    def update(self, loss: float, grad_norm: float) -> str | None:
        """The kind of divergence this step completes, None where there is none."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "non_finite"
        self.above = self.above + 1 if loss > ABOVE * self.initial else 0
        return "above_initial" if self.above >= self.limit else None


def end_kind(train_loss: float, val_loss: float, unigram: float) -> str | None:
    """ "stuck" where neither last loss is at least 2 % below that of the text's unigram model.

    A run that has learned a small text by heart has a validation loss above it and was never unstable.
    """
    if not math.isfinite(val_loss):
        return "non_finite"
    return None if min(train_loss, val_loss) <= STUCK * unigram else "stuck"
