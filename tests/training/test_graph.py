"""Replayed steps: with operations recorded on the CPU in place of CUDA graphs a run gives the same bits as without."""

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import replaying
import torch
from factories import TINY
from forking import forked, killed_and_gone_on, nano, outcome, train

from albert_ablate import build_model
from albert_ablate.config import ConfigError, check, checked_config, construct, graph_obstacle, identity, keys_of
from albert_ablate.config.folders import options
from albert_ablate.model.loss import objective
from albert_ablate.optim.groups import decay_groups
from albert_ablate.training import graph, module, prepare
from albert_ablate.training.run import run

DROPPED = ("dropout=depth_decay", "dropout.mean=0.2")
SITES = "dropout.sites=[embedding,token,head,residual,hidden,drop_path]"
RUNS = {
    "plain": [],
    "masks": [*DROPPED, SITES, "dropout_time=late", "data.accumulate=2", "clip=agc", "norm=rezero"],
    "recomputed": [*DROPPED, "trainer.gradient_checkpointing=true", "data.accumulate=4", "loss.z_loss=1e-3"],
    "bf16": [*DROPPED, "trainer.precision=bf16-mixed", "++model.tied=true", "clip=skip_step"],
    "half": [*DROPPED, "trainer.precision=bf16-true", "attention=rotary", "dropout_time=linear"],
    "double": [*DROPPED, "trainer.precision=64-true", "norm=ngpt", "attention=rotary", "optimizer.weight_decay=0"],
    "averages": ["optimizer=schedule_free", "schedule=constant", "++model.shared=true", "norm=sandwich_ln"],
}


@pytest.fixture
def replayed(monkeypatch):
    """Steps of trainer.graph=auto are replayed on the CPU."""
    monkeypatch.setattr(graph, "recorded", replaying.recorded)
    monkeypatch.setattr(module, "uses_graph", lambda cfg: bool(cfg.trainer.graph))


def pair(text, folder, more):
    return (
        nano(text, folder / name, *more, f"trainer.graph={name}", "optimizer.lr=0.03") for name in ("false", "auto")
    )


def compared(found):
    """All but where operations are counted from: the identity differs."""
    return {key: found[key] for key in ("status", "weights", "rows", "summary", "proof")}


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_replayed_run_gives_the_same_bits(name, text, tmp_path, replayed):
    eager, graphed = (compared(outcome(train(cfg)["folder"])) for cfg in pair(text, tmp_path, RUNS[name]))
    assert graphed == eager


@pytest.mark.process
def test_a_replayed_run_goes_on_after_a_kill(text, tmp_path, replayed):
    eager, graphed = pair(text, tmp_path, [*RUNS["masks"], "budget.tokens=2048"])
    assert compared(outcome(killed_and_gone_on(graphed, 120)["folder"])) == compared(outcome(train(eager)["folder"]))


def test_most_steps_are_replayed(text, tmp_path, replayed, monkeypatch):
    taken = []
    monkeypatch.setattr(graph.GraphedPass, "__call__", lambda self, rows: taken.append(rows) or 1 / 0)
    _, graphed = pair(text, tmp_path, [])
    with pytest.raises(Exception, match="division by zero"):
        run(graphed)
    assert len(taken) == 1, "the first step that is not measured by block"


@pytest.mark.process
def test_nothing_of_ordinary_steps_is_left_when_recording(text, tmp_path, replayed, monkeypatch):
    """A node of autograd that were still alive would belong to their stream, which a recording cannot wait for."""

    class Mark:
        pass

    marks, backward = [], module.LanguageModel.backward

    def marked(self, loss, *args, **more):
        for p in self.model.parameters() if loss.requires_grad else ():
            node, mark = p.view_as(p).grad_fn.next_functions[0][0], Mark()
            node.metadata["mark"] = mark
            marks.append(weakref.ref(mark))
            assert mark is node.metadata["mark"]
        return backward(self, loss, *args, **more)

    def stopped(self, rows):
        raise ValueError(f"{len(marks) > 20}, {sum(mark() is not None for mark in marks)} are alive")

    monkeypatch.setattr(module.LanguageModel, "backward", marked)
    monkeypatch.setattr(graph.GraphedPass, "__call__", stopped)
    _, graphed = pair(text, tmp_path, RUNS["recomputed"])
    with pytest.raises(Exception, match="True, 0 are alive"):
        forked(lambda: run(graphed))


# --- one pass --------------------------------------------------------------------------------------------------------


def passes(monkeypatch, *more, steps=3):
    """Losses and gradients of `steps` passes, eager and replayed; the operations that were recorded."""
    monkeypatch.setattr(graph, "recorded", replaying.recorded)
    cfg = checked_config([*TINY, *more])
    models = [build_model(cfg).train() for _ in range(2)]
    loss, graphed, found = construct(cfg.loss), None, []
    for step in range(steps):
        rows = torch.randint(0, 256, (2, cfg.model.context + 1), generator=torch.Generator().manual_seed(step))
        for model in models:
            model.clock.set(step, 0, step, steps)
            model.zero_grad()
        total, plain = objective(loss, models[0], rows)
        total.backward()
        graphed = graphed or graph.GraphedPass(models[1], loss, rows, 1)
        again, _ = graphed(rows)
        graphed.hand_over(first=True)
        found.append((plain.detach(), again, [[p.grad.clone() for p in model.parameters()] for model in models]))
        with torch.no_grad():
            for model in models:
                for p in model.parameters():
                    p.add_(p.grad, alpha=-0.5)
                model.after_step()
    return found


def configurations():
    needs = {"ngpt": ["attention=rotary", "optimizer.weight_decay=0"], "mix_ln": ["model.layers=4"]}
    known = options()
    for group in ("norm", "norm_type", "attention", "dropout", "loss"):
        for name in known[group]:
            more = needs.get(name, []) if group == "norm" else ["dropout=uniform"] if name == "r_drop" else []
            yield [f"{group}={name}", *more]
    yield from (["model.gated=true"], ["model.sigma_reparam=true"], ["attention.softcap=2"], ["attention.window=4"])
    yield from (["attention.kv_heads=1"], ["dropout=uniform", SITES], ["model.tied=true"], ["model.shared=true"])


@pytest.mark.filterwarnings("ignore:norm=")
@pytest.mark.parametrize("more", configurations(), ids=" ".join)
def test_a_replayed_pass_gives_the_same_bits(more, monkeypatch):
    cfg = checked_config([*TINY, *more])
    if cfg.norm_type.get("_target_", "").rpartition(".")[2] in ("batch_norm", "power_norm"):
        assert "keeps statistics" in graph_obstacle(check({**cfg, "trainer": {**cfg.trainer, "accelerator": "auto"}}))
        return
    for plain, again, gradients in passes(monkeypatch, *more):
        assert torch.equal(plain, again)
        assert all(torch.equal(g, h) for g, h in zip(*gradients, strict=True))


def test_a_rate_that_the_recording_fixed_would_be_found(monkeypatch):
    """The stand-in keeps what was read from Python while it recorded, as a CUDA graph does."""
    monkeypatch.setattr(graph.Masks, "draw", lambda self: None)
    found = passes(monkeypatch, *DROPPED)
    assert not torch.equal(*found[0][:2])


def test_what_a_recording_cannot_hold_is_refused():
    x = torch.ones(3)
    for work in (lambda: x.sum().item(), lambda: torch.rand(2), lambda: x[x > 0], lambda: torch.tensor(2.0) * x):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            replaying.recorded(work)


@pytest.mark.parametrize("name", options()["optimizer"])
def test_an_optimizer_leaves_weights_where_they_lie(name):
    """A graph reads them there."""
    from albert_ablate.model.build import build

    more = ["schedule=constant"] if name == "schedule_free" else []
    cfg = checked_config([*TINY, f"optimizer={name}", *more])
    model = build_model(cfg)
    optimizer, before = build(cfg.optimizer, decay_groups(model), True), [p.data_ptr() for p in model.parameters()]
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        model.after_step()
    assert [p.data_ptr() for p in model.parameters()] == before


@pytest.fixture
def cuda(monkeypatch):
    """In place of torch.cuda: notes what is asked of it; `fails` makes a recording fail."""
    log, streams = [], ["usual"]

    class Stream:
        def wait_stream(self, other):
            log.append(f"{'side' if self is not usual else 'usual'} waits")

    usual = Stream()

    @contextmanager
    def on(stream):
        streams.append("usual" if stream is usual else "side")
        yield
        streams.pop()

    @contextmanager
    def recording(graph, stream):
        with on(stream):
            log.append("record")
            yield
            if fake.fails:
                raise RuntimeError("operation not permitted")

    fake = SimpleNamespace(
        Stream=Stream,
        current_stream=lambda: usual,
        stream=on,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: log.append("replay")),
        graph=recording,
        fails=False,
    )
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    fake.log, fake.work = log, lambda: log.append(f"work on {streams[-1]}")
    return fake


def test_a_pass_is_warmed_up_and_recorded_on_one_stream(cuda):
    replay = graph.recorded(cuda.work)
    replay()
    assert cuda.log == ["side waits", *["work on side"] * 3, "record", "work on side", "replay"]


def test_a_failed_recording_says_what_goes_without(cuda):
    cuda.fails = True
    with pytest.raises(RuntimeError, match="operation not permitted.: trainer.graph=false goes without"):
        graph.recorded(cuda.work)


# --- who may ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["trainer=cpu"], "it needs a CUDA GPU"),
        (["trainer=ddp", "trainer.devices=2"], "several devices"),
        (["trainer.precision=16-mixed"], "whose loss scale changes"),
        (["task=classify", "task.data=topic"], "it is for language models"),
        (["dropout=uniform", "dropout.sites=[attention]"], "whose masks torch's kernel draws"),
        (["dropout=uniform", "dropout.sites=[layer_drop]"], "skipped blocks"),
        (["attention.qk_clip=100"], "the largest logits of a step"),
        (["norm_type=batch_norm"], "which keeps statistics"),
        (["optimizer=sophia"], "which asks for the logits"),
    ],
)
def test_what_cannot_be_replayed_is_refused(more, words):
    with pytest.raises(ConfigError, match=words):
        checked_config(["trainer=auto", *more, "trainer.graph=true"])
    cfg = checked_config(["trainer=auto", *more, "trainer.graph=auto"])
    assert words in graph_obstacle(cfg) and not graph.uses_graph(cfg)


def test_without_a_gpu_one_sentence_says_so(text, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = nano(text, tmp_path, "trainer=auto", "trainer.graph=true")
    with pytest.raises(ConfigError, match="trainer.graph=true is not allowed here: torch finds no CUDA GPU"):
        prepare.check_machine(prepare.prepare(cfg))
    assert not graph.uses_graph(check({**cfg, "trainer": {**cfg.trainer, "graph": "auto"}}))


def test_identity_knows_a_graph_unless_it_is_false():
    plain, asked, auto = (
        checked_config([*TINY, "trainer=auto", f"trainer.graph={g}"]) for g in ("false", "true", "auto")
    )
    before = {**plain, "trainer": {k: v for k, v in plain.trainer.items() if k != "graph"}}
    assert identity(check(before), "text") == identity(plain, "text") and keys_of(before) == keys_of(plain)
    assert len({identity(cfg, "text").setting for cfg in (plain, asked, auto)}) == 3
