"""When a run has diverged. Pure functions of losses."""

import math
from collections.abc import Sequence

STUCK = 0.98  # share of the unigram model's loss that a run must get below by its end
QUARTER = 20  # steps that a quarter of the run must hold
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


def below_unigram(train_loss: float, val_loss: float, unigram: float) -> bool:
    """Whether a last loss is at least 2 % below that of the text's unigram model: then the run has learned something of
    the order of tokens. One of the two is enough: a run that has learned a small text by heart has a validation loss
    above it and was never unstable.
    """
    return math.isfinite(val_loss) and min(train_loss, val_loss) <= STUCK * unigram


def stopped_falling(losses: Sequence[float], unigram: float) -> bool:
    """Whether the mean loss over the last quarter of the steps is less than 2 % of the unigram model's loss below that
    over the quarter before.

    Training batches are noisy: the difference of two quarters of 24 batches of 512 bytes has a standard error of 1 %,
    so that a stuck run as short as this may be taken for one that falls.

    Over each quarter, a run that falls faster gains at least what it takes to get from the unigram model's loss to 2 %
    below it. Never of a run with fewer than 80 steps, whose quarters hold fewer than 20: `nano` with `pre_ln`, which
    learns, is not below the unigram model after 70 steps and is after 81. losses: of the training batches, one a step.
    """
    quarter = len(losses) // 4
    if quarter < QUARTER:
        return False
    before, last = losses[-2 * quarter : -quarter], losses[-quarter:]
    return (math.fsum(before) - math.fsum(last)) / quarter < (1 - STUCK) * unigram


def end_kind(losses: Sequence[float], train_loss: float, val_loss: float, unigram: float) -> str | None:
    """ "stuck" where the run is not `below_unigram` and has `stopped_falling`; one that still falls was given too few
    tokens, or too low a learning rate, to tell."""
    if not math.isfinite(val_loss):
        return "non_finite"
    if below_unigram(train_loss, val_loss, unigram) or not stopped_falling(losses, unigram):
        return None
    return "stuck"
