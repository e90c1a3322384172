"""Tables of autoencoders' scores."""

import numpy as np
import pytest


@pytest.mark.parametrize(
    ("values", "text"),
    [([], ""), ([0.5], "0.5"), ([1.0] * 6, "1"), ([2.20, 2.45, 2.38], "2.343 [2.023, 2.664]")],
)
def test_seeds_that_are_all_alike_have_no_interval(values: list[float], text: str) -> None:
    from allostasis.analysis.train_figures import _cell

    assert _cell(np.array(values)).startswith(text)
    assert ("[" in _cell(np.array(values))) == (len(set(values)) > 1)
