"""t tests of one sample of paired differences: the plain one, with a correction for skew, with a prior variance.

Functions of `d` work along its last axis.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import numpy as np

FIRST = 4  # with 3 pairs t must exceed 11, which only an accidentally tiny spread does
FIRST_CORRECTED = 8  # with fewer pairs no estimate of a skew is worth anything
FIRST_MODERATED, PRIOR_FREEDOM = 3, 3  # of `moderated`
TESTS = ("t", "skew_corrected", "skew_bounded", "moderated")


@dataclass(frozen=True)
class Test:
    """How differences of finished pairs are judged.

    t: the paired t test, from the fourth pair on.
    skew_corrected: that and Johnson's modified t must both reject, from the eighth pair on (`p_johnson`). Keeps 5 % of
    one claim where differences have a skew of up to 2.
    skew_bounded: these two and Hall's transformed t, with the skew one standard error farther against the effect, must
    all reject, from the eighth pair on (`p_hall`). Keeps 5 % of a family of 15 there.
    moderated: from the third pair on, t with PRIOR_FREEDOM more degrees of freedom and the spread
    s~^2 = (PRIOR_FREEDOM s0^2 + (n - 1) s^2) / (PRIOR_FREEDOM + n - 1) (Smyth 2004), s0^2 = `prior` the variance of the
    paired differences of tuning runs, which are independent of all pairs judged.
    """

    name: str = "t"
    prior: float = 0.0  # s0^2, in the unit of d squared

    def __post_init__(self) -> None:
        if self.name not in TESTS:
            raise ValueError(f"A test is one of {', '.join(TESTS)}, got {self.name!r}.")
        if (self.name == "moderated") != (0 < self.prior < inf):
            raise ValueError(f"The test {self.name} cannot have a prior variance of {self.prior:g}.")

    @property
    def first(self) -> int:
        """Pairs at the first look."""
        return FIRST_CORRECTED if self.corrected else FIRST_MODERATED if self.name == "moderated" else FIRST

    @property
    def corrected(self) -> Callable[..., Any] | None:
        """The p that must be small beside that of t, of differences and the value that their mean is compared with."""
        return {"skew_corrected": p_johnson, "skew_bounded": _p_bounded}.get(self.name)

    @property
    def freedom(self) -> int:
        """Degrees of freedom in addition to the n - 1 of n pairs."""
        return PRIOR_FREEDOM if self.name == "moderated" else 0


PLAIN = Test()


def p_johnson(d, side: float = 0.0):
    """Two-sided p of Johnson's modified t: t + g (1/6 + t^2 / 3) / sqrt(n), g the sample skew, on n - 1 (Johnson 1978).

    1 where the correction turns the sign of t. A tail towards which the mean does not lie makes t too large.
    """
    d = np.asarray(d, float) - side
    n = d.shape[-1]
    mean, se = mean_and_error(d)
    t = np.where(se > 0, mean / np.where(se > 0, se, 1.0), 0.0)
    modified = t + skew(d) * (1 / 6 + t**2 / 3) / sqrt(n)
    return np.where(modified * t > 0, t_tail(modified, np.ones_like(t), n - 1), 1.0)[()]


def p_hall(d, side: float = 0.0):
    """Two-sided p of Hall's transformed t, T + a T^2 + a^2 T^3 / 3 + g / (6 sqrt(n)) with a = g / (3 sqrt(n)), on n - 1
    (Hall 1992), where g is the sample skew less one standard error in the direction of T.

    Few pairs understate a skew: with g itself, 15 null claims of skew 2 give a false verdict in 14 % of studies.
    """
    d = np.asarray(d, float) - side
    n = d.shape[-1]
    mean, se = mean_and_error(d)
    t = np.where(se > 0, mean / np.where(se > 0, se, 1.0), 0.0)
    g = skew(d) - np.sign(t) * skew_error(n)
    a = g / (3 * sqrt(n))
    transformed = t + a * t**2 + a**2 * t**3 / 3 + g / (6 * sqrt(n))
    return np.where(transformed * t > 0, t_tail(transformed, np.ones_like(t), n - 1), 1.0)[()]


def _p_bounded(d, side: float = 0.0):
    return np.maximum(p_johnson(d, side), p_hall(d, side))  # Hall's alone errs in 8 % at a skew of 4


def skew(d):
    """Sample skew with its correction for few pairs: sqrt(n (n - 1)) / (n - 2) m3 / m2^1.5; nan without spread.

    Of normal differences its standard error is `skew_error`. It understates: of n pairs it is at most about sqrt(n).
    """
    d = np.asarray(d, float)
    n = d.shape[-1]
    x = d - d.mean(-1, keepdims=True)
    random = np.ptp(d, axis=-1) > 0
    m2 = np.where(random, (x**2).mean(-1), 1.0)
    return np.where(random, (x**3).mean(-1) / m2**1.5 * sqrt(n * (n - 1)) / max(n - 2, 1), np.nan)[()]


def skew_error(n: int) -> float:
    """Standard error of `skew` of n normal differences: sqrt(6 n (n - 1) / ((n - 2) (n + 1) (n + 3)))."""
    return sqrt(6 * n * (n - 1) / ((n - 2) * (n + 1) * (n + 3)))


def mean_and_error(d: np.ndarray, test: Test = PLAIN) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error along the last axis; the error is exactly 0 where all differences are equal."""
    if test.freedom:
        mean, se = mean_and_error(d)
        n = d.shape[-1]
        pooled = (test.freedom * test.prior / n + (n - 1) * se**2) / (test.freedom + n - 1)
        return mean, np.where(se > 0, np.sqrt(pooled), 0.0)
    # over a power of two, which rounds nothing: squares of 1e200 or 1e-200 would overflow or vanish
    largest = np.abs(d).max(-1)
    scale = np.ldexp(1.0, np.frexp(largest)[1] - 1)
    x = d / scale[..., None]
    # .3 - .1 and .5 - .3 differ by rounding only: without the tolerance they would be a t of 1e16
    equal = np.ptp(x, axis=-1) <= 1e-12 * largest / scale
    return x.mean(-1) * scale, np.where(equal, 0.0, x.std(-1, ddof=1)) / sqrt(d.shape[-1]) * scale


def t_tail(x, se, freedom: int):
    """2 P(T > |x| / se), and 1 where se is 0."""
    from scipy.special import stdtr

    random = se > 0
    return np.where(random, 2 * stdtr(freedom, -np.abs(x) / np.where(random, se, 1.0)), 1.0)
