"""Pictures for research: what methods repair against what they damage, and which angle each head chooses."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def plot_tradeoff(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    base: tuple[float, float],
    *,
    repair: str,
    damage: str = "perplexity of ordinary text, change",
    title: str = "",
) -> Figure:
    """Draw what methods repair against what they damage, one curve per method over its settings.

    Args:
        curves: for each method, points (damage, repair), in the order in which they are joined; at most 14 methods.
        base: the base model's point.
        repair: label of the vertical axis, on which higher is better.
        damage: label of the horizontal axis, in shares.
        title: of the picture; name the model in it.

    Raises:
        ValueError: there is nothing to draw, or too much to tell apart.
    """
    if not curves or not all(curves.values()):
        raise ValueError("There is nothing to draw; give at least one method, with one point.")
    if len(curves) > 2 * len(COLORS):
        raise ValueError(f"{len(curves)} methods cannot be told apart; draw at most {2 * len(COLORS)} in a picture.")
    figure = Figure(figsize=(7, 4.3 + 0.19 * len(curves)), layout="constrained")
    axis = figure.subplots()
    for style, (name, points) in enumerate(curves.items()):
        again, color = divmod(style, len(COLORS))
        # Colours come a second time with other markers.
        marker = MARKERS[(color + 3 * again) % len(MARKERS)]
        axis.plot(*zip(*points, strict=True), color=COLORS[color], marker=marker, ls=("-", "--")[again], label=name)
    axis.plot(*base, color="black", marker="*", markersize=12, linestyle="none", label="base model")
    axis.set_xlabel(damage)
    axis.set_ylabel(repair)
    axis.set_title(title, fontsize=10)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=1 if max(map(len, curves)) > 40 else 2, fontsize=9)
    return figure


def plot_choices(gates: torch.Tensor, tokens: Sequence[str], *, names: Sequence[str], title: str = "") -> Figure:
    """Draw which expert each head chose at each token of a prompt: the one with the largest gate.

    Args:
        gates: `[H, S, N]`, gates of N experts, at most seven, at each of S tokens in H heads, such as
            `evaluation.gates_along` gives for a layer. Where the own angle always has the largest, hand over the gates
            of the others (with the identity start their absolute values).
        tokens: the S tokens as text.
        names: of the experts.
        title: of the picture; name the model and the layer in it.

    Raises:
        ValueError: the shape is another, or there are too many experts to tell apart.
    """
    if gates.dim() != 3 or gates.shape[1:] != (len(tokens), len(names)) or not gates.numel():
        raise ValueError(
            f"`gates` has shape {tuple(gates.shape)}, there are {len(tokens)} tokens and {len(names)} names; give "
            "[heads, tokens, experts]."
        )
    if len(names) > len(COLORS):
        raise ValueError(f"{len(names)} experts cannot be told apart; draw at most {len(COLORS)}.")
    figure = Figure(figsize=(9, 1.8 + 0.2 * len(gates)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(
        gates.argmax(dim=-1).cpu().numpy(),
        cmap=ListedColormap(COLORS[: len(names)]),
        vmin=-0.5,
        vmax=len(names) - 0.5,
        aspect="auto",
        interpolation="nearest",
    )
    axis.set_ylabel("head")
    shown = range(0, len(tokens), max(1, len(tokens) // 60))
    axis.set_xticks(shown, [tokens[index].replace("$", r"\$") for index in shown], rotation=90, fontsize=7)
    axis.set_xlim(-0.5, len(tokens) - 0.5)
    axis.set_title(title, fontsize=10)
    for color, name in zip(COLORS, names, strict=False):
        axis.plot([], [], color=color, marker="s", linestyle="none", label=name)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure
