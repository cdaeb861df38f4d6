"""Synthetic languages whose entropy is known exactly: the fast lane of tests and of theory. No torch here.

Each is drawn from named streams, one per split, so that train, validation and test are independent samples of the same
language. One character is one byte, so nats per character are nats per byte token. `entropy_rate` is the least loss any
model can reach; excess loss over it is what a run's summary shows.
"""

import math
import string
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate as running
from typing import Annotated, ClassVar

import numpy as np

from albert_ablate.config import Config, Count, Positive, Range
from albert_ablate.data.corpora import SPLITS, Corpus
from albert_ablate.streams import stream_seed

ALPHABET = string.ascii_letters + string.digits
Symbols = Annotated[int, Range(2, len(ALPHABET))]


@dataclass(frozen=True, kw_only=True)
class Synthetic(Corpus):
    """What every synthetic language shares.

    length: characters of training text; validation and test get a tenth each. language: number of the language drawn
    from the family (not the run's seed: arms and seeds share the language).
    """

    length: Count = 2_000_000
    language: Annotated[int, Range(0)] = 0

    separator: ClassVar[str] = ""
    LICENSE: ClassVar[str] = "none needed: drawn at random"
    ORIGIN: ClassVar[str] = "made by this class from data.language"

    def source(self) -> str:
        shared = {f.name for f in fields(Corpus)}
        return repr({f.name: getattr(self, f.name) for f in fields(self) if f.name not in shared})

    def split(self) -> dict[str, list[str]]:
        sizes = {"train": self.length, "validation": self.length // 10, "test": self.length // 10}
        return {split: [self.sample(self.stream(split), sizes[split])] for split in SPLITS}

    def stream(self, name: str) -> np.random.Generator:
        """Random generator of a part of the language, the same for every run."""
        return np.random.Generator(np.random.PCG64(stream_seed(self.language, type(self).__name__, name)))

    def sample(self, random: np.random.Generator, length: int) -> str:
        """A text of `length` symbols, drawn with `random`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Markov(Synthetic):
    """A first-order Markov chain: P(j | i) = softmax_j(scale * N(0, 1)).

    Entropy rate -sum_i pi_i sum_j P_ij log P_ij, unigram entropy -sum_i pi_i log pi_i, pi the stationary distribution,
    all exact (Shannon 1948).
    """

    symbols: Symbols = 32
    scale: Positive = 2.5

    @cached_property
    def transitions(self) -> np.ndarray:
        """Transition probabilities, rows from and columns to; shape (symbols, symbols)."""
        logits = self.scale * self.stream("language").standard_normal((self.symbols, self.symbols))
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    @cached_property
    def stationary(self) -> np.ndarray:
        """pi with pi P = pi and sum 1."""
        n = self.symbols
        system = np.vstack([self.transitions.T - np.eye(n), np.ones(n)])
        return np.linalg.lstsq(system, np.r_[np.zeros(n), 1.0], rcond=None)[0]

    @property
    def entropy_rate(self) -> float:
        """Entropy per symbol given the symbol before it, in nats: the lowest loss a model can reach."""
        return float(-(self.stationary[:, None] * self.transitions * _log(self.transitions)).sum())

    @property
    def unigram_entropy(self) -> float:
        """Entropy of the stationary distribution, in nats: the loss of the best unigram model."""
        return float(-(self.stationary * _log(self.stationary)).sum())

    def sample(self, random: np.random.Generator, length: int) -> str:
        rows = [list(running(row)) for row in self.transitions]
        last = self.symbols - 1
        state = min(bisect(list(running(self.stationary)), random.random()), last)
        out = []
        for u in random.random(length):
            out.append(state)
            state = min(bisect(rows[state], u), last)
        return "".join(ALPHABET[i] for i in out)


@dataclass(frozen=True, kw_only=True)
class Grammar(Synthetic):
    """Sentences of a random simple grammar: rules A -> t B C..., no two rules of a nonterminal with the same t.

    Such a grammar is unambiguous (a sentence has one derivation: Korenjak and Hopcroft 1966), so the entropy of a
    sentence is that of its derivation, H = h + M H with h_A = -sum p log p over A's rules and M_AB the expected number
    of B's in a rule of A (Grenander 1976). With a full stop after each sentence of expected length n, the entropy rate
    is H_S / (n + 1): exact for a model that sees the sentence from its start; a block that begins inside one costs a
    little more.
    """

    symbols: Symbols = 26
    nonterminals: Annotated[int, Range(1, 200)] = 12
    rules: Annotated[int, Range(2)] = 4

    @staticmethod
    def verify(cfg: Config) -> None:
        """Refuse more rules of a nonterminal than there are first symbols."""
        from albert_ablate.config import ConfigError

        data = cfg.data
        if data.rules > data.symbols:
            raise ConfigError(
                f"data.rules={data.rules} needs as many different first symbols: data.symbols={data.symbols}."
            )

    @cached_property
    def productions(self) -> list[list[tuple[float, str, tuple[int, ...]]]]:
        """Per nonterminal its rules: (probability, terminal, nonterminals that follow). On average 0.8 follow."""
        random = self.stream("language")
        out = []
        for _ in range(self.nonterminals):
            terminals = random.choice(self.symbols, self.rules, replace=False)
            follow = [i % 3 for i in range(self.rules)]  # 0, 1, 2, 0, ...: at least one rule ends
            weights = random.dirichlet(np.ones(self.rules))
            mean = float(weights @ follow)
            if mean > 0.8:  # move weight to the rules that end, so that sentences stay short
                ends = np.array([f == 0 for f in follow])
                keep = 0.8 / mean
                weights = np.where(
                    ends, weights + (1 - keep) * weights[~ends].sum() * ends / ends.sum(), keep * weights
                )
                weights = weights / weights.sum()
            rules = zip(weights, terminals, follow, strict=True)
            out.append(
                [
                    (float(p), ALPHABET[t], tuple(map(int, random.integers(self.nonterminals, size=n))))
                    for p, t, n in rules
                ]
            )
        return out

    def _expected(self, per_symbol: np.ndarray) -> float:
        """x_S of x = own + M x."""
        counts = np.zeros((self.nonterminals, self.nonterminals))
        for a, rules in enumerate(self.productions):
            for p, _, following in rules:
                for b in following:
                    counts[a, b] += p
        return float(np.linalg.solve(np.eye(self.nonterminals) - counts, per_symbol)[0])

    @property
    def entropy_rate(self) -> float:
        """Entropy per symbol in nats: of the rules chosen in a sentence, over its length with the separator."""
        choice = np.array([-sum(p * math.log(p) for p, *_ in rules) for rules in self.productions])
        return self._expected(choice) / (self._expected(np.ones(self.nonterminals)) + 1)

    def sample(self, random: np.random.Generator, length: int) -> str:
        draws = _uniforms(random)
        choices = [list(running(p for p, *_ in rules)) for rules in self.productions]
        out: list[str] = []
        while len(out) < length:
            stack = [0]
            while stack:
                a = stack.pop()
                rule = self.productions[a][min(bisect(choices[a], next(draws)), self.rules - 1)]
                out.append(rule[1])
                stack.extend(reversed(rule[2]))
            out.append(".")
        return "".join(out[:length])


@dataclass(frozen=True, kw_only=True)
class Recall(Synthetic):
    """Associative recall: lines of `pairs` key-value pairs, one of the keys again, its value (Graves et al. 2014,
    1410.5401; Arora et al. 2023, 2312.04927).

    A line "aXbYcZ?bY" and a line end: keys are different letters in random order, values are drawn with replacement
    from as many letters. All characters but the last value are unpredictable from before, so the entropy rate is
    (sum_k log(symbols - k) + pairs log symbols + log pairs) / (2 pairs + 4). A model that cannot recall loses
    `chance` = log(symbols) more on the last value of each line, or `chance` / (2 pairs + 4) per character.
    """

    symbols: Annotated[int, Range(2, 26)] = 16
    pairs: Count = 4

    @staticmethod
    def verify(cfg: Config) -> None:
        """Refuse more pairs than there are different keys."""
        from albert_ablate.config import ConfigError

        data = cfg.data
        if data.pairs > data.symbols:
            raise ConfigError(f"data.pairs={data.pairs} needs as many different keys: data.symbols={data.symbols}.")

    @property
    def chance(self) -> float:
        """Loss in nats of guessing the recalled value uniformly."""
        return math.log(self.symbols)

    @property
    def entropy_rate(self) -> float:
        """Entropy per symbol in nats: of keys, values and the query, over the symbols of a document."""
        keys = sum(math.log(self.symbols - k) for k in range(self.pairs))
        return (keys + self.pairs * math.log(self.symbols) + math.log(self.pairs)) / (2 * self.pairs + 4)

    def sample(self, random: np.random.Generator, length: int) -> str:
        lines = -(-length // (2 * self.pairs + 4))
        lower, upper = np.array(list(string.ascii_lowercase)), np.array(list(string.ascii_uppercase))
        keys = random.random((lines, self.symbols)).argsort(axis=1)[:, : self.pairs]
        values = random.integers(self.symbols, size=(lines, self.pairs))
        asked = random.integers(self.pairs, size=(lines, 1))
        pairs = np.stack([lower[keys], upper[values]], axis=2).reshape(lines, -1)
        query, answer = np.take_along_axis(keys, asked, 1), np.take_along_axis(values, asked, 1)
        mark, end = np.full((lines, 1), "?"), np.full((lines, 1), "\n")
        return "".join(np.hstack([pairs, mark, lower[query], upper[answer], end]).ravel())[:length]


def _log(p: np.ndarray) -> np.ndarray:
    """log p, and 0 where p is 0 (or below it by rounding): what cannot happen adds nothing to an entropy."""
    return np.log(np.where(p > 0, p, 1))


def _uniforms(random: np.random.Generator) -> Iterator[float]:
    while True:
        yield from random.random(65_536).tolist()
