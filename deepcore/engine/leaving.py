"""Owns what engines do under ``deepcore run`` when the job is told to end, and when it is told to resume.

Knows nothing of how ranks agree (``comm/parting``) or of what a checkpoint holds.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepcore.base import env
from deepcore.base.env import RESUME, RUN_FOLDER, SAVE_DIR
from deepcore.base.log import logger
from deepcore.base.stop import StopRequest
from deepcore.checkpoint import folder as folders
from deepcore.checkpoint.background import settle_all
from deepcore.checkpoint.reader import Reader
from deepcore.comm.parting import Parting, parting
from deepcore.config.paths import is_unset
from deepcore.config.resolve import MICRO, STEPS, TOTAL
from deepcore.errors import CheckpointError

if TYPE_CHECKING:
    from deepcore.engine.persistence import Persistent


class Leaving:
    """One per process: signals belong to processes."""

    def __init__(self) -> None:
        self._request = StopRequest()
        self._parting: Parting | None = None
        self._engines: weakref.WeakSet[Persistent] = weakref.WeakSet()
        self._order: list[weakref.ref[Persistent]] = []

    def join(self, engine: Persistent) -> None:
        """Let an engine heed SIGTERM at its boundaries, if ``deepcore run`` started this process. Collective."""
        if env.text(RUN_FOLDER) is None:
            return
        self._engines.add(engine)
        self._order.append(weakref.ref(engine))
        if self._parting is None:
            self._request.listen(self._may_wait)
            self._parting = parting(lambda: self._request.requested)

    def leave(self, engine: Persistent) -> None:
        """The engine makes no step any more."""
        self._engines.discard(engine)
        if not self._engines and self._parting is not None:
            self._parting.close()
            self._parting = None

    def at_boundary(self, engine: Persistent) -> None:
        """After a step: where all ranks stop here, save what there is and end the process."""
        if engine in self._engines and self._parting is not None and self._parting.is_here():
            self._save_and_exit()

    def _alive(self) -> list[Persistent]:
        return [engine for ref in self._order if (engine := ref()) is not None and engine in self._engines]

    def _may_wait(self) -> bool:
        if self._parting is None or not self._parting.can_agree:
            return False
        if any(_folder_of(engine) for engine in self._alive()):
            return True
        logger().warning(
            "SIGTERM: nothing is saved, for this run has not saved before and knows no folder; "
            "start it with 'deepcore run --save-dir DIR'"
        )
        return False

    def _save_and_exit(self) -> None:
        engines = self._alive()
        taken: set[Path] = set()
        for engine in engines:
            folder = _folder_of(engine)
            if folder is None or folder in taken:
                logger().error("SIGTERM: an engine has no folder of its own and is not saved: let it save into one")
                continue
            taken.add(folder)
            if engine.gave_client_state and not engine.provides_client_state and engine.global_rank == 0:
                logger().warning(
                    "SIGTERM: this save keeps no client_state, which earlier ones were given; "
                    "say what it is by engine.provide_client_state(lambda: {...})"
                )
            engine.save_checkpoint(folder)
            engine.wait_for_save()
        settle_all()
        run, rank = env.text(RUN_FOLDER), engines[0].local_rank
        if run is not None:
            (Path(run) / f"saved.{rank}").write_text(", ".join(map(str, sorted(taken))))
        sys.exit(0)


def _folder_of(engine: Persistent) -> Path | None:
    given = env.text(SAVE_DIR)
    return Path(given) if given else engine.last_save_dir


leaving = Leaving()  # of this process


# --- resuming ---------------------------------------------------------------------------------------------------------


def resumed_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the batch sizes with which the newest checkpoint goes on, on any number of ranks.

    The samples of a step are the config's, else the checkpoint's; so is the micro-batch; the accumulation follows.
    """
    adapted = dict(raw)
    saved = next((found for path in _candidates() if (found := _batch_of(path))), None)
    if saved is None:
        return adapted
    for key in (TOTAL, MICRO):
        if is_unset(adapted.get(key)):
            adapted[key] = saved[key]
    adapted.pop(STEPS, None)
    return adapted


def resume(engine: Persistent) -> None:
    """Load the newest checkpoint that is whole, if ``deepcore run --resume`` asks for it. Collective."""
    failures = []
    for path in _candidates():
        try:
            engine.resumed_from, engine.client_state = engine.load_checkpoint(path.parent, tag=path.name)
            return
        except CheckpointError as error:
            failures.append(error)
            logger().warning(f"{path} cannot be resumed from; an older one is tried\n{error}")
    if failures:
        raise failures[0]
    if env.text(RESUME) and engine.global_rank == 0:
        logger().info(f"there is no checkpoint in {env.text(SAVE_DIR)} yet: the run begins")


def _candidates() -> list[Path]:
    """Complete checkpoints to resume from, the newest first."""
    root = env.text(SAVE_DIR)
    if not env.text(RESUME) or root is None:
        return []
    return [Path(root) / tag for tag in reversed(folders.tags(Path(root)))]


def _batch_of(path: Path) -> dict[str, int] | None:
    try:
        batch = Reader(path).manifest.state.get("batch")
    except CheckpointError:
        return None
    sizes = batch if isinstance(batch, dict) else {}
    good = all(type(sizes.get(key)) is int and sizes[key] > 0 for key in (TOTAL, MICRO))
    return {key: sizes[key] for key in (TOTAL, MICRO)} if good else None
