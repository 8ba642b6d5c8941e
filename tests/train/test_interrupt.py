"""Signals as a flag."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time

import pytest

from m1jax.train.interrupt import StopSignal


@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 75), (signal.SIGINT, "SIGINT", 130)])
def test_a_signal_sets_the_flag_and_the_old_handler_comes_back(number, name, code):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert (stop.requested, stop.exit_code) == (None, 0)
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.exit_code) == (name, code)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_control_c_after_a_request_does_not_wait(first):
    with StopSignal() as stop:
        os.kill(os.getpid(), first)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == first.name


def test_a_thread_may_open_it():
    seen = []

    def body():
        with StopSignal() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [None]


def test_another_thread_sees_it_while_the_main_one_is_deep_in_other_code():
    """As in a message of XLA's to a host that does not answer: no handler of Python's runs until that returns."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    held, seen = threading.Event(), []

    def body(stop):
        library.pthread_mutex_lock(mutex)
        held.set()
        time.sleep(1)  # until the main thread waits for the mutex
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            if stop.requested:
                break
            time.sleep(0.01)
        seen.append((stop.requested, stop._handled))
        library.pthread_mutex_unlock(mutex)

    with StopSignal() as stop:
        thread = threading.Thread(target=body, args=(stop,))
        thread.start()
        while not held.is_set():
            pass
        library.pthread_mutex_lock(mutex)
        thread.join()
    assert seen == [("SIGTERM", False)], "no handler had run"
