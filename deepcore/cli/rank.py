"""Owns one rank's process under ``deepcore run``: runs the user's script and writes down how it failed.

Refuses to know the other ranks and torch, which the script may import or not; the launcher reads what is written.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import ModuleType

from deepcore.base import env

GRACE = 5.0  # seconds that a rank gets for its last words once it, or another one, has failed
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl
_ECHOES = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")


def main(argv: list[str]) -> None:
    """Run ``[--module] script args...`` as ``__main__``; exits with the script's code."""
    faulthandler.enable()
    _end_with_launcher()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    error_file = env.text("TORCHELASTIC_ERROR_FILE")
    if error_file is not None:
        threading.Thread(target=_follow_failure, args=(Path(error_file),), daemon=True).start()
    with _Witness(error_file):
        if argv[0] == "--module":
            _run_module(argv[1:])
        else:
            _run_script(argv)


def _end_with_launcher() -> None:
    """Let the system kill this process when the launcher is killed: nobody else would end it."""
    if sys.platform == "linux" and env.text("TORCHELASTIC_ERROR_FILE") is not None:
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


def _interrupted(number: int, frame: object) -> None:
    """Ctrl-C: end, and soon, whatever the script's handlers of exceptions do."""
    faulthandler.dump_traceback_later(2 * GRACE, exit=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    raise KeyboardInterrupt


class _Witness:
    """Writes down how the script ended, where it did not end well; what it raised goes on its way."""

    def __init__(self, error_file: str | None) -> None:
        self._error_file = error_file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            return
        if isinstance(error, SystemExit):
            _record(self._error_file, error, f"exited with {_quoted(error.code)}", "")
        elif isinstance(error, KeyboardInterrupt):
            sys.excepthook = _say_nothing  # the launcher says so once, for all ranks
        elif self._error_file is not None:
            _record(self._error_file, error, f"{type(error).__name__}: {error}", _traceback(error))
            _last_words(error)


def _run_script(argv: list[str]) -> None:
    """What ``python script.py args...`` does, in this process."""
    path = os.path.abspath(argv[0])
    sys.argv[:] = argv
    sys.path[0] = str(Path(path).resolve().parent)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec")
    module = ModuleType("__main__")
    module.__file__ = path
    sys.modules["__main__"] = module
    exec(code, vars(module))


def _run_module(argv: list[str]) -> None:
    """What ``python -m module args...`` does."""
    sys.argv[:] = argv
    sys.path[0] = os.getcwd()
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


def _record(error_file: str | None, error: BaseException, message: str, trace: str) -> None:
    """Write the failure where the elastic agent looks, in its format; the first writer's time decides who was first."""
    if error_file is None or Path(error_file).exists():
        return
    now = time.time()
    extra = {"py_callstack": trace, "timestamp": str(int(now)), "time": now, "echo": is_echo(error)}
    partial = Path(error_file + ".part")
    partial.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    partial.rename(error_file)


def is_echo(error: BaseException | None) -> bool:
    """Whether ``error`` only says that another rank is gone: then that one's error is the cause."""
    while error is not None:
        names = [cls.__name__ for cls in type(error).__mro__]
        if "DistError" in names or any(text in str(error) for text in _ECHOES):
            return True
        error = error.__cause__
    return False


def _traceback(error: BaseException) -> str:
    """The traceback from the script's first line on."""
    shown = traceback.TracebackException.from_exception(error)
    ours = (__file__, runpy.__file__, "<frozen runpy>")
    frames = [frame for frame in shown.stack if frame.filename not in ours]
    shown.stack = traceback.StackSummary.from_list(frames)
    return "".join(shown.format())


def _last_words(error: BaseException) -> None:
    """See to it that the process ends soon and that its traceback is printed once, by the launcher."""
    # Hooks run all the same: experiment trackers live there.
    with contextlib.redirect_stderr(io.StringIO()):
        sys.excepthook(type(error), error, error.__traceback__)
    sys.excepthook = _say_nothing
    # Not a Python timer: the main thread may hold the interpreter for ever in some library's exit handler.
    faulthandler.dump_traceback_later(GRACE, exit=True, file=Path(os.devnull).open("w"))  # noqa: SIM115


def _say_nothing(kind: type[BaseException], error: BaseException, trace: object) -> None:
    return None


def _follow_failure(error_file: Path) -> None:
    """End this process when another rank has failed and this one, deaf to SIGTERM, lives on."""
    while True:
        time.sleep(1.0)
        others = [path for path in error_file.parent.parent.glob("*/error.json") if path != error_file]
        if others:
            time.sleep(GRACE)
            os._exit(1)


def _quoted(code: object) -> str:
    return f"code {code}" if isinstance(code, int) else f"the message {code!r}"


if __name__ == "__main__":
    main(sys.argv[1:])
