"""Runs trained as one stack: every run keeps its own training loop, and their forward and backward passes are shared.

Each run has a thread of its own, of which one works at a time, so that torch's generators and the order of a run's own
work are as in a process that trains it alone. A thread hands over where it has to wait for the others: with the batch
of a micro-batch, until all have theirs, and with its loss. The last one to arrive computes for all. Whatever else a run
does (clipping, optimizer, evaluations, commits, diagnostics of a detailed step) it does by itself, and a run that ends
leaves the others to go on.
"""

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from albert_ablate.model.stacked import StackedDecoder
from albert_ablate.records.signals import StopSignal, stops_handled
from albert_ablate.training.cost import Phases

SECOND_SIGNAL = 10.0  # seconds


class Member:
    """One run of a stack, in the thread that trains it.

    stop: the signal that its training heeds, since only the main thread gets signals. count: of runs at the start.
    """

    def __init__(self, stack: "Stack", count: int):
        self.stack, self.count, self.stop = stack, count, StopSignal()
        self.model: Any = None
        self.given: Any = None  # what it has brought: tokens, then its loss
        self.logits: Any = None
        self.seconds = 0.0  # its share of what was computed for all
        self.company: list[Member] = []  # the runs with which it shares a backward pass, itself among them

    def forward(self, model: Any, tokens: Tensor, phases: Phases) -> Tensor:
        """The model's logits of these tokens, computed with those of the other runs."""
        self.model, self.given = model, tokens
        self._meet(self.stack.at_forward, lambda: self.stack.members, _forward, phases)
        logits, self.logits = self.logits, None
        return logits

    def backward(self, loss: Tensor, phases: Phases) -> None:
        """The backward pass of what `forward` gave, with those of the runs that shared it."""
        self.given = loss
        company = [member for member in self.company if member in self.stack.members]
        self._meet(self.stack.at_backward, lambda: company, _backward, phases)

    def _meet(
        self,
        waiting: "list[Member]",
        expected: "Callable[[], Sequence[Member]]",
        compute: "Callable[[Sequence[Member]], None]",
        phases: Phases,
    ) -> None:
        """Wait for the expected runs; the last one to come computes for all. Time spent waiting is nobody's."""
        began, turn = time.perf_counter(), self.stack.turn
        waiting.append(self)
        while self in waiting:
            if self.stack.aborted:
                raise SystemExit(128 + (self.stop.number or 0))
            here = [member for member in expected() if member in self.stack.members]
            if all(member in waiting for member in here):
                start = time.perf_counter()
                compute(here)
                for member in here:
                    member.seconds, member.given = (time.perf_counter() - start) / len(here), None
                    waiting.remove(member)
                turn.notify_all()
            else:
                turn.wait()
        phases.skip(time.perf_counter() - began - self.seconds)


def _forward(members: Sequence[Member]) -> None:
    """The logits of all members, each its own part."""
    if len(members) == 1:
        members[0].logits = members[0].model(members[0].given)
    else:
        stacked = members[0].stack.stacked(members)
        parts = stacked(torch.cat([member.given for member in members])).chunk(len(members))
        for member, part in zip(members, parts, strict=True):
            member.logits = part
    for member in members:
        member.company = [*members]


def _backward(members: Sequence[Member]) -> None:
    torch.autograd.backward([member.given for member in members])


class Stack:
    """The runs that are trained as one, while they are in training.

    turn: held by the thread that works. members: those whose training has not ended. at_forward, at_backward: those
    that wait for the others.
    """

    def __init__(self, count: int):
        self.turn = threading.Condition()
        self.all = [Member(self, count) for _ in range(count)]
        self.members = [*self.all]
        self.at_forward: list[Member] = []
        self.at_backward: list[Member] = []
        self.noted: float | None = None  # when the first signal came
        self.aborted = False
        self._stacked: tuple[Sequence[Member], StackedDecoder] | None = None

    def stacked(self, members: Sequence[Member]) -> StackedDecoder:
        """The decoder of these members' models, which is kept while they are the same."""
        if self._stacked is None or self._stacked[0] != members:
            self._stacked = members, StackedDecoder([member.model for member in members])
        return self._stacked[1]

    def leave(self, member: Member) -> None:
        """Let the others go on without this run: its training has ended, or broke."""
        for those in (self.members, self.at_forward, self.at_backward):
            if member in those:
                those.remove(member)
        self._stacked = None
        self.turn.notify_all()

    def note(self, number: int, frame: Any) -> None:
        """Handler of a signal: all runs stop at the end of their step. One that comes SECOND_SIGNAL later, when they
        have not, ends them where they wait; until then a worker may be told twice of the same stop."""
        now = time.monotonic()
        self.noted = self.noted or now
        self.aborted = now - self.noted > SECOND_SIGNAL
        for member in self.all:
            member.stop.number = number


TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # of malloc.h
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, for all threads alike; elsewhere nothing. The tensors of a stack are so large
    that it would give them back to the system within each step, and a thread's memory is of no use to the next one."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((TRIM_THRESHOLD, LARGEST), (MMAP_THRESHOLD, LARGEST), (ARENA_MAX, 1)):
            mallopt(option, value)


def together(tasks: Sequence[Callable[[Member], Any]]) -> list[Any]:
    """Call each task with its member of one stack, in a thread of its own, one at a time; gives what they return."""
    keep_freed_memory()
    stack = Stack(len(tasks))
    results: list[Any] = [None] * len(tasks)
    errors: list[BaseException] = []

    def work(i: int) -> None:
        with stack.turn:
            try:
                results[i] = tasks[i](stack.all[i])
            except BaseException as error:
                errors.append(error)
            finally:
                stack.leave(stack.all[i])

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(tasks))]
    with stops_handled(stack.note):
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(1.0)  # not for ever, so that a signal is handled meanwhile
    if errors:
        raise errors[0]
    return results
