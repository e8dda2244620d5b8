"""Regular expressions from files and callers, matched within a time limit.

Python's `re` has no time limit, and no rule about the text of a pattern finds every slow one:
`(a|a)*b` has no star within a star, and `.*.*.*.*.*!` has no star around anything. The package
`regex`, which transformers also needs, reads the same language and can stop in time.
"""

from __future__ import annotations

import functools
import re
import time
from typing import Any

import regex

from compacter_jax.messages import quote, reason_of

# The library's own patterns take microseconds.
MOST_SECONDS = 1.0
_LONGEST = 20_000
# In seconds of the thread's own computing time. Faster matches are not counted, however many there
# are.
_SLOW = 1e-3
# The number of texts whose matches a pattern remembers; a model has at most thousands of modules.
_MOST_FOUND = 2**14


class Pattern:
    """A compiled regular expression; all its slow matches together may take `MOST_SECONDS`.

    Attributes:
      pattern: text of the expression.
      groupindex: name of a group -> its number.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > _LONGEST:
            raise ValueError(
                f"the regular expression {quote(pattern, 100)} has {len(pattern):,} characters; "
                f"use at most {_LONGEST:,}"
            )
        try:
            re.compile(pattern)  # refuses syntax that only `regex` knows, such as recursion
            self._compiled = regex.compile(pattern, regex.VERSION0)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            reason = reason_of(error, 100)
            raise ValueError(
                f"{quote(pattern, 200)} is not a valid regular expression: {reason}"
            ) from None
        self.pattern = pattern
        self.groupindex: dict[str, int] = dict(self._compiled.groupindex)
        self._spent = 0.0
        self._found: dict[str, Any] = {}

    def fullmatch(self, text: str) -> Any:
        """Returns the match of the whole `text`, or None, as `re.fullmatch` does.

        Raises:
          ValueError: if the pattern has taken more than `MOST_SECONDS` of computing time.
        """
        if text in self._found:  # every trace of a model asks about the same paths
            return self._found[text]
        start = time.thread_time()
        try:
            match = self._compiled.fullmatch(text, timeout=MOST_SECONDS)
        except (TimeoutError, MemoryError):
            match, self._spent = None, MOST_SECONDS
        if (took := time.thread_time() - start) > _SLOW:
            self._spent += took
        if self._spent >= MOST_SECONDS:
            raise ValueError(
                f"the regular expression {quote(self.pattern, 200)} takes too long to match; "
                "write it without nested repetitions"
            )
        if len(self._found) < _MOST_FOUND:
            self._found[text] = match
        return match


@functools.lru_cache(maxsize=1024)
def compiled(pattern: str) -> Pattern:
    """Returns the compiled pattern, from a cache after the first call.

    Raises:
      ValueError: if `pattern` is not a regular expression, or is too long.
    """
    return Pattern(pattern)
