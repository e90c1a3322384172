"""Heads zeroed one by one, and sets of them: our engine against one hook and one pass at a time.

    python benchmarks/heads_sweep.py                   random weights of GPT-2's shape
    python benchmarks/heads_sweep.py --device cuda     the same on a GPU
    python benchmarks/heads_sweep.py --work last_layer | last_position | lattice

The peer calls the model itself with a hook on the output projection, one unit at a time over the
whole batch of prompts of one length, and unembeds the last token only. A sample of units, spread
over all, stands for all of them in its time, scaled up; ours runs all. Both alternate, in one
process, in float32 with full-precision products; times are medians over rounds. Weights are random
where they are not at hand: a pass costs the same whatever they are.

heads: every head of every layer. last_layer: every head of the last one. last_position: every head,
at the last token alone. lattice: all heads, pairs and triples of layer 0.

Ours begins with a clean pass that all units share. Where there are few units, as in one layer, that
pass is most of the time, so that the units alone are told beside it: a sweep has it anyway.

Last line: the peer's time over ours, with the clean pass; of last_layer without it.
"""

import argparse
import os
import statistics
import sys
import time

SAME = 2e-4  # logits, relative to 1 + the largest one
AIMS = {
    ("heads", "cpu"): 1.8, ("heads", "cuda"): 10.0, ("last_layer", "cpu"): 20.0,
    ("last_position", "cpu"): 5.0, ("lattice", "cpu"): 1.2, ("lattice", "cuda"): 3.0,
}  # fmt: skip


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    works = ("heads", "last_layer", "last_position", "lattice")
    parser.add_argument("--work", choices=works, default="heads")
    parser.add_argument(
        "--model", default="gpt2-shaped-random",
        choices=("gpt2-shaped-random", "smollm2-shaped-random", "smollm2", "tiny"),
    )  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=float, default=0.1, help="share of units the peer runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()

    import numpy as np
    import torch

    from allostasis.analysis.lattice import lattice
    from allostasis.engines.budget import Budget
    from allostasis.engines.group_run import GroupRun, Profile, Settings
    from allostasis.engines.prompts import Rows, group_rows
    from allostasis.engines.suffix import sweep
    from allostasis.interventions.ablate import Unit
    from allostasis.models.lens import pretrained
    from allostasis.models.shaped import shaped

    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    if options.model == "smollm2":
        model = pretrained(name="HuggingFaceTB/SmolLM2-135M-Instruct", device=options.device)
    elif options.model == "tiny":
        model = pretrained(arch="llama", device=options.device)
    else:
        model = shaped(options.model, device=options.device)
    decoder = model.decoder
    last = decoder.n_layers - 1
    rng = np.random.default_rng(0)
    size = options.prompts, options.tokens
    ids = rng.integers(4, min(decoder.n_vocab, 40_000), size=size)
    answers = rng.integers(4, min(decoder.n_vocab, 40_000), size=(2, options.prompts))
    rows = Rows(
        prompts=[tuple(row) for row in ids.tolist()],
        target=answers[0].tolist(),
        foil=answers[1].tolist(),
    )
    layers = {"last_layer": [last], "lattice": [0]}.get(options.work, range(decoder.n_layers))
    heads = [(layer, head) for layer in layers for head in range(decoder.n_heads)]
    sets = lattice(heads) if options.work == "lattice" else [(head,) for head in heads]
    positions = "last" if options.work == "last_position" else "all"
    units = [Unit(members=some, positions=positions) for some in sets]
    step = max(1, round(1 / options.sample))
    sample = list(range(min(step // 2, len(units) - 1), len(units), step))
    on_device = torch.tensor(ids, device=options.device)
    target, foil = torch.tensor(answers, device=options.device)

    def wait() -> None:
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()

    @torch.no_grad()
    def peer() -> tuple[float, np.ndarray]:
        found = []
        wait()
        start = time.perf_counter()
        for index in sample:
            unit = units[index]
            at = slice(None) if positions == "all" else slice(-1, None)

            def zero(_: object, args: tuple, unit: Unit = unit, at: slice = at) -> tuple:
                z = args[0].unflatten(-1, (decoder.n_heads, -1)).clone()
                for _layer, head in unit.members:
                    z[:, at, head] = 0
                return (z.flatten(-2),)

            hook = decoder.out_projection(unit.layer).register_forward_pre_hook(zero)
            logits = model.hf(on_device, use_cache=False, logits_to_keep=1).logits[:, -1]
            hook.remove()
            row = torch.arange(len(logits), device=logits.device)
            found.append(logits[row, target] - logits[row, foil])
        columns = torch.stack(found).double().cpu().numpy()
        return (time.perf_counter() - start) * len(units) / len(sample), columns

    def ours() -> tuple[float, object]:
        wait()
        start = time.perf_counter()
        swept = sweep(decoder, rows, units, full=False, budget=budget)
        wait()
        return time.perf_counter() - start, swept

    @torch.no_grad()
    def alone() -> float:
        """Seconds of the units, once the clean pass is there."""
        (group,) = group_rows(rows, {}, "none", decoder)
        settings = Settings(("ld",), frozenset({"z"}), reuse_kv=True)
        run = GroupRun(decoder, group, budget, Profile(), settings)
        assert len(run.clean_columns["ld"]) == len(rows)
        wait()
        start = time.perf_counter()
        for layer in layers:
            run.layer(layer, [unit for unit in units if unit.layer == layer])
        wait()
        return time.perf_counter() - start

    budget = Budget.measured(decoder)
    ours()  # kernels are chosen and memory is taken once
    seconds: dict[str, list[float]] = {"peer": [], "ours": [], "alone": []}
    for _ in range(options.rounds):
        taken, theirs = peer()
        seconds["peer"].append(taken)
        seconds["alone"].append(alone())
        taken, swept = ours()
        seconds["ours"].append(taken)
    medians = {side: statistics.median(taken) for side, taken in seconds.items()}
    found = swept.values["ld"][sample]
    off = np.abs(found - theirs).max() / (1 + np.abs(theirs).max())
    profile = swept.profile
    where = options.device
    if where.startswith("cuda"):
        where = torch.cuda.get_device_name()
    print(f"{options.work}: {len(units)} units, {size[0]} prompts of {size[1]} tokens")
    print(f"{options.model}, {where}, {options.threads} threads, torch {torch.__version__}")
    print(f"peer {medians['peer']:8.3f} s (from {len(sample)} units)")
    print(f"ours {medians['ours']:8.3f} s, {profile.max_tokens} tokens side by side at most")
    without = medians["peer"] / medians["alone"]
    print(f"without the clean pass {medians['alone']:.3f} s, {without:.1f}x")
    ratio = profile.naive_forward_tokens / profile.forward_tokens
    print(f"forward tokens {ratio:.2f}x fewer; sham {profile.sham:.1e} logit")
    print(f"largest relative difference of a logit difference: {off:.1e}")
    aim = AIMS.get((options.work, options.device.partition(":")[0]))
    reached = without if options.work == "last_layer" else medians["peer"] / medians["ours"]
    if aim is not None and options.model != "tiny":
        print(f"aim {aim:g}: {'met' if reached >= aim else 'NOT met'}")
    print(f"ratio: {reached:.2f}")
    return int(off > SAME)


if __name__ == "__main__":
    sys.exit(main())
