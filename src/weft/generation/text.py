"""Text tokens to text, as they come."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"


class TextStream:
    """The text of one run of tokens, handed out in whole characters.

    A token may hold only some bytes of a character, which read as replacement characters at the end of the text until
    the rest has come: those are held back. What is handed out in all is `detokenize` of the whole run.
    """

    def __init__(self, detokenize: Callable[[Sequence[int]], str]) -> None:
        self._detokenize = detokenize
        self._ids: list[int] = []
        self._given = 0

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._ids.append(token)
        return self._give(self._detokenize(self._ids).rstrip(REPLACEMENT))

    def flush(self) -> str:
        """The rest of the run, broken characters included; the next token starts a new run."""
        rest = self._give(self._detokenize(self._ids))
        self._ids, self._given = [], 0
        return rest

    def _give(self, text: str) -> str:
        given, self._given = self._given, len(text)
        return text[given:]
