"""The tokenizer of a model that a command line names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from allostasis.core.config import conf_dir
from allostasis.models.zoo import find_tokenizer
from allostasis.tasks.probes.encoded import Asker


@dataclass(frozen=True)
class Named:
    """A model's tokenizer.

    Attributes:
        model: What was asked for.
        sha256: Of all that the tokenizer is.
        asker: Reads rows with it.
    """

    model: str
    sha256: str
    asker: Asker


def named(model: str) -> Named:
    """The tokenizer of `model=`, of `owner/name` on the hub, or in a folder; no BOS is added.

    Raises:
        FileNotFoundError: It is nowhere; says where it was looked for and what to do.
        ValueError: No model is called so.
    """
    config = conf_dir() / "model" / f"{model}.yaml"
    if Path(model).exists():
        tokenizer, sha256 = find_tokenizer(None, source=model)
    elif config.is_file():
        settings = OmegaConf.to_container(OmegaConf.load(config), resolve=False)
        assert isinstance(settings, dict)
        tokenizer, sha256 = find_tokenizer(
            settings.get("name"), source=settings.get("source"), revision=settings.get("revision")
        )
    elif "/" in model:
        tokenizer, sha256 = find_tokenizer(model)
    else:
        known = ", ".join(sorted(path.stem for path in config.parent.glob("*.yaml")))
        raise ValueError(
            f"no model is called '{model}'; give a folder, owner/name on the hub, or one of {known}"
        )
    return Named(
        model,
        sha256,
        Asker(
            lambda text: tokenizer.encode(text, add_special_tokens=False),
            unknown=tokenizer.unk_token_id,
        ),
    )
