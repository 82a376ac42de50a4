import os
import signal

import pytest

from jaxsoft.training import StopRequest, TrainingInterrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_waits_and_second_raises(number):
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.received == number
        with pytest.raises(TrainingInterrupted) as waited:
            stop.check(7)
        assert (waited.value.signal_number, waited.value.step) == (number, 7)
        with pytest.raises(TrainingInterrupted) as at_once:
            os.kill(os.getpid(), number)
        assert at_once.value.step is None
        assert str(at_once.value) == f"stopped by {number.name}"


def test_former_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert after == before


def test_not_entered_it_never_stops():
    StopRequest().check()


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
