"""Who may import whom."""

from pathlib import Path

import pytest


def test_imports_keep_to_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    from importlinter.cli import lint_imports

    config = Path(__file__).parents[1] / "pyproject.toml"
    status = lint_imports(config_filename=str(config), no_cache=True)
    assert status == 0, capsys.readouterr().out
