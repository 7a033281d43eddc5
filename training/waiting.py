"""What ends a stage whose workers can never start: Ray Train itself waits for ever."""

from __future__ import annotations

import logging
import threading
import time

from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import TrainControllerState
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision

from infra.capacity import CapacityError, Demand, Watch

_LOOK_S = 0.2


class EndHopelessWait(ControllerCallback):
    """Ends a stage with a sentence where the cluster cannot come to have its workers.

    Ray Train's controller calls it, and takes what it raises for the end of the run. While the
    controller waits for a placement group, a thread goes on looking.

    Args:
        demand: the fewest workers that the stage trains with.
        wait_s: for how long there may be no hope for them.
    """

    def __init__(self, demand: Demand, wait_s: float) -> None:
        self._demand, self._wait_s = demand, wait_s
        self._error: CapacityError | None = None
        self._told = False

    def after_controller_start(self, train_run_context: object) -> None:
        """Begin to look: once before workers are asked for, and then beside the controller."""
        self._watch = Watch(self._wait_s)
        self._look()
        threading.Thread(target=self._go_on, name="capacity", daemon=True).start()

    def before_controller_execute_resize_decision(self, resize_decision: ResizeDecision) -> None:
        """Wait before workers are asked for, as long as there is no hope."""
        while self._watch.is_without_hope and self._error is None:
            time.sleep(_LOOK_S)
        self._end()

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """End where the look was in vain; this is called after each turn of the controller."""
        self._end()

    def _go_on(self) -> None:
        while self._error is None:
            self._look()
            time.sleep(_LOOK_S)

    def _look(self) -> None:
        try:
            self._watch.check([self._demand])
        except CapacityError as error:
            self._error = error

    def _end(self) -> None:
        if self._error is not None and not self._told:
            self._told = True
            # The driver says it; Ray Train would write the traceback of it besides.
            logging.getLogger("ray.train").setLevel(logging.CRITICAL)
            raise self._error
