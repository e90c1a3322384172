"""The LightningModule of `constraint`: sequence training with frozen heads and a clamped stream."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Len, Lt
from safetensors.torch import load_file
from torch import Tensor

from allostasis.core import locate
from allostasis.core.records import RunRecord
from allostasis.core.seeding import derive
from allostasis.engines.sequence_training import Schedule, SequenceTraining
from allostasis.experiments.constraint import reference as calibrate
from allostasis.experiments.constraint.reference import Reference
from allostasis.interventions.clamp import (
    Attached,
    Clamp,
    ClassClamp,
    InertError,
    NormClamp,
    PlaceboClamp,
    Plan,
    SpreadClamp,
    check_site,
    quiet_directions,
    site_labels,
)
from allostasis.interventions.freeze import Freeze, FreezeKind
from allostasis.models.readout import readout_loss
from allostasis.models.toy_transformer import ToyTransformer
from allostasis.tasks.sequences import Sequences, SequenceTask

log = logging.getLogger(__name__)

INERT = 1e-6  # largest change of a logit or a gradient that is none
UNDONE = 0.01  # of the largest logit: more than this is not the epsilon of a norm that undoes it
PROVEN_ON = 8  # sequences
TRAINED: Literal["constraint"] = "constraint"
"""The arm whose trained model an `eval_only` clamp is put on."""


class Constraint(SequenceTraining):
    """Next-token training with heads frozen, and with the stream clamped at one site.

    A clamp takes its numbers from the control arm of the same seed. One of phase `eval_only` trains
    nothing: it is put on the trained model of the arm `constraint`.

    Args:
        model: The model to train.
        task: Where batches, held-out sequences and probes come from.
        max_steps: Updates.
        freeze: Which weights stay at their initial values: `none`; `heads`, all of some heads;
            `routing`, W_Q and W_K of those; `module`, all of attention.
        frozen_heads: Which heads, in every layer.
        clamp: What is clamped, where and to what.
        reads: Arms whose finished run of the same seed this one needs.
        allow_inert: Whether an arm whose clamp changes nothing may run, labelled inert.
        chunk: Updates between two looks at the probe.
        eval_every: Updates between evaluations; a multiple of `chunk`.
        lr: Learning rate.
        betas: Adam's moment decay rates.
        weight_decay: Decoupled decay.
        warmup_steps: Updates over which the learning rate rises linearly.
        schedule: What it does after that.

    Raises:
        ValueError: The freeze or the clamp does not fit the model, or the task's calibration split
            is too small for a class clamp.
        InertError: The clamp stands where a norm undoes it, and `allow_inert` is off.
    """

    def __init__(
        self,
        *,
        model: ToyTransformer,
        task: SequenceTask,
        max_steps: Annotated[int, Gt(0)],
        freeze: FreezeKind = "none",
        frozen_heads: Sequence[Annotated[int, Ge(0)]] = (1, 2, 3),
        clamp: Plan | None = None,
        reads: Sequence[str] = (),
        allow_inert: bool = False,
        chunk: Annotated[int, Gt(0)] = 10,
        eval_every: Annotated[int, Gt(0)] = 100,
        lr: Annotated[float, Gt(0)] = 1e-3,
        betas: Annotated[Sequence[Annotated[float, Ge(0), Lt(1)]], Len(2, 2)] = (0.9, 0.98),
        weight_decay: Annotated[float, Ge(0)] = 0.0,
        warmup_steps: Annotated[int, Ge(0)] = 20,
        schedule: Schedule = "constant",
    ) -> None:
        super().__init__(
            model=model,
            task=task,
            max_steps=max_steps,
            chunk=chunk,
            eval_every=eval_every,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            schedule=schedule,
        )
        self.plan = clamp or Plan()
        self.frozen = Freeze(dict(model.named_parameters()), kind=freeze, heads=list(frozen_heads))
        self.allow_inert = allow_inert
        self.labels = self._check_site()
        self._n_together = len(task.train_batch(0)) if self.is_by_batch else None
        self.attached: Attached | None = None
        if self.plan.kind != "none" and "control" not in reads:
            raise ValueError("a clamp takes its target from the control arm; put it into `reads`")
        if self.plan.kind == "class":  # told here, before the runs that this one reads are made
            calibrate.check_classes(task.calibration, task.n_classes)

    @property
    def is_by_batch(self) -> bool:
        """Whether what a clamp does to a token depends on the batch that it comes in."""
        return self.plan.kind != "none" and self.plan.statistic == "batch"

    @property
    def label(self) -> str:
        """What run.json says of the clamp's site and form; empty where there is nothing to say."""
        return ", ".join(self.labels)

    def at_once(self, cells: int) -> int:
        """How many sequences are read together: under a clamp by batch, as many as in training.

        The last batch of a set, or the only one of a small set, can be smaller.
        """
        return self._n_together or super().at_once(cells)

    def _check_site(self) -> tuple[str, ...]:
        plan = self.plan
        if plan.kind == "none":
            return ()
        how: dict[str, Any] = {
            "kind": plan.kind, "norm": self.model.norm, "statistic": plan.statistic,
        }  # fmt: skip
        labels = site_labels(plan.site, self.model.sites(), **how)
        try:
            check_site(plan.site, self.model.sites(), **how)
        except InertError as error:
            if not self.allow_inert:
                raise
            log.warning("%s", error)
        if "pinned" in labels:
            log.warning(
                "%s is a norm's output: amplitude is pinned there, whatever is done to it",
                plan.site,
            )
        return labels

    # ------------------------------------------------------------------ other runs

    def take(self, earlier: Mapping[str, RunRecord]) -> dict[str, Any]:
        """Calibrate the clamp on the runs that this one reads, and put it on the model.

        Returns:
            What run.json says of it.
        """
        site, wants_classes = self.plan.site, self.plan.kind == "class"
        n_classes = self.task.n_classes if wants_classes else None
        control = calibrate.measure(
            self._trained(earlier["control"]), self.task.calibration, site, n_classes=n_classes
        )
        told: dict[str, Any] = {
            "reference": control.told()
            | {
                "control": earlier["control"].run["run_id"],
                "split": "calibration",
                "split_sha256": self.task.calibration.sha256,
            }
        }
        base = None
        if self.plan.phase == "eval_only":
            base = self._trained(earlier[TRAINED])
            self.model.load_state_dict(base.state_dict())
            self.updates = self.max_steps
        clamp, facts = self._clamp(control, base)
        self.attached = Attached(clamp)
        self.model.add_hook(site, self.attached, is_permanent=True)
        if self._n_together is not None:
            facts["sequences_a_batch"] = self._n_together
        return told | {"clamp": facts | {"site": site}}

    def _trained(self, record: RunRecord) -> ToyTransformer:
        model = copy.deepcopy(self.model)
        model.load_state_dict(load_file(locate.last_weights(record)))
        return model

    def _clamp(
        self, control: Reference, base: ToyTransformer | None
    ) -> tuple[Clamp, dict[str, Any]]:
        plan, factor = self.plan, self.plan.factor
        match plan.kind:
            case "norm":
                target = factor * control.norm_mean
                return NormClamp(target, plan.statistic), {"target": target}
            case "spread":
                whole = plan.statistic == "batch"
                target = factor * (control.overall_sd if whole else control.feature_sd_mean)
                return SpreadClamp(target, plan.statistic), {"target": target}
            case "placebo":
                assert base is not None
                seed = derive(self.task.seed, "control")
                read = calibrate.sensitivity(base, self.task.calibration, plan.site, seed=seed)
                quiet = quiet_directions(read).to(self.model.W_U)
                target = factor * control.norm_mean
                return PlaceboClamp(target, quiet), {"target": target, "n_quiet": quiet.shape[1]}
            case "class":
                assert base is not None
                return self._class_clamp(control, base)
            case "none":
                raise AssertionError("an arm without a clamp reads no other run")

    def _class_clamp(
        self, control: Reference, base: ToyTransformer
    ) -> tuple[Clamp, dict[str, Any]]:
        own = calibrate.measure(
            base, self.task.calibration, self.plan.site, n_classes=self.task.n_classes
        )
        assert own.class_means is not None
        aim = own if self.plan.source == "own" else control
        factors = {
            name: self.plan.factor * getattr(aim, name) / getattr(own, name) if is_set else 1.0
            for name, is_set in (("between", self.plan.between), ("within", self.plan.within))
        }
        clamp = ClassClamp(means=own.class_means, mean=own.mean, **factors)
        return clamp, {**factors, "own_between": own.between, "own_within": own.within}

    def prepare(self, batch: Sequences) -> None:
        """Tell a class clamp the classes: targets where the past determines them, else none."""
        if self.attached is None or not isinstance(self.attached.clamp, ClassClamp):
            return
        counted = batch.groups[batch.headline]
        classes = batch.targets.clone()
        if self.plan.labels == "shuffled":
            generator = torch.Generator().manual_seed(derive(self.task.seed, "control"))
            known = classes[counted]
            order = torch.randperm(len(known), generator=generator).to(known.device)
            classes[counted] = known[order]
        self.attached.clamp.classes = classes.masked_fill(~counted, -1)

    # ------------------------------------------------------------------ treatment and its proof

    def after_backward(self) -> None:
        """Take what is frozen out of the gradient."""
        self.frozen.zero_gradients()

    def after_update(self) -> None:
        """Put what is frozen back."""
        self.frozen.restore()

    def prove_effect(self) -> dict[str, Any]:
        """Show that the treatment acts: on logits or gradients, from equal weights.

        Returns:
            `effect_logits`, `effect_gradient`: largest changes that switching the clamp on makes;
            `effect_argmax`: share of predictions that it changes; `hook_calls` a forward.

        Raises:
            RuntimeError: It changes neither and `allow_inert` is off, or the loss has no gradient.
        """
        facts: dict[str, Any] = super().prove_effect()
        if self.frozen.slices:
            facts |= self._prove_freeze()
        if self.attached is None:
            return facts
        batch = self.task.calibration.part(slice(PROVEN_ON)).to(self.device)
        with self._switched(False):
            off_logits, off_gradient = self._look(batch)
        before = self.attached.calls
        on_logits, on_gradient = self._look(batch)
        facts |= {
            "effect_logits": float((on_logits - off_logits).abs().max()),
            "effect_gradient": max(
                float((on_gradient[k] - off_gradient[k]).abs().max()) for k in on_gradient
            ),
            "effect_argmax": float((on_logits.argmax(-1) != off_logits.argmax(-1)).double().mean()),
            "hook_calls": self.attached.calls - before,
        }
        if facts["hook_calls"] != 1:
            raise RuntimeError(f"the clamp was called {facts['hook_calls']} times in one forward")
        moved = max(facts["effect_logits"], facts["effect_gradient"])
        is_identity = isinstance(self.attached.clamp, ClassClamp) and not (
            self.plan.between or self.plan.within
        )
        if moved <= INERT and not is_identity:
            if not self.allow_inert:
                raise RuntimeError(
                    f"the clamp at {self.plan.site} changes no logit and no gradient by more than "
                    f"{INERT:g}: an arm with it would be its control again. allow_inert=true runs "
                    "it all the same, labelled inert."
                )
            self.labels = ("inert", *(label for label in self.labels if label != "inert"))
        if facts["effect_logits"] > UNDONE * float(off_logits.abs().max()):
            # a norm does not undo what is so small that its epsilon counts
            self.labels = tuple(label for label in self.labels if label != "inert")
        if is_identity and moved > 1e-4:
            raise RuntimeError(f"the identity clamp changes the output by {moved:.1e}")
        return facts | {"label": self.label}

    def _prove_freeze(self) -> dict[str, Any]:
        """A freeze acts where its weights would have moved."""
        self.model.zero_grad()
        self.loss(self.task.train_batch(0).part(slice(PROVEN_ON))).backward()
        held = max(
            float(part.parameter.grad[part.index].abs().max())
            for part in self.frozen.slices
            if part.parameter.grad is not None
        )
        self.model.zero_grad()
        if held <= 0:
            raise RuntimeError("the frozen weights have no gradient: freezing them changes nothing")
        return {"frozen_gradient": held, "n_frozen": self.frozen.n_frozen}

    def _look(self, batch: Sequences) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and every gradient of the loss, by one forward."""
        self.model.zero_grad()
        self.prepare(batch)
        states = self.model.encode(batch.tokens)
        readout_loss(states, self.model.W_U, batch.targets, batch.scored).backward()
        gradient = {
            name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None
        }
        self.model.zero_grad()
        return (states @ self.model.W_U).detach(), gradient

    @contextmanager
    def _switched(self, is_on: bool) -> Iterator[None]:
        assert self.attached is not None
        before, self.attached.is_on = self.attached.is_on, is_on
        try:
            yield
        finally:
            self.attached.is_on = before

    def summary(self) -> dict[str, Any]:
        """The run in scalars."""
        frozen: dict[str, Any] = {}
        if self.frozen.slices and self.plan.phase != "eval_only":
            frozen = {
                "n_frozen": self.frozen.n_frozen,
                "frozen_max_change": self.frozen.largest_change(),
                "free_head_change": self.frozen.free_change(),
            }
        label = {"label": self.label} if self.label else {}
        return super().summary() | frozen | label

    # ------------------------------------------------------------------ survival

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add where the frozen weights began and what the proof of effect found."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["labels"] = self.labels
        checkpoint["freeze"] = self.frozen.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up where `on_save_checkpoint` left off."""
        super().on_load_checkpoint(checkpoint)
        self.labels = checkpoint["labels"]
        self.frozen.load_state_dict(checkpoint["freeze"])
