"""Clipping rules that look at tensors, blocks or their own past: against other packages, formulas by hand, resume."""

import copy
import math
import signal

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from forking import Ambush, Child, forked, nano, outcome, rows, train, write_text
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn

from albert_ablate import build_model, compose
from albert_ablate.config import checked_config
from albert_ablate.model.build import build
from albert_ablate.model.decoder import Decoder
from albert_ablate.optim.clipping import AdaGC, AutoClip, ClipPerLayer, SkipStep, ZClip, global_norm
from albert_ablate.training.checkpoint import load_checkpoint
from albert_ablate.training.module import LanguageModel
from albert_ablate.training.run import run

NORMS = [1.0, 1.2, 0.9, 1.1, 1.0, 5.0, 1.1, 0.8, 30.0, 1.0, 1.3, 0.7, 2.5, 1.0]  # of the gradient, step by step


class Toy:
    """Two tensors whose gradients together have the norm of each step; the same numbers each time."""

    def __init__(self):
        self.a, self.b = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4))
        self.named = [("a", self.a), ("b", self.b)]
        self.generator = torch.Generator().manual_seed(0)

    def parameters(self):
        return iter([self.a, self.b])

    def modules(self):
        return iter(())

    def gradients(self, norm):
        draws = [torch.randn(p.shape, generator=self.generator) for p in (self.a, self.b)]
        total = torch.cat([d.flatten() for d in draws]).norm()
        for p, d in zip((self.a, self.b), draws, strict=True):
            p.grad = d * norm / total

    def norms(self):
        return [p.grad.norm().item() for p in (self.a, self.b)]

    def clip(self, rule, loss=None):
        norm, _ = global_norm([p.grad for p in (self.a, self.b) if p.grad is not None])
        return float(rule(self.named, norm, None if loss is None else torch.tensor(loss)))


def after_each(rule, norms=NORMS):
    """(global norm after clipping, share) of every step."""
    toy, out = Toy(), []
    for norm in norms:
        toy.gradients(norm)
        share = toy.clip(rule)
        out.append((math.hypot(*toy.norms()), share))
    return np.array(out)


# --- per layer --------------------------------------------------------------------------------------------------------


def test_per_layer_clips_each_tensor_by_itself():
    toy = Toy()
    toy.gradients(2.0)
    before = [p.grad.clone() for p in toy.parameters()]
    share = toy.clip(ClipPerLayer(1.2, "tensor"))
    for p, g in zip(toy.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, g * min(1.0, 1.2 / (g.norm().item() + 1e-6)))
    assert share == np.mean([g.norm().item() > 1.2 for g in before]) == 0.5


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_per_layer_clips_each_block_by_torchs_rule(scale):
    model = build_model(checked_config(["model=nano", "model.layers=3"]))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape, generator=generator)
    theirs = copy.deepcopy(model)
    for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
        other.grad = ours.grad.clone()
    named = list(model.named_parameters())
    share = ClipPerLayer(1.0, "block")(named, global_norm([p.grad for _, p in named])[0])
    parts = [*theirs.blocks, theirs.embedding, theirs.positions, theirs.final_norm, theirs.head]
    clipped = [nn.utils.clip_grad_norm_(part.parameters(), 1.0) > 1 for part in parts if part is not None]
    assert float(share) == pytest.approx(np.mean(clipped))
    for (name, ours), other in zip(named, theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, msg=name)


# --- global rules with a memory ---------------------------------------------------------------------------------------


def test_autoclip_clips_at_the_percentile_of_norms_so_far():
    got = after_each(AutoClip(quantile=0.4, history=5))
    expected = [min(x, np.percentile(NORMS[max(0, i - 4) : i + 1], 40)) for i, x in enumerate(NORMS)]
    np.testing.assert_allclose(got[:, 0], expected, rtol=2e-6)
    np.testing.assert_array_equal(got[:, 1], np.array(expected) < np.array(NORMS) * (1 - 1e-6))
    assert 0 < got[:, 1].mean() < 1


def test_autoclips_threshold_is_the_packages_a_step_later():
    """The package leaves the present norm out of its history: its threshold is ours of the step before."""
    autoclip = pytest.importorskip("autoclip.torch", reason="the package autoclip is not installed")
    toy = Toy()
    theirs = autoclip.QuantileClip(toy.parameters(), quantile=0.4, history_length=1000, global_threshold=True)
    rule, thresholds = AutoClip(quantile=0.4), []
    for norm in NORMS:
        toy.gradients(norm)
        rule([], torch.tensor(norm))
        thresholds.append(torch.tensor(rule.norms).quantile(0.4).item())
        before = thresholds[-2] if len(thresholds) > 1 else math.inf
        theirs.step()
        assert math.hypot(*toy.norms()) == pytest.approx(min(norm, before), rel=1e-5)


def zclip_by_hand(norms, alpha, threshold, max_norm, warmup):
    mean, variance, out = 0.0, 0.0, []
    for i, x in enumerate(norms):
        if i < warmup:
            out.append(min(x, max_norm))
            mean, variance = np.mean(norms[: i + 1]), np.var(norms[: i + 1])
            continue
        z = (x - mean) / (variance**0.5 + 1e-6)
        if z > threshold:
            x = mean + threshold**2 * variance**0.5 / z
        out.append(min(x, max_norm))
        mean = alpha * mean + (1 - alpha) * x
        variance = alpha * variance + (1 - alpha) * (x - mean) ** 2
    return out


@pytest.mark.parametrize("max_norm", [1.05, 100.0])
def test_zclip_is_the_formula_s_and_the_authors_package_s(max_norm):
    settings = {"alpha": 0.9, "max_norm": max_norm}
    got = after_each(ZClip(**settings, threshold=1.5, warmup=5))
    np.testing.assert_allclose(got[:, 0], zclip_by_hand(NORMS, threshold=1.5, warmup=5, **settings), rtol=1e-5)
    assert got[5, 1] == got[8, 1] == 1 and 0 < got[:, 1].mean() < 1
    zclip = pytest.importorskip("zclip", reason="the package zclip is not installed")
    theirs = zclip.ZClip(alpha=0.9, z_thresh=1.5, max_grad_norm=max_norm, warmup_steps=5)
    toy = Toy()
    for norm, ours in zip(NORMS, got[:, 0], strict=True):
        toy.gradients(norm)
        theirs.step(toy)
        assert math.hypot(*toy.norms()) == pytest.approx(ours, rel=1e-5)


def test_zclip_leaves_a_gradient_that_it_does_not_clip_as_it_is():
    toy, rule = Toy(), ZClip(warmup=3, max_norm=100.0)
    for norm in [1e-4, 1.2e-4, 0.9e-4, 1.1e-4, 0.5e-4]:
        toy.gradients(norm)
        before = [p.grad.clone() for p in toy.parameters()]
        assert toy.clip(rule) == 0
        assert all(torch.equal(p.grad, b) for p, b in zip(toy.parameters(), before, strict=True))


def test_adagc_before_adam_is_pytorch_optimizer_s_adagc():
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="the extra `optim` is not installed")
    ours, theirs, rule = Toy(), Toy(), AdaGC(relative=1.05, absolute=1.0, beta=0.9, warmup=4)
    adam = torch.optim.AdamW(ours.parameters(), lr=0.1, weight_decay=0.1)
    other = pytorch_optimizer.AdaGC(theirs.parameters(), lr=0.1, weight_decay=0.1, beta=0.9, warmup_steps=4)
    shares = []
    for norm in NORMS:
        ours.gradients(norm)
        theirs.gradients(norm)
        shares.append(ours.clip(rule))
        adam.step()
        other.step()
        torch.testing.assert_close(ours.a, theirs.a)
        torch.testing.assert_close(ours.b, theirs.b)
    assert set(shares) == {0.0, 0.5, 1.0}


def test_adagc_bounds_a_tensor_by_its_own_past():
    toy, rule = Toy(), AdaGC(relative=1.5, absolute=1e9, beta=0.5, warmup=2)
    toy.gradients(1.0)
    toy.b.grad = None
    gamma = toy.a.grad.norm().item()
    assert toy.clip(rule) == 0
    toy.gradients(1.0)
    toy.a.grad *= 4 * gamma / toy.a.grad.norm()
    first = toy.b.grad.norm().item()
    assert toy.clip(rule) == 0.5
    assert toy.norms() == pytest.approx([1.5 * gamma, first])
    assert rule.gamma.tolist() == pytest.approx([(gamma + 1.5 * gamma) / 2, first])


def test_adagc_does_not_freeze_a_tensor_with_zero_gradient():
    """As ReZero's matrices have none while their gate is 0: the least norm so far says nothing then."""
    toy, rule, seen = Toy(), AdaGC(relative=1.5, absolute=1e9, beta=0.5, warmup=4), []
    for step in range(3):
        toy.gradients(1.0)
        if step < 2:
            toy.a.grad.zero_()
        seen.append(toy.norms()[0])
        assert toy.clip(rule) == 0
    assert seen[:2] == [0, 0] and rule.gamma[0].item() == pytest.approx(seen[2], rel=1e-6)
    toy.gradients(1.0)
    toy.a.grad *= 4 * seen[2] / toy.a.grad.norm()
    toy.clip(rule)
    assert toy.norms()[0] == pytest.approx(1.5 * seen[2], rel=1e-6)


@pytest.mark.parametrize("norm", ["rezero", "skipinit", "fixup"])
def test_matrices_without_first_gradient_train_under_adagc(norm):
    cfg = checked_config(["model=nano", "model.layers=2", f"norm={norm}", "clip=adagc", "clip.warmup=5"])
    model = build_model(cfg)
    rule, named = build(cfg["clip"]), list(model.named_parameters())
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    rows = torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(0))
    least = {name: math.inf for name, _ in named}  # norm of each that was not 0 in the warm-up
    for step in range(9):
        adam.zero_grad()
        nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        before = {name: p.grad.norm().item() for name, p in named}
        rule(named, global_norm([p.grad for _, p in named])[0])
        after = {name: p.grad.norm().item() for name, p in named}
        if step < 4:
            least |= {name: min(x, least[name]) for name, x in after.items() if x}
        assert all(after[name] >= 0.99 * min(before[name], least[name]) for name in least)
        adam.step()


def olmo_skips(history, sigma, window):
    """OLMo-core's rule on (loss, norm) pairs, written out in numpy: whether the last is skipped."""
    kept = np.array(history[-window - 1 :])
    if len(kept) < max(20, window // 2):
        return False
    past, last = kept[:-1], kept[-1]
    return bool(((last - past.mean(0)) / past.std(0, ddof=1) > sigma).any())


def test_skip_step_is_olmo_core_s_rule():
    rng = np.random.default_rng(0)
    pairs = rng.normal([3.0, 1.0], [0.1, 0.2], (160, 2))
    pairs[[10, 45, 90], 1] = 9.0  # by the norm; the first is too early
    pairs[120, 0] = 12.0  # by the loss
    pairs[140, 0] = -4.0  # an unusually small one is no spike
    rule, toy, got = SkipStep(sigma=4.0, window=40, after=20), Toy(), []
    for loss, norm in pairs:
        toy.gradients(norm)
        got.append(bool(toy.clip(rule, float(loss))))
        assert all((p.grad is None) == got[-1] for p in toy.parameters())
    expected = [olmo_skips(pairs[: i + 1].tolist(), 4.0, 40) for i in range(len(pairs))]
    assert got == expected and [i for i, x in enumerate(got) if x] == [45, 90, 120]


RULES = {
    "autoclip": lambda: AutoClip(0.5, 6),
    "zclip": lambda: ZClip(warmup=3, threshold=1.0),
    "adagc": lambda: AdaGC(warmup=3, beta=0.5),
    "skip_step": lambda: SkipStep(sigma=2.0, window=6, after=3),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("stop", [1, 7])
def test_a_rule_goes_on_from_a_checkpoint_bit_for_bit(name, stop, tmp_path):
    def clipped(toy, rule, norms):
        out = []
        for norm in norms:
            toy.gradients(norm)
            share = toy.clip(rule, norm / 2)
            out.append((share, *[None if p.grad is None else p.grad.tolist() for p in toy.parameters()]))
        return out

    whole = clipped(Toy(), RULES[name](), NORMS)
    toy, first = Toy(), RULES[name]()
    begun = clipped(toy, first, NORMS[:stop])
    torch.save(first.state_dict(), tmp_path / "rule.ckpt")
    second = RULES[name]()
    second.load_state_dict(load_checkpoint(tmp_path / "rule.ckpt"))
    assert begun + clipped(toy, second, NORMS[stop:]) == whole
    assert len({share for share, *_ in whole}) > 1


@pytest.mark.parametrize("name", RULES)
def test_a_norm_that_is_not_finite_is_not_remembered(name):
    rule, toy = RULES[name](), Toy()
    for norm in (1.0, 1.1, 0.9, 1.0):
        toy.gradients(norm)
        toy.clip(rule, 1.0)
    before = copy.deepcopy(rule.state_dict())
    toy.gradients(math.inf)
    toy.clip(rule, math.nan)
    for key, value in rule.state_dict().items():
        torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(before[key]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["per_layer", *RULES])
def test_a_parameter_without_a_gradient_is_passed_over(name):
    toy = Toy()
    rule = RULES.get(name, lambda: ClipPerLayer(0.1, "block"))()
    for norm in NORMS:
        toy.gradients(norm)
        toy.b.grad = None
        toy.clip(rule, 1.0)
        assert toy.b.grad is None


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


SKIPPING = ["clip=skip_step", "clip.after=4", "clip.window=8", "clip.sigma=1.5"]


@pytest.mark.process
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "soap"])
def test_a_skipped_step_moves_nothing_and_the_schedule_goes_on(optimizer, text, tmp_path):
    def watched():
        seen, plain = [], LanguageModel.optimizer_step

        def step(self, epoch, batch_idx, optimizer, closure=None):
            held = (self.model, self.trainer.optimizers[0])
            before = copy.deepcopy([x.state_dict() for x in held])
            plain(self, epoch, batch_idx, optimizer, closure)
            seen.append((float(self.watch.clipped), equal(before, [x.state_dict() for x in held])))

        LanguageModel.optimizer_step = step
        Decoder.after_step = lambda self: self.head.weight.data.mul_(0.999)  # nor is that to happen
        cfg = nano(text, tmp_path, f"optimizer={optimizer}", "optimizer.lr=0.01", "norm=rezero", *SKIPPING)
        return seen, run(cfg)

    seen, record = forked(watched)
    history = rows(record["folder"], "steps").to_pydict()
    assert history["clipped"] == [share for share, _ in seen]
    assert len(seen) == 32 and set(history["clipped"]) == {0.0, 1.0}
    assert all(same == bool(share) for share, same in seen)
    model_rows = rows(record["folder"], "layers").to_pydict()
    norms = zip(model_rows["sublayer"], model_rows["grad_norm"], strict=True)  # ReZero's gate counts in attention
    assert all(x > 0 for name, x in norms if name == "attention") and all(x > 0 for x in history["grad_norm"])
    plain = outcome(train(nano(text, tmp_path / "plain", "optimizer.lr=0.01"))["folder"])["rows"]["steps"]
    assert history["lr"] == [row["lr"] for row in plain]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.process
@pytest.mark.parametrize(
    "options",
    [
        ["clip=adagc", "clip.warmup=6", "optimizer=schedule_free", "schedule=constant", "optimizer.lr=0.01"],
        [*SKIPPING, "optimizer=sophia", "optimizer.interval=3", "optimizer.rho=1e3", "data.accumulate=2"],
    ],
    ids=["adagc schedule_free", "skip_step sophia"],
)
def test_a_resumed_run_remembers_clipping_and_optimizer(options, text, tmp_path):
    whole = outcome(train(nano(text, tmp_path / "whole", *options))["folder"])
    cfg = nano(text, tmp_path / "parts", *options)

    def ambushed(at):
        Ambush(at).set()
        return run(cfg)

    kills = [Child(lambda at=at: ambushed(at)).wait() == ("killed", signal.SIGKILL) for at in (200, 150)]
    record = train(cfg)
    assert all(kills) and record["sessions"] == 3 and outcome(record["folder"]) == whole
    assert len({row["clipped"] for row in whole["rows"]["steps"]}) > 1


def test_a_gradient_clip_val_on_the_trainer_is_refused():
    cfg = checked_config(["model=nano", "model.layers=1"])
    module = LanguageModel(build_model(cfg), cfg, 1)
    trainer = pl.Trainer(accelerator="cpu", gradient_clip_val=1.0, logger=False, enable_checkpointing=False)
    module.trainer = trainer
    with pytest.raises(
        ValueError, match="gradient_clip_val=1.0 on the Trainer would be ignored: clipping is chosen by"
    ):
        module.on_fit_start()


class Norms(pl.Callback):
    """(gradient norm, after clipping) of each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self.seen.append((float(module.watch.grad_norm), float(module.watch.grad_norm_clipped)))


def test_clipping_sees_accumulated_unscaled_gradients():
    """The scaler stands in for a GPU's: with it, gradients are 2^12 times too large until the step."""
    found, weights = [], []
    for precision, scale in (("32-true", None), ("16-mixed", 2.0**12)):
        more = ("model.width=16", "model.context=16", "data.accumulate=2", "clip.max_norm=0.2", "schedule=constant")
        cfg = checked_config(["model=nano", "model.layers=1", "clip=norm", "trainer=gpu", *more,
                             f"trainer.precision={precision}", "diagnostics.every=0"])  # fmt: skip
        module, norms = LanguageModel(build_model(cfg), cfg, 3), Norms()
        plugins = [MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu", init_scale=scale))] if scale else []
        quiet = {k: False for k in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
        trainer = pl.Trainer(accelerator="cpu", max_steps=3, accumulate_grad_batches=2, plugins=plugins,
                             callbacks=[norms], **quiet)  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randint(0, 256, (2, 17), generator=generator) for _ in range(6)]
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        found.append(norms.seen)
        weights.append(torch.cat([p.detach().flatten() for p in module.model.parameters()]))
    full, half = map(np.array, found)
    np.testing.assert_allclose(half, full, rtol=5e-3)
    assert len(half) == 3 and (half[:, 0] > 0.25).all() and half[:, 1] == pytest.approx(0.2, rel=1e-4)
    assert (weights[0] - weights[1]).norm() < 0.01 * weights[0].norm()


def test_every_rule_on_disk_is_a_clip_and_says_what_it_remembers():
    from albert_ablate.config import options
    from albert_ablate.optim.clipping import Clip

    for name in options()["clip"]:
        rule = build(compose([f"clip={name}"])["clip"])
        assert isinstance(rule, Clip) and set(rule.state_dict()) == set(rule.remembered)
