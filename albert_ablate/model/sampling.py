"""From logits (..., V) to the next token: temperature, top-k, top-p.

Each takes logits and gives logits, -inf where a token is ruled out. Ties at the border are decided by number: the lower
one stays.
"""

import torch
from torch import Tensor


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature; at 0 the largest alone stays, the first of equals."""
    return logits / temperature if temperature else top_k(logits, 1)


def top_k(logits: Tensor, k: int) -> Tensor:
    """The `k` largest stay (Fan et al. 2018, 1805.04833); all where there are no more."""
    ranked = logits.sort(dim=-1, descending=True, stable=True).indices
    out = torch.full_like(logits, -torch.inf)
    top = ranked[..., :k]
    return out.scatter(-1, top, logits.gather(-1, top))


def top_p(logits: Tensor, p: float) -> Tensor:
    """The smallest set of the most probable tokens whose probabilities sum to at least `p` stays: the nucleus
    (Holtzman et al. 2019, 1904.09751). At least one does; at p = 1 all do."""
    if p >= 1:
        return logits
    ordered, ranked = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.double().softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # of the tokens above it: it is needed while they fall short
    short = before < p
    short[..., 0] = True
    return torch.full_like(logits, -torch.inf).scatter(-1, ranked, ordered.where(short, -torch.inf))


def draw(logits: Tensor, uniform: float) -> int:
    """The token where the running sum of the probabilities of `logits` (V,) first exceeds `uniform`, in [0, 1)."""
    running = logits.double().softmax(-1).cumsum(-1)
    possible = logits.isfinite().nonzero()
    token = int(torch.searchsorted(running, torch.tensor(uniform, dtype=running.dtype) * running[-1], right=True))
    return min(token, int(possible[-1]))
