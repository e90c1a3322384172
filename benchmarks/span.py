"""Log probabilities of whole answers: our sweep against TransformerLens hook by hook.

    python benchmarks/span.py [--examples 8] [--threads 2] [--sample 0.1]

Every head of six layers of SmolLM2 zeroed alone, prompts of `facts` whose answers go on for two
more tokens, log p of all tokens of the target less those of the foil, teacher-forced. The peer runs
`run_with_hooks` on prompt and answer, one head at a time over each batch of one length, once for
targets and once for foils; a sample of heads stands for all of them in its time, scaled up. Ours
runs all, prompts that answers share once. Versions alternate, times are medians over rounds.

Last line: time of the peer over ours.
"""

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace

SAME = 5e-4  # nats, of sums over a few tokens


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=float, default=0.1, help="share that the peer runs")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    import numpy as np
    import torch

    from allostasis.engines.budget import Budget
    from allostasis.engines.suffix import sweep
    from allostasis.experiments.heads.asked import Asked
    from allostasis.interventions.ablate import Unit
    from allostasis.models.lens import bridge, pretrained
    from allostasis.tasks.probes.task import Probes

    torch.set_num_threads(options.threads)
    model = pretrained(name="HuggingFaceTB/SmolLM2-135M-Instruct", device=options.device)
    decoder, lens = model.decoder, bridge(model)
    corpus = Probes(seed=0, corpus="facts").build(model.encode, model.tokenizer)
    more = tuple(model.tokenizer.encode(" of course", add_special_tokens=False))
    longer = [
        replace(e, tokens=replace(e.tokens, target=(e.target_id, *more), foil=(e.foil_id, *more)))
        for e in corpus.of("test")[: options.examples]
    ]
    asked = Asked(corpus, longer, seed=0)
    layers = range(0, decoder.n_layers, 5)
    heads = [(layer, head) for layer in layers for head in range(decoder.n_heads)]
    units = [Unit(members=(place,)) for place in heads]
    step = max(1, round(1 / options.sample))
    sample = list(range(step // 2, len(units), step))

    def peer() -> tuple[float, np.ndarray]:
        found = np.zeros((len(sample), len(asked)))
        start = time.perf_counter()
        for side, sign in (("target", 1), ("foil", -1)):
            batches = defaultdict(list)
            for row, example in enumerate(asked.examples):
                answer = getattr(example.tokens, side)
                batches[len(example.clean_ids), len(answer)].append((row, answer))
            for (n_prompt, n_answer), some in batches.items():
                rows = [row for row, _ in some]
                texts = [(*asked.examples[row].clean_ids, *answer[:-1]) for row, answer in some]
                ids = torch.tensor(texts, device=options.device)
                read = torch.tensor([answer for _, answer in some], device=options.device)
                for index, number in enumerate(sample):
                    layer, head = heads[number]

                    def zero(z: torch.Tensor, hook: object, head: int = head) -> torch.Tensor:
                        del hook
                        z = z.clone()
                        z[:, :, head] = 0
                        return z

                    hooks = [(f"blocks.{layer}.attn.hook_z", zero)]
                    with torch.no_grad():
                        logits = lens.run_with_hooks(ids, fwd_hooks=hooks, logits_to_keep=n_answer)
                    logp = logits[:, n_prompt - ids.shape[1] - 1 :].log_softmax(-1)
                    whole = logp.gather(2, read[:, :, None]).sum((1, 2))
                    found[index, rows] += sign * whole.double().cpu().numpy()
        return (time.perf_counter() - start) * len(units) / len(sample), found

    def ours() -> tuple[float, np.ndarray]:
        start = time.perf_counter()
        swept = sweep(decoder, asked.rows, units, budget=budget)
        whole, _ = asked.span(swept.values["logp_target"], swept.values["logp_foil"])
        return time.perf_counter() - start, whole[sample]

    budget = Budget.measured(decoder)
    seconds, last = defaultdict(list), {}
    for _ in range(options.rounds):
        for side, measure in (("peer", peer), ("ours", ours)):
            taken, last[side] = measure()
            seconds[side].append(taken)
    medians = {side: statistics.median(taken) for side, taken in seconds.items()}
    off = float(np.abs(last["peer"] - last["ours"]).max())
    print(f"{len(units)} heads, {len(asked)} examples, answers of {1 + len(more)} tokens")
    print(f"{options.threads} threads, {options.device}")
    print(f"peer {medians['peer']:8.1f} s (from {len(sample)} heads)")
    print(f"ours {medians['ours']:8.1f} s")
    print(f"largest difference in nats: {off:.1e}")
    print(f"ratio: {medians['peer'] / medians['ours']:.2f}")
    if off > SAME:
        print(f"results disagree by more than {SAME} nat")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
