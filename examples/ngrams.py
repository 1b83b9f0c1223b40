"""What the last few characters alone say: counts, interpolated over the lengths of the context.

The baseline of the examples on text.  A model that does not beat it has learned nothing that a table of counts, filled
in seconds, does not know.

Legend: N characters, k length of a context.
"""

from __future__ import annotations

import numpy as np


class NGrams:
    """P(target | the last k characters), by Witten and Bell's interpolation: k = 0, 1, ... ``longest``.

    The longer context counts as much as it has been seen more often than it has been followed by something new; the
    rest is left to the context that is one shorter, and at last to all targets alike.

    Args:
        characters: (N,) numbers below ``vocabulary``.
        targets: (N,) numbers below ``kinds``; that of place i goes with the context that ends with character i.
        longest: the longest context, in characters.

    Raises:
        ValueError: contexts that are too long to be numbered, or longer than the text.
    """

    def __init__(self, characters: np.ndarray, targets: np.ndarray, vocabulary: int, kinds: int, longest: int) -> None:
        most = int(63 / np.log2(max(vocabulary, kinds, 2))) - 1  # contexts and targets are numbers of 63 bits
        if not 0 <= longest <= most:
            raise ValueError(f"expected contexts of 0 to {most} of {vocabulary} characters, got longest={longest}")
        if not len(characters) == len(targets) > longest:
            raise ValueError(
                f"expected a target for each character, and more of them than the longest context has, {longest}; "
                f"got {len(characters)} characters and {len(targets)} targets"
            )
        self.vocabulary, self.kinds, self.longest = vocabulary, kinds, longest
        self._tables = []  # for each k: what has been seen with its counts; contexts with theirs, and different targets
        for length in range(longest + 1):
            pairs = self._contexts(characters, length) * kinds + targets[longest:]
            seen, counts = np.unique(pairs, return_counts=True)
            contexts, places = np.unique(seen // kinds, return_inverse=True)
            self._tables.append((seen, counts, contexts, np.bincount(places, counts), np.bincount(places)))

    def _contexts(self, characters: np.ndarray, length: int) -> np.ndarray:
        """(N - longest,): the last ``length`` characters up to each place, as one number."""
        contexts = np.zeros(len(characters) - self.longest, np.int64)
        for back in range(length):
            first = self.longest - back
            contexts += characters[first : first + len(contexts)] * self.vocabulary**back
        return contexts

    def chance(self, characters: np.ndarray, targets: np.ndarray | int) -> np.ndarray:
        """(N - longest,): the probability of each target, from the first place that has a whole context."""
        wanted = targets if isinstance(targets, int) else targets[self.longest :]
        chance = np.full(len(characters) - self.longest, 1 / self.kinds)
        for length, (seen, counts, contexts, totals, different) in enumerate(self._tables):
            context = self._contexts(characters, length)
            count = _looked_up(seen, counts, context * self.kinds + wanted)
            total, new = _looked_up(contexts, totals, context), _looked_up(contexts, different, context)
            chance = np.where(total > 0, (count + new * chance) / np.maximum(total + new, 1), chance)
        return chance

    def likeliest(self, characters: np.ndarray) -> np.ndarray:
        """(N - longest,): the target of the largest probability."""
        return np.argmax([self.chance(characters, kind) for kind in range(self.kinds)], axis=0)


def _looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each key, which are sorted; zero for one that is not there."""
    places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
