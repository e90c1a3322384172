"""The one door to SAELens: its synthetic truth, its flat autoencoders, and saved ones of any kind.

Importing this registers `allostasis_hsae`, so that `sae_lens.SAE.load_from_disk` knows it.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Bool, Float
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SAETransformerBridge,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    HierarchyConfig,
    SyntheticModel,
    SyntheticModelConfig,
    generate_hierarchy,
    orthogonal_initializer,
)
from torch import Tensor, nn

from allostasis.core.seeding import derive
from allostasis.models import hsae_sae_lens
from allostasis.models.hsae import HierarchicalSAE
from allostasis.models.lens import TRANSFORMER_LENS

__all__ = [
    "FlatCodes", "FlatSAE", "SAETransformerBridge", "SyntheticModel", "export", "load",
    "planted_hierarchy",
]  # fmt: skip

Flat = Literal["topk", "batchtopk", "matryoshka"]

hsae_sae_lens.register()


class FlatCodes(NamedTuple):
    """Codes of a flat SAE, under the name that a hierarchical one's have.

    Attributes:
        values: All latents.
    """

    values: Float[Tensor, "token latent"]

    def dense(self) -> Float[Tensor, "token latent"]:
        """All latents."""
        return self.values


class FlatSAE(nn.Module):
    """A flat SAE of SAELens, trained by its own `training_forward_pass`, of raw activations.

    Codes are those of the exported form: in the activations' own units, of atoms of unit norm; and
    where the TopK is over a whole batch in training, a latent is on above the learnt threshold.

    Args:
        kind: `topk`, `batchtopk` or `matryoshka`, which is a BatchTopK with losses on its first
            eighth, quarter and half too.
        seed: The run's seed.
        d_model: Width of an activation.
        d_sae: Latents.
        k: Latents that are on for a token, on average where the TopK is over a batch.
    """

    scale: Tensor

    def __init__(
        self,
        *,
        kind: Flat,
        seed: int,
        d_model: Annotated[int, Gt(0)],
        d_sae: Annotated[int, Gt(0)],
        k: Annotated[float, Gt(0)],
    ) -> None:
        super().__init__()
        self.kind, self.d_model, self.d_sae, self.k = kind, d_model, d_sae, k
        shared: dict[str, Any] = {"d_in": d_model, "d_sae": d_sae}
        with torch.random.fork_rng(devices=[]):  # the library draws from the global generator
            torch.manual_seed(derive(seed, "init"))
            if kind == "topk":
                self.sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shared, k=max(1, round(k))))
            elif kind == "batchtopk":
                self.sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shared, k=k))
            else:
                widths = sorted({max(1, d_sae // part) for part in (8, 4, 2, 1)})
                self.sae = MatryoshkaBatchTopKTrainingSAE(
                    MatryoshkaBatchTopKTrainingSAEConfig(**shared, k=k, matryoshka_widths=widths)
                )
        self.register_buffer("scale", torch.ones(()))

    @property
    def hook_dict(self) -> dict[str, Any]:
        """Hook points: none, for what it computes is asked of it directly."""
        return {}

    @torch.no_grad()
    def start_at(self, mean: Float[Tensor, " d"], scale: float) -> None:
        """Take the scale of the data, and begin with their mean as the decoder's bias."""
        self.scale.fill_(scale)
        self.sae.b_dec.copy_(scale * mean)

    def losses(
        self, x: Float[Tensor, "token d"], dead: Bool[Tensor, " latent"] | None, step: int
    ) -> tuple[dict[str, Tensor], Float[Tensor, "token latent"]]:
        """The library's losses, each with its weight in it, and the codes they were taken at.

        Args:
            x: Raw activations.
            dead: Latents that have not fired for a while; None if there are none.
            step: Updates done.
        """
        step_input = TrainStepInput(
            sae_in=self.scale * x,
            coefficients={},
            dead_neuron_mask=dead,
            n_training_steps=step,
            is_logging_step=False,
        )
        output = self.sae.training_forward_pass(step_input)
        return output.losses, output.feature_acts

    def encode(self, x: Float[Tensor, "token d"]) -> FlatCodes:
        """Codes of activations, as the exported form gives them."""
        codes, hidden = self.sae.encode_with_hidden_pre(self.scale * x)
        if isinstance(self.sae, BatchTopKTrainingSAE):
            codes = hidden.relu() * (hidden > self.sae.topk_threshold)
        return FlatCodes(codes / self.scale)

    def decode(self, codes: FlatCodes) -> Float[Tensor, "token d"]:
        """The activations that codes stand for."""
        return self.sae.decode(codes.values * self.scale) / self.scale

    def forward(self, x: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
        """Reconstruction of activations, in their own units."""
        return self.decode(self.encode(x))

    def atoms(self) -> Float[Tensor, "latent d"]:
        """Decoder rows, of unit norm."""
        return self.sae.W_dec / self.sae.W_dec.norm(dim=-1, keepdim=True)

    def export(self, folder: Path, **metadata: Any) -> None:
        """Write the library's inference form, of raw activations.

        TopK stays what it is; the others become a JumpReLU with the learnt threshold.
        """
        flat = copy.deepcopy(self.sae).cpu()  # saving folds norms in place
        flat.cfg.metadata = SAEMetadata(**metadata)
        flat.cfg.device = "cpu"
        flat.fold_activation_norm_scaling_factor(float(self.scale))
        flat.save_inference_model(folder)


def export(sae: HierarchicalSAE | FlatSAE, folder: Path, **metadata: Any) -> None:
    """Write an SAE in SAELens's layout, of raw activations.

    Args:
        sae: In training form.
        folder: Gets `cfg.json` and `sae_weights.safetensors`.
        metadata: `hook_name`, `model_name` and whatever else a reader wants to know. A hook that
            goes by another name in TransformerLens is written under that one, since SAELens passes
            over an SAE whose hook it does not find; ours stays as `task_hook`.

    Raises:
        UnsupportedExport: Its decoder would have more than 2^30 entries.
    """
    hook = metadata.get("hook_name")
    if hook in TRANSFORMER_LENS:
        metadata |= {"hook_name": TRANSFORMER_LENS[hook], "task_hook": hook}
    if isinstance(sae, FlatSAE):
        sae.export(folder, **metadata)
    else:
        hsae_sae_lens.export(sae, **metadata).save_model(folder)


def load(folder: Path | str, *, device: str = "cpu") -> SAE[Any]:
    """A saved SAE of any kind that SAELens or this package knows.

    In a process that has not imported this module, SAELens raises `KeyError: 'allostasis_hsae'`.

    Raises:
        FileNotFoundError: The folder holds no SAE.
    """
    folder = Path(folder)
    if not (folder / "cfg.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no SAE: it has no cfg.json. A run of hsae_train writes one to sae/"
        )
    return SAE.load_from_disk(folder, device=device)


def planted_hierarchy(
    *,
    seed: Annotated[int, Ge(0)],
    n_parents: Annotated[int, Gt(1)] = 16,
    n_children: Annotated[int, Gt(1)] = 4,
    d_model: Annotated[int, Gt(1)] = 64,
    p_parent: Annotated[float, Gt(0), Lt(1)] = 0.08,
    p_any_child: Annotated[float, Gt(0), Lt(1)] = 0.75,
    magnitude_std: Annotated[float, Ge(0)] = 0.1,
    is_hierarchical: bool = True,
) -> SyntheticModel:
    """Activations that are known sums of parents and children, x = sum_i f_i v_i.

    Feature `j < n_parents` is parent j; feature `n_parents + j n_children + k` is its child k. A
    child is on only where its parent is, and at most one of a parent's children is. Parents are on
    independently; v_i are unit vectors, pushed apart as far as `d_model` lets them.

    Args:
        seed: The run's seed, for the directions; samples come from torch's global generator.
        n_parents: Parents.
        n_children: Children of a parent.
        d_model: Dimensions; fewer than features make directions interfere.
        p_parent: Probability that a parent is on.
        p_any_child: Probability that one of its children is, given that it is. Below 1: if a child
            always were, a part of all children's mean could be told from the parent by nothing.
        magnitude_std: Spread of a feature's magnitude about 1 where it is on.
        is_hierarchical: Whether children need their parents; without, every feature is on as often
            as with, but independently.

    Returns:
        SAELens's generator: `sample_with_features(n)` gives activations and features,
        `feature_dict.feature_vectors` the directions, one row a feature.

    Source:
        SAELens 6.54, `sae_lens.synthetic`; hierarchy with mutually exclusive children.
    """
    n_features = n_parents * (1 + n_children)
    tree = generate_hierarchy(
        n_features,
        HierarchyConfig(
            total_root_nodes=n_parents,
            branching_factor=n_children,
            max_depth=1,
            mutually_exclusive_portion=1.0,
            scale_children_by_parent=False,
        ),
    )
    # the library's compensation knows one rate for both levels; siblings that would be on together
    # compete for the one place
    own = 1 - (1 - p_any_child) ** (1 / n_children)
    p_child = own if is_hierarchical else p_parent * p_any_child / n_children
    rates = torch.full((n_features,), p_child)
    rates[:n_parents] = p_parent
    return SyntheticModel(
        SyntheticModelConfig(n_features, d_model, std_firing_magnitudes=magnitude_std, bias=False),
        hierarchy=tree if is_hierarchical else None,
        # the config's own way to orthogonalise draws a progress bar
        feature_dict=FeatureDictionary(
            n_features, d_model, seed=derive(seed, "data"), initializer=orthogonal_initializer()
        ),
        activation_generator=ActivationGenerator(
            n_features,
            rates,
            std_firing_magnitudes=magnitude_std,
            modify_activations=tree.modifier if is_hierarchical else None,
        ),
    )


# ---------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Say what a saved SAE is."""
    parser = argparse.ArgumentParser(
        prog="python -m allostasis.models.sae",
        description="Saved autoencoders, this package's own among them.",
        epilog="  python -m allostasis.models.sae load outputs/hsae_train/baseline/seed=0/*/sae",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("load", help="load an SAE, and say what it is")
    one.add_argument("path", type=Path, help="folder with cfg.json and sae_weights.safetensors")
    words = parser.parse_args(argv)
    try:
        sae = load(words.path)
    except (FileNotFoundError, KeyError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    cfg, metadata = sae.cfg.to_dict(), sae.cfg.metadata
    shape = " ".join(f"{name}={cfg[name]}" for name in ("m", "c", "k", "k_child") if name in cfg)
    print(f"{cfg['architecture']} {cfg['d_in']} -> {cfg['d_sae']} latents {shape}".rstrip())
    print(f"hook {metadata.hook_name} of {metadata.model_name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
