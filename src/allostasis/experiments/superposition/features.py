"""Toy models of superposition: a grid of them, and what each feature got."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Gt, Le
from jaxtyping import Float
from torch import Tensor

from allostasis.analysis.polysemanticity import within_slope
from allostasis.core.progress import Ticker
from allostasis.experiments.superposition.collected import Collected
from allostasis.metrics.feature_capacity import feature_capacity
from allostasis.metrics.feature_dimensionality import feature_dimensionality
from allostasis.metrics.feature_interference import feature_interference
from allostasis.metrics.feature_norm import REPRESENTED, feature_norm
from allostasis.metrics.features_per_dimension import features_per_dimension
from allostasis.models.toy_model import ToyModel
from allostasis.tasks.toy_features import ToyFeatures


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which toy models are trained: all combinations.

    Attributes:
        hidden: Hidden dimensions m.
        ratios: Features for each of them, n / m.
        densities: P(x_i != 0).
        decays: Importance of feature i is decay^i.
        n_steps: Updates.
        batch_size: Examples of an update, for each model.
        lr: Learning rate, which falls to 0 along a cosine.
    """

    hidden: Sequence[Annotated[int, Gt(0)]] = (5, 20)
    ratios: Sequence[Annotated[int, Gt(0)]] = (1, 2, 4, 8)
    densities: Sequence[Annotated[float, Gt(0), Le(1)]] = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
    decays: Sequence[Annotated[float, Gt(0), Le(1)]] = (1.0, 0.9)
    n_steps: Annotated[int, Gt(0)] = 10_000
    batch_size: Annotated[int, Gt(0)] = 1_024
    lr: Annotated[float, Gt(0)] = 1e-3

    def shapes(self) -> Iterator[tuple[int, int]]:
        """(m, n) of the models that are trained side by side."""
        for m, ratio in itertools.product(self.hidden, self.ratios):
            yield m, ratio * m

    def cells(self) -> list[tuple[float, float]]:
        """(density, decay) of each model of a shape."""
        return list(itertools.product(self.densities, self.decays))


def importances(decays: Sequence[float], n_features: int) -> Float[Tensor, "model feature"]:
    """decay^i of feature i, one row a model."""
    base = torch.tensor(decays)[:, None]
    return base ** torch.arange(n_features)


def start(
    grid: Grid, d_hidden: int, n_features: int, *, seed: int, device: torch.device | str
) -> tuple[ToyModel, ToyFeatures]:
    """All models of one shape before the first update, and what they will be shown."""
    densities = [density for density, _ in grid.cells()]
    model = ToyModel(seed=seed, n_models=len(densities), d_hidden=d_hidden, n_features=n_features)
    task = ToyFeatures(
        seed=seed, n_features=n_features, densities=densities, batch_size=grid.batch_size
    )
    return model.to(device), task


def gradient_norm(grid: Grid, model: ToyModel, *, seed: int, device: torch.device | str) -> float:
    """Norm of the gradient of the loss at step 0, of all models of a shape together."""
    shape = model.W.shape[1:]
    _, task = start(grid, int(shape[0]), int(shape[1]), seed=seed, device=device)
    importance = importances([decay for _, decay in grid.cells()], int(shape[1])).to(device)
    model.losses(task.batch(0, device), importance).sum().backward()
    assert model.W.grad is not None
    return float(model.W.grad.norm())


def train(
    grid: Grid, d_hidden: int, n_features: int, *, seed: int, device: torch.device | str, name: str
) -> tuple[ToyModel, ToyFeatures]:
    """Train all models of one shape side by side."""
    model, task = start(grid, d_hidden, n_features, seed=seed, device=device)
    importance = importances([decay for _, decay in grid.cells()], n_features).to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr=grid.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, grid.n_steps)
    tick = Ticker(f"{name} m={d_hidden} n={n_features}", noun="updates")
    for step in range(grid.n_steps):
        optimiser.zero_grad()
        model.losses(task.batch(step, device), importance).sum().backward()
        optimiser.step()
        schedule.step()
        tick(step + 1, grid.n_steps)
    return model.requires_grad_(False), task


def survey(
    grid: Grid, *, seed: int, device: torch.device | str, name: str, found: Collected
) -> dict[str, Any]:
    """Train the grid and record what every feature got; gives what run.json says of it."""
    found.step = grid.n_steps
    frames, summaries = [], []
    for d_hidden, n_features in grid.shapes():
        model, task = train(grid, d_hidden, n_features, seed=seed, device=device, name=name)
        for index, (density, decay) in enumerate(grid.cells()):
            cell = {"hidden": d_hidden, "ratio": n_features // d_hidden, "density": density,
                    "decay": decay}  # fmt: skip
            frame = _features(model, index, density, decay).assign(**cell)
            frames.append(frame)
            x = task.batch(grid.n_steps, device)  # examples that no update has seen
            summaries.append(cell | _cell(model, index, x, frame))
    table = pd.concat(frames, ignore_index=True)
    table["example"] = range(len(table))
    table["intervention"] = table["set"] = "none"
    found.add({str(column): table[column].to_numpy() for column in table})
    _read_cells(summaries, found)
    _read_features(table, found)
    there = table[table["represented"]]
    # a feature of importance 1 is in every model, among features as important or all less so
    keys = ["hidden", "ratio", "density", "decay", "importance"]
    slope = within_slope(
        there["polysemanticity"].to_numpy(), np.log(there["norm"].to_numpy()),
        [tuple(row) for row in there[keys].to_numpy()],
    )  # fmt: skip
    found.read(
        "feature_norm.slope", slope.estimate, n=slope.n, symbol="A", unit="1", split="features"
    )
    return {
        "n_models": len(summaries), "n_features": len(table),
        "n_represented": len(there), "slope": slope.estimate, "n_in_slope": slope.n,
        "n_groups_in_slope": slope.n_groups,
    }  # fmt: skip


def _features(model: ToyModel, index: int, density: float, decay: float) -> pd.DataFrame:
    W = model.W[index].double()  # noqa: N806
    norm, capacity = feature_norm(W), feature_capacity(W)
    interference = feature_interference(W, density)
    represented = norm.square() >= REPRESENTED
    columns = {
        "norm": norm, "capacity": capacity, "polysemanticity": 1 - capacity,
        "interference": interference, "bias": model.b[index].double(), "gain": norm.square(),
        "represented": represented,
    }  # fmt: skip
    frame = pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()})
    frame["feature"] = range(len(frame))
    frame["importance"] = decay ** frame["feature"].astype(float)
    # a feature without a direction has none, so that its cell is empty
    frame["dimensionality"] = feature_dimensionality(W).cpu().numpy()
    frame.loc[~frame["represented"], "dimensionality"] = None
    ratio = frame["gain"] ** 2 / frame["interference"].where(
        frame["interference"] > 1e-12 * frame["gain"] ** 2
    )
    return frame.assign(signal_ratio=ratio)


def _cell(
    model: ToyModel, index: int, x: Float[Tensor, "model example feature"], frame: pd.DataFrame
) -> dict[str, Any]:
    W = model.W[index].double()  # noqa: N806
    there = frame[frame["represented"]]
    hidden = model.hidden(x)[index].double()
    off = (x - model(x))[index].double().square().mean(dim=0).cpu().numpy()
    return {
        "features_per_dimension": float(features_per_dimension(W)),
        "represented": len(there),
        "polysemanticity": float(there["polysemanticity"].mean()) if len(there) else None,
        "hidden_rms": float(hidden.square().mean().sqrt()),
        "loss": float((frame["importance"].to_numpy() * off).sum()),
    }


def _key(cell: Mapping[Any, Any]) -> str:
    return (
        f"m={cell['hidden']},n/m={cell['ratio']},density={cell['density']:g},"
        f"decay={cell['decay']:g}"
    )


def _read_cells(cells: Sequence[dict[str, Any]], found: Collected) -> None:
    names = {
        "features_per_dimension": ("features_per_dimension", "G", "1"),
        "represented": ("features_per_dimension.represented", "G", "1"),
        "polysemanticity": ("features_per_dimension.polysemanticity", "G", "1"),
        "hidden_rms": ("amplitude_activation.hidden", "A", "resid"),
        "loss": ("loss", "Psi", "1"),
    }
    for cell in cells:
        for name, (metric, symbol, unit) in names.items():
            if cell[name] is not None:
                found.read(
                    metric, float(cell[name]), n=1, symbol=symbol, unit=unit, split="features",
                    intervention=_key(cell),
                )  # fmt: skip


def _read_features(table: pd.DataFrame, found: Collected) -> None:
    names = {
        "norm": ("feature_norm", "A", "resid"),
        "dimensionality": ("feature_dimensionality", "G", "1"),
        "capacity": ("feature_capacity", "G", "1"),
        "interference": ("feature_interference", "sigma2", "resid^4"),
        "signal_ratio": ("feature_interference.signal_ratio", "sigma2", "1"),
    }
    for row in table.to_dict("records"):
        for name, (metric, symbol, unit) in names.items():
            if pd.notna(row[name]):
                found.read(
                    metric, float(row[name]), n=1, symbol=symbol, unit=unit, split="features",
                    position=row["feature"], intervention=_key(row),
                )  # fmt: skip
