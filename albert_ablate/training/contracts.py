"""What every component must hold to, checked on a tiny model: `albert-ablate check-component norm=mine`, and the tests
of the package's own options.

It composes and its YAML lists its arguments; it trains a few steps on finite numbers, and every parameter gets a
gradient and moves; the same seed gives the same numbers, another one others; each of its arguments changes something,
and the identity with it; what is measured beside training leaves nothing behind.
"""

import copy
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, dataclass
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from albert_ablate.config import (
    COMPONENTS,
    Config,
    ConfigError,
    check,
    checked_config,
    construct,
    identity,
    nearest,
    option_file,
    option_keys,
    options,
    parameters_of,
    read_yaml,
    to_container,
)
from albert_ablate.data.packed import BatchOrder, take_blocks
from albert_ablate.model.build import build, build_model
from albert_ablate.model.loss import objective
from albert_ablate.optim.clipping import global_norm
from albert_ablate.optim.optimizers import assert_covers, decay_groups
from albert_ablate.training.language import estimated_seconds
from albert_ablate.training.module import LanguageModel
from albert_ablate.training.ranks import Ranks
from albert_ablate.training.validation import Evaluator

TINY = (
    "model=nano", "model.layers=2", "model.width=16", "model.context=16", "data.batch=4", "budget.tokens=320",
)  # fmt: skip
STEPS = 5  # of which the first three must move every parameter
VOCABULARY = 256  # of bytes
UNTRAINED = ("data", "tokenizer", "task", "logger", "trainer", "evaluation")  # groups that no step depends on
State = tuple[str, list[list[float]], dict[str, Tensor]]


# --- a tiny model with the component ---------------------------------------------------------------------------------


def configuration(group: str, option: str, more: Sequence[str] = (), needs: Sequence[str] = ()) -> Config:
    """A tiny model's configuration with an option. needs: overrides it cannot be composed without; more: values."""
    tiny = [o for o in TINY if group not in ("model", "recipe") or not o.startswith("model=")]
    if group == "model":  # somebody's own has sizes of its own
        takes = option_keys(group)[option]
        tiny = [o for o in tiny if not o.startswith("model.") or re.split("[.=]", o)[1] in takes]
    return checked_config([f"{group}={option}", *tiny, *needs, *more])


def with_value(cfg: Config, group: str, name: str, value: Any) -> Config:
    """The configuration with another value of an argument."""
    nodes = to_container(cfg)
    nodes[group][name] = value
    return check(nodes)


def batches(seed: int = 0) -> list[Tensor]:
    """Random token batches, (4, 17) each, the same for one seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (4, 17), generator=generator) for _ in range(STEPS)]


@dataclass
class Trained:
    """seen, moved: whether each parameter had a gradient, and changed. trace: loss, norm and clipped share by step."""

    model: nn.Module
    seen: dict[str, bool]
    moved: dict[str, bool]
    trace: list[list[float]]


def train(cfg: Mapping, steps: int = STEPS) -> Trained:
    """`steps` steps with the arm's own loss, clipping, optimizer and schedule."""
    torch.set_num_threads(1)
    cfg = check(cfg)
    model = build_model(cfg).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build(cfg.optimizer, decay_groups(model), True)
    assert_covers(optimizer, model)
    loss, clip, shape = construct(cfg.loss), build(cfg.clip), construct(cfg.schedule)
    named, peak = list(model.named_parameters()), [g["lr"] for g in optimizer.param_groups]
    seen = dict.fromkeys(before, False)
    trace, logits = list[list[float]](), list[Tensor]()
    model.register_forward_hook(lambda module, inputs, output: logits.append(output))
    for step, rows in enumerate(batches()[:steps]):
        model.clock.set(step, 0, step, STEPS)
        for group, lr in zip(optimizer.param_groups, peak, strict=True):
            group["lr"] = lr * shape((step + 0.5) / STEPS)
        optimizer.zero_grad(set_to_none=True)
        total, plain = objective(loss, model, rows)
        if getattr(optimizer, "due", False):
            optimizer.sample(logits[-1], torch.rand(rows[:, 1:].shape, generator=torch.Generator().manual_seed(step)))
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
    return Trained(model, seen, moved, trace)


def state(cfg: Mapping) -> State:
    """All that a number of an option can change: what is built and every step's figures and weights."""
    done = train(cfg)
    weights = {n: p.detach().clone() for n, p in done.model.named_parameters()}
    return str(done.model), done.trace, weights


def differ(a: State, b: State) -> bool:
    """Whether two results of `state` differ in anything."""
    same = a[0] == b[0] and a[1] == b[1] and a[2].keys() == b[2].keys()
    return not (same and all(torch.equal(a[2][n], b[2][n]) for n in a[2]))


# --- what is checked, each as a sentence on what is wrong, or "" -----------------------------------------------------


def unbound(cfg: Config, group: str, option: str, unlisted: Sequence[str] = ()) -> str:
    """Whether the configuration composes and its YAML lists all arguments but those that are `unlisted` on purpose."""
    if check(to_container(cfg)) != cfg:
        return "checked twice, the configuration changes."
    if (cfg.choices or {}).get(group) != option:
        return f"{group}={option} is missing from the choices of the configuration."
    if group not in COMPONENTS:  # else `group.name=value` could not be set without a plus
        return ""
    written = _written(group, option)
    missing = set(parameters_of(written["_target_"])) - set(written) - set(unlisted)
    return f"its YAML does not list {', '.join(sorted(missing))}." if missing else ""


def _written(group: str, option: str) -> dict[str, Any]:
    """What the YAML of an option says, with those that it builds on."""
    node = read_yaml(option_file(group, option)) or {}
    bases = [base for base in node.get("defaults", ()) if isinstance(base, str) and base != "_self_"]
    found: dict[str, Any] = {}
    for base in bases:
        found |= _written(group, base)
    return found | node


def untrained(cfg: Config, steps: int = 3) -> str:
    """Whether a few steps give finite numbers, and every parameter a gradient and a change."""
    done = train(cfg, steps)
    if not all(math.isfinite(x) for row in done.trace for x in row):
        return f"a loss or the gradients' norm is not finite within {steps} steps."
    if still := [n for n, seen in done.seen.items() if not seen]:
        return f"no gradient within {steps} steps: {', '.join(still[:5])}."
    if still := [n for n, moved in done.moved.items() if not moved]:
        return f"not changed within {steps} steps: {', '.join(still[:5])}."
    return ""


def unseeded(cfg: Config) -> str:
    """Whether the same seed gives the same numbers, and another one others in the same setting."""
    if differ(state(cfg), state(cfg)):
        return "trained twice from one seed, the numbers differ: draw from the seed's streams alone."
    other = check({**cfg, "seed": cfg.seed + 1})
    if not differ(state(cfg), state(other)):
        return "another seed changes nothing."
    return "" if identity(cfg, "t").setting == identity(other, "t").setting else "another seed is another setting."


def another(value: Any, annotation: Any, even: bool = False) -> Any:
    """A nearby allowed value of another size, None where there is none to try. even: it must stay divisible by two."""
    words = [w for part in (annotation, *typing.get_args(annotation)) for w in _words(part)]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2 if even else value + 1
    if isinstance(value, float):
        return 0.05 if value == 0 else value * 0.5
    if isinstance(value, str) or value is None:
        return next((w for w in words if w != value), None)
    if isinstance(value, list | tuple) and value and all(isinstance(v, float) for v in value):
        return [v * 0.9 for v in value]
    if isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value):
        return list(value[:-1]) if len(value) > 1 else [w for w in words if w not in value][:1] or None
    return None


def _words(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def ineffective(cfg: Config, group: str, name: str, tried: Any, before: State | None = None) -> str:
    """Whether another value of an argument changes what is built or trained, and the identity of the setting."""
    value, other = cfg[group].get(name), with_value(cfg, group, name, tried)
    said = f"{group}.{name}={value} -> {tried} changes"
    if not differ(before or state(cfg), state(other)):
        return f"{said} nothing."
    return "" if identity(cfg, "text").setting != identity(other, "text").setting else f"{said} no identity."


# --- what is measured beside training --------------------------------------------------------------------------------


class _Text:
    """Tokens as the estimate and the evaluator take them."""

    train = torch.arange(4000).remainder(251).numpy().astype("uint8")
    validation = test = np.ascontiguousarray(train[::-1])

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def bytes_per_target(self, *sample: Any) -> float:
        return 1.0


def _left(module: Any) -> dict[str, Any]:
    """All that a pass can leave behind: weights, every buffer, gradients and other attributes of the model, what
    clipping rule and optimizer keep, torch's generator."""
    kept: dict[str, Any] = {"generator": torch.get_rng_state()}
    for name, part in module.model.named_modules():
        for key, value in vars(part).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                kept[f"{name}.{key}"] = copy.copy(value) if isinstance(value, Tensor | dict) else repr(value)
    for kind, found in (("weight", module.model.named_parameters()), ("buffer", module.model.named_buffers())):
        kept |= {f"{kind} {name}": value.detach().clone() for name, value in found}
    kept |= {f"{n}.grad": None if p.grad is None else p.grad.clone() for n, p in module.named}
    optimizer, names = module.trainer.optimizers[0], {id(p): n for n, p in module.named}
    for p, found in optimizer.state.items():
        kept |= {f"{names[id(p)]}.{key}": copy.deepcopy(value) for key, value in found.items()}
    own = {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return kept | {"optimizer": repr(own), "groups": repr(groups), "clip": repr(vars(module.clip))}


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else repr(a) == repr(b)


def _begun(cfg: Config) -> Any:
    """The module that Lightning trains, with its optimizer, before the first step."""
    module: Any = LanguageModel(build_model(cfg), cfg, STEPS).train()
    module.trainer = SimpleNamespace(
        optimizers=[module.configure_optimizers()["optimizer"]],
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value),
        world_size=1,
        global_rank=0,
    )
    return module


def _step(module: Any, micro_batches: Sequence[Tensor]) -> None:
    """One step, so that there is a state to spoil."""
    (optimizer,) = module.trainer.optimizers
    for number, batch in enumerate(micro_batches):
        module.training_step(batch, number).backward()
    module.configure_gradient_clipping(optimizer)
    optimizer.step()
    module.model.after_step()
    module.zero_grad(set_to_none=True)


def measuring_leaves(cfg: Config) -> str:
    """Whether estimates of time, evaluations and diagnostics leave model, optimizer and clipping rule as they were."""
    context, order = cfg.model.context, BatchOrder(60, cfg.data.batch, 0)
    module = _begun(cfg)
    text: Any = _Text(VOCABULARY)
    rows = torch.from_numpy(take_blocks(text.train, order.indices(0), context))
    micro_batches = rows.chunk(cfg.data.accumulate)
    evaluator = Evaluator(text, context, 32, Ranks())

    def evaluate() -> float:
        with module.evaluated_weights():
            return evaluator.evaluate(module.model, "validation", nullcontext())["loss"]

    def changed(measure: Callable[[], Any]) -> list[str]:
        before = _left(module)
        measure()
        after = _left(module)
        return sorted(key for key in {*before, *after} if not _same(before.get(key), after.get(key)))

    def estimate() -> float | None:
        return estimated_seconds(module, text, order, context, 10)

    found = {"the estimate of the time": changed(estimate)}
    _step(module, micro_batches)
    found["the estimate of a later session"] = changed(estimate)  # as before a session that goes on
    found["an evaluation"] = changed(evaluate)
    batch = micro_batches[0]
    module.training_step(batch, 0).backward()  # another has begun: its gradients and statistics must stay
    found["the pass of the diagnostics"] = changed(lambda: module.watch.probe.measure_separately(batch[:, :-1]))
    module.watch.detailed, module.watch.gns_rows = True, batch[:1]
    found["the gradient noise scale"] = changed(module.on_after_backward)
    assert module.watch.gns_grad_sq is not None or cfg.data.accumulate > 1
    return " ".join(f"{what} changes {', '.join(keys[:5])}." for what, keys in found.items() if keys)


# --- all of them -----------------------------------------------------------------------------------------------------


def checks(
    group: str, option: str, needs: Sequence[str] = (), tried: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[tuple[str, str | None]]:
    """Each check of a component and what is wrong, "" where nothing is, None where it could not be checked.

    needs: overrides that it cannot do without. tried: values to try for its arguments, by name.
    """
    if group not in options():
        raise ConfigError(f"{group} is not a group of options: it is one of {nearest(group, options())}.")
    cfg = configuration(group, option, needs=needs)
    yield "composes, its YAML lists its arguments", unbound(cfg, group, option)
    if group in UNTRAINED:
        return
    yield "trains, every parameter takes part", _outcome(lambda: untrained(cfg))
    yield "follows its seed", _outcome(lambda: unseeded(cfg))
    yield "measuring leaves nothing behind", _outcome(lambda: measuring_leaves(cfg))
    for name, (annotation, default) in parameters_of(cfg[group]["_target_"]).items() if group in COMPONENTS else ():
        value = cfg[group].get(name, None if default is MISSING else default)
        other = tried.get(name, another(value, annotation))
        said = f"{group}.{name} counts"
        if other is None:
            yield f"{said}; give it another value to try: --try {name}=VALUE", None
        else:
            yield f"{said} ({value} -> {other})", _outcome(partial(ineffective, cfg, group, name, other))


def _outcome(work: Callable[[], str]) -> str:
    try:
        return work()
    except ConfigError:
        raise
    except Exception as error:  # somebody's own code may break in any way
        return f"{type(error).__name__}: {' '.join(str(error).split())}."
