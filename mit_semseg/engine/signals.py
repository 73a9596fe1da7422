"""Handle SIGINT and SIGTERM during training: save a checkpoint after the current step, then stop."""

import logging
import signal
import threading

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Context that records the first signal and calls the original handler for the second signal.

    Signals that the process ignores stay ignored. In other threads than the main thread, the context does nothing.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, object] = {}
        self._received: int | None = None

    @property
    def received(self) -> bool:
        """Whether a signal was received."""
        return self._received is not None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self._handlers = {number: signal.signal(number, self._record) for number in handled}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame) -> None:
        if self.received:
            self._call_handler(number, frame)
        self._received = number
        logger.warning("%s: stopping after this step; a second signal stops immediately", signal.Signals(number).name)

    def raise_received(self) -> None:
        """If a signal was recorded, call the original handler, which usually raises `KeyboardInterrupt`."""
        if self._received is not None:
            self._call_handler(self._received, None)

    def _call_handler(self, number: int, frame) -> None:
        handler = self._handlers[number]
        if handler == signal.SIG_DFL:
            raise KeyboardInterrupt
        handler(number, frame)
