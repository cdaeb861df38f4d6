"""Training steps as CUDA graphs (trainer.graph): a micro-batch's forward and backward pass, recorded once and replayed.

A recorded pass runs no Python and reads and writes the same memory each time. What differs between micro-batches is
therefore put beforehand into tensors that stay where they are: the tokens, the dropout masks, which each site draws
from its own stream, and the rates; loss and gradients are found in such tensors afterwards. These are the operations of
a step without a graph, on the same numbers. Clipping, the optimizer and everything after it are not recorded, and the
steps that are measured by block (diagnostics) are taken without a graph. Which arms can: `config.graph_obstacle`.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from albert_ablate.config import Config, graph_obstacle
from albert_ablate.model.dropout import Dropout, draw_dtype
from albert_ablate.model.loss import objective
from albert_ablate.model.token_model import TokenModel
from albert_ablate.training.diagnostics import undisturbed
from albert_ablate.training.step_watch import mean_square

WARM_UP = 3  # passes before the recording, as torch.cuda.make_graphed_callables has them


def uses_graph(cfg: Config) -> bool:
    """Whether the steps of this run are replayed here: trainer.graph asks for it, and arm and machine can."""
    return bool(cfg.trainer.graph) and torch.cuda.is_available() and graph_obstacle(cfg) is None


def recorded(work: Callable[[], None]) -> Callable[[], None]:
    """`work` as a CUDA graph: calling it does on the device what `work` did there, on the same memory."""
    gc.collect()  # what is left of passes on another stream could not be waited for
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate and compile at their first calls, which cannot be recorded
        for _ in range(WARM_UP):
            work()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            work()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"the step cannot be recorded as a CUDA graph ({error}): trainer.graph=false goes without"
        ) from error
    return graph.replay


class GraphedPass:
    """Forward and backward pass of a micro-batch of the shape of `rows`: called with one, it gives loss and mean square
    of the logits, and `hand_over` gives the parameters their gradients. accumulate: micro-batches an optimizer step."""

    def __init__(self, model: TokenModel, loss: Callable, rows: Tensor, accumulate: int):
        self.model, self.objective, self.accumulate = model, loss, accumulate
        self.rows = rows.clone()
        self.parameters = list(model.parameters())
        self.masks = Masks(model, lambda: objective(loss, model, rows))
        self.found: tuple[Tensor, ...] = ()
        self.gradients: list[tuple[nn.Parameter, Tensor]] = []
        self.sums: list[Tensor] = []  # of the gradients of a step's micro-batches
        self.replay: Callable[[], None] | None = None

    def __call__(self, rows: Tensor) -> tuple[Tensor, ...]:
        if self.replay is None:
            self.replay = recorded(self._pass)
            # tensors that modules keep (rotary angles) were read while recording and may not be freed
            self.kept = [dict(vars(module)) for module in self.model.modules()]
        self.rows.copy_(rows)
        self.masks.draw()
        self.replay()
        return tuple(value.clone() for value in self.found)  # the next micro-batch writes over them

    def _pass(self) -> None:
        for p in self.parameters:
            p.grad = None
        squares: list[Tensor] = []
        with self.masks.given():
            total, plain = objective(self.objective, partial(self._logits, squares), self.rows)
            with torch.autocast(self.rows.device.type, enabled=False):  # Lightning's backward pass is outside it, too
                (total / self.accumulate).backward()
        self.found = plain.detach(), *squares
        self.gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]

    def _logits(self, squares: list[Tensor], tokens: Tensor) -> Tensor:
        logits = self.model(tokens)
        squares.append(mean_square(logits))
        return logits

    def hand_over(self, first: bool) -> None:
        """Put the gradients into the parameters, added to those of the step's micro-batches before unless `first`."""
        gradients = [g for _, g in self.gradients]
        if self.accumulate == 1:
            self.sums = gradients
        elif first:
            self.sums = self.sums or [torch.empty_like(g) for g in gradients]
            torch._foreach_copy_(self.sums, gradients)
        else:
            torch._foreach_add_(self.sums, gradients)
        for (p, _), total in zip(self.gradients, self.sums, strict=True):
            p.grad = total


class Masks:
    """Dropout masks in tensors that stay where they are. forward: one forward pass, which shows their shapes."""

    def __init__(self, model: TokenModel, forward: Callable[[], object]):
        self.clock = model.clock
        self.of: dict[Dropout, Tensor] = {}
        sites = [module for module in model.modules() if isinstance(module, Dropout) and module.rate]
        with undisturbed(model), torch.no_grad(), self._at_full_rate():
            for site in sites:
                site.mask = partial(self._add, site)  # type: ignore[method-assign]
            forward()
        self.now: list[float] = []
        device = next(model.parameters()).device
        self.rates = torch.zeros(2, len(self.of), dtype=draw_dtype(), device=device)  # and 1 / (1 - rate)

    def _add(self, site: Dropout, shape: tuple[int, ...], like: Tensor, rate: float) -> Tensor:
        self.of[site] = torch.zeros(shape, dtype=draw_dtype(), device=like.device)
        return self.of[site].to(like.dtype)

    def draw(self) -> None:
        """Draw what the masks of the clock's micro-batch are made of."""
        now = [site.now for site in self.of]
        if now != self.now:
            self.now = now
            self.rates.copy_(torch.tensor([now, [1 / (1 - rate) for rate in now]], dtype=self.rates.dtype))
        for site, mask in self.of.items():
            if site.now:
                site.seed_generator(mask.device)
                mask.uniform_()

    @contextmanager
    def given(self) -> Iterator[None]:
        """Make the masks of what was drawn, as `Dropout.mask` does; within it the sites take them."""
        for mask, rate, scale in zip(self.of.values(), *self.rates, strict=True):
            mask.ge_(rate).mul_(scale)
        with self._at_full_rate():
            try:
                for site, mask in self.of.items():
                    site.mask = partial(_cast, mask)  # type: ignore[method-assign]
                yield
            finally:
                for site in self.of:
                    vars(site).pop("mask", None)

    @contextmanager
    def _at_full_rate(self) -> Iterator[None]:
        """Every site drops, also one whose rate is 0 at the moment: its mask is one everywhere."""
        factor, self.clock.factor = self.clock.factor, 1.0
        try:
            yield
        finally:
            self.clock.factor = factor


def _cast(mask: Tensor, shape: tuple[int, ...], like: Tensor, rate: float) -> Tensor:
    return mask.to(like.dtype)
