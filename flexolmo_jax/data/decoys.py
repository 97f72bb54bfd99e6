"""Decoys: made-up text that belongs to nobody.

An owner can hold its own text against public text only; it never sees what the other owners have. A router row that
learned nothing but "mine or public" may answer to strangers' text too, and then its expert takes tokens that are not
its own. Decoys stand in for the strangers: text with a regular structure that
is neither the owner's nor public. Half of them are public text whose ids went through a random substitution, the other
half comes from random Markov chains over random subsets of the ids that public text uses. Into every second one of
either kind short pieces of the owner's text are set: strangers too write a comma, a number or a name now and then, and
a few of the owner's tokens in a strange place are not the owner's text.
"""

import numpy as np

from flexolmo_jax.data.packing import Rows, RowSource, spread

_MOST_SYMBOLS = 64
_SPLICE_EVERY = 8
"""One piece of the owner's text in so many tokens of a decoy."""
_LONGEST_SPLICE = 5
_CONCENTRATIONS = (0.03, 0.1, 0.3, 1.0)
"""Of the Dirichlet distribution that a chain's transitions are drawn from: from almost fixed to almost uniform."""


class Decoys:
    """Random access to rows of decoys; row `i` is a pure function of (public text, seed, `i`)."""

    def __init__(self, public: RowSource, own: RowSource, seed: int):
        self._public = public
        self._own = own
        self._seed = seed
        self._ids = np.union1d(*(_ids_in_use(rows) for rows in (public, own)))

    def __len__(self) -> int:
        return len(self._public)

    def __getitem__(self, index: int) -> Rows:
        rng = np.random.default_rng((self._seed, index))
        rows = self._public[index]
        tokens = np.append(rows.inputs, rows.targets[-1:])
        tokens = self._substitute(tokens, rng) if index % 2 else self._chain(len(tokens), rng)
        if index // 2 % 2:
            tokens = self._splice(tokens, rng)
        return rows._replace(inputs=tokens[:-1], targets=tokens[1:])

    def _substitute(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        table = np.arange(max(self._ids.max(), tokens.max()) + 1, dtype=np.int32)
        table[self._ids] = rng.permutation(self._ids)
        return table[tokens]

    def _chain(self, length: int, rng: np.random.Generator) -> np.ndarray:
        count = int(rng.integers(3, min(_MOST_SYMBOLS, len(self._ids)) + 1))
        symbols = rng.choice(self._ids, count, replace=False)
        concentration = np.full(count, rng.choice(_CONCENTRATIONS))
        transitions = rng.dirichlet(concentration, count).cumsum(axis=1)
        state, states = int(rng.integers(count)), np.empty(length, np.int64)
        for position, draw in enumerate(rng.random(length)):
            state = min(int(np.searchsorted(transitions[state], draw)), count - 1)
            states[position] = state
        return symbols[states].astype(np.int32)

    def _splice(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        own, tokens = self._own[int(rng.integers(len(self._own)))].inputs, tokens.copy()
        for start in range(0, len(tokens), _SPLICE_EVERY):
            at = start + int(rng.integers(_SPLICE_EVERY))
            length = min(int(rng.integers(1, _LONGEST_SPLICE + 1)), len(own), max(0, len(tokens) - at))
            source = int(rng.integers(len(own) - length + 1))
            tokens[at : at + length] = own[source : source + length]
        return tokens


def _ids_in_use(rows: RowSource) -> np.ndarray:
    """Ids that occur in a few evenly spaced rows."""
    return np.unique(np.concatenate([rows[index].inputs for index in spread(len(rows), 256)]))
