"""The heat maps of `rome-fast trace`."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..trace.average import Average

_COLOURS = {"state": "Purples", "mlp": "Greens", "attention": "Reds"}

_TITLES = {
    "state": "restoring the state behind a layer",
    "mlp": "restoring what MLPs add in {window} layers around it",
    "attention": "restoring what attention adds in {window} layers around it",
}


def can_draw() -> bool:
    return find_spec("matplotlib") is not None


def heat_map(averages: Mapping[Any, "Average"], window: int, conditions: str, file: Path) -> None:
    """A panel for each kind: average indirect effect by role of the token and layer, on a scale of its own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from ..trace.average import ROLES

    figure, panels = plt.subplots(len(averages), 1, figsize=(9, 0.8 + 1.9 * len(averages)), sharex=True, squeeze=False)
    for axes, (kind, found) in zip(panels[:, 0], averages.items(), strict=True):
        shown = found.mean.T.numpy()
        # A role that no request has stays white; an effect below zero is as pale as none.
        image = axes.imshow(shown, aspect="auto", cmap=_COLOURS[kind], vmin=0, interpolation="nearest")
        axes.set_yticks(range(len(ROLES)), ROLES, fontsize=8)
        axes.set_title(_TITLES[kind].format(window=window), fontsize=9, loc="left")
        layer, role = divmod(int(found.mean.nan_to_num(nan=-1.0).argmax()), len(ROLES))
        axes.plot(layer, role, marker="o", markersize=5, markerfacecolor="none", color="black")
        figure.colorbar(image, ax=axes, pad=0.01).ax.tick_params(labelsize=7)
    panels[-1, 0].set_xlabel("layer")
    figure.text(0.99, 0.005, f"average indirect effect on P(answer), circle: largest. {conditions}", ha="right",
                fontsize=6.5, color="#666666")  # fmt: skip
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(file, dpi=110)
    plt.close(figure)
