"""The phases of a grokking run: memorisation, circuit formation, cleanup, generalisation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

Change = Literal["began", "lost", "confirmed"]


class Hold:
    """A condition that counts from its first evaluation once it has held for `dwell` of them.

    Args:
        dwell: Consecutive evaluations for which the condition must hold. Nothing is confirmed
            within a run's first `dwell` evaluations, so that no detector can fire on its start.
    """

    def __init__(self, dwell: int) -> None:
        self.dwell = dwell
        self.seen = 0
        self.run = 0
        self.began: int | None = None
        self.confirmed: int | None = None

    def update(self, step: int, holds: bool) -> Change | None:
        """Take note of one evaluation; say what changed."""
        self.seen += 1
        if self.confirmed is not None:
            return None
        if not holds:
            lost, self.began, self.run = self.began is not None, None, 0
            return "lost" if lost else None
        self.run += 1
        first = self.began is None
        if self.began is None:
            self.began = step
        if self.run >= self.dwell and self.seen > self.dwell:
            self.confirmed = self.began
            return "confirmed"
        return "began" if first else None


class Phases:
    """Finds t_mem, t_clean, t_grok and t_loss while a run goes on.

    - t_mem: first evaluation with train accuracy >= 0.99, held.
    - t_grok: first with test accuracy >= `grok_accuracy`, held.
    - t_clean: first after t_mem with test loss below half of its running maximum, held.
    - t_loss: first with test loss < 0.1 nat (the published curve's rule, which does not ask that
      it holds).

    An event that does not come stays None: such a run is right-censored at its last step.

    Args:
        grok_accuracy: Test accuracy from which a run counts as generalising.
        dwell: Evaluations for which a condition must hold.
    """

    NAMES = ("t_mem", "t_clean", "t_grok", "t_loss")

    def __init__(
        self,
        *,
        grok_accuracy: Annotated[float, Gt(0), Le(1)] = 0.95,
        dwell: Annotated[int, Ge(1)] = 5,
    ) -> None:
        self.grok_accuracy, self.dwell = grok_accuracy, dwell
        self.holds = {name: Hold(dwell) for name in ("t_mem", "t_clean", "t_grok")}
        self.t_loss: int | None = None
        self.highest_loss = 0.0
        self.seen = 0

    def update(
        self, step: int, *, train_accuracy: float, test_accuracy: float, test_loss: float
    ) -> dict[str, Change]:
        """Take note of one evaluation.

        Args:
            step: Optimiser updates done.
            train_accuracy: On all training pairs.
            test_accuracy: On all held-out pairs.
            test_loss: Mean cross-entropy on the held-out pairs, nat.

        Returns:
            What changed, by event.
        """
        self.seen += 1
        self.highest_loss = max(self.highest_loss, test_loss)
        memorised = self.holds["t_mem"].began is not None and step > self.holds["t_mem"].began
        conditions = {
            "t_mem": train_accuracy >= 0.99,
            "t_clean": memorised and test_loss < self.highest_loss / 2,
            "t_grok": test_accuracy >= self.grok_accuracy,
        }
        if self.t_loss is None and test_loss < 0.1 and self.seen > self.dwell:
            self.t_loss = step
        changes: dict[str, Change] = {}
        for name, hold in self.holds.items():
            change = hold.update(step, conditions[name])
            if change is not None:
                changes[name] = change
        return changes

    @property
    def times(self) -> dict[str, int | None]:
        """Step of each event, None where it has not come."""
        return {name: hold.confirmed for name, hold in self.holds.items()} | {"t_loss": self.t_loss}

    def state_dict(self) -> dict[str, Any]:
        """What an interrupted run needs to go on as if it had not been."""
        return {
            "holds": {name: dict(vars(hold)) for name, hold in self.holds.items()},
            "t_loss": self.t_loss,
            "highest_loss": self.highest_loss,
            "seen": self.seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` left off."""
        for name, hold in self.holds.items():
            vars(hold).update(state["holds"][name])
        self.t_loss = state["t_loss"]
        self.highest_loss, self.seen = state["highest_loss"], state["seen"]
