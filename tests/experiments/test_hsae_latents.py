"""The table that a browser of latents reads."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from allostasis.analysis.matching import match_latents
from allostasis.experiments.hsae.latents import N_EXAMPLES, in_words, latent_table
from allostasis.metrics.base import Coding
from allostasis.tasks.activations import ActivationBatch


def test_a_latent_is_listed_with_the_rows_where_it_is_most_on() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(40, 3, generator=generator) * (torch.rand(40, 3, generator=generator) < 0.5)
    codes[:, 2] = 0  # never on
    members = (codes[:, :2] > 0.2).numpy()
    matches = match_latents(
        codes.numpy(), members, np.ones_like(members), parent=(-1, 0), n_parents=1
    )
    x = torch.zeros(40, 4)
    table = latent_table(
        Coding(x=x, reconstruction=x, codes=codes), matches, ("animal", "dog"), members, str
    )
    for latent in range(2):
        own, column = table[table["latent"] == latent], codes[:, latent]
        want = column.sort(descending=True, stable=True)
        n = min(N_EXAMPLES, int((column > 0).sum()))
        assert own["row"].tolist() == want.indices[:n].tolist()
        assert own["code"].tolist() == pytest.approx(want.values[:n].tolist())
        assert own["text"].tolist() == [str(row) for row in own["row"]]
        assert own["rate"].iloc[0] == pytest.approx(float((column > 0).float().mean()))
        assert own["mean_code"].iloc[0] == pytest.approx(float(column[column > 0].mean()))
    assert set(table["concept"]) == {"animal", "dog", ""}
    first = table[(table["latent"] == 0) & (table["rank"] == 0)].iloc[0]
    assert ("dog" in first["of"]) == bool(members[first["row"], 1])
    (silent,) = table[table["latent"] == 2].to_dict("records")
    assert silent["rate"] == 0
    assert pd.isna(silent["text"])


def test_a_row_in_words_marks_its_token_and_ends_with_the_next() -> None:
    ids = torch.tensor(
        [[3, 0, 10, 11, 0], [3, 1, 11, 12, 0], [3, 2, 12, -1, 0], [4, 2, 20, 21, 0]],
        dtype=torch.int32,
    )
    batch = ActivationBatch(torch.zeros(4, 2), ids)
    words = in_words(batch, lambda ids: "".join(f" {i}" for i in ids))
    assert [words(row) for row in range(4)] == [
        "[ 10] 11",
        " 10[ 11] 12",
        " 10 11[ 12]",
        "[ 20] 21",
    ]
