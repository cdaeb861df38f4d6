"""When a run has diverged. Pure functions of losses."""

import math
from collections.abc import Sequence

STUCK_RATIO = 0.98  # share of the unigram model's loss that a run must get below by its end
LEAST_BUDGET = 80  # steps of a run that can be stuck
LAST_QUARTER = 0.1  # of the fall that is asked of the second half, at least so much must be the last quarter's
ABOVE_RATIO = 1.02  # times the initial loss: a single batch of an unchanged model may lie a little above it
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
        self.above = self.above + 1 if loss > self.highest() else 0
        return "above_initial" if self.above >= self.limit else None

    def highest(self) -> float:
        """The loss above which a step counts."""
        return ABOVE_RATIO * self.initial


class OwnDivergence(Divergence):
    """That of a task of one's own, whose loss may begin near its end or lie below 0: a step counts where its loss is
    above the initial one by as much again, initial + |initial|."""

    def highest(self) -> float:
        return self.initial + abs(self.initial)


def below_unigram(train_loss: float, val_loss: float, unigram: float) -> bool:
    """Whether a last loss is at least 2 % below that of the text's unigram model: then the run has learned something of
    the order of tokens. One of the two is enough: a run that has learned a small text by heart has a validation loss
    above it and was never unstable.
    """
    return math.isfinite(val_loss) and min(train_loss, val_loss) <= STUCK_RATIO * unigram


def midway(steps: int) -> tuple[int, ...]:
    """The steps after which the loss of the training sample is kept for `stopped_falling`: half and three quarters of
    the budget. Nothing of fewer than 80 steps, which are never called stuck: `nano` with `pre_ln`, which learns, is not
    below the unigram model after 70 steps and is after 81.
    """
    return (math.ceil(steps / 2), math.ceil(3 * steps / 4)) if steps >= LEAST_BUDGET else ()


def stopped_falling(half: float, three_quarters: float, end: float, unigram: float) -> bool:
    """Whether the loss has fallen by less than 2 % of the unigram model's loss over the second half of the budget, or
    by less than a tenth of that over its last quarter.

    half, three_quarters, end: nats per token, of one fixed sample of training text, in evaluation mode. The differences
    are paired by example, so that how hard the text is cancels: over three seeds of `nano` the last quarter's is 1.2 %
    to 1.5 % of the unigram loss by the sample, 0.0 % to 3.5 % by the means of its training batches.

    2 %: over half the budget, a run that falls faster gains at least what it takes to get from the unigram model's
    loss to below the line of `below_unigram`. Measured with `nano`: 4.7 % to 18 % in 16 of 16 runs of 8,000 to 30,000
    tokens that learn and had not reached the line; 0.3 % to 0.5 % in 3 of 3 whose rate of 1e-5 is too low to learn,
    1.6 % and 1.5 % with `post_ln` at 48 and 96 layers over 50,000 tokens (96: seed 1, whose batches seemed to fall).
    The last quarter: a loss that was high at half time and lies flat since has stopped. A tenth, as the schedules that
    decay leave little for the end: 1/7 of the second half's learning rate, with a cosine.
    """
    needed = (1 - STUCK_RATIO) * unigram
    return not (half - end >= needed and three_quarters - end >= LAST_QUARTER * needed)


def end_kind(halfway: Sequence[float], train_loss: float, val_loss: float, unigram: float) -> str | None:
    """ "stuck" where the run is not `below_unigram` and has `stopped_falling`; one that still falls was given too few
    tokens, or too low a learning rate, to tell. halfway: the training sample's losses at `midway`."""
    if not math.isfinite(val_loss):
        return "non_finite"
    if below_unigram(train_loss, val_loss, unigram) or len(halfway) < 2:
        return None
    half, three_quarters = halfway
    return "stuck" if stopped_falling(half, three_quarters, train_loss, unigram) else None
