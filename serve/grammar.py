"""Grammars are compiled in both processes: the api process refuses what is none, the engine follows what it is sent."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from wave64.serve.messages import Vocabulary


def compiler(vocabulary: Vocabulary, vocab_size: int, end_ids: frozenset[int] = frozenset()) -> Callable[[str], Any]:
    """A function that compiles a grammar for this vocabulary, or raises ValueError with the reason why it cannot. To
    make it takes a second for a large vocabulary."""
    try:
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    except ImportError:
        raise ValueError("llguidance is not installed on the server: pip install llguidance") from None
    try:
        tokenizer = LLTokenizer(vocabulary.tokenizer, n_vocab=vocab_size,
                                eos_token=sorted({*vocabulary.end_ids, *end_ids}))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is no Exception; the server serves without grammars
        raise ValueError(f"llguidance {version('llguidance')} does not take the model's tokenizer, and 1.7 or later is "
                         f"needed: {type(error).__name__}: {error}") from None

    def compiled(source: str) -> LLMatcher:
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        matcher.compute_bitmask()  # the first takes longest, and copies have what it found
        if matcher.is_error():
            raise ValueError("no answer can have this form")
        return matcher

    return compiled
