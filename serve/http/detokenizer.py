"""Tokens to text as they arrive, and stop strings in that text. Both cost the same per token however long the text is.

The text of a completion is what these two make of its tokens, streamed or not; so the two cannot differ.
"""

from wave64.serve.http.tokenizer import Tokenizer

CONTEXT = 12  # tokens that are decoded again with the new ones: a leading space is one only after something
WINDOW = 24  # tokens kept before the oldest are dropped; four times as many if no position to cut is safe
UNKNOWN = "\ufffd"  # the result of decoding an incomplete or invalid UTF-8 sequence
PATIENCE = 8  # of those at the end of the text may be a character on its way; three of any longer run


class Detokenizer:
    """push(ids) returns the text that they add, without incomplete characters; flush() returns the rest at the end."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = prompt_ids[-CONTEXT:]
        self._text = self._decode(self._window)
        self._shown = len(self._text)  # characters of it that were returned

    def push(self, ids: list[int]) -> str:
        """The text that is certain now: all but a last character that is not complete."""
        self._window += ids
        self._text = self._decode(self._window)
        new = self._show(self._certain())
        if len(self._window) > WINDOW:
            self._forget()
        return new

    def flush(self) -> str:
        """The text of tokens whose last character is incomplete, when no more tokens follow."""
        return self._show(self._text)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)

    def _show(self, text: str) -> str:
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new

    def _certain(self) -> str:
        """The beginning of the window's text that no later token changes; as a rule, all of it."""
        if not self._text.endswith(UNKNOWN):
            return self._text
        known = self._text.rstrip(UNKNOWN)
        for end in range(len(self._window) - 1, len(self._window) - 4, -1):
            # Some decoders spoil a whole run of bytes for one incomplete character after it, so leave its tokens out.
            text = self._decode(self._window[: max(end, 0)])
            if not text.endswith(UNKNOWN):
                return max(text, known, key=len)
        hopeless = len(self._text) - len(known) > PATIENCE  # invalid UTF-8 stays invalid
        return self._text[:-3] if hopeless else known

    def _forget(self) -> None:
        """Drop the oldest tokens where the rest reads the same without them; after a while, anywhere."""
        keep, text = CONTEXT, ""
        for keep in range(CONTEXT, CONTEXT + 4):
            text = self._decode(self._window[-keep:])
            if self._text.endswith(text) and not text.startswith(UNKNOWN):
                break
        else:
            if len(self._window) < 4 * WINDOW:
                return
        shown = self._shown - (len(self._text) - len(text))
        if shown >= 0:
            self._window, self._text, self._shown = self._window[-keep:], text, shown


class StopStrings:
    """push(text) returns the text that may be shown: all but an end that could be the start of a stop string."""

    def __init__(self, stops: list[str], keep: bool = False) -> None:
        """`keep`: a stop string that was found is part of the text."""
        self._stops = stops
        self._keep = keep
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, may_stop: bool = True) -> str:
        """The text up to the stop string that ends first, once there is one (then `matched` says which); the rest is
        dropped. may_stop: whether one may end in this text."""
        held, text = self._held, self._held + text
        found = [(at, stop) for stop in self._stops if may_stop and (at := _find(text, stop, len(held))) >= 0]
        if found:
            at, self.matched = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self._held = ""
            return text[: at + len(self.matched)] if self._keep else text[:at]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """The text held back, at the end of a text without a stop string."""
        held, self._held = self._held, ""
        return held


def _find(text: str, stop: str, start: int) -> int:
    """The offset in `text` of the first `stop` that ends after `start`; -1 without one."""
    return text.find(stop, max(0, start + 1 - len(stop)))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, `stop` itself excluded."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
