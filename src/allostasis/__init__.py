"""How transformers keep working when their routing is constrained."""

from importlib.metadata import version

__version__ = version("allostasis")
