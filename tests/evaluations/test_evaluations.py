"""Evaluations of kept weights against values worked out by hand, closed forms and libraries."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from alphabet import text_of
from factories import SMALL
from scipy.sparse.linalg import LinearOperator, eigsh

from albert_ablate import compose, load_runs, run
from albert_ablate.cli import main
from albert_ablate.config import ConfigError, check, checked_config, conf_folder, identity, options, parameters_of
from albert_ablate.data.packed import BatchOrder, block_count, held_out_sample, take_blocks
from albert_ablate.evaluations.corruption import area, substituted, swapped, zeroed_embedding
from albert_ablate.evaluations.evaluate import evaluate_run, load_subject
from albert_ablate.evaluations.memorization import Memorization
from albert_ablate.evaluations.representation import angular_distance, effective_rank, streams
from albert_ablate.evaluations.sharpness import hessian_product, largest_eigenvalue, perturbed
from albert_ablate.evaluations.units import Units, zeroed_units
from albert_ablate.model.build import build
from albert_ablate.model.weights import weights_hash
from albert_ablate.records.evaluation_results import read_evaluations, write_evaluations
from albert_ablate.records.folder import RunFolder

NAMES = [name for name in options()["evaluation"] if name not in ("standard", "all")]
TINY = [*SMALL, "data=markov", "data.length=20_000"]
TINY += [
    "budget.tokens=40_000",
    "evaluation.every=10_000",
    "evaluation.tokens=1_024",
    "trainer.threads=1",
    "trainer=cpu",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run, without evaluations at its end."""
    return run(checked_config([*TINY, "optimizer.lr=1e-2", f"paths.runs={tmp_path_factory.mktemp('runs')}"]))


def subject_of(record, *overrides):
    cfg = check({**record["config"], "paths": {"runs": "runs", "cache": None}, "choices": record["choices"]})
    return load_subject(RunFolder(Path(record["folder"])), record, cfg, "last")


@pytest.fixture(scope="module")
def subject(finished):
    return subject_of(finished)


def nodes(*names, **more):
    """Evaluations by name, as their YAMLs have them but for `more` and a small sample."""
    found = {name: yaml.safe_load((conf_folder() / "evaluation" / f"{name}.yaml").read_text())[name] for name in names}
    quick = {"corpora": ["airports"], "iterations": 3, "tokens": 256} | more
    return {name: node | {key: quick[key] for key in node if key in quick} for name, node in found.items()}


def evaluation(name, **more):
    return build(nodes(name, **more)[name])


class Uniform(torch.nn.Module):
    """All tokens alike."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.weight = vocabulary, torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens):
        return torch.zeros(*tokens.shape, self.vocabulary)


def having(subject, model):
    return type(subject)(**{**subject.__dict__, "model": model})


# --- each quantity ---------------------------------------------------------------------------------------------------


def test_clean_losses_are_those_of_the_run_on_the_same_sample(finished, subject):
    found = evaluation("clean", tokens=1_024)(subject).summary
    for name, theirs in (("train_loss", "train_loss"), ("val_loss", "val_loss"), ("test_loss", "test_loss_last")):
        evals = load_runs(Path(finished["folder"]).parents[1]).evals
        split = {"train_loss": "train", "val_loss": "validation", "test_loss": "test"}[name]
        last = evals[(evals["split"] == split) & (evals["step"] == finished["summary"]["steps"])]["loss"].iloc[0]
        assert found[name] == pytest.approx(last, abs=1e-6) == finished["summary"][theirs]
    assert found["gap"] == found["val_loss"] - found["train_loss"]


@pytest.mark.skipif(find_spec("airportsdata") is None, reason="needs the extra corpora")
def test_a_uniform_model_needs_eight_bits_a_byte_in_each_domain(subject, monkeypatch):
    asked = evaluation("domains", corpora=["airports", "markov", "bible"])
    result = asked(having(subject, Uniform(256)))
    assert result.summary == {"airports": pytest.approx(8, abs=1e-5), "bible": pytest.approx(8, abs=1e-5)}
    assert not any(row["own"] for row in result.rows)
    from albert_ablate.data import corpora

    there = asked.settings(subject)
    monkeypatch.setattr(corpora, "find_spec", lambda name: None)
    result = asked(having(subject, Uniform(256)))
    missing = {row["corpus"]: row["missing"] for row in result.rows}
    assert result.summary == {} and "airportsdata is not installed: pip install" in missing["airports"]
    assert asked.settings(subject) != there and set(asked.settings(subject)["missing"]) == {"airports", "bible"}
    with pytest.raises(ConfigError, match="corpora=markov is not a corpus"):
        compose(["evaluation=domains", "evaluation.domains.corpora=[markov]"])


@pytest.mark.skipif(find_spec("airportsdata") is None, reason="needs the extra corpora")
def test_domains_are_encoded_by_the_run_s_own_tokenizer(tmp_path):
    words = ["tokenizer=bpe", "tokenizer.vocabulary=260", "budget.tokens=512", "data.batch=2", f"paths.runs={tmp_path}"]
    own = subject_of(run(checked_config([*TINY, *words])))
    found = evaluation("domains", tokens=8192)(having(own, Uniform(260))).summary
    from albert_ablate.data.packages import AirportRecords

    codec = own.packed.codec
    tokens = codec.encode("\n".join(AirportRecords().split()["test"]))  # lines never join: as document by document
    sample = held_out_sample(tokens, own.context, 8192, "domains/airports")
    targets = take_blocks(tokens, sample, own.context)[:, 1:].ravel().tolist()
    text = text_of(codec.model, targets)
    assert own.packed.vocabulary == 260 and text.decode(errors="replace").count("\n") > 50
    assert found["airports"] == pytest.approx(math.log2(260) * len(targets) / len(text), rel=1e-6)


def test_bits_per_byte_of_run_and_clean_share_their_tokens(tmp_path):
    words = ["tokenizer=bpe", "tokenizer.vocabulary=300", "budget.tokens=512", "data.batch=2", f"paths.runs={tmp_path}"]
    record = run(checked_config([*TINY, *words]))
    own = subject_of(record)
    assert evaluation("clean").settings(own)["bytes"] == "of the sample"  # what was counted otherwise is done anew
    size = {}
    for split, tokens in (("validation", 1024), ("test", 1024), ("train", 256)):
        array = getattr(own.packed, split)
        targets = take_blocks(array, held_out_sample(array, own.context, tokens, split), own.context)[:, 1:].ravel()
        size[split] = len(text_of(own.packed.codec.model, targets)) / len(targets)
    summary = record["summary"]
    for name, split in (("val", "validation"), ("test", "test")):
        bits = summary[f"{name}_loss"] / math.log(2) / size[split]
        assert summary[f"{name}_bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    entropy = record["data"]["entropy_rate"] * size["validation"]
    assert summary["excess_loss"] == pytest.approx(summary["val_loss"] - entropy, rel=1e-6)
    row = evaluation("clean")(having(own, Uniform(300))).rows[0]
    assert row["bits_per_byte"] == pytest.approx(math.log2(300) / size["train"], rel=1e-6)


@pytest.mark.skipif(find_spec("airportsdata") is None, reason="needs the extra corpora")
def test_a_lossy_tokenizer_has_no_bits_per_byte(tmp_path, capsys):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    lower = Tokenizer(models.BPE(alphabet, []))
    lower.normalizer, lower.decoder = normalizers.Lowercase(), decoders.ByteLevel()
    lower.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lower.save(str(tmp_path / "lower.json"))
    words = [f"tokenizer.path={tmp_path}/lower.json", "budget.tokens=512", "data.batch=2", f"paths.runs={tmp_path}"]
    record = run(checked_config([*TINY, "tokenizer=file", *words]))
    assert capsys.readouterr().err.count("bits per byte are not reported") == 1
    assert record["data"]["reversible"] is False
    assert record["summary"]["val_loss"] > 0 and record["summary"]["val_bits_per_byte"] is None
    assert record["summary"]["test_bits_per_byte"] is None and record["summary"]["excess_loss"] is None
    found = evaluation("domains")(subject_of(record))
    assert found.summary == {} and found.rows[0]["bits_per_byte"] is None and found.rows[0]["loss"] > 0
    assert "does not give its text back" in found.rows[0]["missing"]


def test_swapping_exchanges_neighbors_and_leaves_an_odd_one():
    where = np.array([[True, False, False, True, True]])
    assert swapped(np.array([[1, 2, 3, 4, 5]]), where).tolist() == [[2, 1, 3, 4, 5]]
    assert swapped(np.array([[1, 2, 3, 4, 5]]), where[:, ::-1]).tolist() == [[2, 1, 3, 4, 5]]
    assert swapped(np.array([[1, 2, 3, 4]]), np.array([[False, True, True, False]])).tolist() == [[1, 2, 4, 3]]


def test_substitution_draws_other_seen_tokens_uniformly():
    inputs, seen = np.full((1, 9000), 7), np.array([2, 7, 9, 200])
    noise = (np.arange(9000) / 9000)[None]
    out = substituted(inputs, np.ones_like(inputs, bool), noise, seen)
    assert dict(zip(*np.unique(out, return_counts=True), strict=True)) == {2: 3000, 9: 3000, 200: 3000}
    unseen = substituted(np.full((1, 8), 5), np.ones((1, 8), bool), np.arange(8)[None] / 8, seen)
    assert unseen.tolist() == [[2, 2, 7, 7, 9, 9, 200, 200]]
    assert (substituted(inputs, np.zeros_like(inputs, bool), noise, seen) == inputs).all()


def test_a_masked_token_moves_only_what_follows(subject):
    rows = subject.sample("validation", 256)
    everything = torch.ones(rows[:, :-1].shape, dtype=torch.bool)
    with zeroed_embedding(subject, everything):
        masked = subject.loss(rows)
    kept = subject.model.embedding.weight.detach().clone()
    with torch.no_grad():
        subject.model.embedding.weight.zero_()
    silent = subject.loss(rows)
    with torch.no_grad():
        subject.model.embedding.weight.copy_(kept)
    assert masked == pytest.approx(silent, abs=1e-6) and masked > subject.loss(rows) + 0.1
    only = torch.zeros(rows[:, :-1].shape, dtype=torch.bool)
    only[:, 5] = True
    before = torch.cat([x for x, _ in subject.logits(rows[:, :-1], rows[:, 1:])])
    with zeroed_embedding(subject, only):
        after = torch.cat([x for x, _ in subject.logits(rows[:, :-1], rows[:, 1:])])
    moved = (before != after).any(-1)
    assert not moved[:, :5].any() and moved[:, 5].all()


def test_corruption_begins_clean_rises_and_sums_to_the_measure(subject):
    rates = [0.0, 0.1, 0.3]
    result = evaluation("corruption", rates=rates, tokens=1024)(subject)
    rows = subject.sample("validation", 1024)
    for kind in ("masked", "noisy", "swapped"):
        losses = [row["loss"] for row in result.rows if row["kind"] == kind]
        assert losses[0] < losses[1] < losses[2]
        rise = [loss - losses[0] for loss in losses]
        by_hand = (0.1 * rise[1] / 2 + 0.2 * (rise[1] + rise[2]) / 2) / 0.3
        assert result.summary[f"{kind}_area"] == pytest.approx(by_hand)
        assert losses[0] == subject.loss(rows, every=slice(1, None, 2) if kind == "swapped" else slice(None))
    assert area((0.0, 1.0), [1.0, 3.0]) == 1 and math.isnan(area((0.0, 1.0), [1.0, math.nan]))


def test_corruptions_are_nested_over_rates_and_alike_in_arms(subject, monkeypatch):
    seen = []
    monkeypatch.setattr(type(subject), "loss", lambda self, rows, inputs=None, every=None: seen.append(inputs) or 0.0)
    evaluation("corruption", rates=[0.0, 0.1, 0.3], tokens=1024)(subject)
    clean = subject.sample("validation", 1024)[:, :-1]
    noisy = [x for x in seen if x is not None][:3]
    few, many = (x != clean for x in noisy[1:])
    assert not (noisy[0] != clean).any() and (few & ~many).sum() == 0 and (noisy[1] == noisy[2])[few].all()
    assert few.float().mean() == pytest.approx(0.1, abs=0.03) and many.float().mean() == pytest.approx(0.3, abs=0.05)
    assert (subject.draws("corruption", "noisy").random(9) == subject.draws("corruption", "noisy").random(9)).all()


def test_calibration_of_a_uniform_model_by_hand(subject):
    rows = subject.sample("validation", 256)
    share = (rows[:, 1:] == 0).float().mean().item()
    found = evaluation("calibration")(having(subject, Uniform(256)))
    assert found.summary["error"] == pytest.approx(abs(share - 1 / 256), abs=1e-6)
    assert found.rows == [{"up_to": 1 / 15, "share": 1.0, "confidence": 1 / 256, "accuracy": share}]


def test_the_reliability_table_adds_up_to_torchmetrics_error(subject):
    found = evaluation("calibration")(subject)
    gaps = sum(row["share"] * abs(row["accuracy"] - row["confidence"]) for row in found.rows)
    assert len(found.rows) > 5 and gaps == pytest.approx(found.summary["error"], abs=1e-6)


def test_verbatim_lengths_are_those_of_greedy_decoding(subject):
    asked, rows = Memorization(prefix=4, continuation=6), subject.sample("train", 512)[:, :10]
    expected = []
    for row in rows:
        text, length = row[:4], 0
        for _ in range(6):
            text = torch.cat([text, subject.model(text[None])[0, -1].argmax()[None]])
        while length < 6 and text[4 + length] == row[4 + length]:
            length += 1
        expected.append(length)
    assert asked._runs(subject, rows, 4).tolist() == expected and len(set(expected)) > 2
    result = asked(subject)
    assert result.summary["excess"] == result.summary["train"] - result.summary["validation"]
    assert len(result.rows) == 12 and result.rows[0]["share"] > result.rows[5]["share"] == result.summary["train"]


def test_prefixes_are_of_blocks_the_run_has_been_trained_on(subject):
    few = type(subject)(**{**subject.__dict__, "steps": 2})
    taken = Memorization()._blocks(few, "train")
    order = np.sort(np.concatenate([few.order.indices(0), few.order.indices(1)]))
    tokens = np.asarray(few.packed.train)
    assert taken.tolist() == [tokens[i * 16 : i * 16 + 17].tolist() for i in order]


def test_a_model_that_memorized_the_text_continues_all_of_it(subject):
    text = np.tile(np.arange(5), 200)

    class Cycle(Uniform):
        def forward(self, tokens):
            return F.one_hot((tokens + 1) % 5, self.vocabulary).float()

    packed = type(subject.packed)(**{**subject.packed.__dict__, "train": text, "validation": text[::-1].copy()})
    order = BatchOrder(block_count(text, 16), 8, 0)
    changed = {"model": Cycle(8), "packed": packed, "order": order, "steps": 1}
    found = Memorization()(type(subject)(**{**subject.__dict__, **changed}))
    assert (found.summary["train"], found.summary["validation"], found.summary["excess"]) == (1, 0, 1)
    assert found.summary["train_length"] == 8


@pytest.mark.parametrize("gated", [False, True])
def test_zeroing_all_units_is_a_model_without_mlps(subject, gated, tmp_path):
    if gated:
        words = ["model.gated=true", "budget.tokens=512", "data.batch=2", f"paths.runs={tmp_path}"]
        subject = subject_of(run(checked_config([*TINY, *words])))
    rows, model = subject.sample("validation", 256), subject.model
    before = subject.loss(rows)
    with zeroed_units(model, [np.arange(block.mlp.inner) for block in model.stack]):
        none = subject.loss(rows)
    assert subject.loss(rows) == before
    handles = [b.mlp.register_forward_hook(lambda module, args, out: torch.zeros_like(out)) for b in model.stack]
    assert none == pytest.approx(subject.loss(rows), abs=1e-6) and none != before
    [handle.remove() for handle in handles]


def test_ablated_units_are_nested_and_differ_by_draw_and_layer(subject):
    asked = Units()
    small, large, other = (asked._units(subject, *w) for w in ((0.1, 0), (0.3, 0), (0.3, 1)))
    assert [len(u) for u in small + large] == [6, 6, 19, 19]
    assert all(set(a) <= set(b) for a, b in zip(small, large, strict=True))
    assert set(large[0]) != set(large[1]) and set(large[0]) != set(other[0])


def test_a_unit_that_nothing_reads_costs_nothing(subject):
    kept = [b.mlp.down.weight.detach().clone() for b in subject.model.stack]
    with torch.no_grad():
        [b.mlp.down.weight.zero_() for b in subject.model.stack]
    found = evaluation("units", shares=[0.5])(subject).summary
    with torch.no_grad():
        [b.mlp.down.weight.copy_(w) for b, w in zip(subject.model.stack, kept, strict=True)]
    assert found["rise_50"] == 0


@pytest.mark.parametrize(("diagonal", "largest"), [([1, 3, -2], 3), ([-5, 3, 1], 3), ([-5, -3, -1], -1), ([0, 0], 0)])
def test_power_iteration_finds_the_largest_eigenvalue(diagonal, largest):
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    turn, _ = torch.linalg.qr(torch.randn(len(diagonal), len(diagonal), dtype=torch.float64, generator=gen()))
    value, steps, residual = largest_eigenvalue(
        lambda v: turn @ matrix @ turn.T @ v, torch.ones(len(diagonal), dtype=torch.float64), 500, 1e-12
    )
    assert value == pytest.approx(largest, abs=1e-6) and residual < 1e-4 and steps <= 1000
    assert math.isnan(largest_eigenvalue(lambda v: v * math.nan, torch.ones(3), 9, 0.1)[0])


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_hessian_of_least_squares_is_its_gram_matrix():
    x, y = torch.randn(20, 6, generator=gen()), torch.randn(20, generator=gen(1))
    a, b = torch.nn.Parameter(torch.randn(4, generator=gen(2))), torch.nn.Parameter(torch.randn(2, generator=gen(3)))

    def product(v):
        return hessian_product(0.5 * (x @ torch.cat([a, b]) - y).square().sum(), [a, b], v)

    torch.testing.assert_close(torch.stack([product(e) for e in torch.eye(6)]), x.T @ x)
    assert largest_eigenvalue(product, torch.ones(6), 200, 1e-7)[0] == pytest.approx(
        np.linalg.eigvalsh((x.T @ x).numpy())[-1], rel=1e-4
    )


def test_eigenvalue_of_a_decoder_is_that_of_lanczos(subject):
    asked = evaluation("sharpness", iterations=200, tolerance=1e-5, draws=1)
    found = asked(subject)
    rows, parameters = subject.sample("train", 256), list(subject.model.parameters())
    sizes = [p.numel() for p in parameters]

    def gradient(shift):
        with torch.no_grad():
            [p.add_(d.view_as(p)) for p, d in zip(parameters, shift.split(sizes), strict=True)]
        loss = F.cross_entropy(subject.model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        out = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        with torch.no_grad():
            [p.sub_(d.view_as(p)) for p, d in zip(parameters, shift.split(sizes), strict=True)]
        return out

    subject.model.double()

    def product(v):
        v = torch.from_numpy(v).flatten() * 1e-5
        return ((gradient(v) - gradient(-v)) / 2e-5).numpy()

    try:
        top = eigsh(LinearOperator((sum(sizes), sum(sizes)), product, dtype=np.float64), k=1, which="LA", tol=1e-4)[0][
            0
        ]
    finally:
        subject.model.float()
    assert found.summary["eigenvalue"] == pytest.approx(top, rel=2e-3) and top > 0.1


def test_a_perturbation_is_relative_and_undone_to_the_bit(subject):
    before = {n: p.detach().clone() for n, p in subject.model.named_parameters()}
    with perturbed(subject.model, 0.3, 0, 0):
        for name, p in subject.model.named_parameters():
            moved = (p - before[name]).detach()
            if p.ndim == 1:
                assert not moved.any()
            else:
                torch.testing.assert_close(moved.norm(dim=1), 0.3 * before[name].norm(dim=1), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(p, before[n]) for n, p in subject.model.named_parameters())


@pytest.mark.parametrize(
    ("matrix", "rank"),
    [
        (torch.eye(7), 7),
        (3 * torch.eye(7)[:, :4], 4),
        (torch.outer(torch.arange(1.0, 6), torch.ones(3)), 1),
        (torch.diag(torch.tensor([3.0, 1.0])), math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))),
        (torch.zeros(3, 3), 0),
    ],
)
def test_effective_rank_of_matrices_whose_rank_is_known(matrix, rank):
    assert effective_rank(matrix.double()) == pytest.approx(rank, abs=1e-6)
    assert math.isnan(effective_rank(matrix * math.nan))


def test_angular_distance_of_known_angles():
    a = torch.tensor([1.0, 0.0])
    b = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 5.0], [-1.0, 0.0]])
    assert angular_distance(a, b).tolist() == pytest.approx([0, 0.25, 0.5, 1], abs=1e-6)


def test_streams_are_first_input_and_what_the_head_reads(subject):
    rows, model = subject.sample("validation", 256), subject.model
    with streams(model) as kept, torch.no_grad():
        logits = model(rows[:, :-1])
    assert len(kept) == 3
    embedded = model.embedding(rows[:, :-1]) + model.positions.weight[:16]
    torch.testing.assert_close(kept[0][0], embedded.detach())
    torch.testing.assert_close(model.head(model.final_norm(kept[-1][0])), logits)


def test_tokens_that_are_all_alike_have_no_rank_but_one(subject):
    kept = subject.model.embedding.weight.detach().clone(), subject.model.positions.weight.detach().clone()
    with torch.no_grad():
        subject.model.embedding.weight.copy_(kept[0][:1].expand_as(kept[0]))
        subject.model.positions.weight.zero_()
    first = evaluation("representation")(subject).rows[0]
    with torch.no_grad():
        subject.model.embedding.weight.copy_(kept[0])
        subject.model.positions.weight.copy_(kept[1])
    assert first["rank_uncentered"] == pytest.approx(1, abs=1e-3) and first["residual"] < 1e-6


# --- as a whole ------------------------------------------------------------------------------------------------------


def test_every_evaluation_leaves_weights_and_generator(subject):
    before, state = weights_hash(subject.model), torch.get_rng_state()
    for node in nodes(*NAMES).values():
        build(node)(subject)
    assert weights_hash(subject.model) == before and torch.equal(torch.get_rng_state(), state)


OTHER = {"tokens": 512, "split": "validation", "corpora": ["bible"], "rates": [0.0, 0.5], "bins": 4, "prefix": 3}
OTHER |= {"continuation": 2, "prefixes": 9, "shares": [0.4], "draws": 2, "iterations": 2, "tolerance": 10.0}
OTHER |= {"radius": 0.5}


@pytest.mark.parametrize("name", NAMES)
def test_every_evaluation_argument_is_in_yaml_and_counts(subject, name):
    node = nodes(name)[name]
    base = build(node)(subject)
    assert set(node) - {"_target_"} == set(parameters_of(node["_target_"]))
    for key in set(node) - {"_target_"}:
        other = build({**node, key: OTHER[key]})(subject)
        assert (other.rows, other.summary) != (base.rows, base.summary), key


def test_a_finished_run_gets_a_missing_evaluation(finished):
    folder, words = (
        Path(finished["folder"]),
        [*TINY, "optimizer.lr=1e-2", f"paths.runs={Path(finished['folder']).parents[1]}"],
    )
    files = {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file() and f.name != "lock"}
    again = run(checked_config([*words, "evaluation=[corruption,representation]", "evaluation.corruption.tokens=256"]))
    assert again["found"] and set(again["evaluations"]) == {"corruption", "representation"}
    assert all(f.stat().st_mtime_ns == at for f, at in files.items())
    entry = read_evaluations(folder)["corruption"]
    assert entry["weights"] == "last" and entry["weights_hash"] == finished["proof"]["final_weights"]
    assert entry["settings"] == {"rates": [0.0, 0.02, 0.05, 0.1, 0.2, 0.3], "tokens": 256}

    kept = (folder / "evaluations.json").stat().st_mtime_ns
    assert evaluate_run(folder, nodes("corruption"), "last")
    assert (folder / "evaluations.json").stat().st_mtime_ns == kept  # done already
    for change in ([512, "last", False], [512, "last", True], [512, "best", False]):
        tokens, weights, force = change
        evaluate_run(folder, nodes("corruption", tokens=tokens), weights, force)
        assert (folder / "evaluations.json").stat().st_mtime_ns > kept, change
        kept = (folder / "evaluations.json").stat().st_mtime_ns
    assert read_evaluations(folder)["corruption"]["weights"] == "best"
    assert run(checked_config([*words, "evaluation=standard"])).get("evaluations") is None


def test_tables_hold_each_run_s_evaluations(finished):
    root = Path(finished["folder"]).parents[1]
    evaluate_run(Path(finished["folder"]), nodes("units"), "last")
    runs = load_runs(root)
    rows = runs.evaluation("units")
    assert list(rows)[:6] == ["arm", "setting", "seed", "weights", "share", "draw"] and len(rows) == 18
    mean = rows[rows["share"] == 0.3]["rise"].mean()
    assert runs.summary.iloc[0]["units.rise_30"] == pytest.approx(mean)
    with pytest.raises(ConfigError, match="No run here has the evaluation unit: they have .*units"):
        runs.evaluation("unit")


def test_a_run_that_is_not_finite_is_evaluated_and_says_so(tmp_path, monkeypatch):
    record = run(checked_config([*TINY, "optimizer=sgd", "optimizer.lr=1e9", "clip=none", f"paths.runs={tmp_path}"]))
    assert record["status"] == "diverged"
    found = evaluate_run(Path(record["folder"]), nodes(*NAMES), "last")
    wanted = {"clean.val_loss", "corruption.noisy_area", "calibration.error", "memorization.excess", "units.rise_10"}
    wanted |= {"sharpness.eigenvalue", "sharpness.rise", "representation.rank_last", "representation.angle_mean"}
    for name, figure in (w.split(".") for w in wanted):
        assert math.isnan(found[name]["summary"][figure]), (name, figure)
    text = (Path(record["folder"]) / "evaluations.json").read_text()
    assert '"error": "NaN"' in text and "NaN," not in text.replace('"NaN",', "")
    json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert math.isnan(load_runs(tmp_path).summary.iloc[0]["calibration.error"])


def test_words_for_what_json_has_no_number_for(tmp_path):
    entry = {"rows": [{"x": math.inf, "y": "text"}], "summary": {"a": math.nan, "b": -math.inf}, "settings": {}}
    write_evaluations(tmp_path, {"some": {**entry, "weights": "last", "weights_hash": "0"}})
    back = read_evaluations(tmp_path)["some"]
    assert back["rows"] == entry["rows"] and math.isnan(back["summary"]["a"]) and back["summary"]["b"] == -math.inf


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(finished, tmp_path):
    """A run of its own to spoil: its folder."""
    import shutil

    target = tmp_path / "runs" / finished["setting"] / "seed0"
    shutil.copytree(finished["folder"], target)
    (target / "evaluations.json").unlink(missing_ok=True)
    return target


def rewrite(folder, change):
    record = json.loads((folder / "record.json").read_text())
    change(record)
    record.pop("checksums")  # an edit that is meant
    (folder / "record.json").write_text(json.dumps(record))


SPOILED = {
    "only a finished or diverged run is": lambda f: rewrite(f, lambda r: r.update(status="stopped")),
    "record.json cannot be read": lambda f: (f / "record.json").write_text("{"),
    "last.ckpt does not exist: take the other weights": lambda f: (f / "checkpoints" / "last.ckpt").unlink(),
    "last.ckpt cannot be read": lambda f: (f / "checkpoints" / "last.ckpt").write_bytes(b"PK torn"),
    "evaluations.json cannot be read": lambda f: (f / "evaluations.json").write_text('{"units": {"rows": []}}'),
    "does not fit the model": lambda f: rewrite(f, lambda r: r["config"]["model"].update(width=32)),
    "is no longer the one": lambda f: rewrite(f, lambda r: r["config"]["data"].update(language=1)),
}


@pytest.mark.parametrize("says", SPOILED)
def test_a_refused_evaluation_is_one_sentence_and_exit_code_2(copy, capsys, says):
    SPOILED[says](copy)
    assert main(["evaluate", str(copy), "units", "units.tokens=64"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["unit"], "evaluation=unit is not an option: evaluation is one of units"),
        (["units", "units.draw=2"], "evaluation.units.draw=2 is unknown"),
        (["units", "corruption.tokens=2"], "evaluation=corruption asks for"),
        (["units", "units.shares=[0.1,0.1]"], "given once"),
        (["corruption", "corruption.rates=[0.1,0.2]"], "start at 0 and rise"),
        (["memorization", "memorization.prefix=10"], "do not fit"),
    ],
)
def test_what_cannot_be_asked_for_is_one_sentence(copy, capsys, words, says):
    assert main(["evaluate", str(copy), *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_in_a_folder_unfinished_runs_are_named_others_done(copy, capsys):
    import shutil

    other = copy.parent / "seed1"
    shutil.copytree(copy, other)
    rewrite(other, lambda record: record.update(status="stopped", seed=1))
    assert main(["evaluate", str(copy.parents[1]), "units", "units.tokens=64"]) == 0
    said = capsys.readouterr().out
    assert f"{other} is stopped, not evaluated" in said and "units.rise_30" in said
    assert (copy / "evaluations.json").exists() and not (other / "evaluations.json").exists()


def test_evaluations_stay_out_of_the_identity(finished):
    names = [identity(compose([*TINY, *words]), "text").run for words in ([], ["evaluation=all"], ["evaluation=units"])]
    assert len(set(names)) == 1
    with pytest.raises(ConfigError, match="weights=best would do nothing"):
        compose(["evaluation.weights=best"])
