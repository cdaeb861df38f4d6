"""One contract per kind, run on every option found in conf/: it builds, it trains, and each of its numbers counts.

A new option is picked up from disk. What an option cannot promise stands in EXCEPTIONS with its reason.
"""

import copy
import math
import tempfile
from contextlib import nullcontext
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from checkpoints import gpt2
from factories import SMALL
from omegaconf import OmegaConf

from albert_ablate import build_model, compose
from albert_ablate.config import (
    COMPONENTS,
    HYDRA_KEYS,
    check,
    conf_folder,
    construct,
    identity,
    options,
    parameters_of,
    to_container,
)
from albert_ablate.data.packed import Order, take_blocks
from albert_ablate.model.build import assemble, build
from albert_ablate.model.loss import objective
from albert_ablate.optim.clipping import global_norm
from albert_ablate.optim.optimizers import assert_covers, decay_groups
from albert_ablate.training.language import estimated_seconds
from albert_ablate.training.module import LanguageModel
from albert_ablate.training.ranks import Ranks
from albert_ablate.training.validation import Evaluator

OPTIONS = options()
ALL = [(group, option) for group, names in OPTIONS.items() for option in names]
TINY = [*SMALL, "data.batch=4", "budget.tokens=320"]
# options that cannot be composed without a value only the user knows
NEEDS = {
    ("data", "text_files"): ["data.path=somewhere"],
    ("data", "hub"): ["data.name=somewhere"],
    ("tokenizer", "file"): ["tokenizer.path=somewhere"],
    ("optimizer", "schedule_free"): ["schedule=constant"],  # any other is refused
    ("norm", "ngpt"): ["attention=rotary", "optimizer.weight_decay=0"],  # it refuses the others
    ("norm", "mix_ln"): ["model.layers=4"],  # a quarter of two is none
    # too large to train in a test: their own shape at another size
    ("model", "gpt2_small"): ["model.layers=2", "model.width=48", "model.context=16"],
    ("model", "albert_agpt"): ["model.layers=2", "model.width=48", "model.context=16"],
    ("model", "pretrained"): [f"model.path={gpt2(Path(tempfile.mkdtemp()), context=16)}"],
    ("model", "hf"): [f"model.config={gpt2(Path(tempfile.mkdtemp()), context=16)}"],
    ("loss", "r_drop"): ["dropout=uniform"],
    **{("dropout_time", name): ["dropout=uniform"] for name in options()["dropout_time"]},
}
UNLISTED = {  # would do nothing there
    ("attention", "learned"): {"rotary_base", "rotary_factor", "rotary_bands", "qk_eps"},
    ("attention", "nope"): {"rotary_base", "rotary_factor", "rotary_bands", "qk_eps"},
    ("attention", "qk_norm"): {"rotary_base", "rotary_factor", "rotary_bands", "qk_clip"},
    ("attention", "rotary"): {"qk_eps"},
}
TRAINED = [pair for pair in ALL if pair[0] not in ("data", "tokenizer", "task", "logger", "trainer", "evaluation")]
AS_FILES_SAY = ("pretrained", "hf")  # whose shape stands in a file
STEPS = 5  # of which the first three must move every parameter


@cache
def composed(*overrides):
    return compose(list(overrides))


def configuration(group, option, *more):
    tiny = [o for o in TINY if group not in ("model", "recipe") or not o.startswith("model=")]
    if option == "hf":  # its sizes are model.changes
        tiny = [o for o in tiny if not o.startswith("model.")]
    cfg = composed(f"{group}={option}", *tiny, *NEEDS.get((group, option), []))
    # a copy; Hydra would take a tenth of a second
    return OmegaConf.create(to_container(check(OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(more))))))


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (4, 17), generator=generator) for _ in range(STEPS)]


def train(cfg, steps=STEPS):
    """`steps` steps with the arm's own loss, clipping, optimizer and schedule: model, gradient seen, clipped shares."""
    torch.set_num_threads(1)
    cfg = check(cfg)
    model = build_model(cfg).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build(cfg["optimizer"], decay_groups(model), True)
    assert_covers(optimizer, model)
    loss, clip, shape = construct(cfg.loss), build(cfg["clip"]), construct(cfg.schedule)
    named, peak = list(model.named_parameters()), [g["lr"] for g in optimizer.param_groups]
    seen = dict.fromkeys(before, False)
    trace = []
    for step, rows in enumerate(batches()[:steps]):
        model.clock.set(step, 0, step, STEPS)
        for group, lr in zip(optimizer.param_groups, peak, strict=True):
            group["lr"] = lr * shape((step + 0.5) / STEPS)
        optimizer.zero_grad(set_to_none=True)
        logits: list[torch.Tensor] = []
        total, plain = objective(loss, lambda tokens, kept=logits: kept.append(model(tokens)) or kept[0], rows)
        if getattr(optimizer, "due", False):
            optimizer.sample(logits[0], torch.rand(rows[:, 1:].shape, generator=torch.Generator().manual_seed(step)))
        total.backward()
        for name, p in named:
            seen[name] |= p.grad is not None and bool(p.grad.ne(0).any())
        with torch.no_grad():
            norm, _ = global_norm([p.grad for _, p in named if p.grad is not None])
            share = clip(named, norm, plain.detach())
        optimizer.step()
        model.after_step()
        trace.append([plain.item(), norm.item(), float(share)])
    moved = {n: bool((p != before[n]).any()) for n, p in model.named_parameters()}
    return model, seen, moved, trace


def state(cfg):
    """All that a number of an option can change: what is built and every step's figures and weights."""
    model, *_, trace = train(cfg)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return str(model), trace, weights


@cache
def state_of(group, option, *more):
    """`state` of an option as it is, which several of its arguments are compared with."""
    return state(configuration(group, option, *more))


def differ(a, b):
    same = a[0] == b[0] and a[1] == b[1] and a[2].keys() == b[2].keys()
    return not (same and all(torch.equal(a[2][n], b[2][n]) for n in a[2]))


@pytest.mark.parametrize(("group", "option"), ALL)
def test_option_composes_and_its_arguments_bind(group, option):
    cfg = configuration(group, option)
    assert check(cfg) == check(to_container(check(cfg)))
    for key in COMPONENTS:
        node = cfg[key]
        known = parameters_of(node["_target_"])
        assert set(node) - HYDRA_KEYS <= set(known)
        assert all(default is not MISSING or name in node for name, (_, default) in known.items())
    assert cfg.choices[group] == option
    if group in COMPONENTS:  # else `group.name=value` could not be set without a plus
        missing = set(parameters_of(cfg[group]["_target_"])) - set(cfg[group]) - UNLISTED.get((group, option), set())
        assert not missing, f"conf/{group}/{option}.yaml does not list {missing}"


@pytest.mark.parametrize(
    "option", [o for o in OPTIONS["model"] if o not in AS_FILES_SAY]
)  # its size is its checkpoint's
def test_model_is_built_on_the_meta_device_at_its_own_size(option):
    cfg = compose([f"model={option}"])
    model = assemble(check(cfg))
    assert len(model.blocks) == cfg.model.layers and all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(("group", "option"), TRAINED)
def test_option_trains_and_every_parameter_takes_part(group, option):
    _, seen, moved, trace = train(configuration(group, option), steps=3)
    assert all(math.isfinite(x) for row in trace for x in row)
    assert all(seen.values()), [n for n, s in seen.items() if not s]
    assert all(moved.values()), [n for n, m in moved.items() if not m]


def perturbed(key, value):
    """A nearby allowed value of another size, None where there is none to try."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2 if key in ("model.width", "model.heads") else value + 1
    if isinstance(value, float):
        return 0.05 if value == 0 else value * 0.5
    return None


# (group, number) or (group, option, number): what makes the number count, where the tiny arm alone would not show it
CIRCUMSTANCES = {
    ("clip", "max_norm"): ["clip.max_norm=0.01"],
    ("clip", "max_value"): ["clip.max_value=0.001"],
    ("clip", "eps"): ["clip.eps=0.5"],
    ("schedule", "warmup"): ["schedule.warmup=0.4"],
    ("norm_type", "eps"): ["norm_type.eps=10"],  # some bound a length by it, here about 4
    ("attention", "rotary_base"): ["attention.rotary_base=100"],
    ("attention", "rotary_bands"): ["attention.rotary_factor=4"],
    ("attention", "qk_eps"): ["attention.qk_eps=0.5"],
    ("attention", "full_every"): ["attention.window=4"],
    ("optimizer", "eps"): ["optimizer.eps=1e-3"],
    ("schedule", "decay"): ["schedule.decay=0.4"],
    ("optimizer", "decay"): ["optimizer.weight_decay=0.1"],
    ("optimizer", "d"): ["optimizer.d=2"],
    ("optimizer", "frequency"): ["optimizer.frequency=1"],
    ("optimizer", "max_dim"): ["optimizer.max_dim=47"],
    ("optimizer", "rho"): ["optimizer.rho=1e4"],
    ("optimizer", "sophia", "interval"): ["optimizer.rho=1e4", "optimizer.interval=1"],
    ("optimizer", "interval"): ["optimizer.interval=3", "optimizer.warmup=1", "optimizer.grace=1"],
    ("optimizer", "warmup"): ["optimizer.interval=4", "optimizer.warmup=1", "optimizer.grace=1"],
    ("optimizer", "threshold"): ["optimizer.threshold=0.1", "optimizer.grace=2"],
    ("optimizer", "grace"): ["optimizer.threshold=0.1", "optimizer.grace=2"],
    ("clip", "history"): ["clip.history=2"],
    ("clip", "unit"): ["clip.max_norm=0.1"],
    ("clip", "zclip", "alpha"): ["clip.warmup=2", "clip.threshold=0.1", "clip.max_norm=100"],
    ("clip", "zclip", "threshold"): ["clip.warmup=2", "clip.threshold=0.1", "clip.max_norm=100"],
    ("clip", "zclip", "warmup"): ["clip.warmup=2", "clip.threshold=0.1", "clip.max_norm=100"],
    ("clip", "adagc", "warmup"): ["clip.warmup=3"],
    ("clip", "relative"): ["clip.warmup=2"],
    ("clip", "absolute"): ["clip.absolute=0.1"],
    ("clip", "beta"): ["clip.warmup=2"],
    ("clip", "sigma"): ["clip.after=3", "clip.window=3", "clip.sigma=2"],
    ("clip", "window"): ["clip.after=3", "clip.window=2", "clip.sigma=1"],
    ("clip", "after"): ["clip.after=3", "clip.window=4", "clip.sigma=0.5"],
    ("norm", "share"): ["norm.share=0.5"],
    ("dropout_time", "until"): ["dropout_time.until=0.8"],
    ("dropout_time", "shape"): ["dropout_time.until=0.8"],
    ("dropout", "spread"): ["model.layers=4"],
    ("dropout", "share"): ["model.layers=4"],
}


# arguments that are null by default: a value to try
NULLS = {
    "attention": {"kv_heads": 1, "head_width": 12, "qk_norm": "rms_head", "softcap": 0.5, "window": 4, "full_every": 2}
    | {"scale": 0.1, "qk_clip": 0.01, "rotary_bands": [0.5, 2.0, 16]},
    "model": {"embedding_scale": 2.0, "logit_softcap": 1.0},
}


def arguments():
    """(group, option, argument), one option for each target: its other YAMLs differ in values alone."""
    seen = set()
    for group, option in TRAINED:
        if group == "recipe" or option in AS_FILES_SAY:  # tests/training/test_go_on.py, tests/model/test_hf.py
            continue
        target = yaml.safe_load((conf_folder() / group / f"{option}.yaml").read_text())["_target_"]
        for name in parameters_of(target):
            if (target, name) not in seen and name not in UNLISTED.get((group, option), set()):
                seen.add((target, name))
                yield group, option, name


NUMBERED = list(arguments())


@pytest.mark.parametrize(("group", "option", "name"), NUMBERED)
def test_every_argument_of_an_option_changes_something(group, option, name):
    circumstances = CIRCUMSTANCES.get((group, option, name), CIRCUMSTANCES.get((group, name), []))
    cfg = configuration(group, option, *circumstances)
    value = cfg[group].get(name, parameters_of(cfg[group]["_target_"])[name][1])
    other = copy.deepcopy(cfg)
    if name == "positions":
        tried = "rotary" if value == "learned" else "learned"
    elif name == "activation":
        tried = "relu"
    elif name == "initial":
        tried = 0.05
    elif name == "hidden":
        tried = 24
    elif name == "betas":
        tried = [0.8, 0.99]
    elif name in NULLS.get(group, {}):
        tried = NULLS[group][name]
    elif name == "sites":
        tried = ["hidden", "attention"]
    elif (group, name) == ("optimizer", "decay"):
        tried = ["matrices"]
    elif name == "unit":
        tried = "block"
    elif name == "scale":
        tried = "original"
    elif (group, name) == ("optimizer", "mean"):
        tried = "all"
    elif name == "shape":
        tried = "linear" if value != "linear" else "cosine"
    else:
        tried = perturbed(f"{group}.{name}", value)
    assert tried is not None, f"no way to perturb {group}.{name}={value}: add one"
    OmegaConf.set_struct(other, False)
    other[group][name] = tried
    assert differ(state_of(group, option, *circumstances), state(other)), (
        f"{group}.{name}={value} -> {tried} changes nothing"
    )
    assert identity(cfg, "text").setting != identity(other, "text").setting


def test_the_seed_changes_the_run_and_not_the_setting():
    a, b = configuration("norm", "pre_ln"), configuration("norm", "pre_ln", "seed=1")
    assert identity(a, "t").setting == identity(b, "t").setting and identity(a, "t").run != identity(b, "t").run
    assert differ(state(a), state(b))
    assert not differ(state(a), state(a))


# --- what is measured beside training --------------------------------------------------------------------------------


def left(module):
    """All that a pass can leave behind: weights, every buffer, gradients and other attributes of the model, what
    clipping rule and optimizer keep, torch's generator."""
    kept = {"generator": torch.get_rng_state()}
    for name, part in module.model.named_modules():
        for key, value in vars(part).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                kept[f"{name}.{key}"] = copy.copy(value) if isinstance(value, torch.Tensor | dict) else repr(value)
    for kind, found in (("weight", module.model.named_parameters()), ("buffer", module.model.named_buffers())):
        kept |= {f"{kind} {name}": value.detach().clone() for name, value in found}
    kept |= {f"{n}.grad": None if p.grad is None else p.grad.clone() for n, p in module.named}
    optimizer, names = module.trainer.optimizers[0], {id(p): n for n, p in module.named}
    for p, state in optimizer.state.items():
        kept |= {f"{names[id(p)]}.{key}": copy.deepcopy(value) for key, value in state.items()}
    own = {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return kept | {"optimizer": repr(own), "groups": repr(groups), "clip": repr(vars(module.clip))}


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else repr(a) == repr(b)


class Text:
    """Tokens as the estimate takes them."""

    train = torch.arange(4000).remainder(251).numpy().astype("uint8")


MEASURED = [(pair, ()) for pair in TRAINED] + [
    (("attention", "learned"), more)
    for more in (("attention.qk_clip=1",), ("attention.qk_clip=1", "data.accumulate=2"), ("model.sigma_reparam=true",))
]


class Sampled(Text):
    """And as the evaluator does."""

    validation = test = Text.train[::-1].copy()

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def bytes_per_target(self, *sample):
        return 1.0


@pytest.mark.parametrize("pair, more", MEASURED, ids=lambda x: "-".join(x) or "plain")
def test_a_measuring_pass_leaves_nothing_in_model_or_optimizer(pair, more):
    cfg = check(configuration(*pair, *more))
    context, order = cfg["model"]["context"], Order(60, cfg["data"]["batch"], 0)
    module = LanguageModel(build_model(cfg), cfg, STEPS).train()
    optimizer = module.configure_optimizers()["optimizer"]
    module.trainer = SimpleNamespace(
        optimizers=[optimizer],
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value),
        world_size=1,
        global_rank=0,
    )

    def unchanged(measure):
        before, found = left(module), measure()
        after = left(module)
        assert not [key for key in {*before, *after} if not same(before.get(key), after.get(key))]
        return found

    def estimate():
        return estimated_seconds(module, Text, order, context, 10)

    assert unchanged(estimate) > 0
    for micro in range(cfg["data"]["accumulate"]):  # one step, so that there is a state to spoil
        module.training_step(micro_batch(cfg, order, micro), micro).backward()
    module.configure_gradient_clipping(optimizer)
    optimizer.step()
    module.model.after_step()
    module.zero_grad(set_to_none=True)
    assert optimizer.state
    assert unchanged(estimate) > 0  # as before a session that goes on
    evaluator = Evaluator(Sampled(256), context, 32, Ranks())

    def evaluate():
        with module.evaluated_weights():
            return evaluator.evaluate(module.model, "validation", nullcontext())["loss"]

    assert unchanged(evaluate) > 0
    batch = micro_batch(cfg, order, 0)
    module.training_step(batch, 0).backward()  # another has begun: its gradients and statistics must stay
    unchanged(lambda: module.watch.probe.beside(batch[:, :-1]))
    module.watch.detailed, module.watch.gns_rows = True, batch[:1]
    unchanged(module.on_after_backward)
    assert module.watch.gns_grad_sq is not None or cfg["data"]["accumulate"] > 1


def micro_batch(cfg, order, number):
    rows = torch.from_numpy(take_blocks(Text.train, order.indices(0), cfg["model"]["context"]))
    return rows.chunk(cfg["data"]["accumulate"])[number]
