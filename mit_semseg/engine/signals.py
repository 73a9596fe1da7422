"""SIGINT and SIGTERM during training: finish the current step, save a checkpoint, then stop."""

import logging
import signal
import threading

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Context that records the first signal and passes the second to the original handler.

    It does not handle signals that are ignored, and does nothing outside the main thread.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, object] = {}
        self._received: int | None = None

    @property
    def received(self) -> bool:
        """Whether a signal has arrived."""
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
        logger.warning("%s: stopping after this step (repeat to stop immediately)", signal.Signals(number).name)

    def raise_received(self) -> None:
        """Call the original handler of the recorded signal, if any; it usually raises `KeyboardInterrupt`."""
        if self._received is not None:
            self._call_handler(self._received, None)

    def _call_handler(self, number: int, frame) -> None:
        handler = self._handlers[number]
        if handler == signal.SIG_DFL:
            raise KeyboardInterrupt
        handler(number, frame)
