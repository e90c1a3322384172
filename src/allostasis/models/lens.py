"""The one door to TransformerLens: what this package takes from it, by the names it has there."""

from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

__all__ = ["HookPoint", "HookedRootModule"]
