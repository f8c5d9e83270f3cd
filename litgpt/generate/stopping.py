"""Where a text ends: stop sequences of tokens or characters in a stream."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any


class StopMatcher:
    """Finds stop sequences in a stream, and says how many of its items are certain to be no part of one.

    Items are token ids or characters. An item is held back as long as it may be the beginning of a stop sequence.
    """

    def __init__(self, sequences: Iterable[Sequence[Hashable]]) -> None:
        self.sequences = {tuple(sequence) for sequence in sequences if len(sequence)}
        self.beginnings = {sequence[:n] for sequence in self.sequences for n in range(1, len(sequence))}
        self.longest = max(map(len, self.sequences), default=0)
        self.held: list[Any] = []
        """The latest items: a beginning of a stop sequence, or the whole of it once `is_stopped`."""
        self.is_stopped = False

    def push(self, item: Hashable) -> int:
        """Take the next item; the first so many of the held ones, counting it, may go out."""
        self.held.append(item)
        n_held = self._longest_tail(self.sequences)
        self.is_stopped = n_held > 0
        n_held = n_held or self._longest_tail(self.beginnings)
        n_ready = len(self.held) - n_held
        del self.held[:n_ready]
        return n_ready

    def _longest_tail(self, known: set[tuple]) -> int:
        """How many of the latest items form one of the `known` sequences; the longest counts."""
        lengths = range(min(self.longest, len(self.held)), 0, -1)
        return next((n for n in lengths if tuple(self.held[-n:]) in known), 0)


def stop_at_text(pieces: Iterable[str], stops: Iterable[str]) -> Iterator[str]:
    """The pieces of a text up to the first of the strings `stops`, which may spread over several pieces."""
    matcher, held = StopMatcher(stops), ""
    for piece in pieces:
        if not matcher.sequences:
            yield piece
            continue
        ready = ""
        for character in piece:
            held += character
            n_ready = matcher.push(character)
            ready, held = ready + held[:n_ready], held[n_ready:]
            if matcher.is_stopped:
                break
        if ready:
            yield ready
        if matcher.is_stopped:
            return
    if held:
        yield held
