"""The figures of an edit run, as HTML; of what was not measured there is none, and a sentence says so."""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import median

from ..closing.effect import DRIFT_LIMIT
from ..closing.flow import ENOUGH_BARE
from .document import escaped
from .drawing import bars, five_numbers, histogram, scatter, spreads
from .edit_data import AskedRecord, EditRun
from .tables import number

Figure = tuple[str, str, str]
"""Title, drawing, caption."""


def figures(run: EditRun) -> tuple[list[Figure], list[str]]:
    """The figures, and of each that is left out a sentence on why."""
    drawn, missing = [], []
    for draw in _FIGURES:
        found = draw(run)
        if isinstance(found, str):
            missing.append(found)
        else:
            drawn.append(found)
    return drawn, missing


def gallery(drawn: Sequence[Figure]) -> str:
    """Figures beside each other where there is room."""
    each = (
        f"<figure><h3>{escaped(title)}</h3>{svg}<figcaption>{escaped(caption)}</figcaption></figure>"
        for title, svg, caption in drawn
    )
    return f'<div class="figures">{"".join(each)}</div>'


def _bare(run: EditRun) -> Figure | str:
    title = "P(target) behind the bare prompt"
    return _probabilities(run, title, lambda r: r.probability_before, lambda r: r.probability_after)


def _prefixed(run: EditRun) -> Figure | str:
    title = "P(target) behind the editing contexts"
    return _probabilities(run, title, lambda r: r.probability_before_prefixed, lambda r: r.probability_after_prefixed)


def _probabilities(
    run: EditRun,
    title: str,
    before: Callable[[AskedRecord], float | None],
    after: Callable[[AskedRecord], float | None],
) -> Figure | str:
    series = {"before": _known(map(before, run.records)), "now": _known(map(after, run.records))}
    series = {name: values for name, values in series.items() if values}
    if "now" not in series:
        return f"{title}: not measured."
    medians = " → ".join(number(median(values)) for values in series.values())
    caption = f"Median {medians}. Of several tokens, the geometric mean."
    if "before" not in series:
        caption += " Before the edit it was not measured."
        # In the colour of what is measured now.
        series = {"before": [], **series}
    return title, histogram(f"{title}: median {medians}", "P(target)", series, 0, 1), caption


def _share_bare(run: EditRun) -> Figure | str:
    title = "Share of an edit that arrives without a context"
    shares = _known(r.share_bare for r in run.records if r.applied)
    if not shares:
        return f"{title}: the run has none, as for subjects that begin the prompt where every row has a context."
    few = sum(share < ENOUGH_BARE for share in shares)
    caption = f"Median {number(median(shares))}; {few} of {len(shares)} below {ENOUGH_BARE:g} (dashed), too little."
    # To the next half, beyond rounding.
    high = max(1.0, math.ceil(max(shares) * 2 - 0.01) / 2)
    low = min(0.0, math.floor(min(shares) * 2 + 0.01) / 2)
    mark = [(ENOUGH_BARE, f"below {ENOUGH_BARE:g} no edit was seen to answer")]
    return title, histogram(f"{title}: {caption}", "share of δ", {"edits": shares}, low, high, mark), caption


def _norms(run: EditRun) -> Figure | str:
    title = "Size of the updates by layer"
    groups: dict[int, list[float]] = {}
    for record in run.records:
        for layer, ratio in zip(record.layers, record.update_ratios, strict=False):
            groups.setdefault(layer, []).append(ratio)
    known = {str(layer): _known(groups[layer]) for layer in sorted(groups)}
    known = {layer: ratios for layer, ratios in known.items() if ratios}
    if not known:
        return f"{title}: no edit has one."
    largest, ratios = max(known.items(), key=lambda item: max(item[1]))
    least, _, middle, _, most = five_numbers(ratios)
    caption = (
        f"‖Δ‖ / ‖W‖ of every edit alone: box from the first to the third quartile, line from the least to the most. "
        f"The most is {number(most)}, in layer {largest}, whose median is {number(middle)} and least {number(least)}."
    )
    return title, spreads(f"{title}: {caption}", "layer", known), caption


def _nll(run: EditRun) -> Figure | str:
    title = "How well the model still reads"
    nll = run.conditions.get("context_nll")
    if nll is None:
        return f"{title}: the NLL of the contexts was not measured."
    values = {"before": float(nll["before"]), "now": float(nll["after"])}
    if nll["origin"] != nll["before"]:
        values["before all edits"] = float(nll["origin"])
    rise = max(nll["after"] - nll["before"], nll["since_origin"] - nll["origin"])
    caption = (
        f"Mean NLL of the contexts' own tokens, perplexity {_perplexity(nll['before'])} → {_perplexity(nll['after'])}. "
        f"It rose by {rise:.3f} nats a token; above {DRIFT_LIMIT:g} a model counts as collapsing."
    )
    return title, bars(f"{title}: {caption}", values, "nats"), caption


def _perplexities(run: EditRun) -> Figure | str:
    title = "Perplexity with each edit alone"
    ratios = [
        r.perplexity_after / r.perplexity_before for r in run.records if r.perplexity_after and r.perplexity_before
    ]
    ratios = _known(ratios)
    if not ratios:
        return f"{title}: not measured by an edit; rome-fast study does."
    caption = f"Perplexity after / before: median {number(median(ratios))}, most {number(max(ratios))}."
    high = max(1.5, math.ceil(max(ratios)))
    return title, histogram(f"{title}: {caption}", "ratio of perplexities", {"edits": ratios}, 0, high), caption


def _neighbours(run: EditRun) -> Figure | str:
    title = "Near keys among the edits"
    points = [(r.nearest_cosine, r.missed) for r in run.records if r.nearest_cosine is not None and r.applied]
    if not points:
        return f"{title}: the run has no other edit to be near, or does not know the keys."
    near = sum(cosine > _NEAR for cosine, _ in points)
    caption = (
        f"An edit's greatest cosine with the key of another one, and how far it stays off, ‖Δk − r‖ / ‖r‖. {near} of "
        f"{len(points)} have a neighbour above {_NEAR:g}; near keys cannot have two values."
    )
    return title, scatter(f"{title}: {caption}", "cosine with the nearest key", "share off", points, 1.0), caption


def _seconds(run: EditRun) -> Figure | str:
    title = "Where the time went"
    seconds = run.conditions["seconds"]
    if not seconds:
        return f"{title}: not measured."
    total = sum(seconds.values())
    caption = f"{number(total)} s in all, {number(total / len(run.records))} s an edit; wall time."
    slowest = dict(sorted(seconds.items(), key=lambda item: -item[1]))
    return title, bars(f"{title}: {caption}", slowest, "s"), caption


_NEAR = 0.95
"""Cosine above which keys are called near."""

_FIGURES = (_bare, _prefixed, _share_bare, _norms, _nll, _perplexities, _neighbours, _seconds)


def _known(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


def _perplexity(nll: float) -> str:
    return number(math.exp(nll)) if nll < 700 else "infinite" if nll > 0 else "no number"
