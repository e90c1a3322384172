"""Patch pairs of prompts: our sweep against TransformerLens hook by hook.

    python benchmarks/patch.py [--pairs 32] [--threads 2] [--sample 0.05]

SmolLM2, clean and corrupt prompts of the `facts` corpus, clean values put into the corrupt run,
logit difference at the last token. Two kinds of work: `last`, every layer's stream, every MLP and
every head at the last token; and `trace`, every layer's stream and MLP at every position that can
matter, counted back from the end. The peer runs `run_with_hooks`, one patch at a time over each
batch of one length, and unembeds the last token only; a sample of patches, spread over all layers,
stands for all of them in its time, scaled up. Ours runs all. Versions alternate, times are medians.

Last line: time of the peer over ours, both kinds of work together.
"""

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict

SAME = 2e-4  # logits


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=float, default=0.05, help="share that the peer runs")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    import numpy as np
    import torch

    from allostasis.engines.budget import Budget
    from allostasis.engines.prompts import Rows
    from allostasis.engines.suffix import sweep
    from allostasis.engines.verify import HOOKS
    from allostasis.interventions.ablate import ALIGNED, Unit
    from allostasis.models.lens import bridge, pretrained
    from allostasis.tasks.probes.task import Probes

    torch.set_num_threads(options.threads)
    model = pretrained(name="HuggingFaceTB/SmolLM2-135M-Instruct", device=options.device)
    decoder, lens = model.decoder, bridge(model)
    corpus = Probes(seed=0, corpus="facts").build(model.encode, model.tokenizer)
    pairs = corpus.of("test")[: options.pairs]
    rows = Rows(
        prompts=[p.corrupt_ids for p in pairs],
        target=[p.target_id for p in pairs],
        foil=[p.foil_id for p in pairs],
    )
    sources = {"patch": [(p.clean_ids,) for p in pairs]}
    reach = max(len(p.clean_ids) - p.roles["first_changed"][0] for p in pairs)
    roles = {
        f"-{back}": [
            [(len(p.clean_ids) - back,) * 2]
            if len(p.clean_ids) - back >= p.roles["first_changed"][0]
            else []
            for p in pairs
        ]
        for back in range(2, reach + 1)
    }
    places = [f"{ALIGNED}{role}" for role in roles]
    layers = range(decoder.n_layers)

    def patch(site: str, layer: int, head: int | None, where: str) -> Unit:
        return Unit(site=site, op="patch", members=((layer, head),), positions=where)  # pyright: ignore[reportArgumentType]

    streams = [(site, layer) for layer in layers for site in ("resid_post", "mlp_out")]
    work = {
        "last": [patch(site, layer, None, "last") for site, layer in streams]
        + [patch("z", layer, h, "last") for layer in layers for h in range(decoder.n_heads)],
        "trace": [patch(site, layer, None, where) for site, layer in streams for where in places],
    }
    step = max(1, round(1 / options.sample))
    samples = {kind: list(range(step // 2, len(units), step)) for kind, units in work.items()}
    lengths = defaultdict(list)
    for row, ids in enumerate(rows.prompts):
        lengths[len(ids)].append(row)

    def peer(kind: str) -> tuple[float, np.ndarray]:
        units, sample = work[kind], samples[kind]
        found = np.zeros((len(sample), len(pairs)))
        start = time.perf_counter()
        for chosen in lengths.values():
            ids = torch.tensor([rows.prompts[row] for row in chosen], device=options.device)
            clean = torch.tensor([pairs[row].clean_ids for row in chosen], device=options.device)
            target = torch.tensor([rows.target[row] for row in chosen])
            foil = torch.tensor([rows.foil[row] for row in chosen])
            names = {f"blocks.{u.layer}.{HOOKS[u.site]}" for u in map(units.__getitem__, sample)}
            with torch.no_grad():
                _, cache = lens.run_with_cache(clean, names_filter=sorted(names), logits_to_keep=1)
            for index, number in enumerate(sample):
                unit = units[number]
                name, head = f"blocks.{unit.layer}.{HOOKS[unit.site]}", unit.members[0][1]
                at = -1 if unit.role is None else int(unit.role)
                acts = [at == -1 or bool(roles[str(at)][row]) for row in chosen]
                if at < -ids.shape[1]:
                    acts = [False] * len(chosen)

                def put(
                    value: torch.Tensor, hook: object, name: str = name, head: int | None = head,
                    at: int = at, acts: list[bool] = acts, cache: object = cache,
                ) -> torch.Tensor:  # fmt: skip
                    del hook
                    value = value.clone()
                    if any(acts):
                        place = (acts, at) if head is None else (acts, at, head)
                        value[place] = cache[name][place]  # pyright: ignore[reportIndexIssue]
                    return value

                with torch.no_grad():
                    logits = lens.run_with_hooks(ids, fwd_hooks=[(name, put)], logits_to_keep=1)
                last, every = logits[:, -1].cpu(), torch.arange(len(chosen))
                found[index, chosen] = (last[every, target] - last[every, foil]).double().numpy()
        return (time.perf_counter() - start) * len(units) / len(sample), found

    def ours(kind: str) -> tuple[float, np.ndarray]:
        start = time.perf_counter()
        swept = sweep(
            decoder, rows, work[kind], sources=sources, roles=roles, full=False, budget=budget
        )
        return time.perf_counter() - start, swept.values["ld"][samples[kind]]

    budget = Budget.measured(decoder)
    seconds, last = defaultdict(list), {}
    for _ in range(options.rounds):
        for kind in work:
            for side, measure in (("peer", peer), ("ours", ours)):
                taken, last[side, kind] = measure(kind)
                seconds[side, kind].append(taken)
    medians = {key: statistics.median(taken) for key, taken in seconds.items()}
    where = f"{options.threads} threads, {options.device}"
    print(f"{len(pairs)} pairs of {min(lengths)} to {max(lengths)} tokens, {where}")
    off = 0.0
    for kind, units in work.items():
        theirs, own = medians["peer", kind], medians["ours", kind]
        off = max(off, float(np.abs(last["peer", kind] - last["ours", kind]).max()))
        print(
            f"{kind:6s} {len(units):5d} patches   peer {theirs:8.1f} s (from "
            f"{len(samples[kind])})   ours {own:8.1f} s   {theirs / own:5.2f}x"
        )
    print(f"largest difference in logits: {off:.1e}")
    whole = {side: sum(medians[side, kind] for kind in work) for side in ("peer", "ours")}
    print(f"ratio: {whole['peer'] / whole['ours']:.2f}")
    if off > SAME:
        print(f"results disagree by more than {SAME} logit")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
