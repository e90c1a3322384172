"""Zero every head of a model on IOI prompts: our sweep against TransformerLens hook by hook.

    python benchmarks/sweep_vs_transformerlens.py [--prompts 64] [--threads 2] [--sample 0.1]

All heads of SmolLM2 (30 x 9), prompts of the `ioi` task, logit difference at the last token. Two
peers run `run_with_hooks`, one head at a time over the whole exact-length batch: the loop that
people write, which computes all logits (usual), and one that unembeds the last token only (fair).
A sample of heads, spread over all layers, stands for all of them in the peers' time, scaled up;
ours runs all. Versions alternate, times are medians over rounds.

Ours runs in float32 and with products rounded to bfloat16, re-checked by `verify_slice`.

Last line: time of the fair peer over ours in float32.
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
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=float, default=0.1, help="share of heads the peers run")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    import numpy as np
    import torch

    from allostasis.engines.budget import Budget
    from allostasis.engines.prompts import Rows
    from allostasis.engines.suffix import Precision, sweep
    from allostasis.engines.verify import verify_slice
    from allostasis.interventions.ablate import Unit
    from allostasis.models.lens import bridge, pretrained
    from allostasis.tasks.ioi import IOI

    torch.set_num_threads(options.threads)
    model = pretrained(name="HuggingFaceTB/SmolLM2-135M-Instruct", device=options.device)
    task = IOI(seed=0, n_examples=options.prompts, n_discovery=2, n_reference=8)
    prompts = task.build(model.encode, model.tokenizer).evaluation
    rows = Rows(
        prompts=[p.ids for p in prompts],
        target=[p.io_id for p in prompts],
        foil=[p.s_id for p in prompts],
    )
    decoder = model.decoder
    units = [
        Unit(members=((layer, head),))
        for layer in range(decoder.n_layers)
        for head in range(decoder.n_heads)
    ]
    step = max(1, round(1 / options.sample))
    sample = list(range(step // 2, len(units), step))
    lens = bridge(model)
    lengths = defaultdict(list)
    for row, ids in enumerate(rows.prompts):
        lengths[len(ids)].append(row)

    def peer(*, all_logits: bool) -> tuple[float, np.ndarray]:
        found = np.zeros((len(sample), len(prompts)))
        start = time.perf_counter()
        for index, unit in enumerate(sample):
            ((layer, head),) = units[unit].members

            def zero(z: torch.Tensor, hook: object, head: int = head) -> torch.Tensor:
                del hook
                z = z.clone()
                z[:, :, head] = 0
                return z

            hooks = [(f"blocks.{layer}.attn.hook_z", zero)]
            for chosen in lengths.values():
                ids = torch.tensor([rows.prompts[row] for row in chosen], device=options.device)
                target = torch.tensor([rows.target[row] for row in chosen])
                foil = torch.tensor([rows.foil[row] for row in chosen])
                extra = {} if all_logits else {"logits_to_keep": 1}
                with torch.no_grad():
                    last = lens.run_with_hooks(ids, fwd_hooks=hooks, **extra)[:, -1].cpu()
                at = torch.arange(len(chosen))
                found[index, chosen] = (last[at, target] - last[at, foil]).double().numpy()
        return (time.perf_counter() - start) * len(units) / len(sample), found

    def ours(precision: Precision) -> tuple[float, object]:
        start = time.perf_counter()
        swept = sweep(decoder, rows, units, full=False, precision=precision, budget=budget)
        return time.perf_counter() - start, swept

    sides = {
        "usual": lambda: peer(all_logits=True),
        "fair": lambda: peer(all_logits=False),
        "fp32": lambda: ours("fp32"),
        "bf16": lambda: ours("bf16"),
    }
    budget = Budget.measured(decoder)
    seconds = defaultdict(list)
    last = {}
    for _ in range(options.rounds):
        for side, measure in sides.items():
            taken, last[side] = measure()
            seconds[side].append(taken)
    medians = {side: statistics.median(taken) for side, taken in seconds.items()}
    swept = last["fp32"]
    profile = swept.profile
    ours_there = swept.values["ld"][sample]
    off = {side: np.abs(last[side] - ours_there).max() for side in ("usual", "fair")}
    where = f"{options.threads} threads, {options.device}"
    print(f"{len(units)} heads, {len(prompts)} prompts, {where}")
    for side, value in medians.items():
        scaled = f" (from {len(sample)} heads)" if side in off else ""
        print(f"{side:6s} {value:8.1f} s   {medians['usual'] / value:5.2f}x the usual loop{scaled}")
    ratio = profile.naive_forward_tokens / profile.forward_tokens
    print(f"forward tokens {profile.forward_tokens:,.0f}, {ratio:.2f}x fewer than one pass a head")
    print(f"tokens side by side {profile.max_tokens}; sham {profile.sham:.1e} logit")
    print(f"largest difference in logits: usual {off['usual']:.1e}, fair {off['fair']:.1e}")
    check = verify_slice(model, rows, last["bf16"], seed=0, precision="bf16")
    print(
        f"bf16 re-checked in float32: {check['max_abs_diff']:.3f} logit off at most, effects "
        f"{check['max_abs_diff_effect']:.3f}; Spearman {check['spearman']:.3f}; "
        f"{len(check['below_noise'])} of {len(units)} effects below twice that"
    )
    print(f"ratio: {medians['fair'] / medians['fp32']:.2f}")
    if max(off.values()) > SAME or not check["passed"]:
        print(f"results disagree: more than {SAME} logit, or bf16 not within its bound")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
