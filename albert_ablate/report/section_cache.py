"""Cache of report sections for the live page: unchanged sections are reused from one update to the next."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

SECONDS_PER_UPDATE = 0.25  # of processor time per update, after which outdated sections wait for the next update


class SectionCache:
    """Sections of a page and parts of them, each stored with the state of its inputs; only changed ones are made again.

    When an update has taken `seconds` of processor time, the remaining outdated sections stay as they were and come
    first in the next update. behind: their names. keeps: False where there is only one update, as in `report`.
    """

    def __init__(self, keeps: bool = True, seconds: float = SECONDS_PER_UPDATE) -> None:
        self.keeps, self.seconds = keeps, seconds
        self.sections: dict[str, tuple[Hashable, Hashable, Any]] = {}  # name -> state, appearance, section
        self.parts: dict[str, dict[Hashable, Any]] = {}  # of a section when it was made last, by their states
        self.behind: list[str] = []
        self._now = ""  # the section that is being made
        self._used: dict[Hashable, Any] = {}

    def has(self, state: Hashable) -> bool:
        """Whether a part with this state is cached for the section that is being made."""
        return state in self.parts.get(self._now, {})

    def part(self, state: Hashable, make: Callable[[], Any]) -> Any:
        """A part of the section that is being made, from the cache where the state is equal, else from `make`."""
        cached = self.parts.get(self._now, {})
        self._used[state] = cached[state] if state in cached else make()
        return self._used[state]

    def sections_of(
        self, wanted: Mapping[str, tuple[Hashable, Callable[[], Any]]], appearance: Hashable
    ) -> dict[str, Any]:
        """Sections by name, updated. wanted: by name in the order of the page, the state of the inputs and the function
        that makes the section. appearance: colors and baseline of all; where it has changed all are made again."""
        begun, behind = time.thread_time(), []
        order = [name for name in self.behind if name in wanted]
        order += [name for name in wanted if name not in order]
        for name in order:
            state, make = wanted[name]
            cached = self.sections.get(name)
            if cached and cached[:2] == (state, appearance):
                continue
            if cached and cached[1] == appearance and time.thread_time() - begun > self.seconds:
                behind.append(name)
                continue
            self._now, self._used = name, {}
            self.sections[name] = state, appearance, make()
            self.parts[name] = self._used
        self.behind = behind
        return {name: self.sections[name][2] for name in wanted}
