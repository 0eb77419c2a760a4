"""report.html: one run on one page, a single file that needs nothing else.

    python -m peftjax.report --workdir=runs/quickstart

It is made of what the workdir holds: config.json, metrics.jsonl, and report.json (`ReportData`) with what is in
neither. The page itself is assets/report.html.j2; here is what stands in it, with charts by matplotlib.
"""

import argparse
import dataclasses
import functools
import importlib.resources
import io
import json
import math
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.core import cli
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftParam
from peftjax.metrics import METRICS, SPEEDS, format_bytes, read_metrics, write_atomically

DATA, PAGE = "report.json", "report.html"
# Shares and correlations that an evaluation may have, those that say most first.
SCORES = (
    "exact_match", "rouge_l", "accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman", "token_accuracy",
)  # fmt: skip

Lines = Sequence[Mapping[str, Any]]  # of metrics.jsonl


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
        values = _read_object(path) if path.exists() else {}
        try:
            for name, kind in (("parts", Part), ("before", Sample), ("after", Sample)):
                values[name] = tuple(kind(**fields) for fields in values.get(name, ()))
            return cls(**values)
        except TypeError as error:
            raise UserError(f"{path}: {error}. Remove the file, and run the training command again") from None


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


def _bits(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jnp.integer):
        return int(jnp.iinfo(dtype).bits)
    return int(jnp.finfo(dtype).bits) if jnp.issubdtype(dtype, jnp.floating) else 8 * jnp.dtype(dtype).itemsize


def versions() -> dict[str, str]:
    """Of what a run is made of, and the devices it runs on."""
    import flax

    count, kind = jax.device_count(), jax.devices()[0].device_kind
    found = {"Python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__}
    return found | {"device": f"{count} x {kind}" if count > 1 else kind}


def write_report(workdir: Path) -> Path:
    """Write the workdir's report.html from what it holds; returns its path.

    Raises:
        UserError: there is nothing to report, or a file cannot be read.
    """
    import jinja2

    sources = [workdir / name for name in ("config.json", METRICS, DATA)]
    if not any(path.exists() for path in sources):
        raise UserError(
            f"--workdir={workdir} holds none of config.json, {METRICS} and {DATA}: no run has written there"
        )
    config = _flat(_read_object(sources[0])) if sources[0].exists() else {}
    lines = read_metrics(sources[1]) if sources[1].exists() else []
    data = ReportData.load(workdir)
    train = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    source = importlib.resources.files("peftjax").joinpath("assets", "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"bytes": format_bytes, "duration": format_duration, "visible": _visible}
    environment.filters["json"] = functools.partial(json.dumps, ensure_ascii=False)
    before, after = ({(sample.record, sample.prompt): sample for sample in side} for side in (data.before, data.after))
    default = _flat(data.default_config)
    page = environment.from_string(source).render(
        name=workdir.resolve().name,
        data=data,
        config=config,
        changed=[(key, config[key], default.get(key)) for key in config if default and config[key] != default.get(key)],
        step=train[-1]["step"] if train else 0,
        cards=_cards(train, evaluations, data),
        charts=_charts(train, evaluations, config.get("task.kind", "causal_lm")),
        peak_bytes=max((line.get("peak_memory_bytes", 0) for line in train), default=0),
        samples=[(sample, before.get(key), after.get(key)) for key, sample in (before | after).items()],
    )
    write_atomically(workdir / PAGE, page)
    return workdir / PAGE


def _cards(train: Lines, evaluations: Lines, data: ReportData) -> list[tuple[str, str, str, str]]:
    """The headline numbers: (what, value, a line of explanation, value before training), the last two may be empty."""
    cards = []
    last = evaluations[-1] if evaluations else {}
    first = evaluations[0] if len(evaluations) > 1 and evaluations[0]["step"] == 0 else {}
    for score in _scores(evaluations)[:1]:
        notes = [f"{100 * (last[score] - first[score]):+.1f} points"] if score in first else []
        notes += [f"{last['prompts']:,} held-out prompts"] if "prompts" in last else []
        before = _percent(first[score]) if score in first else ""
        cards.append((_title(score), _percent(last[score]), " · ".join(notes), before))
    if "eval_loss" in last:
        both = " → ".join(_number(line["perplexity"]) for line in (first, last) if "perplexity" in line)
        before = _number(first["eval_loss"]) if "eval_loss" in first else ""
        cards.append(("Held-out loss", _number(last["eval_loss"]), f"perplexity {both}" if both else "", before))
    base = sum(part.parameters for part in data.parts if not part.adapter)
    if data.parts:
        trained = sum(part.parameters for part in data.parts if part.trained)
        note = f"{trained / base:.2%} of the {base:,} in the base" if base else ""
        cards.append(("Trained parameters", f"{trained:,}", note, ""))
    if data.adapter_file_bytes:
        base_bytes = sum(part.bytes for part in data.parts if not part.adapter)
        note = f"beside a base of {format_bytes(base_bytes)}" if base else ""
        cards.append(("Adapter file", format_bytes(data.adapter_file_bytes), note, ""))
    if train:
        time = format_duration(max(line["seconds"] for line in [*train, *evaluations]))
        cards.append(("Wall time", time, f"{train[-1]['step']:,} steps, evaluation included", ""))
    for name in SPEEDS:
        if speeds := [line[name] for line in train if name in line]:
            cards.append((_title(name), f"{statistics.median(speeds):,.0f}", "median over the run", ""))
    return cards


# Text


def format_duration(seconds: float) -> str:
    """A duration for people: 0.8 s, 42 s, 2 min 31 s, 3 h 12 min."""
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _number(value: float) -> str:
    """Four digits: 0.25, 1,000, 7.33e-8."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
    return re.sub(r"e(-?)\+?0*", r"e\1", text)


def _scores(evaluations: Lines) -> list[str]:
    """The scores that the evaluations have, those that say most first; two fit into a chart."""
    return [name for name in SCORES if any(name in line for line in evaluations[-1:])][:2]


def _title(name: str) -> str:
    """Of a field of metrics.jsonl: Tokens per second."""
    return name.replace("_", " ").capitalize()


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _visible(text: str) -> str:
    """The text with control characters as \\x1b, and half characters as question marks."""
    escapes = {code: f"\\x{code:02x}" for code in (*range(32), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
    return text.translate(escapes).encode("utf-8", "replace").decode("utf-8")


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"section.field": value}"""
    sections = {name: fields if isinstance(fields, Mapping) else {"": fields} for name, fields in config.items()}
    return {f"{name}.{key}".rstrip("."): value for name, fields in sections.items() for key, value in fields.items()}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object but {type(values).__name__}")
    return values


# Charts

# In the page each of these becomes the variable of its name, which is light or dark as the page is.
COLORS = {"first": "#3457d5", "second": "#c8641b", "soft": "#62656e", "grid": "#ecece8"}
WIDE, NARROW = (990, 280), (468, 180)  # pixels, where the page has room
MANY = 40  # points: fewer are marked by dots; so many of a noisy curve stand faintly under their running mean


class _Curve(NamedTuple):
    """Values over the steps. color: a name in COLORS; faint: another curve is its running mean."""

    name: str
    color: str
    steps: Sequence[float]
    values: Sequence[float]
    faint: bool = False


class _Chart(NamedTuple):
    """What the page shows of some curves. legend: (curve, its last value), a faint one without; svg: an element.

    narrow: of a chart that is as wide as the page, another element for a page of half the width; else empty.
    """

    title: str
    note: str
    legend: list[tuple[_Curve, str]]
    svg: str
    narrow: str


def _charts(train: Lines, evaluations: Lines, task: str) -> list[_Chart]:
    """The charts there are data for, the loss first. task: its kind."""
    last_step = max((line["step"] for line in [*train, *evaluations]), default=0)
    loss = _curves("training", train, "loss", smooth=True) + _curves("held out", evaluations, "eval_loss", "second")
    accuracy = [
        curve
        for name, color in zip(_scores(evaluations), ("first", "second"), strict=False)
        for curve in _curves(name.replace("_", " "), evaluations, name, color)
    ]
    lowest = min((value for curve in accuracy for value in curve.values), default=0)
    unit = "nats per token" if task in ("causal_lm", "seq2seq") else "mean of the examples"
    answers = "Answers" if len(accuracy) > 1 else " ".join(curve.name.capitalize() for curve in accuracy)
    rate = _curves("learning rate", train, "learning_rate")
    norm, *speeds = (_curves("running mean", train, name, smooth=True) for name in ("grad_norm", *SPEEDS))
    charts = [
        _chart("Loss", loss, last_step, unit, log=True, bounds=(None, None), wide=bool(accuracy)),
        _chart(answers, accuracy, last_step, "held out", bounds=(min(lowest, 0), 1), text=_percent),
        _chart("Learning rate", rate, last_step),
        _chart("Gradient norm", norm, last_step, "before clipping", log=True),
    ]
    for name, speed in zip(SPEEDS, speeds, strict=True):
        charts.append(_chart(_title(name), speed, last_step, text="{:,.0f}".format))
    return [chart for chart in charts if chart]


def _curves(name: str, lines: Lines, field: str, color: str = "first", smooth: bool = False) -> list[_Curve]:
    """The curve of a field, none if no line has it; values that are not finite have no place on paper."""
    points = [(line["step"], line[field]) for line in lines if field in line and math.isfinite(line[field])]
    if not points:
        return []
    steps, values = zip(*points, strict=True)
    if not smooth or len(points) < MANY:
        return [_Curve(name, color, steps, values)]
    window = np.ones(2 * (len(points) // 50 + 2) + 1)
    means = np.convolve(values, window, "same") / np.convolve(np.ones(len(points)), window, "same")
    return [_Curve("each logged step", color, steps, values, faint=True), _Curve(name, color, steps, means.tolist())]


def _chart(
    title: str,
    curves: list[_Curve],
    last_step: int,
    note: str = "",
    *,
    text: Callable[[float], str] = _number,
    log: bool = False,
    bounds: tuple[float | None, float | None] = (0, None),
    wide: bool = False,
) -> _Chart | None:
    """The chart of the curves, None without any; the same curves give the same text.

    text: how values are written. log: their axis is logarithmic where they span more than a factor of 30.
    """
    if not curves:
        return None
    values = [value for curve in curves for value in curve.values]
    log = log and min(values) > 0 and max(values) > 30 * min(values)
    draw = functools.partial(_draw, title, curves, last_step, bounds, text, log)
    return _Chart(
        title,
        ", ".join(filter(None, [note, "logarithmic" if log else ""])),
        [(curve, "" if curve.faint else text(curve.values[-1])) for curve in curves],
        draw(WIDE if wide else NARROW),
        draw(NARROW) if wide else "",
    )


def _draw(
    title: str,
    curves: list[_Curve],
    last_step: int,
    bounds: tuple[float | None, float | None],
    text: Callable[[float], str],
    log: bool,
    size: tuple[int, int],
) -> str:
    """The svg element of a chart, of width x height pixels."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    width, height = size
    # text stays text, in the page's font; of a curve, however long, a few points a pixel are left
    settings = {
        "svg.fonttype": "none",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 12,
        "svg.hashsalt": f"{title} {width}",
    }
    with style.context(["default", settings, {"path.simplify_threshold": 0.5}]):
        figure = Figure((width / 72, height / 72), facecolor="none", layout="constrained")
        axes = figure.subplots(subplot_kw={"facecolor": "none"})
        for curve in curves:
            look: dict[str, Any] = {"alpha": 0.3} if curve.faint else {"marker": "o"} if len(curve.steps) < MANY else {}
            look |= {"color": COLORS[curve.color], "solid_capstyle": "round", "clip_on": False}
            axes.plot(curve.steps, curve.values, linewidth=1.75, markersize=5, **look)
        axes.set_xlim(0, max(last_step, 1))
        axes.locator_params("x", nbins=5, integer=True)
        axes.locator_params("y", nbins=6)
        if log:
            axes.set_yscale("log")
            values = [value for curve in curves for value in curve.values]
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if max(values) < 1e4 * min(values) else (1,)))
        else:
            axes.set_ylim(*bounds)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: text(value))
        axes.tick_params(left=False, bottom=False, pad=6, labelcolor=COLORS["soft"])
        axes.minorticks_off()
        axes.grid(axis="y", color=COLORS["grid"], linewidth=1, clip_on=False)
        axes.spines[:].set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg")
    drawing = re.sub(r' id="[\w.]+_\d+"', "", file.getvalue().split("</defs>", 1)[1])  # no date, no ids twice
    for name, color in COLORS.items():
        drawing = drawing.replace(color, f"var(--{name})")
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title} by step">{drawing}'


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m peftjax.report", description="Write report.html again.", allow_abbrev=False
    )
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="where a training run wrote")
    print(write_report(parser.parse_args(argv).workdir))


if __name__ == "__main__":
    cli.run(main)
