"""Every head zeroed on four corpora: our engine against one unit at a time on padded corpora.

    python benchmarks/heads_corpora.py [--rows 48] [--layers 5] [--sample 0.1] [--device cuda]

SmolLM2 and the project's own corpora. The peer is the loop of the source: a corpus is padded to its
longest prompt and run whole for every head, with a hook, all positions unembedded, and read at the
last real token (the source read position -1). A leaner peer unembeds that token alone. Ours runs
prompts by length, each once, from the layer that changes. All heads of a few layers, spread over
the model, stand for all layers, and a sample of those heads for the peers'; times are scaled up.

Last line: the peer's time over ours.
"""

import argparse
import os
import sys
import time

SAME = 2e-3  # logits: padding adds masked terms in another order


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=48, help="of each corpus")
    parser.add_argument("--layers", type=int, default=5, help="that stand for all")
    parser.add_argument("--sample", type=float, default=0.1, help="share of heads the peers run")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    import numpy as np
    import torch

    from allostasis.engines.budget import Budget
    from allostasis.engines.prompts import Rows
    from allostasis.engines.suffix import sweep
    from allostasis.interventions.ablate import Unit
    from allostasis.models.lens import pretrained
    from allostasis.tasks.probes.rows import CORPORA
    from allostasis.tasks.probes.task import Probes

    torch.set_num_threads(options.threads)
    model = pretrained(name="HuggingFaceTB/SmolLM2-135M-Instruct", device=options.device)
    decoder = model.decoder
    n_layers, n_heads = decoder.n_layers, decoder.n_heads
    layers = sorted({int(x) for x in np.linspace(0, n_layers - 1, options.layers).round()})
    units = [Unit(members=((layer, head),)) for layer in layers for head in range(n_heads)]
    step = max(1, round(1 / options.sample))
    sample = list(range(step // 2, len(units), step))
    scale = n_layers * n_heads / len(sample)
    budget = Budget.measured(decoder)
    total = {"usual": 0.0, "lean": 0.0, "ours": 0.0}
    worst = 0.0
    for corpus in CORPORA:
        task = Probes(seed=0, corpus=corpus)
        examples = task.build(model.encode, model.tokenizer).examples[: options.rows]
        rows = Rows(
            prompts=[example.clean_ids for example in examples],
            target=[example.target_id for example in examples],
            foil=[example.foil_id for example in examples],
        )
        width = max(map(len, rows.prompts))
        ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
        for row, prompt in enumerate(rows.prompts):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt), 1
        at = mask.sum(1) - 1
        target, foil = torch.tensor(rows.target), torch.tensor(rows.foil)
        ids, mask, at = (tensor.to(options.device) for tensor in (ids, mask, at))

        @torch.no_grad()
        def peer(ids=ids, mask=mask, at=at, target=target, foil=foil, *, lean: bool):  # noqa: ANN
            found = []
            start = time.perf_counter()
            row = torch.arange(len(ids), device=ids.device)
            for index in sample:
                ((layer, head),) = units[index].members

                def zero(_: object, args: tuple, head: int = head) -> tuple:
                    z = args[0].unflatten(-1, (n_heads, -1)).clone()
                    z[:, :, head] = 0
                    return (z.flatten(-2),)

                hook = decoder.out_projection(layer).register_forward_pre_hook(zero)
                given = {"attention_mask": mask, "use_cache": False}
                if lean:
                    hidden = model.hf.base_model(ids, **given).last_hidden_state[row, at]
                    logits = decoder.unembed(hidden).cpu()
                else:
                    logits = model.hf(ids, **given).logits[row, at].cpu()
                hook.remove()
                here = torch.arange(len(ids))
                found.append((logits[here, target] - logits[here, foil]).double().numpy())
            return (time.perf_counter() - start) * scale, np.stack(found)

        def ours(rows=rows) -> tuple[float, object]:  # noqa: ANN001
            start = time.perf_counter()
            sweep(decoder, rows, [], full=False, budget=budget)
            clean = time.perf_counter() - start
            start = time.perf_counter()
            swept = sweep(decoder, rows, units, full=False, budget=budget)
            alone = time.perf_counter() - start - clean
            return clean + alone * n_layers / len(layers), swept

        taken = {}
        taken["ours"], swept = ours()
        taken["lean"], leaner = peer(lean=True)
        taken["usual"], theirs = peer(lean=False)
        again, _ = ours()
        taken["ours"] = min(taken["ours"], again)
        worst = max(
            worst, *(np.abs(swept.values["ld"][sample] - x).max() for x in (theirs, leaner))
        )
        for side, seconds in taken.items():
            total[side] += seconds
        padded = len(rows) * width / sum(map(len, rows.prompts))
        said = ", ".join(f"{side} {seconds:.1f} s" for side, seconds in taken.items())
        print(f"{corpus}: {len(rows)} rows, {padded:.2f}x the tokens when padded; {said}")
    print(f"{n_layers * n_heads} heads, {options.threads} threads, {options.device}; scaled from")
    print(f"{len(units)} heads of layers {layers} (ours), {len(sample)} of them (peers)")
    for side, seconds in total.items():
        print(f"{side:6s} {seconds:9.1f} s   {seconds / total['ours']:5.2f}x ours")
    print(f"largest difference in logits: {worst:.1e}")
    print(f"ratio: {total['usual'] / total['ours']:.2f}")
    return int(worst > SAME)


if __name__ == "__main__":
    sys.exit(main())
