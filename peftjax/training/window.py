"""The steps since the last line of the log. Reading their metrics waits for the device, so it is done for several at once."""

import math
import time

import jax

from peftjax.core import host_arrays
from peftjax.core.errors import NotFiniteError
from peftjax.data.batches import HostBatch


class Window:
    """The steps since the last `close`, their metrics and their speed.

    Args:
        unit: What the speed counts, such as "tokens".
    """

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._steps: list[tuple[int, dict[str, jax.Array], list[str]]] = []
        self._count = 0
        self.reopen()

    def reopen(self) -> None:
        """Restart the clock."""
        self._opened = time.perf_counter()

    def add(self, step: int, measured: dict[str, jax.Array], batch: HostBatch) -> None:
        """Remember a step that has been dispatched."""
        self._steps.append((step, measured, batch.records))
        self._count += batch.real_tokens
        host_arrays.wait_on_cpus(measured)

    def close(self) -> dict[str, float]:
        """The metrics of the last step, and the speed over all steps.

        Raises:
            NotFiniteError: A loss or a gradient norm is not finite; the message has the first such step and its
                records.
        """
        numbers: dict[str, float] = {}
        for step, measured, records in self._steps:
            numbers = {name: float(value) for name, value in jax.device_get(measured).items()}
            if bad := [name for name in ("loss", "grad_norm") if not math.isfinite(numbers[name])]:
                raise NotFiniteError(
                    f"step {step}: {bad[0]} is {numbers[bad[0]]}. Records of its batch: {', '.join(dict.fromkeys(records))}. "
                    "No checkpoint has been saved since; lower optim.learning_rate, inspect these records, or set "
                    "optim.clip_norm"
                )
        speed = self._count / (time.perf_counter() - self._opened)
        self._steps, self._count = [], 0
        self.reopen()
        return numbers | {f"{self._unit}_per_second": speed}
