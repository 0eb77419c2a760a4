"""Tune a model: load, attach a method, train what it adds, hand back an adapter that everyone can read.

    python -m peftjax.train --config=configs/quickstart.py --workdir=runs/quickstart [--config.optim.learning_rate=1e-4]

Run again in the same workdir, it goes on where it was, bit for bit.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from peftjax import methods, metrics, optim, sharding
from peftjax.core import cli, variables
from peftjax.core import config as configs
from peftjax.core.fingerprint import fingerprint
from peftjax.data.batches import eval_batches, eval_examples, train_batches
from peftjax.data.text import Tokenizer, load_tokenizer
from peftjax.evaluate import Answer, answer, evaluate_loss, exact_match, make_eval_step
from peftjax.io.checkpoint import Checkpoints
from peftjax.io.hf_adapter import save_adapter
from peftjax.io.hf_model import load_model, make_random, resolve, save_model
from peftjax.losses import Totals, next_token_loss

# Sections and fields that may differ between a run and its resumption: they change nothing that is computed.
FREE = ("checkpoint.", "data.workers", "data.tfds_data_dir", "eval.samples")


class TrainState(NamedTuple):
    """All that changes from step to step; a checkpoint holds exactly this and the position in the data."""

    step: jax.Array  # int32 [], updates done
    trainable: variables.FlatTree
    optimizer: optax.OptState
    key: jax.Array  # uint32 [2], the same all the time: step t draws from fold_in(key, t)


@dataclasses.dataclass
class Run:
    """What is set up once for a training."""

    config: Any
    workdir: Path
    mesh: Mesh
    base: Path  # the base model's directory
    base_fingerprint: str
    tokenizer: Tokenizer
    batches: Any
    method: methods.Method
    model: Any  # in evaluation; its trainable leaves are those of the start, until `sync`
    frozen: variables.FlatTree
    schedule: optax.Schedule
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    eval_step: Callable[..., Totals]

    def sync(self, state: TrainState) -> None:
        """Write what is trained into the model."""
        variables.update(self.model, state.trainable)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint records of the run that wrote it."""
        return {"config": json.loads(configs.to_json(self.config)), "base": self.base_fingerprint}


def train(config: Any, workdir: Path) -> dict[str, float]:
    """Run the training that `config` describes in `workdir`, from its newest checkpoint if there is one.

    Returns the last evaluation's scores.

    Raises:
        ValueError: the config does not fit the model, the data, or the run that the workdir holds; or the loss or the
            gradient is not finite any more.
    """
    mesh = sharding.make_mesh(config.mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep, keep_best=config.checkpoint.keep_best)
    with jax.set_mesh(mesh), checkpoints:
        run, state = setup(config, workdir, mesh)
        state = resume(run, state, checkpoints)
        start, steps = int(state.step), config.train.steps
        with metrics.Log(workdir, total_steps=steps, resume_step=start, enabled=jax.process_index() == 0) as log:
            introduce(run, state, log)
            scores = {} if start else evaluate(run, state, log)
            window = Window(start)
            for step in range(start + 1, steps + 1):
                batch = next(run.batches)
                state, measured = run.train_step(state, run.frozen, shard(run, batch))
                window.add(step, measured, batch)
                evaluating = step == steps or due(step, config.train.eval_every)
                saving = evaluating or due(step, config.checkpoint.every)
                if saving or due(step, config.train.log_every):
                    numbers = window.close()
                    if step == steps or due(step, config.train.log_every):
                        log.step(step, numbers | {"learning_rate": float(run.schedule(step - 1))})
                if evaluating:
                    scores = evaluate(run, state, log)
                if saving:
                    score = -scores["eval_loss"] if evaluating and scores else None
                    checkpoints.save(step, flatten(state), run.batches.get_state(), score=score, identity=run.identity)
                    window = Window(step)
            checkpoints.wait()
            finish(run, state, log)
    return scores


def setup(config: Any, workdir: Path, mesh: Mesh) -> tuple[Run, TrainState]:
    """Everything that a run needs before its first step, and the state it starts from."""
    base = resolve(config.model.path, config.model.revision)
    tokenizer = load_tokenizer(base)
    method = methods.from_config(config.method)
    batches = train_batches(config, tokenizer, process_index=jax.process_index(), process_count=jax.process_count())
    options = {"dtype": config.model.dtype, "param_dtype": config.model.param_dtype or None, "remat": config.model.remat}
    if config.model.init == "random":
        model = make_random(base, mesh=mesh, seed=config.seed, **options)
    else:
        model = load_model(base, quantize=config.model.quantize or None, mesh=mesh, **options)
    base_fingerprint = fingerprint({path: leaf.get_value() for path, leaf in variables.flat(model)[1].items()})
    methods.attach(model, method, rngs=nnx.Rngs(config.seed))
    sharding.place(model, mesh)

    model.train()
    graph, leaves = variables.flat(model)
    _, trainable, frozen = variables.split(model, variables.trainable_mask(leaves, method.trains))
    model.eval()
    eval_graph, _ = variables.flat(model)
    decayed = optim.decay_mask(trainable, {path: leaf.axes for path, leaf in leaves.items()})
    optimizer = optim.make_optimizer(config.optim, config.train.steps, decayed)
    state = first_state(trainable, optimizer, config.seed)
    dropout = tuple(path for path, leaf in leaves.items() if isinstance(leaf, variables.DropoutKey))
    run = Run(
        config=config, workdir=workdir, mesh=mesh, base=base, base_fingerprint=base_fingerprint, tokenizer=tokenizer,
        batches=batches, method=method, model=model, frozen=frozen,
        schedule=optim.make_schedule(config.optim, config.train.steps),
        train_step=make_train_step(graph, optimizer, dropout, config.train.loss_chunk, state),
        eval_step=make_eval_step(eval_graph, config.train.loss_chunk),
    )  # fmt: skip
    return run, state


def first_state(trainable: variables.FlatTree, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step. A moment lies where its parameter lies, anything else on every device.

    The trainable leaves are copied: the train step donates its state, and the model keeps its own.
    """
    mesh = next(leaf.sharding.mesh for leaf in jax.tree.leaves(trainable))
    everywhere = sharding.spec((), (), mesh)

    def make(trainable: Any) -> TrainState:
        key = jax.random.key_data(jax.random.key(seed))
        return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, trainable), optimizer.init(trainable), key)

    def where(path: tuple, leaf: jax.ShapeDtypeStruct) -> Any:
        owner = trainable.get(getattr(path[-1], "key", None))
        return owner.sharding if owner is not None and owner.shape == leaf.shape else everywhere

    shardings = jax.tree_util.tree_map_with_path(where, jax.eval_shape(make, trainable))
    return jax.jit(make, out_shardings=shardings)(trainable)


def make_train_step(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, dropout_keys: tuple[str, ...], chunk: int, state: TrainState
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted (state, frozen, batch [A, B, T]) -> (state, metrics). The frozen tree is an argument: never donated,
    never differentiated. Microbatches add up sums of losses and gradients; dividing once by the number of tokens makes
    the result that of one large batch, however the tokens fall."""

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def loss(trainable: Any, frozen: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, Totals]:
        totals = next_token_loss(variables.merge(graph, trainable, frozen), batch, chunk)
        return totals.loss, totals

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state: TrainState, frozen: Any, batch: Mapping[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def microbatch(sums: Any, part: Any) -> tuple[Any, None]:
            index, batch = part
            keyed = variables.with_dropout_keys(frozen, dropout_keys, jax.random.fold_in(key, index))
            (_, totals), gradients = jax.value_and_grad(loss, has_aux=True)(state.trainable, keyed, batch)
            return jax.tree.map(jnp.add, sums, (optax.tree.cast(gradients, jnp.float32), totals)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trainable)
        none = Totals(*(jnp.zeros((), jnp.float32) for _ in Totals._fields))
        count = batch["tokens"].shape[0]
        (gradients, totals), _ = jax.lax.scan(microbatch, (zeros, none), (jnp.arange(count), batch))
        gradients = jax.tree.map(lambda g: g / totals.tokens, gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
        trainable = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), state.trainable, updates)
        measured = {"loss": totals.loss / totals.tokens, "grad_norm": optax.tree.norm(gradients), "tokens": totals.tokens}
        return TrainState(state.step + 1, trainable, optimizer_state, state.key), measured

    return train_step


class Window:
    """The steps since the last look at them. Looking waits for the device, so it is done for several steps at once."""

    def __init__(self, step: int) -> None:
        self.steps: list[tuple[int, dict[str, jax.Array], Any]] = []
        self.tokens, self.opened = 0, time.perf_counter()

    def add(self, step: int, measured: dict[str, jax.Array], batch: Any) -> None:
        """Remember a step that was started."""
        self.steps.append((step, measured, batch))
        self.tokens += batch.real_tokens

    def close(self) -> dict[str, float]:
        """The last step's numbers and the speed over all of them.

        Raises:
            ValueError: a loss or a gradient norm is not finite; names the first such step and its records.
        """
        for step, measured, batch in self.steps:
            numbers = {name: float(value) for name, value in jax.device_get(measured).items()}
            if bad := [name for name in ("loss", "grad_norm") if not math.isfinite(numbers[name])]:
                raise ValueError(
                    f"step {step}: {bad[0]} is {numbers[bad[0]]}. Records of its batch: {', '.join(batch.records)}. "
                    "No checkpoint was written since; lower optim.learning_rate, look at these records, or set optim.clip_norm"
                )
        speed = self.tokens / (time.perf_counter() - self.opened)
        self.steps, self.tokens, self.opened = [], 0, time.perf_counter()
        return numbers | {"tokens_per_second": speed}


def resume(run: Run, state: TrainState, checkpoints: Checkpoints) -> TrainState:
    """The state of the newest intact checkpoint, with the data moved to where it was; else `state`.

    Raises:
        ValueError: the checkpoint is of another base, config or method; names what differs.
    """
    if (identity := checkpoints.identity()) is not None:
        differ = configs.differences(run.config, configs.from_json(json.dumps(identity["config"])))
        differ = [line for line in differ if not line.startswith(FREE)]
        if identity["base"] != run.base_fingerprint:
            differ.append(f"the base model's weights: fingerprint {run.base_fingerprint} here, {identity['base']} there")
        if differ:
            raise ValueError(
                f"{run.workdir} holds a run with another configuration: {'; '.join(differ)}. "
                "Take another --workdir, or remove this one to start anew"
            )
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in flatten(state).items()}
    restored = checkpoints.restore(abstract)
    if restored is None:
        return state
    run.batches.set_state(restored.data_state)
    leaves = [restored.state[name] for name in flatten(state)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def flatten(state: TrainState) -> dict[str, jax.Array]:
    """The arrays of a state by name, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def evaluate(run: Run, state: TrainState, log: metrics.Log) -> dict[str, float]:
    """Scores on the held-out records, logged; an empty dict where the config names none."""
    config, step = run.config, int(state.step)
    if not config.data.eval:
        return {}
    scores = evaluate_loss(run.eval_step, state.trainable, run.frozen, eval_batches(config, run.tokenizer), run.mesh)
    if config.eval.exact_match:
        run.sync(state)
        examples = eval_examples(config, run.tokenizer, config.eval.exact_match)
        answers = answer(run.model, examples, run.tokenizer, config.eval.max_new_tokens)
        scores["exact_match"] = exact_match(answers)
    log.evaluation(step, scores)
    return scores


def shard(run: Run, batch: Any) -> dict[str, jax.Array]:
    """A batch on the mesh, [A, B / A, T]."""
    return sharding.shard_batch(batch.arrays(), run.mesh, run.config.train.accumulate)


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is to be done at this one."""
    return every > 0 and step % every == 0


def introduce(run: Run, state: TrainState, log: metrics.Log) -> None:
    (run.workdir / "config.json").write_text(configs.to_json(run.config))


def finish(run: Run, state: TrainState, log: metrics.Log) -> None:
    """Write what the run was for: the adapter, or after full fine-tuning the model."""
    run.sync(state)
    if run.method.peft_type is None:
        save_model(run.model, run.workdir / "model", source=run.base)
    else:
        save_adapter(run.model, run.workdir / "adapter", base=run.config.model.path)
    log.message(run.batches.summary_text())


def main(argv: list[str]) -> None:
    options = cli.parse(argv, "train", "Tune a model by the config's method; goes on where it was if run again.")
    config = configs.load(options.config, options.overrides, method_defaults=methods.method_defaults)
    train(config, Path(options.workdir))


if __name__ == "__main__":
    cli.run(main)
