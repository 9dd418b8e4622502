"""How far a long step is: a bar where somebody watches a terminal or a notebook, whole lines where a log is kept."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from tqdm.asyncio import tqdm_asyncio
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

# Seconds between two lines of a log.
_PAUSE = 30.0


class _Lines:
    """What of tqdm is used here, as a line of the log from time to time and one at the end."""

    def __init__(self, iterable: Iterable[Any] | None, initial: float, **shown: Any) -> None:
        self.iterable, self.n, self.shown = iterable, initial, {**shown, "initial": initial}
        self._start = self._said = time.monotonic()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.iterable or ():
                yield item
                self.update()

    def update(self, n: float = 1) -> None:
        """Count, and say so if the last line is old enough."""
        self.n += n
        if time.monotonic() - self._said >= _PAUSE:
            self._say()

    def set_postfix_str(self, postfix: str, refresh: bool = True) -> None:
        """Keep what the next line ends with."""
        self.shown["postfix"] = postfix or None

    def close(self) -> None:
        """Say how long it took, if it took long enough for a line before."""
        if self._said > self._start:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        logger.info(tqdm.format_meter(self.n, elapsed=self._said - self._start, ncols=0, **self.shown))


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    total: float | None = None,
    unit: str = "it",
    unit_scale: bool = False,
    initial: float = 0,
    disable: bool = False,
    **options: Any,
) -> Any:
    """Return tqdm's bar, or, where standard error is no terminal and our log is shown, what writes a line each 30 s.

    Args:
        iterable: What is gone through; None to count by `update`.
        desc: What is being done.
        total: How much of it there is. Default: the iterable's length.
        unit: Of what.
        unit_scale: Shorten large counts, such as 12.3k.
        initial: How much was done before.
        disable: Show nothing.
        **options: Further ones of tqdm, for the bar.

    Example:
        >>> sum(progress([1, 2, 3], desc="Adding", disable=True))
        6
    """
    total = len(iterable) if total is None and isinstance(iterable, Sized) else total
    shown: dict[str, Any] = {"total": total, "unit": unit, "unit_scale": unit_scale}
    in_terminal = sys.stderr is not None and sys.stderr.isatty()
    if disable or in_terminal or tqdm is not tqdm_asyncio or not logger.isEnabledFor(logging.INFO):
        shown |= {**options, **({"disable": True} if disable else {})}
        return tqdm(iterable, desc=desc, initial=initial, **shown)
    return _Lines(iterable, initial, prefix=desc, **shown)
