"""What is written down was measured, and what it names is there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MEASURED = re.compile(r"\d(?:[\d ,.]*\d)?\s?(?:ms|s|min|seconds|minutes|hours|GB|MB|x|%)(?![\w^])")
STUDY = re.compile(r"experiments/\d{4}-\d{2}-\d{2}_\w+")


def paragraphs(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        header = re.match(r"(?:#.*\n)+", text)
        text = re.sub(r"^# ?", "", header[0] if header else "", flags=re.MULTILINE)
    return re.split(r"\n\s*\n", text)


def test_every_number_in_a_yaml_header_or_readme_names_a_run() -> None:
    files = [README, *(ROOT / "conf" / "exp").glob("*.yaml")]
    for path in files:
        for paragraph in paragraphs(path):
            for number in MEASURED.findall(paragraph):
                assert STUDY.search(paragraph), f"{path.name}: '{number}' in: {paragraph}"


def test_every_study_that_is_named_is_there() -> None:
    for path in (README, ROOT / "CHANGELOG.md"):
        for name in STUDY.findall(path.read_text(encoding="utf-8")):
            assert (ROOT / name / "README.md").is_file(), name


def test_readme_is_short_and_names_every_experiment_and_condition() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for path in (ROOT / "conf" / "exp").glob("*.yaml"):
        assert f"`{path.stem}`" in text


def test_every_make_target_of_the_readme_exists() -> None:
    targets = subprocess.run(
        ["make", "-C", str(ROOT), "help"], check=True, capture_output=True, text=True
    ).stdout
    for target in re.findall(r"`make ([a-z-]+)", README.read_text(encoding="utf-8")):
        assert f"make {target} " in targets


def test_makefile_has_a_target_for_every_experiment() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for path in (ROOT / "conf" / "exp").glob("*.yaml"):
        assert re.search(rf"^{path.stem}:", text, flags=re.MULTILINE)


def test_the_lab_records_index_is_what_its_command_writes() -> None:
    code = "import index; print(index.index(), end='')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "experiments", check=True, capture_output=True
    )
    text = (ROOT / "experiments" / "README.md").read_bytes()
    assert done.stdout == text, "run `make index`"
    for study in (ROOT / "experiments").glob("*/README.md"):
        assert f"[{study.parent.name}](#{study.parent.name})".encode() in text
