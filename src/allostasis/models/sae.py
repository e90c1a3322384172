"""The one door to SAELens: the synthetic truth, and the library's own autoencoders."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    HierarchyConfig,
    SyntheticModel,
    SyntheticModelConfig,
    generate_hierarchy,
    orthogonal_initializer,
)


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
        seed: Of the directions; samples come from torch's global generator.
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
            n_features, d_model, seed=seed, initializer=orthogonal_initializer()
        ),
        activation_generator=ActivationGenerator(
            n_features,
            rates,
            std_firing_magnitudes=magnitude_std,
            modify_activations=tree.modifier if is_hierarchical else None,
        ),
    )
