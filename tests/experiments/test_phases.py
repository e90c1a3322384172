import pytest
from hypothesis import given
from hypothesis import strategies as st

from allostasis.experiments.grokking.phases import Hold, Phases


def follow(curve: list[tuple[float, float, float]], **settings: float) -> Phases:
    phases = Phases(**settings)
    for i, (train, test, loss) in enumerate(curve):
        phases.update(50 * i, train_accuracy=train, test_accuracy=test, test_loss=loss)
    return phases


def test_dwell_and_censoring() -> None:
    blip = [(0.2, 0.01, 5.0)] * 6 + [(1.0, 0.96, 9.0)] * 4 + [(1.0, 0.90, 9.0)] * 10
    phases = follow(blip)
    assert phases.times == {"t_mem": 300, "t_clean": None, "t_grok": None, "t_loss": None}
    held = blip + [(1.0, 0.96, 4.0)] * 5
    assert follow(held).times == {"t_mem": 300, "t_clean": 1000, "t_grok": 1000, "t_loss": None}


def test_no_detector_fires_within_its_first_dwell_evaluations() -> None:
    perfect = [(1.0, 1.0, 0.01)] * 5
    assert set(follow(perfect).times.values()) == {None}
    times = follow(perfect + [(1.0, 1.0, 0.01)]).times
    assert (times["t_mem"], times["t_grok"], times["t_loss"]) == (0, 0, 250)


def test_cleanup_is_measured_against_the_highest_loss_so_far() -> None:
    curve = [(0.5, 0.0, 4.0)] * 6 + [(1.0, 0.0, 20.0)] * 3 + [(1.0, 0.3, 9.9)] * 5
    assert follow(curve).times["t_clean"] == 450
    above = curve[:-5] + [(1.0, 0.3, 10.1)] * 5
    assert follow(above).times["t_clean"] is None


def test_a_low_test_loss_counts_without_being_held() -> None:
    curve = [(1.0, 0.5, 1.0)] * 8 + [(1.0, 0.97, 0.09), (1.0, 0.9, 0.3)]
    assert follow(curve).times["t_loss"] == 400


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 6))
def test_a_hold_is_the_first_run_that_is_long_enough(holds: list[bool], dwell: int) -> None:
    hold = Hold(dwell)
    for step, value in enumerate(holds):
        hold.update(step, value)
    starts = [
        start
        for start in range(len(holds))
        if (start == 0 or not holds[start - 1])
        and any(
            all(holds[start : end + 1]) and end - start + 1 >= dwell and end >= dwell
            for end in range(start, len(holds))
        )
    ]
    assert hold.confirmed == (starts[0] if starts else None)


@pytest.mark.parametrize("cut", [3, 8, 12])
def test_a_resumed_detector_finds_the_same_phases(cut: int) -> None:
    curve = [(0.5, 0.0, 4.0)] * 6 + [(1.0, 0.2, 20.0)] * 3 + [(1.0, 0.97, 0.05)] * 8
    first = follow(curve[:cut])
    second = Phases()
    second.load_state_dict(first.state_dict())
    for i, (train, test, loss) in enumerate(curve[cut:], start=cut):
        second.update(50 * i, train_accuracy=train, test_accuracy=test, test_loss=loss)
    assert second.times == follow(curve).times
