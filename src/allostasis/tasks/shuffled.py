"""Rows of a store too large for memory, in a random order that reads the disk in long stretches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

Rows = np.ndarray
"""Numbers of rows, int64."""


class ShuffleBuffer:
    """Batches of all rows, each once an epoch, from a buffer that is filled block by block.

    Blocks come in a random order. Whenever the buffer holds `buffer_rows` or more it is shuffled
    and drawn from until it is half empty; at the end it is emptied. The last rows, fewer than a
    batch, are left out; which ones is chance. The order is a function of the seed alone: to go on
    at a batch, the choices before it are made again without a row being read.

    Args:
        n_rows: Rows of the store.
        read: Rows by number; called for whole blocks, each number ascending.
        batch_size: Rows a batch.
        block_rows: Rows read in one stretch.
        buffer_rows: Rows from which on the buffer is drawn from.
        seed: Of the order.
    """

    def __init__(
        self,
        *,
        n_rows: int,
        read: Callable[[Rows], np.ndarray],
        batch_size: int,
        block_rows: int,
        buffer_rows: int,
        seed: tuple[int, int],
    ) -> None:
        self.n_rows, self.read, self.batch_size = n_rows, read, batch_size
        self.block_rows, self.buffer_rows, self.seed = block_rows, buffer_rows, seed

    def batches(self, start: int = 0) -> Iterator[tuple[Rows, np.ndarray]]:
        """Batches from number `start` on: the rows' numbers and what they hold."""
        rng = np.random.default_rng(self.seed)
        held = np.empty(0, dtype=np.int64)
        pool: _Pool | None = None  # what is held, once a batch is to be given
        done = 0
        blocks = rng.permutation(-(-self.n_rows // self.block_rows))
        for place, block in enumerate(blocks):
            first = int(block) * self.block_rows
            new = np.arange(first, min(first + self.block_rows, self.n_rows))
            if pool is not None:
                pool.add(self.read(new))
            held = np.concatenate([held, new])
            is_last = place == len(blocks) - 1
            if len(held) < self.buffer_rows and not is_last:
                continue
            order = rng.permutation(len(held))
            held = held[order]
            if pool is not None:
                pool.order(order)
            kept = 0 if is_last else self.buffer_rows // 2
            n_batches = max(0, len(held) - kept) // self.batch_size
            for number in range(n_batches):
                if done >= start:
                    if pool is None:
                        pool = self._filled(held)
                    chosen = slice(number * self.batch_size, (number + 1) * self.batch_size)
                    yield held[chosen], pool.rows(chosen)
                done += 1
            used = n_batches * self.batch_size
            held = held[used:]
            if pool is not None:
                pool.drop(used)

    def _filled(self, rows: Rows) -> _Pool:
        left = self.buffer_rows // 2 + self.batch_size  # at most, once it was drawn from
        most = min(self.n_rows, max(self.buffer_rows, left) + self.block_rows)
        order = np.argsort(rows)
        pool = _Pool(most)
        for first in range(0, len(rows), self.block_rows):
            pool.add(self.read(rows[order[first : first + self.block_rows]]))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        pool.order(back)
        return pool


class _Pool:
    """Rows in an order that changes while none of them moves.

    Args:
        size: Most rows that are held at once.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.data = np.empty(0)  # of the rows' own shape and type once there are some
        self.places, self.free = np.arange(0), np.arange(size)

    def add(self, rows: np.ndarray) -> None:
        """Hold more rows, after the others."""
        if not len(self.data):
            self.data = np.empty((self.size, *rows.shape[1:]), dtype=rows.dtype)
        places, self.free = np.split(self.free, [len(rows)])
        self.data[places] = rows
        self.places = np.concatenate([self.places, places])

    def order(self, order: Rows) -> None:
        """Put the rows in another order."""
        self.places = self.places[order]

    def rows(self, chosen: slice) -> np.ndarray:
        """Some rows, copied."""
        return self.data[self.places[chosen]]

    def drop(self, n: int) -> None:
        """Forget the first rows."""
        dropped, self.places = np.split(self.places, [n])
        self.free = np.concatenate([self.free, dropped])
