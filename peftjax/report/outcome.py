"""Signs in the metrics of a run that it has learned nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from peftjax.report.classes import Classes, collapse


def concerns(lines: Sequence[Mapping[str, Any]], classes: Classes | None) -> list[str]:
    """Signs in the metrics of a run, and in its last predictions of classes, that it has learned nothing."""
    return [why for why in (concern(lines), collapse(classes)) if why]


def concern(lines: Sequence[Mapping[str, Any]]) -> str:
    """Why a run with these lines of metrics.jsonl seems to have learned nothing; empty if there is no sign of that."""
    trained = [line for line in lines if line["kind"] == "train"]
    scored = [line["eval_loss"] for line in lines if line["kind"] == "eval" and "eval_loss" in line]
    if trained and trained[-1].get("grad_norm") == 0:
        return (
            f"the gradient norm of step {trained[-1]['step']} is exactly 0, so nothing was learned; check which "
            "parameters are trainable and which tokens count in the loss"
        )
    name, losses = ("eval_loss", scored) if len(scored) > 1 else ("loss", [line["loss"] for line in trained])
    if len(losses) > 1 and losses[-1] > losses[0]:
        return f"{name} rose from {losses[0]:.4g} to {losses[-1]:.4g}; lower optim.learning_rate or check the data"
    return ""
