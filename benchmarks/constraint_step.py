"""One training step of the constraint experiment: ours against the straightforward one.

    python benchmarks/constraint_step.py [--rounds 7] [--threads 2] [--vocab 4096] [--d-model 128]

Same weights, same batch (64 sequences of 128 tokens at full size). The straightforward step is what
one writes first: every hook point, attention as scores and pattern, all logits, cross_entropy, Adam
as torch gives it. Ours never forms the pattern, never holds all logits, and fuses Adam. Losses and
gradients must agree, relative to each tensor's largest entry: 1e-10 in float64, 1e-5 in float32.
The two are timed in turn.

Last line: the straightforward step's median time over ours.
"""

import argparse
import copy
import statistics
import sys
import time


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--n-layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()

    import torch
    from torch import nn

    from allostasis.models.readout import readout_loss
    from allostasis.models.toy_transformer import ToyTransformer
    from allostasis.tasks.interleaved_patterns import InterleavedPatterns
    from allostasis.tasks.sequences import Sequences

    torch.set_num_threads(options.threads)
    task = InterleavedPatterns(
        seed=0, seq_len=options.seq_len, vocab_size=options.vocab, batch_size=options.batch
    )
    batch = task.train_batch(0)

    def model() -> ToyTransformer:
        return ToyTransformer(
            seed=0,
            vocab_size=options.vocab,
            seq_len=options.seq_len,
            d_model=options.d_model,
            n_layers=options.n_layers,
        )

    def look(tensor: torch.Tensor, *, hook: object) -> None:
        del tensor, hook

    plain, ours = model(), model()
    for block in plain.blocks:  # attention as it is written in a textbook
        block.attn.hook_pattern.add_hook(look, is_permanent=True)
    optimisers = {
        "plain": torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0),
        "ours": torch.optim.AdamW(ours.parameters(), lr=1e-3, weight_decay=0.0, fused=True),
    }

    def plain_loss(model: ToyTransformer, batch: Sequences) -> torch.Tensor:
        logits = model(batch.tokens)
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())

    def our_loss(model: ToyTransformer, batch: Sequences) -> torch.Tensor:
        return readout_loss(model.encode(batch.tokens), model.W_U, batch.targets, batch.scored)

    losses = {"plain": lambda: plain_loss(plain, batch), "ours": lambda: our_loss(ours, batch)}

    def difference(n_sequences: int, dtype: torch.dtype) -> float:
        """Largest difference of loss and gradients, relative to each tensor's largest entry."""
        some = batch.part(slice(n_sequences))
        pair = [copy.deepcopy(side).to(dtype) for side in (plain, ours)]
        found = [plain_loss(pair[0], some), our_loss(pair[1], some)]
        for loss in found:
            loss.backward()
        worst = abs(found[0].item() - found[1].item()) / abs(found[0].item())
        for (name, left), right in zip(
            pair[0].named_parameters(), pair[1].parameters(), strict=True
        ):
            if name.endswith("b_K"):  # moves all scores of a query alike: 0 but for rounding
                continue
            assert left.grad is not None
            assert right.grad is not None
            size = float(left.grad.abs().max())
            worst = max(worst, float((left.grad - right.grad).abs().max()) / size)
        return worst

    # all of the batch in float64; in float32 a quarter, for of millions of neurons one lies within
    # rounding of its kink, and there the two may choose different sides
    for n_sequences, dtype, allowed in ((16, torch.float32, 1e-5), (64, torch.float64, 1e-10)):
        worst = difference(min(n_sequences, options.batch), dtype)
        print(f"{dtype}: loss and gradients differ by at most {worst:.1e} (allowed {allowed:g})")
        if worst > allowed:
            print("the two steps differ")
            return 1

    def step(name: str) -> float:
        begun = time.perf_counter()
        optimisers[name].zero_grad()
        losses[name]().backward()
        optimisers[name].step()
        return 1e3 * (time.perf_counter() - begun)

    times: dict[str, list[float]] = {name: [] for name in losses}
    for name in losses:
        step(name)
    for _ in range(options.rounds):
        for name, taken in times.items():
            taken.append(step(name))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, median in medians.items():
        spread = f"{min(times[name]):.0f} to {max(times[name]):.0f}"
        print(f"{name:6s} {median:7.1f} ms a step ({spread})")
    print(f"ratio: {medians['plain'] / medians['ours']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
