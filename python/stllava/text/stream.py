"""Text while its tokens come: whole characters, each once, nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stllava.text.interface import AnyTokenizer

__all__ = ["TextStream"]

_HALF = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one continuation.

    What `add` and `close` return, joined, is `text`: the tokens' text without white space at either end, cut before the stop string that is complete
    first (of several that one token completes, the one that begins first). A piece is held back as long as it may be the beginning of a stop string,
    half of a character, or white space at the end. Special tokens, and ids of a padded vocabulary that the tokenizer does not know, have no text.

    Only the last tokens are decoded again for each new one: their text may depend on each other, that of older ones does not.
    """

    def __init__(self, tokenizer: AnyTokenizer, stop: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._silent = frozenset(tokenizer.special_ids.values())
        self._stop = [word for word in stop if word]
        self._ids: list[int] = []
        self._begin = self._end = 0  # of the tokens whose text is known and which the next ones are decoded with
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What is certain now and was not before; "" once `stopped`."""
        if self.stopped or token in self._silent or token >= self._tokenizer.vocab_size:
            return ""
        self._ids.append(token)
        return self._take(last=False)

    def close(self) -> str:
        """The rest: there are no more tokens."""
        return "" if self.stopped else self._take(last=True)

    def _take(self, *, last: bool) -> str:
        decode = self._tokenizer.decode
        known, text = decode(self._ids[self._begin:self._end]), decode(self._ids[self._begin:])
        if len(text) > len(known) and (last or not text.endswith(_HALF)):
            self._held += text[len(known):]
            self._begin, self._end = self._end, len(self._ids)
        cut = min((at for at in map(self._held.find, self._stop) if at >= 0), default=-1)
        self.stopped = cut >= 0
        if self.stopped:
            self._held = self._held[:cut]
        certain = self._held if last or self.stopped else self._held[:len(self._held) - self._begun_stop()]
        piece = certain.rstrip()
        self._held = self._held[len(piece):]
        if not self.text:
            piece = piece.lstrip()
        self.text += piece
        return piece

    def _begun_stop(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = min(max(map(len, self._stop), default=0) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if any(word.startswith(self._held[-n:]) for word in self._stop)), 0)
