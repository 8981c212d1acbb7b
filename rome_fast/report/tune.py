"""What `rome-fast tune` says when it is done."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .tables import number


def tune_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """A line for each candidate, the best first; the difference to the best with its interval of 95 %."""
    table = Table(header_style="bold", title=title, title_justify="left")
    columns = ["layer", "decay", "clamp", "requests", "score", "P bare", "P behind text", "paraphrase"]
    columns += ["neighbourhood", "perplexity ratio", "largest", "best better by"]
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["layer"]),
            f"{row['weight_decay']:g}",
            f"{row['clamp']:g}",
            str(row["requests"]),
            number(row["score"]),
            number(row["probability"]),
            number(row["probability_behind"]),
            number(row["paraphrase"]),
            number(row["neighborhood"]),
            number(row["perplexity_ratio"]) + ("" if row["eligible"] else " !"),
            number(row["largest_perplexity_ratio"]),
            interval(row["difference"]) if "difference" in row else "",
        )
    return table


def interval(difference: Mapping[str, Any]) -> str:
    return f"{difference['mean']:+.3f} ({difference['low']:+.3f} … {difference['high']:+.3f})"


def summary(report: Mapping[str, Any]) -> list[str]:
    """What was chosen, what could not be told apart from it, and what it gains over the default."""
    choice, default = report["choice"], report["default"]
    limit = report["conditions"]["perplexity_limit"]
    lines = [
        f"chosen: layer {choice['layer']}, weight decay {choice['weight_decay']:g}, clamp {choice['clamp']:g}; score "
        f"{choice['score']:.3f}, perplexity ratio {choice['perplexity_ratio']:.4f}"
    ]
    if not choice["eligible"]:
        lines.append(f"no candidate keeps to a mean perplexity ratio of {limit:g}: this one comes nearest to it")
    near = [
        f"{row['layer']}" for row in report["layers"] if "difference" in row and not row["difference"]["told_apart"]
    ]
    if near:
        lines.append(
            f"{choice['requests']} requests do not tell layer {report['layers'][0]['layer']} from layer "
            f"{', '.join(near)}: other requests may well turn their order"
        )
    same = (choice["layer"], choice["weight_decay"], choice["clamp"]) == (
        default["layer"],
        default["weight_decay"],
        default["clamp"],
    )
    if same:
        lines.append("that is what would be used without tuning")
    else:
        apart = "" if default["difference"]["told_apart"] else ", which is within the noise of so few requests"
        lines.append(
            f"without tuning: layer {default['layer']}, weight decay {default['weight_decay']:g}, clamp "
            f"{default['clamp']:g}; score {default['score']:.3f}, perplexity ratio "
            f"{default['perplexity_ratio']:.4f}; gain {interval(default['difference'])}{apart}"
        )
    return lines
