"""Plot the held-out losses in results.json over the number of trainable parameters:

PYTHONPATH=. python experiments/methods_on_dates/picture.py
"""

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

HERE = Path(__file__).parent
FAMILIES = {  # of methods, with a color
    "updates of kernels": (
        "#3457d5",
        ("lora", "lora, DoRA", "lora, EVA", "lora, PiSSA", "adalora", "loha", "lokr", "vera", "randlora", "vblora",
         "fourierft", "miss"),
    ),
    "rotations and reflections of kernels": ("#009e73", ("oft", "boft", "hra")),
    "bottleneck adapters": ("#c8641b", ("houlsby", "pfeiffer", "parallel")),
    "scales, norms and embeddings": ("#cc79a7", ("ia3", "ln_tuning", "trainable_tokens")),
    "soft prompts and prefixes": ("#e69f00", ("prompt", "p_tuning", "prefix")),
    "all parameters": ("#16181d", ("full",)),
}  # fmt: skip
# Where a name may be, relative to its point, in typographic points.
SPOTS = [
    (across, up)
    for up in (0, 5, -5, 9, -9, 14, -14, 20, -20, 28, -28)
    for across in (7, -7, 0)
    if across or abs(up) > 8
]


def losses(result: dict[str, Any]) -> list[float]:
    """The held-out loss of each seed with the best rate."""
    return [seed["eval_loss"] for seed in result["scores"][result["rate"]]]


def draw(results: dict[str, Any]) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.4, 5.6), layout="constrained")
    methods = results["methods"]
    for family, (color, names) in FAMILIES.items():
        trained, means, deviations = zip(*(point(methods[name]) for name in names), strict=True)
        axes.errorbar(trained, means, deviations, fmt="o", color=color, markersize=6, linewidth=1, label=family)
    axes.axhline(results["base_loss"], color="gray", linestyle=":", linewidth=1)
    axes.annotate("the base alone", (1, results["base_loss"]), (0, -4), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", va="top", color="gray", fontsize=9)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="trained parameters", ylabel="held-out loss (nats per token)")
    axes.set_xlim(800, 1.6e6)
    axes.set_xticks([1e3, 1e4, 1e5, 1e6], ["1,000", "10,000", "100,000", "1,000,000"])
    axes.set_yticks([0.2, 0.3, 0.5, 1, 2], ["0.2", "0.3", "0.5", "1", "2"])
    axes.minorticks_off()
    axes.grid(color="#ecece8")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8.5, loc="lower left", frameon=False)
    add_names(axes, methods)
    figure.savefig(HERE / "methods.png", dpi=160)


def point(result: dict[str, Any]) -> tuple[int, float, float]:
    """The number of trained parameters, and the mean and standard deviation of the held-out losses."""
    return result["trained"], statistics.mean(losses(result)), statistics.stdev(losses(result))


def bar(axes: Any, result: dict[str, Any]) -> Any:
    """The box of an error bar, in pixels."""
    from matplotlib.transforms import Bbox

    trained, mean, deviation = point(result)
    low, high = axes.transData.transform([(trained, mean - deviation), (trained, mean + deviation)])
    return Bbox([low, high]).padded(1)


def add_names(axes: Any, methods: dict[str, Any]) -> None:
    """Write each name at the first spot around its point where it hides no other name, point or bar."""
    figure = axes.get_figure()
    figure.canvas.draw()
    figure.set_layout_engine("none")
    points = {name: axes.transData.transform(point(one)[:2]) for name, one in methods.items()}
    colors = {name: color for color, names in FAMILIES.values() for name in names}
    taken = [axes.get_legend().get_window_extent(), *(bar(axes, one) for one in methods.values())]
    for name, one in methods.items():
        for across, up in SPOTS:
            label = axes.annotate(
                name, point(one)[:2], (across, up), textcoords="offset points", fontsize=8.5, color=colors[name],
                ha="center" if not across else "left" if across > 0 else "right", va="center",
            )  # fmt: skip
            box = label.get_window_extent()
            hidden = any(box.overlaps(other) for other in taken)
            if not hidden and not any(box.padded(6).contains(*point) for point in points.values()):
                break
            label.remove()
        else:
            raise SystemExit(f"no free spot for the name {name}")
        taken.append(box)
        if abs(up) > 9:  # a line to the point
            line = {"arrowstyle": "-", "color": colors[name], "linewidth": 0.6}
            axes.annotate("", point(one)[:2], (across, up), textcoords="offset points", arrowprops=line)


if __name__ == "__main__":
    draw(json.loads((HERE / "results.json").read_text()))
