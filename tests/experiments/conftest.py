"""Fixtures of the experiments' tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Audit = Callable[..., Path]

N_LAYERS, N_HEADS = 12, 4
CHOSEN = ((9, 1), (10, 2), (9, 3))
MISSING = (3, 2)  # a head that the sweep did not reach


@pytest.fixture(scope="session")
def write_audit() -> Audit:
    """A function that writes one run that looks like `ioi` into `root / "ioi"`.

    Effects are planted: `lost` logits of direct effect, of which the share `repaired` is made up
    for, `by_scale` of the repair by the final norm's scale and the rest by MLPs; `excess` is what
    the norm gains in late depths over its null.
    """
    import numpy as np
    import pandas as pd

    from allostasis.analysis import claim_files
    from allostasis.core.records import write_json
    from allostasis.experiments import ioi

    registered = claim_files.freeze(claim_files.load(Path(ioi.__path__[0]), "ioi"))
    kinds = {"zero": 1.0, "mean": 0.9, "resample": 0.85}  # how much of the write is taken away

    def prompts(seed: int, n: int) -> pd.DataFrame:
        rng = np.random.default_rng([seed, 0])
        pairs = [sorted(rng.choice(60, 2, replace=False)) for _ in range(n)]
        return pd.DataFrame({
            "example": range(n), "split": "evaluation", "template": [i % 8 for i in range(n)],
            "order": ["ABBA" if i % 2 else "BABA" for i in range(n)],
            "io": [f" N{a}" for a, _ in pairs], "s": [f" N{b}" for _, b in pairs],
            "cluster": [f"t{i % 8}:N{a}|N{b}" for i, (a, b) in enumerate(pairs)],
            "ld_clean": 4.8 + rng.normal(0, 1.2, n), "own": 4.0 + rng.normal(0, 0.8, n),
        })  # fmt: skip

    def effects(
        base: pd.DataFrame, rng: np.random.Generator, drop: np.ndarray, repaired: float,
        by_scale: float, kind: dict[str, Any],
    ) -> pd.DataFrame:  # fmt: skip
        n = len(base)
        repair = repaired * drop + rng.normal(0, 0.4, n)
        scale = by_scale * repair + rng.normal(0, 0.1, n)
        heads = rng.normal(0, 0.1, n)
        parts = {"phi_routing": heads / 2, "phi_content": heads / 2, "phi_scale": scale}
        parts["phi_mlps"] = repair - scale - heads
        ld = base["ld_clean"] - drop + repair
        log_a, log_a_clean = 3.0 + 0.05 * scale, np.full(n, 3.0)
        margin, margin_clean = ld - 1.0, base["ld_clean"] - 1.0
        with np.errstate(invalid="ignore"):
            log_m, log_m_clean = np.log(margin), np.log(margin_clean)
        return base.drop(columns="own").assign(
            **kind, ld=ld, te=ld - base["ld_clean"], drop=drop, sr=repair, sr_heads=heads,
            sr_mlps=parts["phi_mlps"], sr_scale=scale, phi_own=-drop, **parts,
            sigma=1 - 0.02 * repaired, sigma_clean=1.0, correct=(ld > 0) * 1.0,
            correct_clean=(base["ld_clean"] > 0) * 1.0, log_margin=log_m, log_amplitude=log_a,
            log_alignment=log_m - log_a, log_margin_clean=log_m_clean,
            log_amplitude_clean=log_a_clean, log_alignment_clean=log_m_clean - log_a_clean,
        )  # fmt: skip

    def norms(
        base: pd.DataFrame, rng: np.random.Generator, kind: dict[str, Any], first: int,
        excess: float, shrink: float,
    ) -> list[pd.DataFrame]:  # fmt: skip
        frames = []
        for depth in range(N_LAYERS + 1):
            clean = 300 + 10 * depth + rng.normal(0, 12, len(base))
            is_behind = depth > first
            null = clean * (1 - shrink * is_behind)
            gain = is_behind * (excess + rng.normal(0, 0.01, len(base)))
            row: dict[str, Any] = {"depth": depth, "angle_end": 0.1 * is_behind}
            row |= {"var_end": (null * np.exp(gain)) ** 2, "var_end_clean": clean**2}
            for place, outlier in (("end", 0.0), ("all", 2_000.0), ("rest", 0.0)):
                row |= {
                    f"norm_{place}": null * np.exp(gain) + outlier,
                    f"norm_{place}_clean": clean + outlier, f"norm_{place}_null": null + outlier,
                }  # fmt: skip
            frames.append(base[["example", "cluster"]].assign(**kind, **row))
        return frames

    def write(
        root: Path,
        condition: str = "critical",
        seed: int = 0,
        *,
        n: int = 48,
        lost: float = 1.0,
        repaired: float = 0.3,
        by_scale: float = 0.9,
        excess: float = 0.02,
        model: dict[str, Any] | None = None,
        summary: dict[str, Any] | None = None,
        **run_json: Any,
    ) -> Path:
        rng = np.random.default_rng([seed, {"baseline": 1, "critical": 2}.get(condition, 3)])
        base = prompts(seed, n)
        digest = f"{condition[:4]}-{(model or {}).get('name', 'small')[-5:]}".replace("/", "_")
        identity = {
            "run_id": f"ioi-{condition}-{seed}-cpu-{digest}", "exp": "ioi",
            "condition": condition, "seed": seed, "device": "cpu",
        }  # fmt: skip
        sets: list[tuple[str, tuple[tuple[int, int], ...]]] = []
        if condition == "critical":
            sets = [("single", (head,)) for head in CHOSEN]
            sets += [("pair", CHOSEN[:2]), ("pair", CHOSEN[1:]), ("all", CHOSEN)]
        if condition == "random_control":
            sets = [("random", ((9, int(a)), (10, int(b)))) for a, b in
                    {(a, b) for a in (0, 2) for b in (0, 1, 3)}]  # fmt: skip
        none = {"ablation": "none", "intervention": "none", "set": "baseline", "n_members": 0}
        clean = effects(base, rng, np.zeros(n), 0.0, 0.0, none)
        clean["ld"], clean["te"] = clean["ld_clean"], 0.0
        examples, depths = [clean], []
        for ablation, taken in kinds.items():
            for name, heads in sets:
                key = f"{ablation}:" + "+".join(f"{a}.{b}" for a, b in sorted(heads))
                kind = {"ablation": ablation, "intervention": key, "set": name}
                share = len(heads) / len(CHOSEN) * lost if name != "random" else 0.02
                drop = share * taken * base["own"].to_numpy()
                of = {**kind, "n_members": len(heads)}
                examples.append(effects(base, rng, drop, repaired, by_scale, of))
                is_random = name == "random"
                depths += norms(
                    base, rng, kind, min(a for a, _ in heads),
                    0.0 if is_random else excess * taken, 0.002 if is_random else 0.03 * taken,
                )  # fmt: skip
        folder = root / "ioi" / condition / f"seed={seed}" / f"cpu-{digest}"
        folder.mkdir(parents=True)
        for name, frames in (("examples", examples), ("depths", depths)):
            if frames:
                table = pd.concat(frames, ignore_index=True).assign(**identity)
                table.to_parquet(folder / f"{name}.parquet")
        _metrics(rng, base, condition).assign(**identity).to_parquet(folder / "metrics.parquet")
        names = [f"{a}.{b}" for a, b in CHOSEN]
        facts = {"title": "Small-1M (Q4_1, dequantised to float32)", "name": "small",
                 "weights_sha256": "ab" * 32, "prepend_bos": False, "dtype": "float32"}  # fmt: skip
        run = {
            "schema_version": 1, **identity, "device_resolved": "cpu", "device_name": "test",
            "status": "done", "wall_s": 60.0, "commit": None, "dirty": None,
            "versions": {"python": "3.11"}, "config_hash": digest,
            "claims": registered["hashes"], "claims_hash": registered["hash"],
            "checkpoints": {}, "error": None, "metrics": {}, "skipped": {},
            "model": facts | (model or {}), "tokenizer": {"adds_bos": False, "pad": "<pad>"},
            "data": {"sha256": "cd" * 32, "dropped": {"names": ["<script>"]},
                     "evaluation": {"n": n}},
            "discovery": {
                "selected": names, "q": dict.fromkeys(names, 1e-4), "rule": "direct effect",
                **{key: {name: value * (1 + i) for i, name in enumerate(names)} for key, value in
                   {"de_discovery": 1.3, "de_evaluation": 1.2, "shrinkage": 0.08,
                    "attention": 0.3, "copy_score": 0.3}.items()},
            },
            "summary": {"logit_diff": 4.8, "accuracy": 1.0, "does_task": True,
                        "selected": "+".join(names)} | (summary or {}),
        } | run_json  # fmt: skip
        if condition == "critical":
            run |= {"profile": {"forward_tokens": 1e4, "naive_forward_tokens": 2.5e4},
                    "verify": {"passed": True}}  # fmt: skip
        name = run["model"]["name"]
        settings = {
            "name": "ioi", "condition": condition, "seed": seed, "model": {"name": name},
            "task": {"_target_": "allostasis.tasks.ioi.IOI", "n_examples": n},
            "module": {"_target_": "allostasis.experiments.ioi.module.IOIAudit",
                       "sets": {"baseline": "none", "critical": "critical"}.get(condition,
                                                                                 "random")},
        }  # fmt: skip
        write_json(folder / "config.yaml", settings)  # JSON is YAML
        write_json(folder / "run.json", run)
        return folder

    def _metrics(rng: np.random.Generator, base: pd.DataFrame, condition: str) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []

        def add(metric: str, value: float, split: str = "evaluation", **columns: Any) -> None:
            rows.append({
                "step": 0, "split": split, "metric": metric, "symbol": "Psi", "unit": "logit",
                "layer": None, "head": None, "position": None, "value": value, "n": len(base),
                "intervention": None, "value_clean": None, "delta": None, "ci_low": None,
                "ci_high": None, **columns,
            })  # fmt: skip

        add("logit_diff", float(base["ld_clean"].mean()))
        add("accuracy", 1.0)
        for layer, head in np.ndindex(N_LAYERS, N_HEADS):
            at = {"layer": layer, "head": head}
            effect = 1.3 if (layer, head) in CHOSEN else float(rng.normal(0, 0.15))
            for split in ("discovery", "evaluation"):
                add("direct_effect", effect, split, **at, ci_low=effect - 0.1,
                    ci_high=effect + 0.1)  # fmt: skip
            if condition == "critical" and (layer, head) != MISSING:
                add("logit_diff", 4.8 - effect, **at, intervention=f"zero:{layer}.{head}",
                    value_clean=4.8, delta=-effect)  # fmt: skip
        if condition == "critical":
            add("logit_diff", 1.9, intervention="zero:9.1+9.3+10.2", value_clean=4.8, delta=-2.9)
        return pd.DataFrame(rows).astype({"layer": "Int64", "head": "Int64", "position": "Int64"})

    return write


@pytest.fixture(scope="session")
def audit(write_audit: Audit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One seed of all three conditions with 30 % self-repair, to be read, never written to."""
    root = tmp_path_factory.mktemp("audit")
    for condition in ("baseline", "critical", "random_control"):
        write_audit(root, condition)
    return root


@pytest.fixture(scope="session")
def write_hsae() -> Callable[..., None]:
    """A function that writes a run of hsae_train and the one of hsae_teacher that it has read."""
    return _write_hsae


def _write_hsae(model: Any, task: Any, trained: Path, *, metric: str = "causal") -> None:
    """A finished run of hsae_train, and the one of hsae_teacher that it has read."""
    import pandas as pd
    import torch

    from allostasis.core.records import write_json
    from allostasis.core.spaces import UnembVec, causal_metric
    from allostasis.experiments.hsae import arms
    from allostasis.experiments.hsae.clouds import kept_tokens
    from allostasis.models import sae
    from allostasis.models.hsae import HierarchicalSAE
    from allostasis.models.teacher import FILE, Teacher, write_teacher
    from allostasis.tasks.concepts import ConceptTable

    root = trained.parents[3]
    common = torch.bincount(task.split("train").ids[:, 3].clamp(min=0)).argsort(descending=True)
    ids = [int(token) for token in common if token > 3][:48]
    sides = ["train", "train", "val", "test"]
    rows = [
        (name, synset, parent, f"w{token}", f"w{token}", token, sides[(place // 4) % 4])
        for place, token in enumerate(ids)
        for name, synset, parent in _concepts_of_a_place(place)
    ]
    columns = ["concept", "synset", "parent", "lemma", "form", "token_id", "split"]
    frame = pd.DataFrame(rows, columns=columns).astype({"parent": "Int64"})
    digest = model.identity["tokenizer_sha256"]
    table = ConceptTable(frame, {"tokenizer_sha256": digest})
    rows_of = model.decoder.W_U.detach().T.float()
    space = causal_metric(UnembVec(rows_of[kept_tokens(model)]), metric=metric)
    vector = {s: rows_of[torch.from_numpy(table.ids(s))].double().mean(dim=0) - space.mean
              for s in table.names}  # fmt: skip
    shape = (2, 2, model.decoder.d_model)
    deltas = [[vector[p + c] - vector[p] for c in (1, 2)] for p in (10, 20)]
    teacher = Teacher(
        UnembVec(torch.stack([vector[10], vector[20]])),
        UnembVec(torch.stack([torch.stack(of_one) for of_one in deltas])),
        torch.ones(2, 2, dtype=torch.bool), (10, 20), ((11, 12), (21, 22)), space, digest,
        model.identity["weights_sha256"],
    )  # fmt: skip
    taught = root / "hsae_teacher" / metric / "seed=0" / "cpu-aa"
    table.write(taught)
    write_teacher(taught / FILE, teacher)
    write_json(taught / "run.json", {"run_id": f"hsae_teacher-{metric}-0-cpu-aa", "status": "done"})
    hsae = HierarchicalSAE(seed=0, d_model=shape[2], m=4, c=2, s=2, k=2)
    given = arms.of_teacher(teacher, m=4, c=2)
    hsae.plant(given.parents, given.children, given.mask)
    sae.export(hsae, trained / "sae", hook_name="unembed_input")
    read = {"hsae_teacher": {"run_id": f"hsae_teacher-{metric}-0-cpu-aa"}}
    write_json(
        trained / "run.json",
        {"run_id": "hsae_train-x", "status": "done", "read": read, "checkpoints": {}},
    )


def _concepts_of_a_place(place: int) -> list[tuple[str, int, int | None]]:
    parent, child = 10 * (1 + place % 2), 1 + (place // 2) % 2
    return [(f"p{parent}", parent, None), (f"c{parent + child}", parent + child, parent)]
