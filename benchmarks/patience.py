"""Which peers are too slow to be timed on a case: some take minutes in float16 on a CPU."""

from __future__ import annotations

TIMES = 10.0  # how many times as long as this library a peer may take for forward and backward
LEAST = 0.2  # seconds that any peer may take

Key = tuple[str, str, str]  # name, layout and dtype


class Patience:
    """Remembers each peer's best rate over the cases, and tells when it would take too long on one.

    Args:
        times: how many times as long as the fastest of this library's backends a peer may take.
        least: seconds that every peer may take.
    """

    def __init__(self, times: float = TIMES, least: float = LEAST) -> None:
        self.times, self.least = times, least
        self._rates: dict[Key, float] = {}

    def why_not(self, key: Key, flops: int, ours: float) -> str | None:
        """Return why a peer is not even tried on a case of `flops` that takes this library `ours` s, or None."""
        rate = self._rates.get(key)
        if rate is None or flops / rate <= self._limit(ours):
            return None
        return self._reason(flops / rate, ours, "would take at its best rate so far")

    def unsure(self, key: Key, seconds: float, ours: float) -> bool:
        """Tell whether a first run of `seconds` needs a second one: libraries prepare kernels at the first call."""
        return seconds > self._limit(ours) or (seconds > self.least / 4 and key not in self._rates)

    def after(self, key: Key, flops: int, seconds: float, ours: float) -> str | None:
        """Note a peer's run of `seconds`; return why the peer is not timed then, or None."""
        if seconds > self.least / 4:  # a shorter one says more about a first run than about the next maps
            self._rates[key] = max(self._rates.get(key, 0.0), flops / seconds)
        return None if seconds <= self._limit(ours) else self._reason(seconds, ours, "took")

    def _limit(self, ours: float) -> float:
        return max(self.least, self.times * ours)

    def _reason(self, seconds: float, ours: float, verb: str) -> str:
        return f"slow: forward and backward {verb} {seconds:.2g} s, {seconds / ours:.0f} times ours"
