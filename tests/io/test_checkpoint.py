import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from peftjax.core.errors import UserError
from peftjax.io.checkpoint import Checkpoints
from tests.runs import free_port

# When one array of a damaged checkpoint cannot be read, orbax tears down its reads of the others, and Python from 3.12 on
# tells of exceptions in them that nobody is there to raise to.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

State = dict[str, jax.Array]
IDENTITY = {"base": "04b46ed3e99b500f", "method": {"name": "lora", "rank": 8}}


def state_of(step: int) -> State:
    """Every kind of leaf a run may have; `noise` does not compress, so its file is the largest."""
    noise = jax.random.normal(jax.random.key(step), (64, 64))
    return {
        "blocks.attention.query.adapters.default.a": noise,
        "moments/mu": (noise[:6, :5] * 3).astype(jnp.bfloat16),
        "half": noise[0, :3].astype(jnp.float16),
        "codes": (noise[:4, :7] * 4).astype(jnp.int4),
        "flags": noise[0, :9] > 0,
        "step": jnp.int32(step),
        "rng": jax.random.key(step),
        "rng_data": jax.random.key_data(jax.random.key(step + 1)),
    }


def abstract_of(state: State) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in state.items()}


ABSTRACT = abstract_of(state_of(0))


def bits_of(leaf: jax.Array) -> bytes:
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf).tobytes()


def assert_same_bits(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name, leaf in expected.items():
        assert actual[name].dtype == leaf.dtype, name
        assert actual[name].shape == leaf.shape, name
        assert bits_of(actual[name]) == bits_of(leaf), name


def write(directory: Path, *steps: int) -> None:
    with Checkpoints(directory, keep=9, keep_best=False) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), {"position": step}, score=float(step), identity=IDENTITY)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoints 10, 20 and 40, to copy."""
    directory = tmp_path_factory.mktemp("written")
    write(directory, 10, 20, 40)
    return directory


@pytest.fixture
def directory(written: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoints 10, 20 and 40, to do damage to."""
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir())


def test_what_is_restored_is_what_was_saved_bit_for_bit(directory: Path) -> None:
    with Checkpoints(directory, keep=9, keep_best=False) as checkpoints:
        restored = checkpoints.restore(ABSTRACT)
    assert restored is not None
    assert (restored.step, restored.data_state, restored.damaged) == (40, {"position": 40}, ())
    assert restored.identity == IDENTITY
    assert_same_bits(restored.state, state_of(40))


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "not" / "there", keep=1, keep_best=True) as checkpoints:
        assert checkpoints.restore(ABSTRACT) is None
        assert checkpoints.identity() is None
        assert checkpoints.latest_step() is None
    assert not (tmp_path / "not").exists()


def test_the_identity_is_read_without_the_arrays(directory: Path) -> None:
    shutil.rmtree(directory / "40" / "state")
    with Checkpoints(directory, keep=9, keep_best=False) as checkpoints:
        assert checkpoints.identity() == IDENTITY


def test_arrays_are_restored_on_another_mesh_than_they_were_saved_from(tmp_path: Path) -> None:
    devices = jax.devices()[:8]
    assert len(devices) == 8

    def sharded(shape: tuple[int, int], specs: dict[str, P]) -> State:
        mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=devices[: shape[0] * shape[1]])
        state = {name: leaf for name, leaf in state_of(3).items() if name in specs}
        return {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in state.items()}

    query = "blocks.attention.query.adapters.default.a"
    before = sharded((2, 4), {query: P("a", "b"), "codes": P("b"), "step": P(), "rng": P()})
    after = sharded((4, 1), {query: P(None, "a"), "codes": P(), "step": P(), "rng": P()})
    with Checkpoints(tmp_path, keep=1, keep_best=False) as checkpoints:
        checkpoints.save(3, before, {}, identity={})
        restored = checkpoints.restore(abstract_of(after))
    assert restored is not None
    assert_same_bits(restored.state, before)
    for name, leaf in after.items():
        assert restored.state[name].sharding == leaf.sharding, name


def test_arrays_may_be_donated_and_the_data_state_changed_while_a_save_is_running(tmp_path: Path) -> None:
    count_up = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.arange(2_000_000, dtype=jnp.float32)
    expected, data_state = np.asarray(x).copy(), {"position": [1, 2]}
    with Checkpoints(tmp_path, keep=1, keep_best=False) as checkpoints:
        checkpoints.save(1, {"x": x}, data_state, identity={})
        data_state["position"].append(3)
        for _ in range(5):
            x = count_up(x)
        jax.block_until_ready(x)
        restored = checkpoints.restore(abstract_of({"x": x}))
    assert restored is not None
    assert np.array_equal(restored.state["x"], expected)
    assert restored.data_state == {"position": [1, 2]}


@pytest.mark.parametrize(
    ("keep", "keep_best", "scores", "left"),
    [
        (1, False, [5.0, 1.0, 2.0, 3.0], [40]),
        (2, False, [5.0, 1.0, 2.0, 3.0], [30, 40]),
        (2, True, [5.0, 1.0, 2.0, 3.0], [10, 30, 40]),
        (1, True, [1.0, 9.0, 2.0, 3.0], [20, 40]),
        (1, True, [1.0, 2.0, 3.0, 4.0], [40]),
        (1, True, [7.0, 7.0, 7.0, 7.0], [10, 40]),  # the first of equals
        (1, True, [1.0, None, float("nan"), None], [10, 40]),
        (1, True, [None, None, float("inf"), None], [40]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, keep: int, keep_best: bool, scores: list[float | None], left: list[int]
) -> None:
    with Checkpoints(tmp_path, keep=keep, keep_best=keep_best) as checkpoints:
        for step, score in zip((10, 20, 30, 40), scores, strict=True):
            checkpoints.save(step, {"x": jnp.float32(step)}, {}, score=score, identity={})
        assert checkpoints.latest_step() == 40
    assert steps_in(tmp_path) == left


def test_the_best_of_an_earlier_process_survives(tmp_path: Path) -> None:
    for step, score in ((10, 1.0), (20, 9.0), (30, 2.0), (40, 3.0)):
        with Checkpoints(tmp_path, keep=1, keep_best=True) as checkpoints:
            checkpoints.save(step, {"x": jnp.float32(step)}, {}, score=score, identity={})
    assert steps_in(tmp_path) == [20, 40]


def test_checkpoints_of_plain_orbax_calls_are_restored_and_counted(tmp_path: Path) -> None:
    """How checkpoints were written before orbax's manager decided which to keep: their scores are in the record alone."""
    import orbax.checkpoint as ocp

    from peftjax.core.fingerprint import fingerprint
    from peftjax.io import checkpoint as module

    with ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        for step, score in ((10, 3.0), (20, 1.0)):
            state = state_of(step)
            content = {
                "score": score,
                "identity": IDENTITY,
                "data_states": [{"position": step}],
                "leaves": {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in state.items()},
                "fingerprint": fingerprint(state),
            }
            about = {"content": content, "checksum": module._checksum(content)}
            items = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
            checkpointer.save(tmp_path / str(step), args=items)
    with Checkpoints(tmp_path, keep=1, keep_best=True) as checkpoints:
        restored = checkpoints.restore(ABSTRACT)
        assert restored is not None
        assert (restored.step, restored.data_state, restored.identity) == (20, {"position": 20}, IDENTITY)
        assert_same_bits(restored.state, state_of(20))
        checkpoints.save(30, state_of(30), {}, score=2.0, identity=IDENTITY)
    assert steps_in(tmp_path) == [10, 30]


def test_an_intact_checkpoint_is_never_overwritten(directory: Path) -> None:
    with (
        Checkpoints(directory, keep=9, keep_best=False) as checkpoints,
        pytest.raises(UserError, match="20 already exists"),
    ):
        checkpoints.save(20, state_of(21), {}, identity={})
    shutil.rmtree(directory / "40")
    with Checkpoints(directory, keep=9, keep_best=False) as checkpoints:
        restored = checkpoints.restore(ABSTRACT)
    assert restored is not None
    assert restored.step == 20
    assert_same_bits(restored.state, state_of(20))


def test_at_least_one_checkpoint_must_be_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.keep is 0"):
        Checkpoints(tmp_path, keep=0, keep_best=True)


def data_file(checkpoint: Path) -> Path:
    return max((path for path in checkpoint.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_position(checkpoint: Path) -> None:
    path = checkpoint / "about" / "metadata"
    path.write_text(path.read_text().replace('"position": 40', '"position": 41'))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "the biggest file truncated": lambda checkpoint: truncate(data_file(checkpoint)),
    "a byte flipped in a data file": lambda checkpoint: flip(data_file(checkpoint)),
    "the biggest file lost": lambda checkpoint: data_file(checkpoint).unlink(),
    "orbax's array metadata lost": lambda checkpoint: shutil.rmtree(checkpoint / "state" / "array_metadatas"),
    "orbax's manifest lost": lambda checkpoint: (checkpoint / "state" / "manifest.ocdbt").unlink(),
    "the arrays lost": lambda checkpoint: shutil.rmtree(checkpoint / "state"),
    "the record lost": lambda checkpoint: (checkpoint / "about" / "metadata").unlink(),
    "the record truncated": lambda checkpoint: truncate(checkpoint / "about" / "metadata"),
    "the data position changed": change_position,
    "everything lost": lambda checkpoint: [shutil.rmtree(path) for path in checkpoint.iterdir() if path.is_dir()],
}


def damage(checkpoint: Path, kind: str = "a byte flipped in a data file") -> None:
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    DAMAGES[kind](checkpoint)
    assert before != {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(
    directory: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(directory / "40", kind)
    with Checkpoints(directory, keep=9, keep_best=False) as checkpoints:
        restored = checkpoints.restore(ABSTRACT)
        assert checkpoints.latest_step() == 20
    assert restored is not None
    assert restored.step == 20
    assert restored.data_state == {"position": 20}
    assert_same_bits(restored.state, state_of(20))
    (message,) = restored.damaged
    assert message.startswith("checkpoint 40 is damaged (")
    assert message.endswith("); falling back to checkpoint 20")
    assert message in capsys.readouterr().out


def test_arrays_that_orbax_reads_without_complaint_but_were_not_saved_are_damage(directory: Path) -> None:
    shutil.rmtree(directory / "40" / "state")
    shutil.copytree(directory / "20" / "state", directory / "40" / "state")
    with Checkpoints(directory, keep=9, keep_best=False) as checkpoints:
        restored = checkpoints.restore(ABSTRACT)
    assert restored is not None
    assert restored.damaged == (
        "checkpoint 40 is damaged (arrays: fingerprint mismatch); falling back to checkpoint 20",
    )


def test_a_lost_file_without_which_every_bit_can_be_read_is_no_damage(directory: Path) -> None:
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt", "state/_METADATA", "state/_sharding"):
        (directory / "40" / name).unlink()
    with Checkpoints(directory, keep=9, keep_best=False) as checkpoints:
        restored = checkpoints.restore(ABSTRACT)
    assert restored is not None
    assert (restored.step, restored.damaged) == (40, ())
    assert_same_bits(restored.state, state_of(40))


def test_two_damaged_checkpoints_are_passed_over(directory: Path) -> None:
    damage(directory / "40")
    damage(directory / "20", "the record lost")
    with Checkpoints(directory, keep=9, keep_best=False) as checkpoints:
        restored = checkpoints.restore(ABSTRACT)
    assert restored is not None
    assert restored.step == 10
    assert [message[:13] for message in restored.damaged] == ["checkpoint 40", "checkpoint 20"]


def test_if_all_are_damaged_the_run_does_not_start_again_from_zero(directory: Path) -> None:
    for step in ("10", "20", "40"):
        damage(directory / step)
    with (
        Checkpoints(directory, keep=9, keep_best=False) as checkpoints,
        pytest.raises(UserError, match=r"no checkpoint in .* is usable: checkpoint 40 .* 20 .* 10 .*"),
    ):
        checkpoints.restore(ABSTRACT)
    assert steps_in(directory) == [10, 20, 40]


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(directory: Path) -> None:
    damage(directory / "40")
    with Checkpoints(directory, keep=2, keep_best=False) as checkpoints:
        checkpoints.restore(ABSTRACT)
        checkpoints.save(40, state_of(40), {"position": 40}, identity=IDENTITY)
        restored = checkpoints.restore(ABSTRACT)
    assert restored is not None
    assert (restored.step, restored.damaged) == (40, ())
    assert_same_bits(restored.state, state_of(40))
    assert steps_in(directory) == [20, 40]


def test_a_damaged_checkpoint_goes_when_a_newer_one_is_complete_and_displaces_none(directory: Path) -> None:
    """The damaged 40 has the highest number and the highest score, and must not count for either rule."""
    damage(directory / "40")
    with Checkpoints(directory, keep=1, keep_best=True) as checkpoints:
        checkpoints.restore(ABSTRACT)
        assert steps_in(directory) == [10, 20, 40]
        checkpoints.save(30, state_of(30), {}, score=1.0, identity=IDENTITY)
    assert steps_in(directory) == [20, 30]


def test_the_step_of_a_damaged_checkpoint_can_be_saved_after_a_newer_one_has_removed_it(directory: Path) -> None:
    damage(directory / "40")
    with Checkpoints(directory, keep=2, keep_best=False) as checkpoints:
        checkpoints.restore(ABSTRACT)
        for step in (30, 40):
            checkpoints.save(step, state_of(step), {}, identity=IDENTITY)
        assert checkpoints.latest_step() == 40
    assert steps_in(directory) == [30, 40]


def test_other_names_shapes_and_dtypes_are_an_error_that_lists_them_and_not_damage(directory: Path) -> None:
    wanted = {name: leaf for name, leaf in ABSTRACT.items() if name != "flags"}
    wanted["half"] = jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=ABSTRACT["half"].sharding)
    wanted["codes"] = jax.ShapeDtypeStruct((7, 4), jnp.int4, sharding=ABSTRACT["codes"].sharding)
    wanted["extra"] = ABSTRACT["step"]
    with Checkpoints(directory, keep=9, keep_best=False) as checkpoints:
        with pytest.raises(UserError, match="belongs to another model, method or optimizer") as caught:
            checkpoints.restore(wanted)
        assert checkpoints.latest_step() == 40
    lines = str(caught.value).splitlines()[1:-1]
    assert [line.strip() for line in lines] == [
        "flags: only in the checkpoint",
        "extra: only in this run",
        "half: float16[3] in the checkpoint, bfloat16[3] in this run",
        "codes: int4[4, 7] in the checkpoint, int4[7, 4] in this run",
    ]


def test_a_checkpoint_of_two_processes_serves_one_only_if_their_data_positions_are_the_same(directory: Path) -> None:
    from peftjax.io import checkpoint as module

    def written_by_two(second: dict[str, int]) -> None:
        path = directory / "40" / "about" / "metadata"
        content = json.loads(path.read_text())["content"]
        content["data_states"] = [{"position": 40}, second]
        path.write_text(json.dumps({"content": content, "checksum": module._checksum(content)}))

    with Checkpoints(directory, keep=9, keep_best=False) as checkpoints:
        written_by_two({"position": 40})
        restored = checkpoints.restore(ABSTRACT)
        assert restored is not None
        assert restored.data_state == {"position": 40}
        written_by_two({"position": 41})
        with pytest.raises(UserError, match="written by 2 processes with different positions in the data"):
            checkpoints.restore(ABSTRACT)


@pytest.fixture
def full_disk() -> Callable[[], None]:
    """Call it to end the condition that no file of this process can grow beyond 64 KiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("call", ["save", "wait", "close", "latest_step", "restore"])
def test_a_save_that_fails_in_the_background_raises_at_the_next_call(
    tmp_path: Path, full_disk: Callable[[], None], call: str
) -> None:
    large = {"x": jax.random.normal(jax.random.key(0), (2**18,))}
    checkpoints = Checkpoints(tmp_path, keep=2, keep_best=False)
    checkpoints.save(10, {"x": jnp.zeros(3)}, {}, identity={})
    checkpoints.save(20, large, {}, identity={})
    arguments = {"save": (30, large, {}), "restore": (abstract_of(large),)}.get(call, ())
    with pytest.raises(OSError, match="checkpoint 20 could not be written to"):
        getattr(checkpoints, call)(*arguments, **({"identity": {}} if call == "save" else {}))
    full_disk()
    if call != "close":  # the failure is told once, and the next save may succeed
        assert checkpoints.latest_step() == 10
        checkpoints.save(20, large, {}, identity={})
        assert checkpoints.latest_step() == 20
        checkpoints.close()
    assert [path.name for path in sorted(tmp_path.iterdir())][:1] == ["10"]


def test_a_failed_save_leaves_nothing_behind_when_the_next_one_is_complete(
    tmp_path: Path, full_disk: Callable[[], None]
) -> None:
    large = {"x": jax.random.normal(jax.random.key(0), (2**18,))}
    with Checkpoints(tmp_path, keep=1, keep_best=False) as checkpoints:
        checkpoints.save(10, {"x": jnp.zeros(3)}, {}, identity={})
        checkpoints.save(20, large, {}, identity={})
        with pytest.raises(OSError, match="checkpoint 20 could not be written to"):
            checkpoints.wait()
        full_disk()
        checkpoints.save(30, large, {}, identity={})
    assert steps_in(tmp_path) == [30]


def test_a_save_that_fails_loses_none_of_the_checkpoints_before_it(
    tmp_path: Path, full_disk: Callable[[], None]
) -> None:
    large = {"x": jax.random.normal(jax.random.key(0), (2**18,))}
    with Checkpoints(tmp_path, keep=1, keep_best=True) as checkpoints:
        for step, score in ((10, 2.0), (20, 1.0)):
            checkpoints.save(step, {"x": jnp.float32(step)}, {}, score=score, identity={})
        checkpoints.save(30, large, {}, score=3.0, identity={})  # complete, it would replace both
        with pytest.raises(OSError, match="checkpoint 30 could not be written to"):
            checkpoints.wait()
        assert checkpoints.latest_step() == 20
        full_disk()
        checkpoints.save(40, {"x": jnp.float32(40)}, {}, score=1.0, identity={})
    assert steps_in(tmp_path) == [10, 40]


KILLED = """
import sys
import jax, jax.numpy as jnp
from peftjax.io.checkpoint import Checkpoints

checkpoints = Checkpoints(sys.argv[1], keep=1, keep_best=False)
checkpoints.save(10, {"x": jnp.full((3,), 10.0)}, {"position": 10}, identity={})
checkpoints.wait()
checkpoints.save(20, {"x": jax.random.normal(jax.random.key(0), (2**25,))}, {"position": 20}, identity={})
checkpoints.close()
"""


@pytest.mark.slow
def test_a_process_killed_in_the_middle_of_a_save_leaves_the_one_before(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    deadline = time.monotonic() + 120
    while not any(path.name.startswith("20.") for path in tmp_path.iterdir()):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    unfinished = [path.name for path in tmp_path.iterdir() if path.name != "10"]
    assert unfinished
    assert "20" not in unfinished

    x = jnp.full((3,), 10.0)
    with Checkpoints(tmp_path, keep=2, keep_best=False) as checkpoints:
        assert checkpoints.latest_step() == 10
        restored = checkpoints.restore(abstract_of({"x": x}))
        assert restored is not None
        assert (restored.step, restored.data_state, restored.damaged) == (10, {"position": 10}, ())
        assert_same_bits(restored.state, {"x": x})
        checkpoints.save(20, {"x": x}, {}, identity={})
    assert steps_in(tmp_path) == [10, 20]  # and what the killed process left is gone


TWO_PROCESSES = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np

rank, port, directory = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:" + port, num_processes=2, process_id=rank)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from peftjax.io.checkpoint import Checkpoints

mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
def state(step):
    rows = np.arange(4096, dtype=np.float32).reshape(8, 512) * 1.7 + step
    place = lambda x, spec: jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])
    return {"rows": place(rows, P("a")), "step": place(np.int32(step), P())}
abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for k, v in state(0).items()}

checkpoints = Checkpoints(directory, keep=2, keep_best=True)
for step in (10, 20, 30):
    position = {"rank": rank, "position": step * (rank + 1), "padding": "x" * 10 * rank}
    checkpoints.save(step, state(step), position, score=-step, identity={"base": "b"})
assert (checkpoints.latest_step(), checkpoints.identity()) == (30, {"base": "b"})
def check(step):
    restored = checkpoints.restore(abstract)
    assert (restored.step, restored.data_state["position"]) == (step, step * (rank + 1)), restored
    assert restored.data_state["rank"] == rank
    for name, leaf in state(step).items():
        for mine, theirs in zip(restored.state[name].addressable_shards, leaf.addressable_shards):
            assert np.array_equal(mine.data, theirs.data)
    return restored.damaged
assert check(30) == ()
if rank == 0:  # only what process 1 wrote: process 0 alone would not notice
    for path in (directory / "30" / "state" / "ocdbt.process_1" / "d").iterdir():
        path.unlink()
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("damaged")
assert len(check(20)) == 1
checkpoints.close()
assert sorted(path.name for path in directory.iterdir()) == ["10", "20", "30"]
print("fine")
"""


@pytest.mark.slow
def test_each_process_gets_its_own_data_state_back_and_all_agree_on_damage(tmp_path: Path) -> None:
    port = str(free_port())
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), port, str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=150)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for output in outputs:
        assert "fine\n" in output, outputs
    assert "checkpoint 30 is damaged" in outputs[0]
    assert "damaged" not in outputs[1]  # said once, by process 0
