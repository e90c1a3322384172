"""One update of grokking's model: ours against TransformerLens's three-position forward.

    python benchmarks/grokking_step.py            about two minutes on two cores
    python benchmarks/grokking_step.py --threads 1 --steps 50

An update is the loss (log-softmax in float64), all gradients and a fused AdamW step on the full
batch of 3,830 pairs at p = 113. All models start from the same weights and see the same pairs. The
peer is the faster of HookedTransformer and TransformerBridge.boot_native. First both sides train in
float64 and their loss curves must agree; then single updates are timed in turn, in float32.

With matmul=bfloat16 our three largest products (logits from neurons, and both gradients of that)
round their factors to bfloat16's 8 significant bits and sum in float32; all else stays float32.
That is not the same computation, so its ratio is printed apart. Its loss curve is held against the
float64 one beside those of both float32 sides: training amplifies rounding errors of any size.

The last line is `ratio: X`, the peer's median time over ours in float32. The exit status is 1 when
curves disagree.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge

from allostasis.models.modular_transformer import ModularTransformer
from allostasis.tasks.modular_addition import ModularAddition, Pairs

AGREEMENT = 1e-6  # relative, float64 loss curves of ours and the peer's
ROUNDING = 0.25  # relative, loss curve with bfloat16 products and float64; float32 reaches 0.05
IN_A_ROW = 5  # timed updates in one turn

Update = Callable[[], float]


def hooked_transformer(model: ModularTransformer) -> nn.Module:
    """HookedTransformer with the model's weights; biases that ours lacks are zero and fixed."""
    peer = HookedTransformer(HookedTransformerConfig(**sizes(model)))
    for name, parameter in peer.named_parameters():
        own = name.rpartition(".")[2]
        fill(parameter, getattr(model, own, None))
    return peer


def bridge(model: ModularTransformer) -> nn.Module:
    """TransformerBridge over its native model, likewise; its matrices are the transposes."""
    peer = TransformerBridge.boot_native(sizes(model))
    own = {
        "tok_embed.weight": model.W_E,
        "pos.weight": model.W_pos,
        "layers.0.attn.q.weight": model.W_Q.mT.flatten(0, 1),
        "layers.0.attn.k.weight": model.W_K.mT.flatten(0, 1),
        "layers.0.attn.v.weight": model.W_V.mT.flatten(0, 1),
        "layers.0.attn.o.weight": model.W_O.flatten(0, 1).T,
        "layers.0.mlp.fc_in.weight": model.W_in.T,
        "layers.0.mlp.fc_in.bias": model.b_in,
        "layers.0.mlp.fc_out.weight": model.W_out.T,
        "layers.0.mlp.fc_out.bias": model.b_out,
        "head.weight": model.W_U.T,
    }
    for name, parameter in peer.named_parameters():
        fill(parameter, own.pop(name.replace("._original_component", ""), None))
    assert not own, f"not copied: {sorted(own)}"
    return peer


def sizes(model: ModularTransformer) -> dict[str, object]:
    """A model's sizes, in TransformerLens's words."""
    return {
        "n_layers": 1,
        "d_model": model.d_model,
        "d_head": model.d_head,
        "n_heads": model.n_heads,
        "d_mlp": model.d_mlp,
        "act_fn": "relu",
        "normalization_type": None,
        "d_vocab": model.p + 1,
        "d_vocab_out": model.p + 1,
        "n_ctx": 3,
        "init_weights": False,
        "device": "cpu",
    }


@torch.no_grad()
def fill(parameter: nn.Parameter, value: Tensor | None) -> None:
    """Copy a value into a parameter, or fix the parameter at zero where there is none."""
    if value is None:
        parameter.zero_().requires_grad_(False)
    else:
        parameter.copy_(value)


def updates(model: nn.Module, loss: Callable[[], Tensor]) -> Update:
    """A function that does one update and returns the loss before it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1.0, betas=(0.9, 0.98), fused=True)

    def update() -> float:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        return value.item()

    return update


def peer_updates(peer: nn.Module, pairs: Pairs) -> Update:
    """Updates of a peer with the loss as published: log-softmax in float64 at the last position."""

    def loss() -> Tensor:
        log_prob = peer(pairs.tokens)[:, -1].double().log_softmax(dim=-1)
        return -log_prob.gather(-1, pairs.answer[:, None]).mean()

    return updates(peer, loss)


def our_updates(dtype: torch.dtype, pairs: Pairs, **how: str) -> Update:
    """Updates of a fresh model of ours, with the options of its `loss`."""
    model = ModularTransformer(seed=0).to(dtype)
    return updates(model, lambda: model.loss(pairs, **how))


def curve(update: Update, steps: int) -> list[float]:
    """The losses before each of a number of updates."""
    return [update() for _ in range(steps)]


def deviation(losses: list[float], reference: list[float]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(x / y - 1) for x, y in zip(losses, reference, strict=True))


def seconds(contestants: dict[str, Update], turns: int) -> dict[str, float]:
    """Median time of an update; contestants take turns, so that a busy machine hits all alike.

    A turn is one update that is not timed and `IN_A_ROW` that are, as in training.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(turns):
        for name, update in contestants.items():
            update()
            for _ in range(IN_A_ROW):
                start = time.perf_counter()
                update()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def print_breakdown(update: Update, steps: int = 20) -> None:
    """Print the operations that an update spends most of its time in."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        curve(update, steps)
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    for event in events[:12]:
        ms, calls = event.self_cpu_time_total / steps / 1e3, event.count / steps
        print(f"    {ms:6.2f} ms  {calls:5.1f} calls  {event.key}")


def main() -> int:
    """Compare, time, print; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="updates of the loss curves")
    parser.add_argument("--turns", type=int, default=8, help="turns of five timed updates each")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", DeprecationWarning)
    pairs = ModularAddition(seed=0).train

    start = ModularTransformer(seed=0)
    makers = {"HookedTransformer": hooked_transformer, "TransformerBridge": bridge}
    candidates = {name: peer_updates(make(start), pairs) for name, make in makers.items()}
    first = seconds(candidates, turns=1)
    peer_name = min(first, key=lambda name: first[name])
    for name, value in first.items():
        print(f"{name}: {value * 1e3:.1f} ms an update (median of 5)")

    make = makers[peer_name]
    exact = make(start).double()
    reference = curve(peer_updates(exact, pairs), options.steps)
    curves = {
        "ours, float64": our_updates(torch.float64, pairs),
        f"{peer_name}, float32": peer_updates(make(start), pairs),
        "ours, float32": our_updates(torch.float32, pairs),
        "ours, bfloat16 products": our_updates(torch.float32, pairs, matmul="bfloat16"),
    }
    apart = {n: deviation(curve(u, options.steps), reference) for n, u in curves.items()}
    print(f"\nlargest deviation of {options.steps} losses from {peer_name} in float64, relative")
    for name, value in apart.items():
        print(f"  {value:7.1e}  {name}")

    contestants = {
        peer_name: candidates[peer_name],
        "ours, engine=naive": our_updates(torch.float32, pairs, engine="naive"),
        "ours, float32": our_updates(torch.float32, pairs),
        "ours, bfloat16 products": our_updates(torch.float32, pairs, matmul="bfloat16"),
    }
    timed = seconds(contestants, options.turns)
    print(
        f"\nms an update, {options.threads} threads, median of {options.turns} turns of {IN_A_ROW}"
    )
    for name, value in timed.items():
        print(f"  {value * 1e3:7.2f}  {name}")
    print("  of ours in float32, by operation (profiled, so slower):")
    print_breakdown(contestants["ours, float32"])

    for name, bound in (("ours, float64", AGREEMENT), ("ours, bfloat16 products", ROUNDING)):
        if apart[name] > bound:
            print(f"{name}: deviates by {apart[name]:.1e}, more than {bound}", file=sys.stderr)
            return 1
    print(
        f"\nratio with bfloat16 products: {timed[peer_name] / timed['ours, bfloat16 products']:.2f}"
    )
    print(f"ratio: {timed[peer_name] / timed['ours, float32']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
