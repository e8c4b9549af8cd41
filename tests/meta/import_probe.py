"""Owns the watch over imports: run as a script, it prints as JSON what each did beyond defining names.

Knows nothing of what is allowed; the tests judge. Usage: ``python -B import_probe.py PARENT NAME...``.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping

WATCHED_EVENTS = (
    "ctypes.dlopen",
    "os.exec",
    "os.fork",
    "os.mkdir",
    "os.posix_spawn",
    "os.putenv",
    "os.remove",
    "os.rename",
    "os.system",
    "os.unsetenv",
    "shutil.rmtree",
    "socket.bind",
    "socket.connect",
    "subprocess.Popen",
)
PROBES = ("_lazy_init", "init", "is_available", "device_count", "current_device", "get_device_properties")


class RecordingEnviron(MutableMapping[str, str]):
    """Stands in for os.environ (os.getenv reads it too) and notes every access."""

    def __init__(self, inner: MutableMapping[str, str], note: Callable[[str], None]) -> None:
        self.inner, self.note = inner, note

    def __getitem__(self, key: str) -> str:
        self.note(f"read {key}")
        return self.inner[key]

    def __setitem__(self, key: str, value: str) -> None:
        self.note(f"write {key}")
        self.inner[key] = value

    def __delitem__(self, key: str) -> None:
        self.note(f"delete {key}")
        del self.inner[key]

    def __iter__(self) -> Iterator[str]:
        self.note("read all")
        return iter(self.inner)

    def __len__(self) -> int:
        self.note("read all")
        return len(self.inner)


def opens_for_writing(arguments: tuple[object, ...]) -> bool:
    """Whether an ``open`` audit event (path, mode, flags) can change a file."""
    flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))


def watch(names: list[str]) -> dict[str, dict[str, object]]:
    """Import each module after torch; report modules, environment, events, device probes, threads, root logger."""
    import torch

    notes: dict[str, list[str]] = {"environment": [], "events": [], "device": []}
    watching = False

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if watching and (event in WATCHED_EVENTS or (event == "open" and opens_for_writing(arguments))):
            notes["events"].append(f"{event} {arguments[:1]}")

    def spied(kind: str, label: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            notes[kind].append(label)
            return original(*args, **kwargs)

        return call

    for label in PROBES:
        setattr(torch.cuda, label, spied("device", label, getattr(torch.cuda, label)))
    threading.Thread.start = spied("events", "thread", threading.Thread.start)  # type: ignore[method-assign]
    root = logging.getLogger()
    os.environ = RecordingEnviron(os.environ, notes["environment"].append)  # type: ignore[assignment]  # noqa: B003
    sys.addaudithook(audit)
    report: dict[str, dict[str, object]] = {}
    for name in names:
        before, threads, logging_before = set(sys.modules), threading.active_count(), (list(root.handlers), root.level)
        watching = True
        importlib.import_module(name)
        watching = False
        report[name] = {
            **{kind: list(found) for kind, found in notes.items()},
            "modules": sorted(set(sys.modules) - before),
            "threads": threading.active_count() - threads,
            "root_logger_changed": (list(root.handlers), root.level) != logging_before,
            "cuda_initialised": torch.cuda.is_initialized(),
        }
        for found in notes.values():
            found.clear()
    return report


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    sys.stdout.write(json.dumps(watch(sys.argv[2:])))
