"""The programs of a step whose batches have several lengths, compiled before they are needed.

Every shape of a batch needs its own program. A thread compiles the programs in the order of their first use, while the run
evaluates and trains. They are stored where jit looks for them, so the step does not trace or compile them again.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import jax
from jax.sharding import Mesh

from peftjax.core.progress import COMPILING, Progress
from peftjax.training.step import abstract_like

Shapes = tuple[tuple[int, ...], ...]


class CompileAhead:
    """Context manager: a jitted step whose programs a thread compiles. Call it like the step.

    If a program fails to compile, the call that needs it raises the error. On exit, the context waits for the program that is
    being compiled and cancels those after it.
    """

    def __init__(
        self, step: Callable[..., Any], mesh: Mesh, others: tuple[Any, ...], batches: Iterable[Any], progress: Progress
    ) -> None:
        """
        Args:
            step: The jitted step. The shapes of its last argument, the batch, vary.
            mesh: The mesh of its arguments.
            others: Its other arguments.
            batches: Batches as `jax.ShapeDtypeStruct`s with shardings, in the order of their first use.
            progress: Names the phase of the run while a call waits for its program.
        """
        self._step, self._progress = step, progress
        self._known: set[Shapes] = set()  # of earlier calls
        self._programs: dict[Shapes, Future[Any]] = {}
        self._thread = ThreadPoolExecutor(1, "compile")
        distinct = {_shapes(batch): batch for batch in batches}
        # On GPUs, XLA times the kernels that it chooses from, and a step that runs at the same time would disturb this.
        if len(distinct) > 1 and mesh.devices.flat[0].platform != "gpu":
            abstract = abstract_like(others)
            for shapes, batch in distinct.items():
                self._programs[shapes] = self._thread.submit(_compile, step, mesh, (*abstract, batch))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __call__(self, *arguments: Any) -> Any:
        """The step."""
        shapes = _shapes(arguments[-1])
        if shapes in self._known:
            return self._step(*arguments)
        with self._progress.phase(COMPILING):
            program = self._programs.pop(shapes, None)
            if program and not program.cancel():  # it is being compiled, or ready
                program.result()
            result = self._step(*arguments)
        self._known.add(shapes)
        return result


def _compile(step: Any, mesh: Mesh, arguments: tuple[Any, ...]) -> None:
    with jax.set_mesh(mesh):  # each thread has its own
        step.lower(*arguments).compile()


def _shapes(batch: Any) -> Shapes:
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))
