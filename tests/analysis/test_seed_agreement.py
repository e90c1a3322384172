"""Agreement of seeds, from decoders on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from allostasis.analysis.seed_agreement import agreement_table, mcc


def arm(root: Path, condition: str, decoders: list[np.ndarray]) -> Any:
    from allostasis.analysis.aggregate import Arm
    from allostasis.analysis.curves import RunView
    from allostasis.core.records import read_run, write_json

    runs = []
    for seed, decoder in enumerate(decoders):
        folder = root / condition / str(seed)
        (folder / "sae").mkdir(parents=True)
        save_file({"W_dec": decoder}, folder / "sae" / "sae_weights.safetensors")
        about = {"exp": "hsae_train", "condition": condition, "device": "cpu", "status": "done"}
        about |= {"run_id": f"{condition}-{seed}", "device_resolved": "cpu"}
        write_json(folder / "run.json", about | {"seed": seed})
        runs.append(RunView(read_run(folder)))
    return Arm("hsae_train", condition, "0", "cpu", tuple(runs), {})


def test_it_is_the_metric() -> None:
    from allostasis.metrics.mcc_seeds import mcc_seeds

    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((7, 5)), rng.standard_normal((4, 5))
    wanted = mcc_seeds(torch.from_numpy(one), torch.from_numpy(other)).sort().values
    assert np.sort(mcc(one, other)) == pytest.approx(wanted.numpy())


def test_seeds_that_found_the_same_directions_agree_and_others_do_as_random_rows(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((20, 64)).astype(np.float32)
    same = [scale * base[rng.permutation(20)] for scale in (1, -2, 3)]
    apart = [rng.standard_normal((20, 64)).astype(np.float32) for _ in range(3)]
    lone = arm(tmp_path, "lone", apart[:1])
    [table] = agreement_table([arm(tmp_path, "same", same), arm(tmp_path, "apart", apart), lone])
    assert [row[0] for row in table.rows] == ["same", "apart"]
    assert table.rows[0][1:4] == ("3", "1", "1 to 1")
    _, _, mean, _, null = table.rows[1]
    assert float(mean) == pytest.approx(float(null), abs=0.03)
    assert agreement_table([lone]) == []
