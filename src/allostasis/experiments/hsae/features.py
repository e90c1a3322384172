"""H7: single features of an autoencoder toggled on prompts, and the heads that write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64, Int64
from scipy import stats
from torch import Tensor

from allostasis.analysis.matching import latent_parents
from allostasis.core.seeding import derive
from allostasis.experiments.hsae.sources import codes_of, n_parents_of
from allostasis.metrics.flip_rate import flip_rate
from allostasis.metrics.kl_divergence import kl_divergence
from allostasis.metrics.prob_drop import prob_drop
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.prompts import Prompt, Prompts

Kind = Literal["zero", "mean", "double", "parent_only"]
IMPACT = ["layer", "feature", "kind", "metric", "value", "n", "active_fraction", "p_value",
          "q_value"]  # fmt: skip
FEWEST = 3  # clusters of prompts for a test


@dataclass(frozen=True)
class Found:
    """Tables by file name, and the run in scalars."""

    tables: dict[str, pd.DataFrame]
    summary: dict[str, Any]


@dataclass(frozen=True)
class Read:
    """Prompts as the unembedding reads them at their ends.

    Attributes:
        resid: What it reads.
        target: The answers' tokens.
        foil: The foils'.
        cluster: What prompts share that are not independent.
    """

    resid: Float[Tensor, "prompt d"]
    target: Int64[Tensor, " prompt"]
    foil: Int64[Tensor, " prompt"]
    cluster: np.ndarray


class Features:
    """Toggles of an autoencoder's latents where the unembedding reads.

    A latent f is set to 0, to its mean over training rows, or doubled, and the rest of the row is
    left as it is, what the autoencoder does not explain included:
    resid' = resid + (code'_f - code_f) d_f. A hierarchical parent that is set to 0 takes its
    children with it; `parent_only` leaves them.

    Args:
        model: A language model.
        sae: A SAELens autoencoder of what its unembedding reads.
        seed: The run's seed.
    """

    def __init__(self, model: LanguageModel, sae: Any, *, seed: int) -> None:
        self.model, self.sae, self.seed = model, sae, seed
        self.decoder = model.decoder
        self.atoms: Float[Tensor, "latent d"] = sae.W_dec.detach().float().cpu()
        m = n_parents_of(sae)
        self.means = torch.zeros(len(self.atoms))  # of codes, until training rows are read
        self.parent_of = latent_parents(len(self.atoms), m) if m else np.full(len(self.atoms), -1)

    # ------------------------------------------------------------------ the whole

    def measure(
        self,
        prompts: Prompts,
        *,
        background: Float[Tensor, "row d"],
        n_features: int,
        n_controls: int,
        n_perm: int,
    ) -> Found:
        """Choose features on one split of prompts, measure them on the other.

        Args:
            prompts: Indirect-object prompts.
            background: Training rows, for means and firing rates of latents.
            n_features: As many with the largest attribution.
            n_controls: As many others, each as often active as one of these.
            n_perm: Permutations of heads.
        """
        codes = codes_of(self.sae, background)
        self.means, rates = codes.mean(dim=0), (codes > 0).float().mean(dim=0).numpy()
        choosing, measuring = self.read(prompts.discovery), self.read(prompts.evaluation)
        attribution = self.attribution(choosing)
        order = np.argsort(-np.abs(attribution), kind="stable")
        chosen = order[:n_features]
        controls = self._matched(chosen, rates, n_controls)
        impact = self.impact(measuring, [*chosen.tolist(), *controls])
        impact["role"] = np.where(impact["feature"].isin(chosen), "attribution", "control")
        impact["attribution"] = attribution[impact["feature"]]
        alignment, heads = self.alignment(prompts.evaluation, [*chosen.tolist(), *controls])
        explained = self.explained(impact, alignment, heads, n_perm)
        tested = impact[impact["metric"] == "logit_diff"]
        clean = self.logits(measuring.resid)
        place = torch.arange(len(clean))
        said = clean[place, measuring.target] - clean[place, measuring.foil]
        return Found(
            {
                "examples": pd.DataFrame({
                    "example": place.numpy(), "split": "evaluation", "cluster": measuring.cluster,
                    "intervention": "none", "logit_diff": said.double().numpy(),
                }),
                "feature_impact": impact,
                "feature_head_alignment": alignment.merge(heads, on=["layer", "head"]),
                "metrics": pd.DataFrame([*explained, *_readings(impact)]),
            },
            {
                "features": len(chosen), "controls": len(controls),
                "never_active": int((tested.groupby("feature")["n"].max() == 0).sum()),
                "significant": int((tested["q_value"] < 0.05).sum()),
            },
        )  # fmt: skip

    def read(self, prompts: Sequence[Prompt]) -> Read:
        """What the unembedding reads at each prompt's end; prompts of one length go together."""
        rows, order = [], []
        for group in _by_length(prompts):
            ids = torch.tensor([p.ids for p in group], device=self.decoder.device)
            output = self.decoder.model.base_model(input_ids=ids, use_cache=False)
            rows.append(output.last_hidden_state[:, -1].float().cpu())
            order += group
        return Read(
            torch.cat(rows),
            torch.tensor([p.io_id for p in order]),
            torch.tensor([p.s_id for p in order]),
            np.array([p.cluster for p in order]),
        )

    def logits(self, resid: Float[Tensor, "prompt d"]) -> Float[Tensor, "prompt vocab"]:
        """Logits of the unembedding, before any cap."""
        moved = resid.to(self.decoder.device, self.decoder.dtype)
        return self.decoder.unembed(moved).float().cpu()

    def attribution(self, read: Read) -> Float64[np.ndarray, " latent"]:
        """Mean over prompts of gradient times code, for the logit difference, which is linear."""
        weights = self.decoder.W_U.detach().float().cpu()
        gradient = (weights[:, read.target] - weights[:, read.foil]).T
        codes = codes_of(self.sae, read.resid)
        return ((gradient @ self.atoms.T) * codes).double().mean(dim=0).numpy()

    def _matched(self, chosen: np.ndarray, rates: np.ndarray, n: int) -> list[int]:
        """Other features, each of the firing rate nearest to that of one drawn from the chosen."""
        rng = np.random.default_rng(derive(self.seed, "control"))
        pool = [f for f in range(len(rates)) if f not in set(chosen.tolist())]
        found: list[int] = []
        for feature in rng.choice(chosen, size=min(n, len(pool)), replace=n > len(chosen)):
            nearest = min(pool, key=lambda other: (abs(rates[other] - rates[feature]), other))
            pool.remove(nearest)
            found.append(nearest)
        return found

    # ------------------------------------------------------------------ toggles

    def toggled(
        self,
        resid: Float[Tensor, "prompt d"],
        codes: Float[Tensor, "prompt latent"],
        feature: int,
        kind: Kind,
    ) -> Float[Tensor, "prompt d"]:
        """The rows with one latent changed and all else kept.

        Args:
            resid: What the unembedding reads.
            codes: The latents of these rows.
            feature: Which latent.
            kind: `zero`, which silences a parent's children too; `parent_only`, which does not;
                `mean` over training rows; `double`.
        """
        own = codes[:, feature]
        if kind == "zero":
            gone = [feature, *np.flatnonzero(self.parent_of == feature).tolist()]
            return resid - codes[:, gone] @ self.atoms[gone]
        value = {"mean": self.means[feature], "double": 2 * own, "parent_only": 0 * own}[kind]
        return self.set_to(resid, codes, feature, value)

    def set_to(
        self,
        resid: Float[Tensor, "prompt d"],
        codes: Float[Tensor, "prompt latent"],
        feature: int,
        value: Float[Tensor, "*prompt"],
    ) -> Float[Tensor, "prompt d"]:
        """The rows with one latent at a value and all else kept: resid + (value - code) d_f."""
        return resid + (value - codes[:, feature])[:, None] * self.atoms[feature]

    def impact(self, read: Read, features: Sequence[int]) -> pd.DataFrame:
        """One row a feature, kind and metric, over the prompts in which the feature is active."""
        codes = codes_of(self.sae, read.resid)
        clean = self.logits(read.resid)
        rows: list[dict[str, Any]] = []
        for feature in features:
            active = codes[:, feature] > 0
            n = int(active.sum())
            is_parent = bool((self.parent_of == feature).any())
            kinds: list[Kind] = ["zero", "mean", "double", *(["parent_only"] if is_parent else [])]
            for kind in kinds:
                where = {
                    "layer": self.decoder.n_layers, "feature": feature, "kind": kind, "n": n,
                    "active_fraction": n / len(codes),
                }  # fmt: skip
                if not n:
                    rows.append({**where, "metric": "logit_diff"})
                    continue
                rows += self._effects(read, clean, codes, active, feature, kind, where)
        table = pd.DataFrame(rows).reindex(columns=IMPACT)
        tested = table["p_value"].notna()
        if tested.any():
            q = stats.false_discovery_control(table.loc[tested, "p_value"].to_numpy())
            table.loc[tested, "q_value"] = q
        return table

    def _effects(
        self,
        read: Read,
        clean: Float[Tensor, "prompt vocab"],
        codes: Float[Tensor, "prompt latent"],
        active: Bool[Tensor, " prompt"],
        feature: int,
        kind: Kind,
        where: dict[str, Any],
    ) -> Iterator[dict[str, Any]]:
        before = clean[active]
        target, foil = read.target[active], read.foil[active]
        after = self.logits(self.toggled(read.resid[active], codes[active], feature, kind))
        place = torch.arange(len(before))
        change = (after - before).double()
        difference = (change[place, target] - change[place, foil]).numpy()
        clusters = pd.Series(difference).groupby(read.cluster[active.numpy()]).mean().to_numpy()
        p_value = None
        if len(clusters) >= FEWEST and clusters.std() > 0:
            t = clusters.mean() / stats.sem(clusters)
            p_value = float(2 * stats.t.sf(abs(t), len(clusters) - 1))
        log_p, log_q = (logits.double().log_softmax(dim=1) for logits in (before, after))
        values = {
            "logit_diff": float(difference.mean()),
            "prob_drop": float(prob_drop(log_p.exp(), log_q.exp(), target).mean()),
            "kl_divergence": float(kl_divergence(log_p, log_q).mean()),
            "flip_rate": float(flip_rate(before.argmax(dim=1), after.argmax(dim=1)).mean()),
        }
        for metric, value in values.items():
            tested = {"p_value": p_value} if metric == "logit_diff" else {}
            yield {**where, "metric": metric, "value": value, **tested}

    # ------------------------------------------------------------------ heads

    @torch.no_grad()
    def alignment(
        self, prompts: Sequence[Prompt], features: Sequence[int]
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """How much of a feature's direction each head can write, and does; and what heads do.

        Heads write before the final norm, features are read behind it: a head's output matrix is
        followed by the norm's gain, and by what a layer norm subtracts.

        Returns:
            One row a feature and head: `share` of the direction in what the head can write (null:
            d_head / d), and `cosine` of what it makes of IO's token with the direction. One row a
            head: its direct effect on the logit difference, in logits.
        """
        decoder = self.decoder
        unit = self.atoms[list(features)]
        unit = unit / unit.norm(dim=1, keepdim=True)
        made, direct = self._writes(prompts)
        rows = []
        for layer in range(decoder.n_layers):
            out = self._behind_the_norm(layer, decoder.W_O(layer).detach().float().cpu())
            for head in range(decoder.n_heads):
                basis = torch.linalg.qr(out[head].T.double()).Q.float()
                share = (unit @ basis).square().sum(dim=1)
                written = made[layer][:, head]
                written = written / written.norm(dim=1, keepdim=True)
                cosine = (written @ unit.T).mean(dim=0)
                rows.append(
                    pd.DataFrame({
                        "layer": layer, "head": head, "feature": list(features),
                        "share": share.numpy(), "cosine": cosine.numpy(),
                        "share_null": decoder.d_head / decoder.d_model,
                    })
                )  # fmt: skip
        places = [(la, he) for la in range(decoder.n_layers) for he in range(decoder.n_heads)]
        heads = pd.DataFrame(places, columns=["layer", "head"])
        heads["direct_effect"] = direct.flatten()
        return pd.concat(rows, ignore_index=True), heads

    def _behind_the_norm(
        self, layer: int, write: Float[Tensor, "*row d"]
    ) -> Float[Tensor, "*row d"]:
        """A head's write times the gains that follow it, up to a scale that a norm decides."""
        post = self.decoder.attn_post_gain(layer)
        if post is not None:
            write = write * post.detach().float().cpu()
        if self.decoder.is_centred:
            write = write - write.mean(dim=-1, keepdim=True)
        return write * self.decoder.final_gain.detach().float().cpu()

    def _writes(
        self, prompts: Sequence[Prompt]
    ) -> tuple[list[Float[Tensor, "prompt head d"]], Float64[np.ndarray, "layer head"]]:
        """What each head makes of IO's token, and its mean direct effect at the prompts' ends."""
        from allostasis.models.blocks import Capture

        decoder = self.decoder
        weights = decoder.W_U.detach().float().cpu()
        made: list[list[Tensor]] = [[] for _ in range(decoder.n_layers)]
        direct: list[Tensor] = []
        for group in _by_length(prompts):
            ids = torch.tensor([p.ids for p in group], device=decoder.device)
            found = Capture()
            with decoder.recording(found):
                clean = decoder.capture(ids)
            read = torch.tensor([p.io_id for p in group]), torch.tensor([p.s_id for p in group])
            toward = (weights[:, read[0]] - weights[:, read[1]]).T
            end = clean.resid_pre[-1][:, -1].float().cpu()
            centred = end - end.mean(dim=1, keepdim=True) if decoder.is_centred else end
            scale = (centred.square().mean(dim=1) + decoder.final_eps).sqrt()
            place, io = torch.arange(len(group)), torch.tensor([p.roles["IO"] for p in group])
            effects = []
            for layer in range(decoder.n_layers):
                out = decoder.W_O(layer).float()
                values = found.value[layer][place, :, io].float()
                written = torch.einsum("rhk,hkd->rhd", values, out).cpu()
                made[layer].append(self._behind_the_norm(layer, written))
                at_end = torch.einsum("rhk,hkd->rhd", clean.z[layer][:, -1].float(), out)
                post = decoder.post_norm_gain(layer, clean.attn_out[layer][:, -1])
                at_end = at_end if post is None else at_end * post[:, None]
                at_end = at_end.cpu()
                if decoder.is_centred:
                    at_end = at_end - at_end.mean(dim=-1, keepdim=True)
                behind = at_end * decoder.final_gain.detach().float().cpu() / scale[:, None, None]
                effects.append(torch.einsum("rhd,rd->rh", behind, toward))
            direct.append(torch.stack(effects, dim=1))
        mean = torch.cat(direct).double().mean(dim=0)
        return [torch.cat(pieces) for pieces in made], mean.numpy()

    def explained(
        self, impact: pd.DataFrame, alignment: pd.DataFrame, heads: pd.DataFrame, n_perm: int
    ) -> Iterator[dict[str, Any]]:
        """Whether heads aligned with features that matter matter themselves: Spearman over heads.

        A head's score is the mean over features of alignment times the size of the feature's effect
        when it is set to 0. p is of the largest |rho| over both alignments, heads permuted.
        """
        zeroed = impact[(impact["kind"] == "zero") & (impact["metric"] == "logit_diff")]
        effect = zeroed.set_index("feature")["value"].fillna(0.0).abs()
        scores = {}
        for column in ("share", "cosine"):
            weighted = alignment[column].abs() * alignment["feature"].map(effect)
            scores[column] = weighted.groupby([alignment["layer"], alignment["head"]]).mean()
        own = heads["direct_effect"].abs().to_numpy()
        usable = {k: s.to_numpy() for k, s in scores.items() if s.nunique() > 1}
        if not usable or len(np.unique(own)) < 2:
            return
        rank = {name: stats.rankdata(score) for name, score in usable.items()}
        rng = np.random.default_rng(derive(self.seed, "bootstrap"))
        found = {name: np.corrcoef(r, stats.rankdata(own))[0, 1] for name, r in rank.items()}
        null = np.array([
            max(abs(np.corrcoef(r, permuted)[0, 1]) for r in rank.values())
            for permuted in (rng.permutation(stats.rankdata(own)) for _ in range(n_perm))
        ])
        for name, rho in found.items():
            p = (1 + int((null >= abs(rho)).sum())) / (1 + n_perm)
            where = {"symbol": "other", "unit": "1", "split": "evaluation", "n": len(own)}
            yield {**where, "metric": f"feature_head_rho.{name}", "value": float(rho)}
            yield {**where, "metric": f"feature_head_rho.{name}_p", "value": p}


def _by_length(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    for _, group in groupby(sorted(prompts, key=lambda p: len(p.ids)), lambda p: len(p.ids)):
        yield list(group)


def _readings(impact: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Mean absolute effects of the chosen features and of their controls."""
    there = impact[impact["value"].notna()]
    for (role, kind, metric), rows in there.groupby(["role", "kind", "metric"], sort=True):
        yield {
            "metric": f"feature_impact.{metric}", "symbol": "other", "split": "evaluation",
            "unit": {"logit_diff": "logit", "kl_divergence": "nat"}.get(str(metric), "1"),
            "intervention": f"{role}:{kind}", "value": float(rows["value"].abs().mean()),
            "n": len(rows),
        }  # fmt: skip
