"""The LightningModule of `ioi`: ablate name movers, and account for what the output does."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Gt, Le, Lt
from scipy.stats import t as student

from allostasis.analysis.repair import select_name_movers
from allostasis.core.progress import Ticker
from allostasis.core.seeding import derive
from allostasis.engines.parts import Parts
from allostasis.engines.prompts import Rows
from allostasis.engines.suffix import Precision
from allostasis.engines.suffix import sweep as run_sweep
from allostasis.engines.verify import kl_of_a_zeroed_layer, verify_slice
from allostasis.experiments.ioi.discovery import Portrait, attention_to_io, copy_scores
from allostasis.experiments.ioi.group import Group, groups_of
from allostasis.experiments.ioi.tables import Collected
from allostasis.interventions.ablate import Op, Unit, parse_heads
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.ioi import IOI, Prompt, Prompts

Ablation = Literal["zero", "mean", "resample"]
Head = tuple[int, int]

OPS: Mapping[Ablation, Op] = {"zero": "scale", "mean": "mean", "resample": "resample"}
INERT = 1e-6  # logits or nats: less than this is no effect
SUM = 1e-3  # logits by which direct effects may miss the logit difference
ACCURATE = 0.9  # accuracy from which a model does the task


class IOIAudit(L.LightningModule):
    """Ablation of name movers on indirect-object prompts, with an exact account of the effect.

    Args:
        model: A language model.
        task: The prompts.
        sets: Which heads: `none`, `critical`, or `random` sets of the same size and layers.
        heads: `discover` finds the critical heads on the discovery split; or a list of them.
        k: How many to find.
        q: False discovery rate over all heads, one-sided: only heads that help.
        ablations: What is put in a head's place.
        n_donors: Prompts a `resample` averages over, after the readout.
        n_random: Random sets.
        sweep: Whether `critical` also zeroes every head of the model alone.
        precision: Of that sweep; `bf16` is re-checked in float32 and fails if it is off.
        published: By model name, heads that the literature names: `critical` and `random`.
    """

    def __init__(
        self,
        *,
        model: LanguageModel,
        task: IOI,
        sets: Literal["none", "critical", "random"],
        heads: Literal["discover"] | list[str] = "discover",
        k: Annotated[int, Ge(1)] = 3,
        q: Annotated[float, Gt(0), Lt(1)] = 0.01,
        ablations: Sequence[Ablation] = ("zero", "mean", "resample"),
        n_donors: Annotated[int, Ge(1), Le(8)] = 4,
        n_random: Annotated[int, Ge(1)] = 20,
        sweep: bool = True,
        precision: Precision = "fp32",
        published: Mapping[str, Mapping[str, list[str]]] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.task = model, task
        self.sets, self.k, self.q = sets, k, q
        self.ablations, self.n_donors, self.n_random = tuple(ablations), n_donors, n_random
        self.with_sweep = sweep
        self.precision: Precision = precision
        self.decoder = model.decoder
        self.explicit = None if heads == "discover" else self._parse(heads)
        known = (published or {}).get(model.identity["name"], {})
        self.published = {kind: self._parse(names) for kind, names in known.items()}
        self.workspace = Path()
        self.facts: dict[str, Any] = {}

    def _parse(self, names: Sequence[str]) -> list[Head]:
        return parse_heads(names, n_layers=self.decoder.n_layers, n_heads=self.decoder.n_heads)

    # ------------------------------------------------------------------ the run

    def prove_effect(self) -> dict[str, float]:
        """Show that the hooks reach the model: zeroing every head of a layer moves the logits.

        Raises:
            RuntimeError: Nothing moves.
        """
        return {"kl_of_a_zeroed_layer": kl_of_a_zeroed_layer(self.model)}

    @torch.no_grad()
    def test_step(self, batch: IOI, batch_idx: int) -> dict[str, Any]:
        """The whole audit; gives the tables that the run keeps."""
        del batch_idx
        prompts = batch.build(self.model.encode, self.model.tokenizer)
        self._tell(prompts)
        found = Collected()
        critical = self._choose(prompts, found)
        groups = list(groups_of(self.decoder, prompts.evaluation, prompts, seed=self.task.seed))
        self._measure_baseline(groups, critical, found)
        units = self._units(critical)
        tick = Ticker(f"ioi {self.sets} seed {self.task.seed}", noun="interventions")
        pairs = list(itertools.product(groups, units))
        for done, (group, (name, unit)) in enumerate(pairs):
            found.add(group.prompts, name, unit, *group.follow(unit, self.n_donors))
            tick(done + 1, len(pairs))
        self._prove(found)
        if self.sets == "critical" and self.with_sweep:
            self._sweep(prompts.evaluation, found)
        found.summarise()
        return {"tables": found.tables()}

    def _tell(self, prompts: Prompts) -> None:
        self.facts = {
            "model": {**self.model.identity, "title": self.model.title},
            "tokenizer": self.model.facts,
        }
        self._data = {
            "sha256": prompts.sha256,
            "dropped": {kind: list(words) for kind, words in prompts.dropped.items()},
            "discovery": {"n": len(prompts.discovery)},
            "evaluation": {"n": len(prompts.evaluation)},
            "n_reference": self.task.n_reference,
        }

    def _choose(self, prompts: Prompts, found: Collected) -> list[Head]:
        """The critical heads, by what they write on the discovery split alone."""
        groups = groups_of(self.decoder, prompts.discovery, prompts, seed=self.task.seed)
        clusters: list[str] = []
        effects: list[np.ndarray] = []
        patterns: list[tuple[Group, list[dict[str, int]]]] = []
        for group in groups:
            writes = group.effects.writes
            effects.append((writes.heads / writes.scale[:, None, None]).cpu().numpy())
            clusters += [prompt.cluster for prompt in group.prompts]
            patterns.append((group, [dict(prompt.roles) for prompt in group.prompts]))
        direct = np.concatenate(effects)
        self._tell_direct("discovery", direct, found)
        rng = np.random.default_rng(derive(self.task.seed, "bootstrap"))
        movers = select_name_movers(direct, clusters, k=self.k, q=self.q, rng=rng)
        heads = movers.heads if self.explicit is None else self.explicit
        names = sorted({p.io_id for p in prompts.discovery})
        copies = copy_scores(self.decoder, torch.tensor(names, device=self.device), heads)
        seen = [attention_to_io(group.clean, roles, heads) for group, roles in patterns]
        looks = torch.cat(seen).mean(dim=0).tolist()
        portraits = {_name(h): Portrait(a, c) for h, a, c in zip(heads, looks, copies, strict=True)}
        for (layer, head), portrait in zip(heads, portraits.values(), strict=True):
            where = {"layer": layer, "head": head, "split": "discovery", "unit": "1"}
            found.read("attention_to_io", portrait.attention, n=len(direct), symbol="G", **where)
            found.read("copy_score", portrait.copy_score, n=len(names), symbol="G", **where)
        self.facts["discovery"] = {
            "selected": list(portraits),
            "rule": "given" if self.explicit else f"direct effect, q <= {self.q}, at most {self.k}",
            "q": {_name(head): float(movers.q[head]) for head in heads},
            "de_discovery": {_name(h): float(direct[:, h[0], h[1]].mean()) for h in heads},
            "attention": {name: portrait.attention for name, portrait in portraits.items()},
            "copy_score": {name: portrait.copy_score for name, portrait in portraits.items()},
            "is_name_mover": {name: p.is_name_mover for name, p in portraits.items()},
        }
        return heads

    def _tell_direct(self, split: str, direct: np.ndarray, found: Collected) -> None:
        for layer, head in np.ndindex(direct.shape[1:]):
            value = float(direct[:, layer, head].mean())
            found.read("direct_effect", value, n=len(direct), split=split, layer=layer, head=head)

    def _measure_baseline(
        self, groups: Sequence[Group], critical: Sequence[Head], found: Collected
    ) -> None:
        direct = []
        for group in groups:
            effects = group.effects
            off = np.abs(effects.writes.logit_difference.cpu().numpy() - effects.readouts["ld"])
            if off.max() > SUM:
                raise RuntimeError(
                    f"direct effects sum to the logit difference only within {off.max():.1e} "
                    f"(allowed {SUM}): blocks.py does not know all that this model writes"
                )
            clean = {f"{k}_clean": v for k, v in effects.readouts.items()}
            nothing = dict.fromkeys(("te", "drop", "sr"), np.zeros(len(group.prompts)))
            columns = {**effects.readouts, **clean, **nothing}
            found.add(group.prompts, "baseline", None, columns, [])
            writes = effects.writes
            direct.append((writes.heads / writes.scale[:, None, None]).cpu().numpy())
        whole = np.concatenate(direct)
        self._tell_direct("evaluation", whole, found)
        after = {_name(h): float(whole[:, h[0], h[1]].mean()) for h in critical}
        before = self.facts["discovery"]["de_discovery"]
        self.facts["discovery"]["de_evaluation"] = after
        self.facts["discovery"]["shrinkage"] = {
            name: 1 - after[name] / before[name] for name in after if before[name]
        }
        ld = np.concatenate([group.effects.readouts["ld"] for group in groups])
        standard_error = ld.std(ddof=1) / np.sqrt(len(ld))
        accuracy = float((ld > 0).mean())
        lower = float(ld.mean() - student.ppf(0.975, len(ld) - 1) * standard_error)
        self._summary = {
            "logit_diff": float(ld.mean()),
            "accuracy": accuracy,
            "does_task": accuracy >= ACCURATE and lower > 0,
            "selected": "+".join(map(_name, critical)) or "none",
        }

    def _units(self, critical: list[Head]) -> list[tuple[str, Unit]]:
        """What is ablated, with the kind of set that it is."""
        named: list[tuple[str, tuple[Head, ...]]] = []
        if self.sets == "critical":
            for size, name in ((1, "single"), (2, "pair"), (len(critical), "all")):
                if name == "all" or size < len(critical):
                    named += [(name, heads) for heads in itertools.combinations(critical, size)]
        if self.sets == "random" and critical:
            named += [("random", heads) for heads in self._random_sets(critical)]
        if self.sets in self.published:
            named.append(("published", tuple(self.published[self.sets])))
        return [
            (name, Unit(members=heads, op=OPS[ablation]))
            for ablation in self.ablations
            for name, heads in named
            if heads
        ]

    def _random_sets(self, critical: list[Head]) -> list[tuple[Head, ...]]:
        """Sets of other heads, with as many in each layer as the critical set has; no two alike."""
        rng = np.random.default_rng(derive(self.task.seed, "control"))
        wanted = Counter(layer for layer, _ in critical)
        pools = {
            layer: [h for h in range(self.decoder.n_heads) if (layer, h) not in critical]
            for layer in wanted
        }
        short = [layer for layer, n in wanted.items() if len(pools[layer]) < n]
        if short:
            raise RuntimeError(
                f"layers {short} have fewer other heads than the critical set takes from them, so "
                "that there is no random set of its size; take fewer with module.k"
            )
        possible = math.prod(math.comb(len(pools[layer]), n) for layer, n in wanted.items())
        drawn: dict[tuple[Head, ...], None] = {}
        while len(drawn) < min(self.n_random, possible):
            picked = [
                (layer, int(head))
                for layer, n in sorted(wanted.items())
                for head in sorted(rng.choice(pools[layer], size=n, replace=False))
            ]
            drawn.setdefault(tuple(picked))
        return list(drawn)

    def _prove(self, found: Collected) -> None:
        """Refuse an arm of which a set changes nothing; one of several random sets may."""
        table = pd.concat(found.examples)
        effects = table[table["set"] != "baseline"].groupby(["set", "intervention"])["te"]
        moved = effects.apply(lambda effect: effect.abs().max() > INERT)
        inert = [key for (name, key) in moved[~moved].index if name != "random"]
        if len(moved) and not moved.any():
            inert = [key for _, key in moved.index]
        if inert:
            raise RuntimeError(
                f"these interventions change no logit difference: {', '.join(inert)}"
            )

    def _sweep(self, prompts: Sequence[Prompt], found: Collected) -> None:
        """Zero every head alone, and re-check a sample of it."""
        rows = Rows(
            prompts=[p.ids for p in prompts],
            target=[p.io_id for p in prompts],
            foil=[p.s_id for p in prompts],
        )
        heads = itertools.product(range(self.decoder.n_layers), range(self.decoder.n_heads))
        units = [Unit(members=(head,)) for head in heads]
        identity = (
            f"{self.model.identity['weights_sha256']} {self._data['sha256']} {self.precision}"
        )
        tick = Ticker(f"ioi sweep seed {self.task.seed}", noun="heads")
        swept = run_sweep(
            self.decoder,
            rows,
            units,
            full=False,
            precision=self.precision,
            parts=Parts(self.workspace / "parts", identity),
            progress=tick,
        )
        clean = float(swept.clean["ld"].mean())
        for unit, ld in zip(units, swept.values["ld"], strict=True):
            ((layer, head),) = unit.members
            found.read(
                "logit_diff", float(ld.mean()), n=len(rows), layer=layer, head=head,
                intervention=unit.key, value_clean=clean, delta=float(ld.mean()) - clean,
                scale=0.0, n_unique=swept.profile.n_unique,
            )  # fmt: skip
        self.facts["profile"] = asdict(swept.profile)
        self.facts["verify"] = verify_slice(
            self.model, rows, swept, seed=derive(self.task.seed, "verify"), precision=self.precision
        )

    # ------------------------------------------------------------------ what run.json says

    def data(self) -> dict[str, Any]:
        """Hash and size of the prompts, and the words that were dropped."""
        return self._data

    def summary(self) -> dict[str, Any]:
        """The run in scalars."""
        return self._summary


def _name(head: Head) -> str:
    return f"{head[0]}.{head[1]}"
