from __future__ import annotations

import os
import signal
import threading

import pytest

from trueup.runs.interrupt import Stopped, interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_stops(number, capfd):
    before = signal.getsignal(number)
    with interrupts() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        assert interrupt.requested
        assert "with a checkpoint" in capfd.readouterr().err
        with pytest.raises(Stopped, match="--resume auto") as raised:
            os.kill(os.getpid(), number)
    assert raised.value.exit_code == 128 + number
    assert signal.getsignal(number) is before


def test_what_is_raised_when_the_step_is_over_carries_the_exit_code():
    with interrupts() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
    stopped = interrupt.stop("saved")
    assert isinstance(stopped, KeyboardInterrupt)
    assert (str(stopped), stopped.exit_code) == ("saved", 143)


def test_the_last_signal_gives_the_code():
    with interrupts() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped) as raised:
            os.kill(os.getpid(), signal.SIGINT)
    assert interrupt.requested
    assert raised.value.exit_code == 130


def test_handlers_come_back_after_an_exception():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), interrupts():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_nothing_is_caught():
    seen = []
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with interrupts() as interrupt:
            seen.append((interrupt.requested, signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]
