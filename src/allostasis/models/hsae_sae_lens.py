"""The hierarchical SAE as SAELens knows it: flat weights and a grouped activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import (
    SAE,
    SAEConfig,
    SAEMetadata,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
)
from torch import Tensor, nn

from allostasis.models.hsae import HierarchicalSAE
from allostasis.models.hsae_kernels import best_children, top_k

ARCHITECTURE = "allostasis_hsae"


class GroupedTopK(nn.Module):
    """TopK over the first `m` latents; of the `c` children of each that is on, the best.

    Args:
        m: Parents.
        c: Children of a parent, j-major behind the parents.
        k: Active parents of a token.
        k_child: Active children of an active parent.
    """

    def __init__(self, m: int, c: int, k: int, k_child: int = 1) -> None:
        super().__init__()
        self.m, self.c, self.k, self.k_child = m, c, k, k_child

    def forward(self, hidden: Tensor) -> Tensor:
        """Codes of pre-activations, whatever axes come before the latents."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        parents, children = flat[:, : self.m], flat[:, self.m :].unflatten(1, (self.m, self.c))
        chosen = top_k(parents, self.k)
        z = parents.gather(1, chosen).relu()
        scores = children.gather(1, chosen[..., None].expand(-1, -1, self.c))
        best, child = best_children(scores, self.k_child)
        latent = self.m + chosen[..., None] * self.c + child
        index = torch.cat([chosen, latent.flatten(1)], dim=1)
        value = torch.cat([z, (best.relu() * (z > 0)[..., None]).flatten(1)], dim=1)
        return torch.zeros_like(flat).scatter(1, index, value).view(hidden.shape)


@dataclass
class HSAEConfig(SAEConfig):
    """Of a hierarchical SAE: latents are m parents, then their m c children j-major.

    Attributes:
        m: Parents.
        c: Children of a parent.
        k: Active parents of a token.
        k_child: Children that each of them turns on, at most.
        metadata: What it is of: hook, model, training.
    """

    m: int = 1
    c: int = 1
    k: int = 1
    k_child: int = 1
    metadata: Any = field(default_factory=SAEMetadata)  # on loading a dictionary for a moment

    @classmethod
    def architecture(cls) -> str:
        """The name in SAELens's registries."""
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)


@dataclass(kw_only=True)
class HSAETrainingConfig(TrainingSAEConfig):
    """Of one that SAELens's own trainer trains, in its flat form.

    Attributes:
        m: Parents.
        c: Children of a parent.
        k: Active parents of a token.
        k_child: Children that each of them turns on, at most.
        parents_coefficient: Weight of what the parents alone miss.
    """

    m: int
    c: int
    k: int
    k_child: int = 1
    parents_coefficient: float = 0.1

    @classmethod
    def architecture(cls) -> str:
        """The name in SAELens's registries, which look up the trained form under the same one."""
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)


def _check(cfg: Any) -> None:
    if cfg.d_sae != cfg.m * (1 + cfg.c):
        raise ValueError(f"d_sae={cfg.d_sae} is not m (1 + c) of m={cfg.m}, c={cfg.c}")
    if not 1 <= cfg.k_child <= cfg.c:
        raise ValueError(f"k_child={cfg.k_child} of c={cfg.c} children; it is 1 to {cfg.c}")


class HSAE(SAE[HSAEConfig]):
    """A hierarchical SAE for use: encode, decode, hook points."""

    b_enc: nn.Parameter

    def initialize_weights(self) -> None:
        """Weights of the right shape, on any device, the meta device among them."""
        super().initialize_weights()
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device))

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        """The grouped TopK."""
        return GroupedTopK(self.cfg.m, self.cfg.c, self.cfg.k, self.cfg.k_child)

    def encode(self, x: Tensor) -> Tensor:
        """Codes of activations."""
        hidden = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(self.activation_fn(hidden))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Activations that codes stand for."""
        rebuilt = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(rebuilt), self.d_head)

    def fold_W_dec_norm(self) -> None:
        """Refused: to scale one child's encoder is to change which child is largest.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "decoder norms of a hierarchical SAE cannot be folded: TopK and argmax would choose "
            "other latents. Its atoms have unit norm in the units it was trained in"
        )


class HSAETraining(TrainingSAE[HSAETrainingConfig]):
    """The flat form, as SAELens's trainer trains it."""

    b_enc: nn.Parameter

    def initialize_weights(self) -> None:
        """Encoder rows equal to decoder rows; biases zero."""
        super().initialize_weights()
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device))

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        """The grouped TopK."""
        return GroupedTopK(self.cfg.m, self.cfg.c, self.cfg.k, self.cfg.k_child)

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """None that change during training."""
        return {}

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and pre-activations."""
        hidden = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(self.activation_fn(hidden)), hidden

    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,  # noqa: ARG002
        sae_out: Tensor,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """What the parents alone miss, weighted."""
        m = self.cfg.m
        alone = feature_acts[:, :m] @ self.W_dec[:m] + self.b_dec
        missed = (step_input.sae_in - alone).square().sum(dim=-1).mean()
        return {"parents_loss": self.cfg.parents_coefficient * missed}


def register() -> None:
    """Make the architecture known to SAELens; a second call changes nothing."""
    if ARCHITECTURE not in SAE_CLASS_REGISTRY:
        register_sae_class(ARCHITECTURE, HSAE, HSAEConfig)
    if ARCHITECTURE not in SAE_TRAINING_CLASS_REGISTRY:
        register_sae_training_class(ARCHITECTURE, HSAETraining, HSAETrainingConfig)


def export(sae: HierarchicalSAE, **metadata: Any) -> HSAE:
    """A trained hierarchical SAE in SAELens's form, for activations as they are.

    Args:
        sae: In training form.
        metadata: For `cfg.metadata`; `hook_name` must be among it, for SAELens passes over an SAE
            whose hook it does not find without a word.

    Raises:
        UnsupportedExport: Its decoder would have more than 2^30 entries.
        ValueError: No hook is named.
    """
    if not metadata.get("hook_name"):
        raise ValueError("an exported SAE needs its hook_name")
    weights = {name: tensor.detach().cpu() for name, tensor in sae.flat_weights().items()}
    flat = HSAE(
        HSAEConfig(
            d_in=sae.d_model,
            d_sae=sae.d_sae,
            dtype=str(weights["b_dec"].dtype).removeprefix("torch."),
            metadata=SAEMetadata(**metadata),
            m=sae.m,
            c=sae.c,
            k=sae.k,
            k_child=sae.k_child,
        )
    )
    flat.load_state_dict(weights)
    return flat
