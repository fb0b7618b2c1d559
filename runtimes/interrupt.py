"""Long calls into native code that whatever interrupts the main thread can end early."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent import futures
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.1  # on Windows a wait for another thread does not see Ctrl-C before its end


def interruptibly(
    call: Callable[[], T],
    cancel: Callable[[], None],
    poll: Callable[[], None] | None = None,
) -> T:
    """The result of `call`, which `cancel` ends early when the calling thread is interrupted.

    Python acts on Ctrl-C, or on any signal that the app handles, only between two instructions of
    the main thread. So another thread makes the call while this one waits, and calls `poll` ten
    times a second. The hand-off costs a few tenths of a millisecond.

    Raises:
        BaseException: what interrupted, once the call has ended; or what `call` raised.
    """
    with futures.ThreadPoolExecutor(1) as helper:  # leaving it waits for the end of the call
        try:
            run = helper.submit(call)
            while not futures.wait([run], timeout=POLL_SECONDS).done:
                if poll is not None:
                    poll()
        except BaseException:
            cancel()
            raise
    return run.result()


def sees_interrupts() -> bool:
    """Whether this is the main thread, and the program is not yet ending (no new threads then)."""
    me = threading.current_thread()
    return me is threading.main_thread() and me.is_alive()
