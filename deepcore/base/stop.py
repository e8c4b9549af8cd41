"""Owns the wish of the outside world that this process end: SIGTERM, noted until somebody can act on it.

Knows nothing of ranks and of training.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable


class StopRequest:
    """Whether SIGTERM has come.

    Attributes:
        requested: so it has.
    """

    def __init__(self) -> None:
        self.requested = False
        self._may_wait: Callable[[], bool] = lambda: True

    def listen(self, may_wait: Callable[[], bool]) -> bool:
        """Note SIGTERM from now on; False where that is not ours: in another thread, or beside a user's handler.

        Args:
            may_wait: asked when it comes; where it says no, the process ends at once, as without this.
        """
        self._may_wait = may_wait
        if threading.current_thread() is not threading.main_thread():
            return False
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._note)
        return signal.getsignal(signal.SIGTERM) == self._note

    def _note(self, number: int, frame: object) -> None:
        if self._may_wait():
            self.requested = True
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
