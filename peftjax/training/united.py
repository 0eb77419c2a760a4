"""The parts that the runs of a population share: the base, a model with the adapters of all runs, and the programs."""

import contextlib
import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.core import variables
from peftjax.core import workdir as workdirs
from peftjax.core.one_cpu import compiler_options
from peftjax.io.random_model import draw_again
from peftjax.models.base import Model
from peftjax.report.data import PAGE, ReportData
from peftjax.tasks import Task
from peftjax.training import precision
from peftjax.training.abstract import outline, place_shapes
from peftjax.training.alike import group_runs, shared_paths, structure, unite
from peftjax.training.evaluation import EvalStep
from peftjax.training.hooks import NO_HOOKS
from peftjax.training.member import LiveMember, Member
from peftjax.training.population_evaluation import make_population_eval_step
from peftjax.training.population_step import SharedUpdate, make_gradients, make_shared_update, own_leaves, shared_leaves
from peftjax.training.resume import open_checkpoints, resolve_config
from peftjax.training.run import Run
from peftjax.training.setup import attach_method, base_fingerprint, open_data
from peftjax.training.split import make_tx, split
from peftjax.training.step import TrainState, abstract_like, jit_options
from peftjax.training.varied import Varied


class SharedBase:
    """The bases of all runs. They share all arrays but those of the parameters that the checkpoint lacks, such as a new head.

    Attributes:
        model: The base of a run with the seed `seed`.
        task: The task.
        varied: The differences between the models of the runs.
        mesh: The devices.
    """

    def __init__(self, model: Model, seed: int, task: Task, varied: Varied, mesh: Mesh) -> None:
        self.model, self.task, self.varied, self.mesh = model, task, varied, mesh
        self._seed, self._of_seeds = seed, {seed: (model, base_fingerprint(model))}

    def of(self, seed: int) -> tuple[Model, str]:
        """A copy of the base of a run with a seed, and its fingerprint."""
        if not (self.model.origin and self.model.origin.drawn):
            seed = self._seed  # all runs have the same base
        if seed not in self._of_seeds:
            model = nnx.clone(self.model)
            draw_again(model, self.mesh, seed)
            self._of_seeds[seed] = model, base_fingerprint(model)
        model, fingerprint = self._of_seeds[seed]
        return nnx.clone(model), fingerprint


class United:
    """Runs that one program can train, and what they share.

    Attributes:
        members: The runs.
        model: The base with the adapters of all runs, as shapes. Each leaf is as large as in the run where it is
            largest.
        mesh: The devices.
        gradients: The jitted function of `make_gradients`.
        eval_step: The jitted step of `make_population_eval_step`.
        shared: The frozen leaves of all runs, such as the base; empty until the first run is opened.
    """

    def __init__(self, members: Sequence[Member], base: SharedBase, model: Model, mesh: Mesh) -> None:
        place_shapes(model, mesh)
        self.members, self.model, self.mesh = members, model, mesh
        self.shared: variables.FlatTree = {}
        self._base = base
        self._names = shared_paths(model)
        self._updates: dict[Hashable, SharedUpdate] = {}
        self._alone: dict[nnx.GraphDef, EvalStep] = {}
        config = members[0].config
        parts = split(config, base.task, model, config.method)
        self._trainable, self._own = Padded(parts.trainable), Padded(own_leaves(model, parts.frozen))
        options = compiler_options(mesh.devices.flat)
        self.gradients = jax.jit(make_gradients(parts.objective), compiler_options=options)
        self.eval_step = make_population_eval_step(variables.flat(model)[0], base.task, mesh)

    def open(self, member: Member) -> LiveMember:
        """Attach the adapters of a run to the base, and restore its newest checkpoint if it has one."""
        with contextlib.ExitStack() as opened:
            opened.enter_context(workdirs.claim(member.workdir, member.config.model.path))
            task, batches = open_data(member.config, self.mesh)
            checkpoints = opened.enter_context(open_checkpoints(member.config, member.workdir))
            config, source = resolve_config(member.config, task, batches, member.workdir, checkpoints)
            model, base = self._base.of(config.seed)
            method = attach_method(config, task, model, self.mesh, source)
            self._base.varied.hold(model)
            sharding.place(model, self.mesh)
            parts = split(config, task, model, method)
            assert unite(self.model, model) is not None, f"{member.name} has another structure"
            run = Run(config, member.workdir, self.mesh, task, batches, method, model, parts, base, NO_HOOKS)
            run.report = ReportData(sweep=True)
            run.eval_step = self._alone.setdefault(structure(model), run.eval_step)
            state = run.resume(parts.trainable, parts.tx, checkpoints)
            if state.step < config.train.steps and jax.process_index() == 0:  # a run with a report counts as finished
                (member.workdir / PAGE).unlink(missing_ok=True)
            self.shared = self.shared or shared_leaves(model, run.frozen)
            own = own_leaves(model, run.frozen)
            run.frozen = {**self.shared, **own}
            self._widen(variables.present(state.trainable, own))  # ranks may have been chosen from data
            # the paths: runs that choose ranks from data may leave out different layers
            alike = dataclasses.replace(config.optim, learning_rate=1.0)
            key = alike, config.train.steps, config.method, frozenset(state.trainable)
            if key not in self._updates:
                tx = partial(make_tx, config, method, abstract_like(parts.trainable), _without_weights(model))
                self._updates[key] = jax.jit(
                    make_shared_update(tx, self._names), donate_argnums=0, **jit_options(state)
                )
            update, step = self._updates[key], int(state.step)
            return LiveMember(member, run, own, update, state, step, checkpoints, opened.pop_all())

    def states(self, members: Sequence[LiveMember]) -> list[TrainState]:
        """The states of members without moments, padded."""
        return [
            one.state._replace(optimizer=(), trainable=self._trainable(self._named(one.state.trainable)))
            for one in members
        ]

    def own_frozen(self, members: Sequence[LiveMember]) -> list[variables.FlatTree]:
        """The frozen leaves of each member that are not in `shared`, padded."""
        return [self._own(self._named(one.own)) for one in members]

    def own(self, members: Sequence[LiveMember]) -> list[variables.FlatTree]:
        """All leaves of each member that are not in `shared`, padded."""
        return [
            {**state.trainable, **frozen}
            for state, frozen in zip(self.states(members), self.own_frozen(members), strict=True)
        ]

    def _widen(self, leaves: variables.FlatTree) -> None:
        """From now on, pad to shapes that are at least as large as those of a run's leaves."""
        leaves = self._named(leaves)
        self._trainable.widen(leaves)
        self._own.widen(leaves)

    def _named(self, tree: variables.FlatTree) -> variables.FlatTree:
        """The tree of a member with the paths of `model`."""
        return variables.renamed(tree, self._names) if self._names else tree


def unite_runs(members: Sequence[Member], mesh: Mesh) -> list[United]:
    """Load the base of some runs, and group the runs by what one program can train.

    One program cannot train models that differ in structure, for example because an `init` of LoRA has a nonzero initial
    update.
    """
    config = members[0].config
    task, batches = open_data(config, mesh)
    batches.close()
    config = precision.resolve_dtype(config, task.hf_config)
    model = task.load_model(config.model, task.directory, mesh, config.seed)
    groups, varied = group_runs(members, lambda one: one.config.method, lambda one: outline(model, one.config.method))
    base = SharedBase(model, config.seed, task, varied, mesh)
    return [United(runs, base, united, mesh) for united, runs in groups]


class Padded:
    """Pads flat trees to the same shapes.

    Args:
        like: A tree of arrays or shapes. A tree that lacks one of its leaves gets zeros there.
    """

    def __init__(self, like: variables.FlatTree) -> None:
        self._set(like)

    def __call__(self, tree: variables.FlatTree) -> variables.FlatTree:
        """The padded tree; the tree itself if it has all of the shapes."""
        if tree.keys() == self._like.keys() and _shapes(tree) == _shapes(self._like):
            return tree
        return self._fill(tree)

    def widen(self, leaves: Mapping[str, Any]) -> None:
        """From now on, pad to shapes that are at least as large as those of some leaves."""
        wider = {
            path: jax.tree.map(variables.widest, leaf, leaves[path])
            if path in leaves and jax.tree.leaves(leaf)
            else leaf
            for path, leaf in self._like.items()
        }
        if _shapes(wider) != _shapes(self._like):
            self._set(wider)

    def _set(self, like: variables.FlatTree) -> None:
        self._like = like
        self._fill = jax.jit(lambda tree: variables.filled(tree, like))


def _without_weights(model: Model) -> dict[str, nnx.Variable]:
    """The variables of a model as shapes, except the constants of methods. They outlive a run, and its weights must not."""
    return {
        path: leaf if isinstance(leaf, variables.PeftConstant) else leaf.replace(abstract_like(leaf.get_value()))
        for path, leaf in variables.flat(model)[1].items()
    }


def _shapes(tree: variables.FlatTree) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(tree)]
