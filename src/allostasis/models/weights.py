"""Where a model's weights come from: a folder, the conversion cache, a package, the hub."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from allostasis.models import conversion, hub
from allostasis.models.conversion import Gguf
from allostasis.models.packages import PACKAGED, Packaged, absent, check, installed

log = logging.getLogger(__name__)

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Source:
    """Weights that were found.

    Attributes:
        folder: Holds config, weights and tokenizer.
        kind: Where they come from, in words that do not change between a first run and the next.
        revision: Commit on the hub, if they are from there.
        quantisation: How they were stored before they were made dense, if they were.
        licence: As far as it is known.
        file_sha256: Of the GGUF file that they were converted from, if any.
        weights_sha256: If it is known before they are loaded.
        may_be_pickled: Whether weights may be read from `.bin` files; only tensors are.
    """

    folder: Path
    kind: str
    revision: str | None = None
    quantisation: str | None = None
    licence: str | None = None
    file_sha256: str | None = None
    weights_sha256: str | None = None
    may_be_pickled: bool = False

    @property
    def fingerprint(self) -> tuple[tuple[str, int, int], ...]:
        """Name, size and time of change of each file: what a loaded model stays valid for."""
        found = sorted(path for path in self.folder.iterdir() if path.is_file())
        return tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in found)


def find(
    name: str | None, *, source: str | None, revision: str | None, dtype_of: Callable[[int], str]
) -> Source:
    """Look in every place, in order, and convert what has to be converted.

    Args:
        name: The model's name on the hub.
        source: A folder with the model, or a GGUF file.
        revision: Of the hub's copy; a package has none, so that it is passed over.
        dtype_of: The dtype that a model of so many parameters shall be converted to.

    Raises:
        FileNotFoundError: It is nowhere; the message says where it was looked for and what to do.
        ValueError: What was found is not what was expected, or cannot be read safely.
    """
    if source is not None:
        return from_folder(Path(source).expanduser(), dtype_of)
    if name is None:
        raise ValueError(
            "model=local needs weights: give model.source=<folder> or model.name=<owner/name>"
        )
    packaged = PACKAGED.get(name) if revision is None else None
    if packaged is not None:
        dtype = dtype_of(0)  # all of them are small
        if conversion.converted_folder(packaged.key, packaged.sha256, dtype).is_dir():
            return _from_package(packaged, (), dtype)
        if paths := installed(packaged):
            return _from_package(packaged, check(packaged, paths), dtype)
    try:
        folder, commit = hub.snapshot(name, revision)
    except hub.HubError as error:
        raise FileNotFoundError(missing(name, packaged, error, revision=revision)) from error
    if packaged is not None:
        log.warning(
            "%s from the hub is in full precision: not the %s weights of package %s",
            name,
            packaged.quantisation,
            packaged.packages[0],
        )
    return Source(folder, "hub", revision=commit, may_be_pickled=True)


def missing(
    name: str, packaged: Packaged | None, error: hub.HubError, *, revision: str | None = None
) -> str:
    """The message for weights that are nowhere: what was tried, and what would help."""
    title, looked, help_ = f"model.name={name}", ["model.source (not set)"], []
    if packaged is not None:
        title = f"model={packaged.key}"
        looked.append(f"cache {_short(conversion.cache_folder())}/{packaged.key}-…")
        looked.append(f"package {', '.join(absent(packaged))} (not installed)")
        help_.append(f"{packaged.command}        ({packaged.terms})")
    looked.append(f"hub ({error.state})")
    if error.advice is not None:
        help_.append(error.advice)
    elif packaged is None:
        at = f" --revision {revision}" if revision is not None else ""
        help_.append(f"hf download {name}{at}        (where the hub answers; found from then on)")
    help_.append("python -m allostasis +exp=ioi model=local model.source=/path/to/folder")
    return "\n  ".join([
        f"No weights for {title}. Looked for: {'; '.join(looked)}.\nDo one of:", *help_
    ])  # fmt: skip


def _from_package(packaged: Packaged, paths: tuple[Path, ...], dtype: str) -> Source:
    gguf = Gguf(packaged.key, paths, packaged.sha256)
    folder = conversion.convert(gguf, dtype)
    return Source(
        folder,
        f"package {packaged.packages[0]}=={packaged.version}",
        quantisation=packaged.quantisation,
        licence=packaged.licence,
        file_sha256=packaged.sha256,
        weights_sha256=conversion.read(folder)["weights_sha256"],
    )


def from_folder(path: Path, dtype_of: Callable[[int], str]) -> Source:
    """The model in a folder of config, safetensors and tokenizer, or in one GGUF file.

    Raises:
        ValueError: It holds no weights, weights in pickles only, or more than one GGUF file.
    """
    if path.is_dir() and (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return Source(path, "folder")
    ggufs = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if len(ggufs) == 1 and ggufs[0].is_file():
        file = ggufs[0]
        gguf = Gguf(file.stem, (file,), conversion.sha256(file))
        folder = conversion.convert(gguf, dtype_of(_n_weights(file)))
        facts = conversion.read(folder)
        return Source(
            folder,
            "GGUF file",
            quantisation=facts["quantisation"],
            licence=facts["licence"],
            file_sha256=gguf.sha256,
            weights_sha256=facts["weights_sha256"],
        )
    if not path.is_dir():
        raise ValueError(f"model.source={path}: there is no such folder or GGUF file")
    if pickles := sorted(file.name for glob in PICKLES for file in path.glob(glob)):
        raise ValueError(
            f"model.source={path} holds its weights in pickles only ({', '.join(pickles)}), which "
            "can run code when they are read. Convert them once, which reads nothing but tensors:\n"
            f"  {safely(path)}"
        )
    raise ValueError(
        f"model.source={path} holds no model. Needed are config.json, *.safetensors and the "
        f"tokenizer's files, or one *.gguf; there are {', '.join(sorted(_names(path))) or 'none'}"
    )


def safely(folder: Path) -> str:
    """The command that turns a folder's pickles into safetensors."""
    code = f"M.from_pretrained({str(folder)!r}, weights_only=True).save_pretrained({str(folder)!r})"
    return f'python -c "from transformers import AutoModelForCausalLM as M; {code}"'


def _n_weights(file: Path) -> int:
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _short(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
