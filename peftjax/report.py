"""report.html: one run on one page, a single file that needs nothing else.

    python -m peftjax.report --workdir=runs/quickstart

It is made of what the workdir holds: config.json, metrics.jsonl, and report.json (`ReportData`) with what is in
neither. The page itself is assets/report.html.j2; here is only what stands in it.
"""

import argparse
import dataclasses
import importlib.resources
import itertools
import json
import math
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.core import cli
from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.core.variables import PeftParam
from peftjax.metrics import METRICS, format_bytes, read_metrics, write_atomically

DATA, PAGE = "report.json", "report.html"

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Part:
    """The parameters of a group of modules, over all layers. adapter: a method added them; trained: it trains them."""

    name: str
    parameters: int
    bytes: int
    adapter: bool
    trained: bool


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answer of the model. expected, correct: None where there is no one right answer."""

    record: str
    prompt: str
    answer: str
    expected: str | None = None
    correct: bool | None = None


@dataclasses.dataclass(frozen=True)
class ReportData:
    """What the report shows that is neither in config.json nor in metrics.jsonl; report.json has these very fields.

    Each may be left empty, and its section is then left out. The train command saves `before` when it starts, since a
    resumed run cannot answer as the untrained model any more, and the rest when it ends.
    """

    title: str = ""  # of the page; empty: the name of the workdir
    parts: tuple[Part, ...] = ()
    optimizer_bytes: int = 0
    adapter_file_bytes: int = 0
    before: tuple[Sample, ...] = ()  # answers before the first step
    after: tuple[Sample, ...] = ()  # answers to the same prompts after the last one; paired by record and prompt
    timings: Mapping[str, float] = dataclasses.field(default_factory=dict)  # seconds by what took them
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # as config.json, with no field changed

    def save(self, workdir: Path) -> None:
        """Write report.json."""
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(workdir / DATA, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, workdir: Path) -> "ReportData":
        """Read report.json; all fields are empty where there is none.

        Raises:
            UserError: it is not what `save` writes.
        """
        path = workdir / DATA
        if not path.exists():
            return cls()
        values = _read_object(path)
        if unknown := [name for name in values if name not in cls.__dataclass_fields__]:
            raise UserError(f"{path}: unknown field {unknown[0]!r}.{suggest(unknown[0], cls.__dataclass_fields__)}")
        try:
            parts = tuple(Part(**part) for part in values.get("parts", ()))
            samples = {name: tuple(Sample(**sample) for sample in values.get(name, ())) for name in ("before", "after")}
        except TypeError as error:
            raise UserError(f"{path}: {error}. Remove the file, and run the training command again") from None
        return cls(**{**values, "parts": parts, **samples})


def count_parts(leaves: Mapping[str, nnx.Variable], trains: type[nnx.Variable]) -> tuple[Part, ...]:
    """The model's parameters by part: the base's by the first two names of their path, an adapter's by its module.

    leaves: from `variables.flat`; trains: the type that the method trains. Constants and keys are no parameters.
    """
    sums: dict[tuple[str, bool, bool], list[int]] = {}
    for path, leaf in leaves.items():
        if not isinstance(leaf, nnx.Param | PeftParam):
            continue
        adapter = isinstance(leaf, PeftParam)
        module = path.split(".adapters.")[0] if adapter else ".".join(path.split(".")[:-1][:2])
        total = sums.setdefault((module, adapter, type(leaf) is trains), [0, 0])
        total[0] += math.prod(leaf.get_value().shape)
        total[1] += tree_bytes(leaf.get_value())
    return tuple(
        Part(name, parameters, size, adapter, trained) for (name, adapter, trained), (parameters, size) in sums.items()
    )


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays in a tree, counted once however many devices hold a copy; two int4 take one byte."""
    return sum(math.ceil(leaf.size * _bits(leaf.dtype) / 8) for leaf in jax.tree.leaves(tree))


def versions() -> dict[str, str]:
    """Of what a run is made of, and the devices it runs on."""
    import flax

    devices = jax.devices()
    found = {"Python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__}
    return found | {
        "device": f"{len(devices)} x {devices[0].device_kind}" if len(devices) > 1 else devices[0].device_kind
    }


def write_report(workdir: Path) -> Path:
    """Write the workdir's report.html from what it holds; returns its path.

    Raises:
        UserError: there is nothing to report, or a file cannot be read.
    """
    sources = [workdir / name for name in ("config.json", METRICS, DATA)]
    if not any(path.exists() for path in sources):
        raise UserError(
            f"--workdir={workdir} holds none of config.json, {METRICS} and {DATA}: no run has written there"
        )
    config = _flat(_read_object(sources[0])) if sources[0].exists() else {}
    lines = read_metrics(sources[1]) if sources[1].exists() else []
    page = render(config, lines, ReportData.load(workdir), name=workdir.resolve().name)
    write_atomically(workdir / PAGE, page)
    return workdir / PAGE


def render(config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], data: ReportData, name: str) -> str:
    """The page, from config fields by dotted name, the lines of metrics.jsonl, and the rest."""
    import jinja2

    source = importlib.resources.files("peftjax").joinpath("assets", "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"bytes": format_bytes, "duration": format_duration, "visible": _visible}
    train = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    return environment.from_string(source).render(
        title=data.title or name,
        facts=_facts(config),
        unfinished=_unfinished(config, train),
        cards=_cards(train, evaluations, data),
        charts=_charts(train, evaluations),
        parts=_parts(data.parts),
        memory=_memory(data, train),
        timings=data.timings,
        samples=_samples(data),
        changed=_changed(config, data.default_config),
        config={field: _value(value) for field, value in config.items()},
        versions=data.versions,
    )


# Headline numbers


@dataclasses.dataclass(frozen=True)
class Card:
    """A headline number, where it came from, and a line of explanation."""

    label: str
    value: str
    before: str = ""
    note: str = ""


def _cards(
    train: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], data: ReportData
) -> list[Card]:
    cards = []
    first = evaluations[0] if len(evaluations) > 1 and evaluations[0]["step"] == 0 else {}
    last = evaluations[-1] if evaluations else {}
    for field, label in (("exact_match", "Exact match"), ("token_accuracy", "Token accuracy")):
        if field in last:
            gain = f"{100 * (last[field] - first[field]):+.1f} points" if field in first else ""
            asked = f"{last['prompts']:,} held-out prompts" if field == "exact_match" and "prompts" in last else ""
            note = " · ".join(filter(None, [gain, asked]))
            cards.append(Card(label, _percent(last[field]), _percent(first[field]) if field in first else "", note))
            break
    if "eval_loss" in last:
        both = [_number(line["perplexity"]) for line in (first, last) if "perplexity" in line]
        note = f"perplexity {' → '.join(both)}" if both else ""
        before = _number(first["eval_loss"]) if "eval_loss" in first else ""
        cards.append(Card("Held-out loss", _number(last["eval_loss"]), before, note))
    if data.parts:
        trained = sum(part.parameters for part in data.parts if part.trained)
        base = sum(part.parameters for part in data.parts if not part.adapter)
        note = f"{trained / base:.2%} of the {base:,} in the base" if base else ""
        cards.append(Card("Trained parameters", f"{trained:,}", note=note))
    if data.adapter_file_bytes:
        base_bytes = sum(part.bytes for part in data.parts if not part.adapter)
        note = f"beside a base of {format_bytes(base_bytes)}" if base_bytes else ""
        cards.append(Card("Adapter file", format_bytes(data.adapter_file_bytes), note=note))
    if train:
        seconds = max(line["seconds"] for line in [*train, *evaluations])
        cards.append(
            Card("Wall time", format_duration(seconds), note=f"{train[-1]['step']:,} steps, evaluation included")
        )
    if speeds := [line["tokens_per_second"] for line in train if "tokens_per_second" in line]:
        cards.append(Card("Tokens per second", f"{statistics.median(speeds):,.0f}", note="median over the run"))
    return cards


def _facts(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was done, in a few words: (what, which)."""
    rank = f", rank {config['method.rank']}" if "method.rank" in config else ""
    facts = [
        ("method", config.get("method.name", "") + rank),
        ("base", config.get("model.path", "")),
        ("data", ", ".join(config.get("data.train", ()))),
        ("optimizer", config.get("optim.name", "")),
    ]
    return [(what, which) for what, which in facts if which]


def _unfinished(config: Mapping[str, Any], train: Sequence[Mapping[str, Any]]) -> str:
    done, steps = train[-1]["step"] if train else 0, config.get("train.steps", 0)
    return f"step {done:,} of {steps:,}" if done < steps else ""


# Curves


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve as an SVG path in a box of 100 x 100, y downward. look: its CSS class. marks: dots at its points, the
    same way. value: the last one; empty: none of its own, another curve stands for it."""

    name: str
    look: str
    value: str
    path: str
    marks: str


@dataclasses.dataclass(frozen=True)
class Hit:
    """What a reader who points at one column of a chart is told; all numbers in percent of the box."""

    left: float
    width: float
    x: float
    y: float
    step: str
    values: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves over the steps. Ticks are (percent from the left or from the top, label)."""

    title: str
    note: str
    series: list[Series]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    hits: list[Hit]


@dataclasses.dataclass(frozen=True)
class _Curve:
    name: str
    look: str
    points: list[Point]
    marked: bool = False
    told: bool = True  # with values, in the legend and the hits


def _charts(train: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The charts there are data for, the loss first."""
    last_step = max((line["step"] for line in [*train, *evaluations]), default=0)
    held_out = _Curve("held out", "second", _points(evaluations, "eval_loss"), marked=True)
    accuracies = [
        _Curve("exact match", "first", _points(evaluations, "exact_match"), marked=True),
        _Curve("token accuracy", "second", _points(evaluations, "token_accuracy"), marked=True),
    ]
    rate = _Curve("learning rate", "first", _thinned(_points(train, "learning_rate")))
    charts = [
        _chart(
            "Loss", [*_smoothed("training", _points(train, "loss")), held_out], last_step,
            note="nats per token", logarithmic=True,
        ),
        _chart(
            "Held-out answers", [curve for curve in accuracies if len(curve.points) > 1], last_step,
            low=0.0, high=1.0, text=_percent,
        ),
        _chart("Learning rate", [rate], last_step, low=0.0),
        _chart(
            "Gradient norm", _smoothed("running mean", _points(train, "grad_norm")), last_step,
            note="before clipping", low=0.0, logarithmic=True,
        ),
        _chart(
            "Tokens per second", _smoothed("running mean", _points(train, "tokens_per_second")), last_step,
            low=0.0, text=lambda value: f"{value:,.0f}",
        ),
    ]  # fmt: skip
    return [chart for chart in charts if chart is not None]


def _chart(
    title: str,
    curves: Sequence[_Curve],
    last_step: int,
    *,
    note: str = "",
    low: float = math.inf,
    high: float = -math.inf,
    logarithmic: bool = False,
    text: Callable[[float], str] | None = None,
) -> Chart | None:
    """The chart of the curves that have points, None if none has.

    low, high: what the y axis holds in any case. logarithmic: it is so where the values span more than a factor of 30.
    text: how values are written.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return None
    text = text or _number
    values = [y for curve in curves for _, y in curve.points]
    logarithmic = logarithmic and min(values) > 0 and max(values) > 30 * min(values)
    scale = _LogScale(min(values), max(values)) if logarithmic else _Scale(min(low, *values), max(high, *values))
    steps = _Scale(0, last_step)

    def place(point: Point) -> Point:
        return 100 * steps(point[0]), 100 * (1 - scale(point[1]))

    def draw(curve: _Curve) -> Series:
        spots = [f"{x:.2f} {y:.2f}" for x, y in map(place, curve.points)]
        marks = "".join(f"M{spot}h.01" for spot in spots) if curve.marked or len(spots) == 1 else ""
        return Series(
            curve.name, curve.look, text(curve.points[-1][1]) if curve.told else "", "M" + "L".join(spots), marks
        )

    return Chart(
        title=title,
        note=", ".join(filter(None, [note, "logarithmic" if logarithmic else ""])),
        series=[draw(curve) for curve in curves],
        x_ticks=[(100 * steps(tick), _tick(tick)) for tick in steps.ticks],
        y_ticks=[(100 * (1 - scale(tick)), f"{tick:.0%}" if text is _percent else _tick(tick)) for tick in scale.ticks],
        hits=_hits([curve for curve in curves if curve.told], place, text),
    )


class _Scale:
    """Numbers to [0, 1], with about five round ticks."""

    def __init__(self, low: float, high: float) -> None:
        if high <= low:
            low, high = (low - abs(low) / 2, low + abs(low) / 2) if low else (0.0, 1.0)
        power = 10.0 ** math.floor(math.log10((high - low) / 5))
        distance = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= (high - low) / 5.001)
        # a tick that lies just outside is taken in
        first, last = math.ceil(low / distance - 0.1), math.floor(high / distance + 0.1)
        self.ticks = [float(f"{k * distance:.12g}") for k in range(first, last + 1)]
        self.low, self.high = min(low, self.ticks[0]), max(high, self.ticks[-1])

    def __call__(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


class _LogScale:
    """Positive numbers to [0, 1] by their logarithm, with ticks at one, two or three numbers a decade."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = math.log10(low), math.log10(high)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            ticks = [float(f"{factor}e{decade}") for decade in decades for factor in factors]
            self.ticks = [tick for tick in ticks if low <= tick <= high]
            if len(self.ticks) <= 6:
                break
        self.ticks = self.ticks[:: math.ceil(len(self.ticks) / 6)]

    def __call__(self, value: float) -> float:
        return (math.log10(value) - self.low) / (self.high - self.low)


def _hits(
    curves: Sequence[_Curve], place: Callable[[Point], Point], text: Callable[[float], str], columns: int = 100
) -> list[Hit]:
    """A hit for each marked point and for about `columns` steps of the others."""
    told: dict[float, list[tuple[str, Point]]] = {}
    for curve in curves:
        for point in curve.points if curve.marked else curve.points[:: math.ceil(len(curve.points) / columns)]:
            told.setdefault(point[0], []).append((curve.name, point))
    rows = sorted(told.items())
    places = [place(row[0][1]) for _, row in rows]
    borders = [0.0, *((left[0] + right[0]) / 2 for left, right in itertools.pairwise(places)), 100.0]
    hits = []
    for (step, row), (x, y), (left, right) in zip(rows, places, itertools.pairwise(borders), strict=True):
        values = [f"{name} {text(point[1])}" if len(curves) > 1 else text(point[1]) for name, point in row]
        hits.append(
            Hit(round(left, 2), round(right - left, 2), round(x, 2), round(y, 2), f"{step:,.0f}", ", ".join(values))
        )
    return hits


def _points(lines: Iterable[Mapping[str, Any]], field: str) -> list[Point]:
    """(step, value) of the lines that have the field; values that are not finite have no place on paper."""
    return [(line["step"], line[field]) for line in lines if field in line and math.isfinite(line[field])]


def _smoothed(name: str, points: list[Point]) -> list[_Curve]:
    """The curve; where it has many points faintly, under its running mean."""
    if len(points) < 40:
        return [_Curve(name, "first", points)]
    steps, values = np.array(points).T
    half = max(2, len(points) // 50)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    begin = np.maximum(np.arange(len(points)) - half, 0)
    end = np.minimum(np.arange(len(points)) + half + 1, len(points))
    means = (sums[end] - sums[begin]) / (end - begin)
    mean = [(float(x), float(y)) for x, y in zip(steps, means, strict=True)]
    return [_Curve("each logged step", "faint", _thinned(points), told=False), _Curve(name, "first", _thinned(mean))]


def _thinned(points: list[Point], limit: int = 300) -> list[Point]:
    """At most about 2 * limit points that look the same: the lowest and the highest of each stretch."""
    length = math.ceil(len(points) / limit)
    if length <= 2:
        return points
    kept: list[Point] = []
    for start in range(0, len(points), length):
        stretch = points[start : start + length]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept


# Tables


@dataclasses.dataclass(frozen=True)
class Row:
    """A part in the table of parameters; share: of all parameters of its group, for the bar."""

    name: str
    parameters: str
    size: str
    share: float


@dataclasses.dataclass(frozen=True)
class Group:
    """The base or the adapter in the table of parameters."""

    name: str
    state: str
    parameters: str
    size: str
    rows: list[Row]


def _parts(parts: Sequence[Part]) -> list[Group]:
    groups = []
    for name, adapter in (("Base", False), ("Adapter", True)):
        own = [part for part in parts if part.adapter == adapter]
        if not own:
            continue
        total = sum(part.parameters for part in own)
        trained = {part.trained for part in own}
        state = "partly trained" if len(trained) == 2 else "trained" if trained == {True} else "frozen"
        rows = [
            Row(part.name, f"{part.parameters:,}", format_bytes(part.bytes), 100 * part.parameters / max(total, 1))
            for part in own
        ]
        groups.append(Group(name, state, f"{total:,}", format_bytes(sum(part.bytes for part in own)), rows))
    return groups


def _memory(data: ReportData, train: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """(what, bytes), those that are there."""
    rows = [
        ("Frozen base", sum(part.bytes for part in data.parts if not part.trained)),
        ("Trained parameters", sum(part.bytes for part in data.parts if part.trained)),
        ("Optimizer state", data.optimizer_bytes),
        ("Peak in use", max((line.get("peak_memory_bytes", 0) for line in train), default=0)),
    ]
    return [(what, size) for what, size in rows if size]


def _samples(data: ReportData) -> list[tuple[Sample, Sample | None, Sample | None]]:
    """(any, before, after) for each prompt that was answered at least once."""
    before = {(sample.record, sample.prompt): sample for sample in data.before}
    after = {(sample.record, sample.prompt): sample for sample in data.after}
    return [(sample, before.get(key), after.get(key)) for key, sample in (before | after).items()]


def _changed(config: Mapping[str, Any], default: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(field, value, default) of the fields that are not at their default; none where the defaults are unknown."""
    if not default:
        return []
    defaults = _flat(default)
    return [
        (field, _value(value), _value(defaults[field]) if field in defaults else "")
        for field, value in config.items()
        if field not in defaults or _value(defaults[field]) != _value(value)
    ]


# Text


def format_duration(seconds: float) -> str:
    """A duration for people: 0.8 s, 42 s, 2 min 31 s, 3 h 12 min."""
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _number(value: float) -> str:
    """Four digits, no trailing exponent zeros."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if math.isfinite(value) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _tick(value: float) -> str:
    """As short as can be: 0.5, 1,000, 12k, 1.5M, 2e-4."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if 1e4 <= abs(value) < 1e12 and abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return _number(value)


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _visible(text: str) -> str:
    """The text with control characters as \\x1b, and half characters as question marks."""
    escapes = {code: f"\\x{code:02x}" for code in (*range(32), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
    return text.translate(escapes).encode("utf-8", "replace").decode("utf-8")


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"section.field": value}"""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= (
            {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, Mapping) else {name: value}
        )
    return flat


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object but {type(values).__name__}")
    return values


def _bits(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jnp.integer):
        return int(jnp.iinfo(dtype).bits)
    return int(jnp.finfo(dtype).bits) if jnp.issubdtype(dtype, jnp.floating) else 8 * jnp.dtype(dtype).itemsize


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m peftjax.report", description="Write report.html again.", allow_abbrev=False
    )
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="where a training run wrote")
    print(write_report(parser.parse_args(argv).workdir))


if __name__ == "__main__":
    cli.run(main)
