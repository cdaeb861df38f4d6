"""Representations by depth: effective rank of the residual stream and angles between successive blocks."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from albert_ablate.config import Count
from albert_ablate.evaluations.subject import Evaluation, Result, Subject
from albert_ablate.model.decoder import Decoder


@dataclass(frozen=True)
class Representation(Evaluation):
    """rank = exp(-sum_i q_i ln q_i), q_i = s_i / sum_j s_j, s the singular values: effective rank (Roy and Vetterli
    2007, EUSIPCO) of the matrix of representations, a row a token, after each block.
    angle = mean of arccos(cos(x_l, x_l+1)) / pi over tokens: angular distance of successive blocks (Gromov et al. 2024,
    2403.17887, who take the last token of a sequence: the column angle_last).

    The mean row is subtracted first, since what all tokens share tells none from another (rank_uncentered: it is not).
    residual = |X - mean| / |X|, Frobenius norms: 0 where all tokens are represented alike (after Dong et al. 2021,
    2103.03404). Depth 0 is what enters the first block. rank_first, rank_middle and rank_last are after blocks 1,
    L / 2 (rounded up) and L, angle_mean is over l = 0..L-1. A stream of two parts is taken as it enters the head,
    without the final norm. tokens: size of the fixed sample of validation text.
    """

    looks_inside = True

    tokens: Count = 2_048

    def __call__(self, subject: Subject) -> Result:
        rows = subject.sample("validation", self.tokens)
        with streams(cast(Decoder, subject.model)) as streams_by_depth:
            subject.loss(rows)
        states = [torch.cat(parts).double().cpu() for parts in streams_by_depth]
        table: list[dict[str, Any]] = []
        for depth, x in enumerate(states):
            flat = x.flatten(0, 1)
            centered = flat - flat.mean(0)
            angles = angular_distance(states[depth - 1], x) if depth else torch.full((1, 1), torch.nan)
            table.append(
                {
                    "depth": depth,
                    "rank": effective_rank(centered),
                    "rank_uncentered": effective_rank(flat),
                    "residual": (centered.norm() / flat.norm()).item(),
                    "angle": angles.mean().item(),
                    "angle_last": angles[:, -1].mean().item(),
                }
            )
        L = len(states) - 1
        at = {"first": 1, "middle": math.ceil(L / 2), "last": L}
        summary = {f"rank_{name}": table[depth]["rank"] for name, depth in at.items()}
        return Result(table, {**summary, "angle_mean": float(np.mean([row["angle"] for row in table[1:]]))})


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the normalized singular values: n for the identity of size n, 0 for the zero matrix, nan
    where an entry is not finite."""
    if not matrix.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(matrix)
    if values.sum() == 0:
        return 0.0
    q = values / values.sum()
    return torch.special.entr(q).sum().exp().item()


def angular_distance(a: Tensor, b: Tensor) -> Tensor:
    """arccos(cosine) / pi over the last axis: 0 for the same direction, 1/2 for a right angle, 1 for the opposite."""
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return cosine.clamp(-1, 1).arccos() / math.pi


@contextmanager
def streams(model: Decoder) -> Iterator[list[list[Tensor]]]:
    """Within it, what enters the first block and what leaves each is kept: a list per depth of (B, T, D)."""
    captured: list[list[Tensor]] = [[] for _ in range(len(model.blocks) + 1)]

    def keep(depth: int, stream: Any) -> None:
        tensor = model.last.finish(stream, nn.Identity()) if isinstance(stream, tuple) else stream
        captured[depth].append(tensor.detach())

    handles = [model.blocks[0].register_forward_pre_hook(lambda module, args: keep(0, args[0]))]
    for i, block in enumerate(model.blocks):
        handles.append(block.register_forward_hook(lambda module, args, out, depth=i + 1: keep(depth, out)))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
