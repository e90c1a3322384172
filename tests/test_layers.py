"""Who may import whom."""

import subprocess
import sys
from pathlib import Path


def test_imports_keep_to_the_layers(tmp_path: Path) -> None:
    # a process of its own: import-linter sets up logging anew, which silences other tests' loggers
    command = Path(sys.executable).with_name("lint-imports")
    config = Path(__file__).parents[1] / "pyproject.toml"
    done = subprocess.run(
        [command, "--config", config, "--no-cache", "--no-logo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
