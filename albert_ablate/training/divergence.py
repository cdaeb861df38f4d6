"""When a run has diverged. Pure functions of losses."""

import math

STUCK = 0.98  # share of the unigram model's loss that a run must get below by its end
PATIENCE = 0.1  # share of the budget that the loss may lie above the initial loss


class Divergence:
    """Watches the training loss, step by step.

    "non_finite": a loss or gradient norm is not a number. "above_initial": the loss lay above the initial loss for
    10 % of the budget's steps without a break. The third kind, "stuck", is seen at the end (`stuck`).
    """

    def __init__(self, steps: int):
        self.limit = max(1, math.ceil(PATIENCE * steps))
        self.initial = math.inf
        self.above = 0

    def update(self, loss: float, grad_norm: float) -> str | None:
        """The kind of divergence this step completes, None where there is none."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "non_finite"
        self.above = self.above + 1 if loss > self.initial else 0
        return "above_initial" if self.above >= self.limit else None


def stuck(val_loss: float, unigram: float) -> str | None:
    """ "stuck" where the validation loss is not at least 2 % below that of the text's unigram model."""
    return None if val_loss < STUCK * unigram else "stuck"
