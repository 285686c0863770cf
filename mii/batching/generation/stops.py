"""Stop strings: found across token borders, held back while they might still complete, never shown.

The first stop string to be complete ends the answer, whatever the pieces in which the text arrives; of several that are
complete at the same character, the longest. The text that is shown ends where it begins. Matching is Aho and
Corasick's automaton ("Efficient string matching", CACM 18(6), 1975): one transition a character, and between
candidates a jump to the next character that begins a stop string.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable

ROOT = 0


class StopStrings:
    """The stop strings of a call, compiled once and shared by all of its requests.

    Args:
        stops: Strings of any length, at least one character each; none at all is fine.

    Raises:
        ValueError: One of them is empty.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self.strings = tuple(dict.fromkeys(stops))
        if "" in self.strings:
            raise ValueError("a stop string is empty; give strings of one character or more, or none at all")
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._found: list[str | None] = [None]
        for stop in self.strings:
            self._insert(stop)
        self._fallback = [ROOT] * len(self._next)
        self._held = list(self._depth)
        self._link()
        starts = "".join(re.escape(char) for char in self._next[ROOT])
        self._first = re.compile(f"[{starts}]") if starts else None

    def __bool__(self) -> bool:
        return bool(self.strings)

    def _insert(self, stop: str) -> None:
        state = ROOT
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._found.append(None)
            state = self._next[state][char]
        self._found[state] = stop

    def _link(self) -> None:
        """Breadth first: where to go on when a character does not fit, what ends here, how much must be held."""
        queue = deque(self._next[ROOT].values())
        while queue:
            state = queue.popleft()
            fallback = self._fallback[state]
            if self._found[state] is None:
                self._found[state] = self._found[fallback]
            if not self._next[state]:
                self._held[state] = self._held[fallback]
            for char, child in self._next[state].items():
                self._fallback[child] = self._step(fallback, char)
                queue.append(child)

    def _step(self, state: int, char: str) -> int:
        while state != ROOT and char not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(char, ROOT)

    def scan(self, state: int, text: str, armed: bool = True) -> tuple[int, int, str | None]:
        """Reads `text` from `state`: the state after it, the characters read, the stop string complete there.

        Args:
            state: What an earlier scan returned, or `ROOT`.
            text: The characters that follow.
            armed: Whether to halt at a complete stop string; else all of `text` is read.
        """
        at, end = 0, len(text)
        while self._first is not None and at < end:
            if state == ROOT:
                candidate = self._first.search(text, at)
                if candidate is None:
                    break
                at = candidate.start()
            state = self._step(state, text[at])
            at += 1
            if armed and self._found[state] is not None:
                return state, at, self._found[state]
        return state, end, None

    def held(self, state: int) -> int:
        """How many of the last characters might be the start of a stop string."""
        return self._held[state]


class StopMatcher:
    """Looks for the stop strings in one request's text, piece by piece.

    Args:
        stops: What to look for.

    >>> matcher = StopMatcher(StopStrings(["\\nUser:"]))
    >>> [matcher.feed(piece) for piece in ("Hi.\\n", "Us", "ually so\\nU", "ser: more")], matcher.matched
    (['Hi.', '', '\\nUsually so', ''], '\\nUser:')
    """

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self.looks = bool(stops)
        """Whether there is anything to look for."""
        self._state = ROOT
        self._held = ""
        self._ahead: tuple[int, str] | None = None
        self.matched: str | None = None

    def feed(self, text: str, armed: bool = True) -> str:
        """Takes the next piece of text and returns what may be shown now.

        Args:
            text: What follows the text of earlier calls.
            armed: False while stop strings do not count yet; one that completes then is ordinary text.

        Returns:
            Text that can be no part of a stop string. Once `matched` is set, the text ends and nothing more comes.
        """
        if self.matched is not None:
            return ""
        self._ahead = None
        if not self.looks:
            return text
        self._state, read, self.matched = self._stops.scan(self._state, text, armed)
        if self.matched is not None:
            return self._show(text[:read], len(self.matched))
        return self._show(text, self._stops.held(self._state))

    def look_ahead(self, text: str) -> str | None:
        """Whether `text`, which is likely but not sure to be fed next, completes a stop string.

        Calls in a row continue each other; `feed` forgets them.

        Returns:
            None, or what may be shown up to the stop string; then `matched` is set and the text ends.
        """
        if not self.looks or self.matched is not None:
            return None
        state, seen = self._ahead or (self._state, "")
        state, read, self.matched = self._stops.scan(state, text)
        self._ahead = state, seen + text
        return None if self.matched is None else self._show(seen + text[:read], len(self.matched))

    def flush(self) -> str:
        """What was held back, when the text ends without a stop string."""
        return "" if self.matched is not None else self._show("", 0)

    def _show(self, text: str, hold: int) -> str:
        """All that is held and `text`, but for the last `hold` characters, which are held from now on."""
        text = self._held + text
        border = len(text) - hold
        self._held = text[border:]
        return text[:border]
