"""Parameter groups: which parameters decay, and at what multiple of the learning rate, the decay and eps."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from albert_ablate.config import Config, ConfigError

Kind = Literal["matrices", "embeddings", "head", "gains", "biases"]
Kinds = tuple[Kind, ...]
DECAYED: Kinds = ("matrices", "embeddings", "head")


def decay_groups(model: nn.Module) -> list[dict]:
    """The model's parameters, those of one kind, one set of multipliers and one number of parts together.

    kind: matrices (two or more dimensions), embeddings (tokens and positions), head, tied (an embedding that is the
    head too), gains (of norms), biases, gates (any other with fewer than two dimensions, such as ReZero's).
    factors: what the model's `multipliers(name)` says. parts: matrices that a block's linear map stacks (3 for
    queries, keys and values; their numbers of rows where these differ), 0 where the parameter is no such map. The
    optimizers say what is to be done with them.
    """
    parts = {
        f"blocks.{layer}.{name}.weight": len(rows) if len(set(rows.values())) == 1 else list(rows.values())
        for layer, block in enumerate(getattr(model, "stack", ()))
        for name, _, rows, _ in block.matrices()
    }
    multipliers: Callable[[str], Mapping[str, float]] = getattr(model, "multipliers", lambda name: {})
    groups: dict[tuple, dict] = {}
    kinds: Mapping[str, str] = getattr(model, "kinds", dict)()
    for name, p in model.named_parameters():
        kind, factors = kinds.get(name) or _kind(name, p, getattr(model, "tied", False)), dict(multipliers(name))
        assert factors.keys() <= {"lr", "weight_decay", "eps"}, f"{name}: no optimizer knows all of {factors}"
        key = (kind, tuple(sorted(factors.items())), str(parts.get(name, 0)))
        new = {"params": [], "kind": kind, "factors": factors, "parts": parts.get(name, 0)}
        groups.setdefault(key, new)["params"].append(p)
    return list(groups.values())


def _kind(name: str, p: nn.Parameter, tied: bool) -> str:
    if p.ndim >= 2:
        part = name.split(".")[0]
        if part == "embedding" and tied:
            return "tied"
        return {"embedding": "embeddings", "positions": "embeddings", "head": "head"}.get(part, "matrices")
    leaf = name.split(".")[-1]
    return {"weight": "gains", "bias": "biases"}.get(leaf, "gates")


def torch_param_groups(
    groups: Iterable, decay: Kinds, lr: float, weight_decay: float, eps: float | None = None
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, one for each distinct (decays, multipliers), the plain learning rate first.

    A kind in `decay` decays; a tied head where both its kinds do. Bare parameters are one group that decays.
    """
    groups = [g if isinstance(g, dict) else {"params": [g]} for g in groups]
    held = {g.get("kind") for g in groups}
    if "tied" in held and len({"embeddings", "head"} & set(decay)) == 1:
        raise ConfigError(
            f"optimizer.decay=[{','.join(decay)}] is not allowed: embeddings and head of this model are one matrix, "
            "list both or neither."
        )
    for kind in set(decay) - set(DECAYED) - held if None not in held else ():
        raise ConfigError(f"optimizer.decay={kind} would do nothing: this model has no {kind}; leave it out.")
    merged: dict[tuple, dict[str, Any]] = {}
    for group in groups:
        kind, factors = group.get("kind"), group.get("factors", {})
        decays = kind is None or kind in decay or (kind == "tied" and {"embeddings", "head"} <= set(decay))
        settings = {
            "params": [],
            "lr": lr * factors.get("lr", 1),
            "weight_decay": weight_decay * factors.get("weight_decay", 1) if decays else 0.0,
        }
        if eps is not None:
            settings["eps"] = eps * factors.get("eps", 1)
        merged.setdefault((decays, tuple(sorted(factors.items()))), settings)["params"] += group["params"]
    return sorted(merged.values(), key=lambda g: (g["lr"] != lr, not g["weight_decay"]))


def verify_decay(cfg: Config) -> None:
    """Refuses a choice of decaying kinds that contradicts itself or would do nothing."""
    node = cfg.optimizer
    listed = set(node.decay)
    written = "[" + ",".join(node.decay) + "]"
    if cfg.model.get("tied") and len(listed & {"embeddings", "head"}) == 1:
        raise ConfigError(
            f"optimizer.decay={written} contradicts model.tied=true, where embeddings and head are one matrix: "
            "list both or neither."
        )
    if not node.weight_decay and listed != set(DECAYED):
        raise ConfigError(f"optimizer.decay={written} would do nothing: optimizer.weight_decay is 0.")


def assert_covers(optimizer: Optimizer, model: nn.Module) -> None:
    """Every parameter of the model stands in exactly one group."""
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters())), "a parameter is in no group, or in two"
