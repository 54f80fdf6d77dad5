"""Signals become an event, also after a library took them, and go back to who had them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from openhelix.runtime.launch.node import NUMBERS, Interrupts, interruptible


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Under nohup a hang-up is ignored, and stays so: these tests are not about that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


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


def test_what_is_ended_in_order_is_not_disturbed_by_more_signals() -> None:
    with interruptible() as interrupts:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGHUP):
            raise_here(number)
        assert interrupts.wait(5.0) and interrupts.heard == 4


@pytest.mark.parametrize("patience", [0, 1, 2])
@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_beyond_the_patience_raises(number: signal.Signals, patience: int) -> None:
    with interruptible() as interrupts:
        with interrupts.patience(patience):
            for _ in range(patience):
                raise_here(number)
            with pytest.raises(KeyboardInterrupt):
                raise_here(number)
        raise_here(number)  # and outside none does
        with pytest.raises(KeyboardInterrupt), interrupts.patience(patience):
            raise AssertionError("it had come before")
        with interrupts.patience(interrupts.heard):
            assert interrupts.is_set()


def test_what_a_patient_block_let_pass_raises_at_its_end_if_it_is_too_much_around_it() -> None:
    done = []

    def work(interrupts: Interrupts) -> None:
        with interrupts.patience(0):
            with interrupts.patience(1):
                raise_here(signal.SIGTERM)
                done.append("in order")
            done.append("never")

    with interruptible() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            work(interrupts)
        with interrupts.patience(interrupts.heard):
            done.append("afterwards")
    assert done == ["in order", "afterwards"]


def test_within_another_block_it_is_the_same_event() -> None:
    with interruptible() as outer:
        with interruptible() as inner:
            assert inner is outer
            raise_here(signal.SIGINT)
        assert outer.wait(5.0)
        raise_here(signal.SIGINT)  # the outer block's still
    assert not isinstance(getattr(signal.getsignal(signal.SIGINT), "__self__", None), Interrupts)


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
