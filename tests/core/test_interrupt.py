import os
import pickle
import signal

import pytest

from allostasis.core.interrupt import Interrupted, interruptible


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_raises_within_and_does_as_before_without(
    number: signal.Signals, status: int
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=number.name) as caught, interruptible():
        os.kill(os.getpid(), number)
    assert caught.value.exit_status == status
    assert signal.getsignal(number) is before


def test_it_passes_an_except_exception_and_a_pickle() -> None:
    stop = Interrupted(signal.SIGTERM)
    assert not isinstance(stop, Exception)
    assert pickle.loads(pickle.dumps(stop)).exit_status == 143
