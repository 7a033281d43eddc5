"""What makes a run save out of turn: SIGTERM, a node that is about to go, and the clock.

One worker sees it and all must act on it after the same step, so all tell each other in every step,
while they compute its gradients.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.callback import WorkerCallback

from training import parallel

_ASK_EVERY_S = 10.0  # Ray Train, whether a node is about to go; all workers wait for its answer


class _Terminated:
    """Whether this process was told to end while a stage was being trained in it."""

    training = False
    told = False


class CatchSigterm(WorkerCallback):
    """Lets SIGTERM reach the training in a worker of Ray Train.

    Ray Train calls it in the worker's main thread, the only one that may say what a signal does.
    The training runs in another.
    """

    def after_init_train_context(self) -> None:
        """Take the signal for the time of the training."""
        catch_sigterm()


def catch_sigterm() -> None:
    """Let SIGTERM be noted while a stage is trained; before, after, and a second time, it ends."""
    former = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        if _Terminated.training and not _Terminated.told:
            _Terminated.told = True
        elif callable(former):
            former(number, frame)
        else:
            raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, note)


@contextmanager
def listening() -> Iterator[None]:
    """Inside, SIGTERM is noted and does not end the process."""
    here = threading.current_thread() is threading.main_thread()
    former = signal.getsignal(signal.SIGTERM)
    if here:  # outside of Ray Train, whose workers have done so already
        catch_sigterm()
    _Terminated.training, _Terminated.told = True, False
    try:
        yield
    finally:
        _Terminated.training = False
        if here:
            signal.signal(signal.SIGTERM, former)


class Notices:
    """What this worker sees, and what all have agreed on.

    Args:
        checkpoint_minutes: After so many without one a checkpoint is due; ``None``: never.

    Attributes:
        ending: Why the run is to save now and end, in words; empty if it is not.
        due: By the clock a checkpoint is due.
    """

    def __init__(self, checkpoint_minutes: float | None) -> None:
        self._seconds = None if checkpoint_minutes is None else 60 * checkpoint_minutes
        self._saved = self._asked = time.monotonic()
        self.ending = ""
        self.due = False

    def tell(self, device: torch.device) -> None:
        """Begin to tell all workers what this one sees now (a collective).

        That is SIGTERM, that a checkpoint is due, and that it is time to ask Ray Train.
        """
        now = time.monotonic()
        due = self._seconds is not None and now - self._saved >= self._seconds
        signs = (_Terminated.told, due, now - self._asked >= _ASK_EVERY_S)
        self._told = parallel.any_sees(signs, device)

    def hear(self) -> None:
        """Take what any worker told; the same on all (where they ask Ray Train, a collective)."""
        terminated, self.due, ask = self._told()
        if terminated:
            self.ending = "a worker was told to end (SIGTERM)"
        if ask:
            self._asked = time.monotonic()
            if (info := ray.train.get_preemption_info()) is not None:
                self.ending = f"{len(info.preempted_node_ids)} nodes are about to be taken away"

    def saved(self) -> None:
        """A checkpoint begins: the clock starts anew."""
        self._saved = time.monotonic()


def interrupted(reason: str) -> RayActorError:
    """The error with which all workers end so that Ray Train starts them again.

    Ray Train takes it for the loss of a node that was announced, and counts it apart from failures:
    ``FailureConfig.max_preemption_failures`` is without bound unless it is set.
    """
    return RayActorError(error_msg=reason, preempted=True)
