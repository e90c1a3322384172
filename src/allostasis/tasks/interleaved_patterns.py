"""Interleaved patterns: two repeating streams, token by token in turn; which one comes next?"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from annotated_types import Ge, Gt
from jaxtyping import Float64, Int64
from torch import Tensor

from allostasis.core.seeding import derive
from allostasis.tasks.sequences import Ceiling, Sequences

Split = Literal["train", "test", "calibration", "probe", "classes"]
GROUPS = ("all", "predictable", "last")
N_CLASSES = 32
"""Answers of the class probe, or the whole vocabulary where it is smaller."""


class Steps:
    """A loader whose batches are nothing: the module asks the task for the batch of its step."""

    def __init__(self, times: int | None) -> None:
        self.times = times

    def __iter__(self) -> Iterator[int]:
        return itertools.count() if self.times is None else iter(range(self.times))


class InterleavedPatterns(L.LightningDataModule):
    """Two streams that repeat with their own periods, interleaved A B A B ...

    Each stream draws a period L, uniform on period_low..period_high, and L tokens, independent and
    uniform on the vocabulary, and repeats them. An item has seq_len + 1 tokens; a position's target
    is the next token. A target is `predictable` where its index within its stream is above the
    stream's period: at index L the period is still a guess. An item is a function of seed, split
    and index alone, whatever order, worker or batch it comes in.

    Args:
        seed: The run's seed.
        seq_len: Positions that a model reads.
        vocab_size: Tokens.
        period_low: Shortest period.
        period_high: Longest period.
        n_train: Training sequences of an epoch.
        n_val: Held-out sequences, the same at every evaluation.
        n_record: The first held-out sequences, which are looked at during training; all of them
            are at the end.
        n_calibration: Tokens, at least, of the split that interventions are calibrated on.
        n_contexts: Sequences of each class of the class probe.
        fresh: Whether each epoch has new sequences; otherwise the same ones in a new order.
        batch_size: Sequences of a training batch.
        probe_size: Sequences that routing is compared on from step to step.

    Raises:
        ValueError: The periods do not fit each other or the sequence.

    Example:
        >>> task = InterleavedPatterns(seed=0, seq_len=16, vocab_size=64)
        >>> item = task.item("test", 0)
        >>> item.shape, bool((item == task.item("test", 0)).all())
        (torch.Size([17]), True)
    """

    def __init__(
        self,
        *,
        seed: int,
        seq_len: Annotated[int, Ge(4)] = 128,
        vocab_size: Annotated[int, Ge(8)] = 4096,
        period_low: Annotated[int, Ge(1)] = 2,
        period_high: Annotated[int, Ge(1)] = 7,
        n_train: Annotated[int, Gt(0)] = 10_000,
        n_val: Annotated[int, Gt(0)] = 2_000,
        n_record: Annotated[int, Gt(0)] = 32,
        n_calibration: Annotated[int, Gt(0)] = 50_000,
        n_contexts: Annotated[int, Ge(2)] = 64,
        fresh: bool = True,
        batch_size: Annotated[int, Gt(0)] = 64,
        probe_size: Annotated[int, Ge(2)] = 64,
    ) -> None:
        super().__init__()
        if period_low > period_high:
            raise ValueError(
                f"period_low={period_low} is above period_high={period_high}; give a range"
            )
        if period_high >= seq_len // 2:
            raise ValueError(
                f"period_high={period_high}: a stream of seq_len={seq_len} has {seq_len // 2} "
                f"targets and would not repeat; take seq_len of at least {2 * period_high + 2}"
            )
        if batch_size > n_train:
            raise ValueError(f"batch_size={batch_size} is more than n_train={n_train}")
        self.seed, self.seq_len, self.vocab_size = seed, seq_len, vocab_size
        self.period_low, self.period_high = period_low, period_high
        self.n_train, self.n_val, self.n_record = n_train, n_val, min(n_record, n_val)
        self.n_calibration, self.n_contexts = n_calibration, n_contexts
        self.fresh, self.batch_size, self.probe_size = fresh, batch_size, probe_size
        self.n_classes = vocab_size

    # ------------------------------------------------------------------ items

    def item(self, split: Split, index: int) -> Int64[Tensor, " token"]:
        """The tokens of one item, seq_len + 1 of them."""
        return self._draw(split, [index])[0][0]

    def _draw(self, split: Split, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens of some items, and the periods of their two streams.

        An item's numbers are the counters 'index x blocks' and following of a Philox generator
        that is keyed by seed and split, so that neighbours are drawn in one call.
        """
        width = 2 + 2 * self.period_high
        blocks = -(-width // 4)  # a counter gives four numbers
        name = f"{derive(self.seed, 'data')}:{split}".encode()
        key = int.from_bytes(hashlib.sha256(name).digest()[:16], "big")
        raw = np.concatenate([
            np.random.Philox(key=key, counter=first * blocks).random_raw(4 * blocks * n)
            for first, n in _runs(indices)
        ]).reshape(len(indices), -1)  # fmt: skip
        n_periods = self.period_high - self.period_low + 1
        periods = self.period_low + raw[:, :2] % n_periods
        patterns = (raw[:, 2:width] % self.vocab_size).reshape(len(indices), 2, -1)
        tokens = np.empty((len(indices), self.seq_len + 1), dtype=np.int64)
        for stream in (0, 1):
            place = np.arange(tokens[:, stream::2].shape[1]) % periods[:, stream, None]
            tokens[:, stream::2] = np.take_along_axis(
                patterns[:, stream], place.astype(np.int64), axis=1
            )
        return torch.from_numpy(tokens), torch.from_numpy(periods.astype(np.int64))

    def sequences(self, split: Split, indices: Sequence[int]) -> Sequences:
        """Items as a batch."""
        return self._batch(*self._draw(split, indices))

    def _batch(self, tokens: Tensor, periods: Tensor) -> Sequences:
        index, stream = self._places()
        predictable = index > periods[:, stream]
        everywhere = torch.ones_like(predictable)
        last = everywhere & (torch.arange(self.seq_len) == self.seq_len - 1)
        return Sequences(
            tokens=tokens[:, :-1],
            targets=tokens[:, 1:],
            scored=everywhere,
            groups=dict(zip(GROUPS, (everywhere, predictable, last), strict=True)),
            headline="predictable",
        )

    def _places(self) -> tuple[Int64[Tensor, " position"], Int64[Tensor, " position"]]:
        """Of each target: its index within its stream, and the stream."""
        place = torch.arange(1, self.seq_len + 1)
        return place // 2, place % 2

    # ------------------------------------------------------------------ splits

    def train_batch(self, step: int) -> Sequences:
        """The batch of an update, a function of the update alone."""
        batches = self.n_train // self.batch_size
        epoch, batch = divmod(step, batches)
        at = range(batch * self.batch_size, (batch + 1) * self.batch_size)
        if self.fresh:
            first = epoch * self.n_train
            return self.sequences("train", range(first + at.start, first + at.stop))
        order = self._order(epoch)
        return self.sequences("train", [order[i] for i in at])

    def _order(self, epoch: int) -> list[int]:
        if self._ordered[0] != epoch:
            generator = torch.Generator().manual_seed(derive(self.seed, "order") + epoch)
            drawn = torch.randperm(self.n_train, generator=generator).tolist()
            self._ordered: tuple[int, list[int]] = (epoch, drawn)
        return self._ordered[1]

    _ordered = (-1, [])

    @cached_property
    def held_out(self) -> Sequences:
        """All held-out sequences."""
        return self.sequences("test", range(self.n_val))

    @cached_property
    def watched(self) -> Sequences:
        """The held-out sequences that are looked at during training."""
        return self.held_out.part(slice(self.n_record))

    @cached_property
    def probe(self) -> Sequences:
        """Fixed sequences on which routing is compared from step to step."""
        return self.sequences("probe", range(self.probe_size))

    @cached_property
    def calibration(self) -> Sequences:
        """Sequences that interventions take their numbers from; no result is read on them."""
        return self.sequences("calibration", range(-(-self.n_calibration // self.seq_len)))

    @cached_property
    def class_probe(self) -> Sequences:
        """Sequences in classes by the answer at the last position, n_contexts of each class.

        The class's token stands wherever the answer to the last position stood before.
        """
        n_classes = min(N_CLASSES, self.vocab_size)
        tokens, periods = self._draw("classes", range(n_classes * self.n_contexts))
        classes = torch.arange(len(tokens)) % n_classes
        answer, (_, stream) = tokens[:, -1:].clone(), self._places()
        in_stream = torch.arange(self.seq_len + 1) % 2 == stream[-1]
        tokens = torch.where((tokens == answer) & in_stream, classes[:, None], tokens)
        batch = self._batch(tokens, periods)
        return Sequences(**vars(batch) | {"classes": classes, "n_classes": n_classes})

    def train_dataloader(self) -> Steps:
        """Steps without end: the module counts its updates and asks for their batches."""
        return Steps(None)

    def test_dataloader(self) -> Steps:
        """One step."""
        return Steps(1)

    # ------------------------------------------------------------------ what can be reached

    def ceiling(self, sequences: Sequences) -> dict[str, Ceiling]:
        """The best that any predictor can expect on these positions, by group.

        Accuracy is the mean of the largest predictive probability, cross-entropy that of the
        predictive entropy. Of `predictable` positions a predictor may take it for granted that the
        period is over, for nothing else is counted there.
        """
        found = {is_over: self._best(sequences, is_over=is_over) for is_over in (False, True)}
        reached = {}
        for name, mask in sequences.groups.items():
            best, here = found[name == "predictable"], mask.cpu()
            reached[name] = Ceiling(
                accuracy=float(best.confidence[here].mean()),
                cross_entropy=float(best.entropy[here].mean()),
            )
        return reached

    def expected_accuracy(self, sequences: Sequences) -> Float64[Tensor, "sequence position"]:
        """How often the best predictor is right at each position, given what came before."""
        return self._best(sequences, is_over=False).confidence

    def _best(self, sequences: Sequences, *, is_over: bool) -> Prediction:
        return bayes_oracle(
            torch.cat([sequences.tokens, sequences.targets[:, -1:]], dim=1).cpu(),
            vocab_size=self.vocab_size,
            period_low=self.period_low,
            period_high=self.period_high,
            is_over=is_over,
        )

    def data(self) -> dict[str, Mapping[str, int | str]]:
        """What the run used, for run.json."""
        sets = {
            "test": self.held_out,
            "probe": self.probe,
            "calibration": self.calibration,
            "classes": self.class_probe,
        }
        return {name: {"n": len(part), "sha256": part.sha256} for name, part in sets.items()}


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Stretches of neighbouring indices: the first and how many."""
    first = last = None
    for index in indices:
        if first is None or last is None:
            first = index
        elif index != last + 1:
            yield first, last + 1 - first
            first = index
        last = index
    if first is not None and last is not None:
        yield first, last + 1 - first


class Prediction(NamedTuple):
    """What a predictor says at each position.

    Attributes:
        token: Its most likely next token.
        confidence: The probability it gives that token.
        entropy: Of its predictive distribution, in nats.
    """

    token: Int64[Tensor, "sequence position"]
    confidence: Float64[Tensor, "sequence position"]
    entropy: Float64[Tensor, "sequence position"]


def bayes_oracle(
    tokens: Int64[Tensor, "sequence token"],
    *,
    vocab_size: int,
    period_low: int,
    period_high: int,
    is_over: bool = False,
) -> Prediction:
    """The best predictor there is: it knows how items are drawn, and sees the tokens before.

    A stream of which k tokens were seen has period L with a weight of V^-min(k, L) where they
    repeat with L, else 0. If k >= L the next token is the one L before; otherwise any, uniformly.

    Args:
        tokens: Whole items, one more token than there are positions.
        vocab_size: V.
        period_low: Shortest period.
        period_high: Longest period.
        is_over: Whether it is told that k > L, as holds at `predictable` positions; where that
            leaves no period, its confidence is 0.

    Returns:
        Position by position; confidence in [0, 1], entropy in [0, ln V].

    Source:
        Bayes' rule; exact for any vocabulary.

    Example:
        >>> item = torch.tensor([[3, 5, 4, 5, 3, 5, 4, 5, 3]])  # periods 2 and 1
        >>> found = bayes_oracle(item, vocab_size=64, period_low=1, period_high=2)
        >>> found.token[0, -2:].tolist(), found.confidence[0, -1].item() > 0.99
        ([5, 3], True)
    """
    token = torch.zeros_like(tokens)
    confidence = torch.zeros(tokens.shape, dtype=torch.float64)
    entropy = torch.zeros_like(confidence)
    for start in (0, 1):
        stream = tokens[:, start::2]
        here = _predict(stream, vocab_size, range(period_low, period_high + 1), is_over=is_over)
        for whole, part in zip((token, confidence, entropy), here, strict=True):
            whole[:, start::2] = part
    return Prediction(token[:, 1:], confidence[:, 1:], entropy[:, 1:])


def _predict(
    stream: Int64[Tensor, "sequence place"], vocab_size: int, periods: range, *, is_over: bool
) -> Prediction:
    n_rows, length = stream.shape
    seen = torch.arange(length)
    weights, candidates, repeats = [], [], []
    for period in periods:
        before = torch.roll(stream, period, dims=1)
        broken = (stream != before) & (seen >= period)
        consistent = (broken.cumsum(dim=1) - broken.long()) == 0  # of what was seen before
        weight = torch.exp(-seen.clamp(max=period).double() * math.log(vocab_size))
        over = seen > period if is_over else torch.ones_like(seen, dtype=torch.bool)
        weights.append(torch.where(consistent & over, weight, 0.0))
        candidates.append(before)
        repeats.append((seen >= period).expand(n_rows, length))
    weight = torch.stack(weights, dim=-1)
    candidate, repeat = torch.stack(candidates, dim=-1), torch.stack(repeats, dim=-1)
    total = weight.sum(dim=-1, keepdim=True)
    weight = torch.where(total > 0, weight / total.clamp(min=torch.finfo(weight.dtype).tiny), 0.0)
    free = torch.where(repeat, 0.0, weight).sum(dim=-1) / vocab_size  # of each token
    same = (candidate[..., :, None] == candidate[..., None, :]) & repeat[..., None, :]
    mass = (same * weight[..., None, :]).sum(dim=-1) + free[..., None]
    mass = torch.where(repeat, mass, 0.0)
    twins = same.sum(dim=-1).clamp(min=1)  # periods that name the same token
    named = (repeat / twins).sum(dim=-1)
    best = mass.max(dim=-1)
    confidence = torch.maximum(best.values, free)
    token = candidate.gather(-1, best.indices[..., None])[..., 0]
    token = torch.where(best.values >= free.clamp(min=1e-300), token, 0)  # a guess: any token
    surprise = -torch.xlogy(mass, mass) * repeat / twins
    entropy = surprise.sum(dim=-1) - (vocab_size - named) * torch.xlogy(free, free)
    return Prediction(token, confidence, entropy.clamp(min=0.0))


def induction_oracle(
    tokens: Int64[Tensor, "sequence token"],
) -> Int64[Tensor, "sequence position"]:
    """What followed the last time that the stream's last token stood there; -1 where it never did.

    Args:
        tokens: Whole items, one more token than there are positions.

    Returns:
        Token ids, position by position; no direction.

    Source:
        Olsson et al. (2022), In-context Learning and Induction Heads, on one stream.

    Example:
        >>> induction_oracle(torch.tensor([[3, 5, 4, 5, 3, 5, 4]])).tolist()
        [[-1, -1, -1, -1, 5, 4]]
    """
    said = torch.full_like(tokens, -1)
    for start in (0, 1):
        stream = tokens[:, start::2]
        for place in range(2, stream.shape[1]):
            past, last = stream[:, : place - 1], stream[:, place - 1 : place]
            found = past == last
            order = torch.arange(1, place)
            at = (found * order).amax(dim=1)  # one past the last match, 0 if there is none
            follower = stream.gather(1, at[:, None])[:, 0]
            said[:, start + 2 * place] = torch.where(at > 0, follower, -1)
    return said[:, 1:]
