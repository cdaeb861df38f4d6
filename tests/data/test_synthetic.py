"""Synthetic languages: what they claim about their entropy against what their text shows."""

import math
from collections import Counter

import numpy as np
import pytest

from albert_ablate.data.synthetic import ALPHABET, Grammar, Markov, Recall


def block_entropy(text, n):
    """Plug-in entropy of n-grams, nats."""
    counts = np.array(list(Counter(text[i : i + n] for i in range(len(text) - n + 1)).values()), dtype=float)
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def test_markov_with_two_symbols_has_the_textbook_entropy_rate():
    language = Markov(symbols=2)
    (a, _), (b, _) = language.transitions[0][::-1].tolist(), language.transitions[1].tolist()
    pi = np.array([b, a]) / (a + b)  # stationary of leaving probabilities a from state 0, b from state 1
    h = lambda p: -(p * math.log(p) + (1 - p) * math.log(1 - p))  # noqa: E731
    assert language.entropy_rate == pytest.approx(pi[0] * h(a) + pi[1] * h(b), abs=1e-12)
    assert language.unigram_entropy == pytest.approx(h(pi[0]), abs=1e-12)


def test_markov_text_has_the_entropies_it_claims():
    language = Markov(symbols=8, length=300_000)
    text = language.split()["train"][0]
    assert len(text) == 300_000 and set(text) == set(ALPHABET[:8])
    assert block_entropy(text, 1) == pytest.approx(language.unigram_entropy, abs=0.01)
    assert block_entropy(text, 2) - block_entropy(text, 1) == pytest.approx(language.entropy_rate, abs=0.01)
    assert block_entropy(text, 3) - block_entropy(text, 2) == pytest.approx(language.entropy_rate, abs=0.01)


def test_grammar_entropy_and_length_agree_with_samples():
    language = Grammar(length=200_000)
    sentences = language.split()["train"][0].split(".")[:-1]
    probability = {(a, t): (p, b) for a, rules in enumerate(language.productions) for p, t, b in rules}

    def surprise(sentence):  # parse from the left: the terminal tells the rule
        stack, total = [0], 0.0
        for t in sentence:
            p, following = probability[stack.pop(), t]
            total -= math.log(p)
            stack.extend(reversed(following))
        assert not stack
        return total

    nats = sum(map(surprise, sentences)) / sum(len(s) + 1 for s in sentences)
    assert nats == pytest.approx(language.entropy_rate, rel=0.02)
    assert language.entropy_rate > 0.1


def test_recall_lines_have_the_answer_and_entropy_they_claim():
    language = Recall(symbols=5, pairs=2, length=240_000)
    lines = language.split()["train"][0].splitlines()
    for line in lines[:2000]:
        pairs = dict(zip(line[0:4:2], line[1:4:2], strict=True))
        assert len(pairs) == 2 and line[4] == "?" and pairs[line[5]] == line[6] and len(line) == 7
    counts = np.array(list(Counter(lines).values()), dtype=float)
    p = counts / counts.sum()
    # 5 * 4 orders of keys, 25 pairs of values, 2 questions: all equally likely
    assert math.log(5 * 4 * 25 * 2) / 8 == pytest.approx(language.entropy_rate, abs=1e-12)
    assert -(p * np.log(p)).sum() / 8 == pytest.approx(language.entropy_rate, abs=0.005)
    assert language.chance == pytest.approx(math.log(5))


@pytest.mark.parametrize("family", [Markov, Grammar, Recall])
def test_splits_are_independent_samples_of_one_language(family):
    a, b, other = (family(length=5_000, language=k).split() for k in (0, 0, 1))
    assert a == b and a["train"] != other["train"]
    assert len(a["train"][0]) == 5_000 and len(a["test"][0]) == 500
    assert not a["train"][0].startswith(a["validation"][0][:50]) and a["validation"] != a["test"]


def test_a_language_without_chance_has_no_entropy():
    """At a scale where each state has one successor, P log P is 0 throughout."""
    certain = Markov(scale=1e6)
    assert set(certain.transitions.ravel()) == {0.0, 1.0} and certain.entropy_rate == 0
    assert 0 <= certain.unigram_entropy <= math.log(32)
