"""Signals become an event, also after a library took them, and go back to who had them."""

from __future__ import annotations

import os
import signal

import pytest

from openhelix.runtime.launch.node import NUMBERS, Interrupts, interruptible


def raise_here(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_each_sets_the_event_and_is_given_back(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in NUMBERS]
    with interruptible() as interrupts:
        assert not interrupts.is_set()
        raise_here(number)
        assert interrupts.wait(5.0)
    assert [signal.getsignal(n) for n in NUMBERS] == before


def test_a_second_ctrl_c_ends_at_once_another_sigterm_does_not() -> None:
    with interruptible() as interrupts:
        raise_here(signal.SIGTERM)
        assert interrupts.wait(5.0)
        raise_here(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            raise_here(signal.SIGINT)


def test_signals_are_taken_back_from_a_library() -> None:
    with interruptible() as interrupts:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        interrupts.listen()
        raise_here(signal.SIGTERM)
        assert interrupts.wait(5.0)


def test_a_signal_that_comes_inside_the_event_does_not_wait_for_itself() -> None:
    interrupts = Interrupts()
    with interrupts._cond:  # where the main thread may be when the signal comes
        interrupts._handle(signal.SIGTERM, None)
    assert interrupts.is_set() and interrupts.wait(5)
