"""Two CPU processes that exchange states over gloo give what one process gives.

Run as a script, this file is one of the two processes.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed

from allostasis.instrument import FIRST_EXAMPLE, halves, observe, perturbed, specimen
from allostasis.metrics.base import Reading, Snapshot, discover
from allostasis.metrics.margin import runner_up


def _scenes() -> dict[str, Snapshot]:
    """A plain snapshot, and one in whose first half no answer is right."""
    model = specimen()
    plain = observe(model, earlier=perturbed(model))
    assert plain.logits is not None
    assert plain.labels is not None
    labels = plain.labels.clone()
    labels[:48] = runner_up(plain.logits, plain.logits.argmax(dim=-1))[:48]
    return {"plain": plain, "all wrong in one half": replace(plain, labels=labels)}


def _readings(snapshot: Snapshot) -> list[tuple[str, Reading]]:
    found = []
    for name, cls in discover().items():
        metric = cls()
        metric.update(snapshot)
        found += [(name, reading) for reading in metric.readings()]
    return found


def _process(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = {name: _readings(halves(scene)[rank]) for name, scene in _scenes().items()}
    distributed.barrier()
    distributed.destroy_process_group()
    if rank == 0:
        json.dump(found, sys.stdout)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), store], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    together = json.loads(outputs[0])
    for scene, snapshot in _scenes().items():
        alone = _readings(snapshot)
        assert len(alone) == len(together[scene])
        for (name, reading), (other_name, row) in zip(alone, together[scene], strict=True):
            other = Reading(*row)
            assert (name, reading.part, reading[3:6]) == (other_name, other.part, other[3:6])
            if (name, reading.part) != FIRST_EXAMPLE:
                assert other.value == pytest.approx(reading.value, rel=1e-6, abs=1e-12), reading


if __name__ == "__main__":
    _process(int(sys.argv[1]), sys.argv[2])
