"""What a page that is made again and again keeps from one making to the next."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

SECONDS = 0.25  # of processor time, after which the sections that are left wait for the next making


class Kept:
    """Sections of a page, and parts of them, by the state of what they were made from: only what is new is made.

    A section whose runs have changed is made anew, until `seconds` of processor time have passed; those that are left
    stay as they were, and are the first of the next making. `behind`: their names. keeps: whether there is a next one.
    """

    def __init__(self, keeps: bool = True, seconds: float = SECONDS) -> None:
        self.keeps, self.seconds = keeps, seconds
        self.sections: dict[str, tuple[Hashable, Hashable, Any]] = {}  # name -> state, looks, section
        self.parts: dict[str, dict[Hashable, Any]] = {}  # of a section when it was made last, by their states
        self.behind: list[str] = []
        self._now = ""  # the section that is being made
        self._used: dict[Hashable, Any] = {}

    def has(self, state: Hashable) -> bool:
        """Whether the section that is being made had a part of this state the last time."""
        return state in self.parts.get(self._now, {})

    def part(self, state: Hashable, make: Callable[[], Any]) -> Any:
        """A part of the section that is being made: what `make` gives, or gave the last time for an equal state."""
        known = self.parts.get(self._now, {})
        self._used[state] = known[state] if state in known else make()
        return self._used[state]

    def made(self, wanted: Mapping[str, tuple[Hashable, Callable[[], Any]]], looks: Hashable) -> dict[str, Any]:
        """Name of a section -> the section. wanted: in the order of the page, the state each is to be of and what makes
        it. looks: of all sections; one of other looks is made anew in any case."""
        begun, behind = time.thread_time(), []
        order = [name for name in self.behind if name in wanted]
        order += [name for name in wanted if name not in order]
        for name in order:
            state, make = wanted[name]
            known = self.sections.get(name)
            if known and known[:2] == (state, looks):
                continue
            if known and known[1] == looks and time.thread_time() - begun > self.seconds:
                behind.append(name)
                continue
            self._now, self._used = name, {}
            self.sections[name] = state, looks, make()
            self.parts[name] = self._used
        self.behind = behind
        return {name: self.sections[name][2] for name in wanted}
