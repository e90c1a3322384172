"""When to record: often while the held-out accuracy is on its way up, seldom elsewhere."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Annotated

from annotated_types import Ge, Gt, Le


class Cadence:
    """Decides at each cheap probe of the held-out accuracy whether a full record is due.

    A record is due at every probe while low < accuracy < high, or when the last two probes lie on
    both sides of that band; then for `hysteresis` more probes; else every `sparse_every` steps.
    Only held-out accuracy may be given: training accuracy reaches 1 long before anything is learnt.

    Args:
        low: Lower edge of the band.
        high: Upper edge of the band.
        dense_every: Steps between probes.
        sparse_every: Steps between records outside the band; a multiple of `dense_every`.
        hysteresis: Probes for which dense recording goes on after the band was left.

    Raises:
        ValueError: low is not below high, or sparse_every is no multiple of dense_every.
    """

    def __init__(
        self,
        *,
        low: Annotated[float, Ge(0), Le(1)] = 0.15,
        high: Annotated[float, Ge(0), Le(1)] = 0.85,
        dense_every: Annotated[int, Gt(0)] = 10,
        sparse_every: Annotated[int, Gt(0)] = 100,
        hysteresis: Annotated[int, Ge(0)] = 5,
    ) -> None:
        if low >= high:
            raise ValueError(f"low={low} is not below high={high}")
        if sparse_every % dense_every:
            raise ValueError(f"{sparse_every=} is no multiple of {dense_every=}")
        self.low, self.high = low, high
        self.dense_every, self.sparse_every, self.hysteresis = dense_every, sparse_every, hysteresis
        self.last: float | None = None
        self.dense_left = 0

    @property
    def is_dense(self) -> bool:
        """Whether the last probe was in the band or shortly after: a record is due now."""
        return self.dense_left > 0

    def is_due(self, step: int, accuracy: float) -> bool:
        """Take note of a probe and say whether to record at this step.

        Args:
            step: Optimiser updates done.
            accuracy: Held-out accuracy of the probe, in [0, 1].
        """
        last, self.last = self.last, accuracy
        inside = self.low < accuracy < self.high
        jumped = last is not None and min(last, accuracy) <= self.low < self.high <= max(
            last, accuracy
        )
        if inside or jumped:
            self.dense_left = self.hysteresis
            return True
        if self.dense_left:
            self.dense_left -= 1
            return True
        return step % self.sparse_every == 0

    def state_dict(self) -> dict[str, float | int | None]:
        """What an interrupted run needs to decide as an uninterrupted one would."""
        return {"last": self.last, "dense_left": self.dense_left}

    def load_state_dict(self, state: dict[str, float | int | None]) -> None:
        """Take up where `state_dict` left off."""
        self.last = state["last"]
        self.dense_left = int(state["dense_left"] or 0)


class Plan:
    """What a run records and how often: the config group `metrics`.

    Args:
        record: Names of metrics to record, or patterns such as `amplitude_*`; what a pattern that
            begins with `!` matches is left out.
        evaluate: Metrics read at every evaluation, whatever the cadence.
        low: Lower edge of the band of held-out accuracy in which recording is dense.
        high: Upper edge of that band.
        dense_every: Updates between probes, and between records inside the band.
        sparse_every: Updates between records outside the band.
        hysteresis: Probes for which dense recording goes on after the band was left.
        drift_lag: Updates between the two sides of a drift; drift is read on its multiples only.
        checkpoint_every: Updates between resume points.

    Raises:
        ValueError: drift_lag or checkpoint_every is no multiple of dense_every.
    """

    def __init__(
        self,
        *,
        record: list[str],
        evaluate: list[str],
        low: Annotated[float, Ge(0), Le(1)] = 0.15,
        high: Annotated[float, Ge(0), Le(1)] = 0.85,
        dense_every: Annotated[int, Gt(0)] = 10,
        sparse_every: Annotated[int, Gt(0)] = 100,
        hysteresis: Annotated[int, Ge(0)] = 5,
        drift_lag: Annotated[int, Gt(0)] = 500,
        checkpoint_every: Annotated[int, Gt(0)] = 2_500,
    ) -> None:
        for name, value in (("drift_lag", drift_lag), ("checkpoint_every", checkpoint_every)):
            if value % dense_every:
                raise ValueError(f"metrics.{name}={value} is no multiple of {dense_every=}")
        self.record, self.evaluate = list(record), list(evaluate)
        self.drift_lag, self.checkpoint_every = drift_lag, checkpoint_every
        self.cadence = Cadence(
            low=low,
            high=high,
            dense_every=dense_every,
            sparse_every=sparse_every,
            hysteresis=hysteresis,
        )

    def has(self, metric: str) -> bool:
        """Whether a metric of this name is to be recorded.

        Example:
            >>> plan = Plan(record=["*", "!margin*"], evaluate=[])
            >>> plan.has("accuracy"), plan.has("margin_loss")
            (True, False)
        """
        refused = [pattern[1:] for pattern in self.record if pattern.startswith("!")]
        is_refused = any(fnmatch(metric, pattern) for pattern in refused)
        return not is_refused and any(fnmatch(metric, pattern) for pattern in self.record)
