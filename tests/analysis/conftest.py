"""How many data sets a calibration simulates."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sets", type=int, default=None, help="data sets a calibration simulates (make calibrate)"
    )
