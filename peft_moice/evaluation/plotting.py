"""Pictures of measurements. Needs matplotlib, from the extra `peft_moice[plot]`.

Every function returns a matplotlib figure that is not registered with pyplot, so nothing has to be closed, and raises
ImportError where matplotlib is not installed and ValueError where there is nothing to draw or too much to tell apart.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .angles import attention_waveform
from .losses import PositionLosses

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_PANEL = (4.2, 3.6)
"""Width and height of a panel in inches: two of them are readable side by side at the width of a page."""

_BUCKETS = 240

Curve = tuple[Sequence[float], Sequence[tuple[float, float]]]
"""Values by position, and their intervals."""


def plot_positions(
    panels: Mapping[str, Mapping[str, Curve]],
    positions: Sequence[float],
    *,
    confidence: float = 0.95,
    title: str = "",
) -> "Figure":
    """Draw shares of right answers against the position of what was asked for, one curve per model.

    Args:
        panels: for each panel's title, the curves to draw in it by their names. Equal names have equal colours and
            markers in all panels.
        positions: relative positions of all curves, 0 to 1.
        confidence: of the intervals, for the label of the axis. Default: 0.95.
        title: of the picture; name the model in it, unless the curves do.
    """
    if not panels or not all(panels.values()) or not positions:
        raise ValueError("There is nothing to draw; give at least one panel, with one curve, and one position.")
    names = _distinct(name for curves in panels.values() for name in curves)
    figure = _figure(_PANEL[0] * len(panels), _PANEL[1] + 0.4)
    from matplotlib.ticker import PercentFormatter

    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (heading, curves) in zip(axes, panels.items(), strict=True):
        for name, (values, intervals) in curves.items():
            style = names.index(name)
            # Bars of different curves stand side by side.
            shift = 0.012 * (style - (len(names) - 1) / 2)
            axis.errorbar(
                [position + shift for position in positions],
                values,
                # Rounding may put a mean just outside of its interval.
                yerr=(
                    [max(0.0, value - low) for value, (low, _) in zip(values, intervals, strict=True)],
                    [max(0.0, high - value) for value, (_, high) in zip(values, intervals, strict=True)],
                ),
                color=_COLORS[style],
                marker=_MARKERS[style],
                capsize=3,
                label=name,
            )
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel("position of what is asked for")
        axis.set_xticks(positions)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].set_ylabel(f"right answers ({confidence:.0%} intervals)")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    if title:
        figure.suptitle(title, fontsize=10)
    _legend_below(figure, axes)
    return figure


def plot_heat_map(
    table: Sequence[Sequence[float]],
    lengths: Sequence[int],
    positions: Sequence[float],
    *,
    unit: str = "tokens",
    title: str = "",
) -> "Figure":
    """Draw scores over position and length.

    Args:
        table: scores 0 to 1 by length (rows) and position (columns).
        lengths: of the rows.
        positions: relative positions of the columns.
        unit: what lengths count. Default: "tokens".
        title: of the picture; name the model in it.
    """
    if not table or not all(table):
        raise ValueError("There is nothing to draw; give at least one row, with one score.")
    width = max(_PANEL[0], 1.6 + 0.75 * len(positions))
    figure = _figure(width, 1.6 + 0.45 * len(lengths))
    axis = figure.subplots()
    image = axis.imshow(table, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for row, scores in enumerate(table):
        for column, score in enumerate(scores):
            axis.text(column, row, f"{score:.0%}", ha="center", va="center", color="black" if score > 0.5 else "white")
    axis.set_xticks(range(len(positions)), [f"{position:.0%}" for position in positions])
    axis.set_yticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set_xlabel("position of what is asked for")
    axis.set_ylabel(unit)
    axis.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axis, label="right answers")
    return figure


def plot_expert_load(load: torch.Tensor, *, names: Sequence[str] | None = None, title: str = "") -> "Figure":
    """Draw the mean gate of each expert, per layer and head.

    Args:
        load: `[L, H, N]`, mean gates of N experts in each of L layers and H heads. With the identity start they may
            lie outside of 0 to 1.
        names: of the experts. Default: their numbers.
        title: of the picture; name the model in it.
    """
    if load.dim() != 3 or not load.numel():
        raise ValueError(f"`load` has shape {tuple(load.shape)}, but has to be [layers, heads, experts].")
    layers, heads, experts = load.shape
    names = _names_of(experts, names)
    colors = _colors_of(load)
    width, height = 0.9 + max(1.0, 0.16 * heads) * experts, 1.2 + 0.12 * layers
    figure = _figure(width, height)
    axes = figure.subplots(1, experts, sharey=True, squeeze=False)[0]
    for expert, axis in enumerate(axes):
        values = _array(load[:, :, expert])
        image = axis.imshow(values, aspect="auto", origin="lower", **colors)
        axis.set_title(names[expert], fontsize=9)
        axis.set_xlabel("head")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes), label="mean gate")
    figure.suptitle(title, fontsize=10)
    return figure


def plot_gates(
    gates: torch.Tensor, tokens: Sequence[str], *, names: Sequence[str] | None = None, title: str = ""
) -> "Figure":
    """Draw how the experts share the gates along a prompt.

    Args:
        gates: `[S, N]`, gates of N experts at each of S tokens, in one head or as a mean. They are stacked; where some
            are negative, as with the identity start, they are drawn as a heat map.
        tokens: the S tokens as text; every token is named where they are few, else some of them.
        names: of the experts. Default: their numbers.
        title: of the picture; name the model in it.
    """
    if gates.dim() != 2 or len(tokens) != len(gates) or not len(tokens):
        raise ValueError(
            f"`gates` has shape {tuple(gates.shape)} and there are {len(tokens)} tokens; give [tokens, experts]."
        )
    if gates.shape[1] > len(_COLORS):
        raise ValueError(f"{gates.shape[1]} experts cannot be told apart; draw at most {len(_COLORS)}.")
    figure = _figure(9, 3.4)
    axis = figure.subplots()
    names = _names_of(gates.shape[1], names)
    if gates.min() < 0:  # there is nothing to stack, and lines would hide each other
        image = axis.imshow(_array(gates.T), aspect="auto", interpolation="nearest", **_colors_of(gates))
        axis.set_yticks(range(len(names)), names)
        figure.colorbar(image, ax=axis, label="gate", pad=0.01)
    else:
        axis.stackplot(range(len(tokens)), _array(gates.T), colors=_COLORS[: len(names)], labels=names, step="mid")
        # The own angle at the bottom mostly fills the picture; what the others take is at the top.
        axis.set_ylim(max(0.0, 0.95 - gates[:, 1:].sum(dim=1).max().item()), 1)
        axis.set_ylabel("share of the gates")
        _legend_below(figure, [axis])
    _name_tokens(axis, tokens)
    axis.set_title(title, fontsize=10)
    return figure


def plot_losses(losses: Mapping[str, PositionLosses], *, title: str = "") -> "Figure":
    """Draw loss against position in running text, one curve per model, on a logarithmic axis of positions; and below,
    where there are several, how far each is from the first.

    Args:
        losses: by the names of their curves, all over the same positions.
        title: of the picture; name the text in it.
    """
    if not losses:
        raise ValueError("There is nothing to draw; give at least one curve.")
    names = _distinct(losses)
    centers, first = losses[names[0]].centers, losses[names[0]].losses
    if any(tuple(curve.centers) != tuple(centers) for curve in losses.values()):
        raise ValueError("The curves were measured over other positions. Measure all with one `chunk_length`.")
    panels = min(2, len(names))
    figure = _figure(1.7 * _PANEL[0], (0.7 + 0.4 * panels) * _PANEL[1])
    axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=(3, 2)[:panels])[:, 0])
    for style, name in enumerate(names):
        look: dict[str, Any] = {"color": _COLORS[style], "marker": _MARKERS[style], "markersize": 4, "label": name}
        axes[0].plot(centers, losses[name].losses, **look)
        if panels == 2:
            change = [loss - before for loss, before in zip(losses[name].losses, first, strict=True)]
            axes[1].plot(centers, change, **look)
    axes[0].set_ylabel("mean loss, in nats")
    axes[0].set_title(title, fontsize=10)
    if panels == 2:
        axes[1].set_ylabel("minus the first")
    axes[-1].set_xscale("log", base=2)
    axes[-1].xaxis.set_major_formatter("{x:g}")
    axes[-1].set_xlabel("position in the text, in tokens")
    for axis in axes:
        axis.grid(alpha=0.3)
    _legend_below(figure, axes)
    return figure


def plot_waveforms(head_dim: int, rope_bases: Sequence[float], context_length: int, *, title: str = "") -> "Figure":
    """Draw the attention waveforms of base angles, and the envelope of all of them over that of the first.

    Args:
        head_dim: number D of rotated dimensions.
        rope_bases: base angles, the model's own first; at most seven.
        context_length: number of distances.
        title: of the picture; name the model in it.
    """
    if not 1 <= len(rope_bases) <= len(_COLORS):
        raise ValueError(f"`rope_bases` holds {len(rope_bases)} angles; draw 1 to {len(_COLORS)} in a picture.")
    waveforms = torch.stack([attention_waveform(head_dim, base, context_length) for base in rope_bases])
    # Means over buckets of equal width on the axis: finer waves would hide each other in solid bands.
    edges = torch.unique(torch.logspace(0, math.log10(context_length), _BUCKETS + 1, device="cpu").round().long())
    sizes = edges.diff().tolist()
    smooth = torch.stack([part.mean(dim=-1) for part in torch.split(waveforms[:, 1:], sizes, dim=-1)], dim=-1).numpy()
    distances = ((edges[:-1] + edges[1:] - 1) / 2).tolist()
    figure = _figure(9, 6)
    single, envelope = figure.subplots(2, 1, sharex=True, sharey=True)
    for base, waveform, color in zip(rope_bases, smooth, _COLORS, strict=False):
        single.plot(distances, waveform, color=color, linewidth=0.8, label=f"{base:,g}")
    highest = smooth.max(axis=0)
    envelope.fill_between(distances, smooth[0], highest, color=_COLORS[5], alpha=0.6)
    envelope.plot(distances, smooth[0], color=_COLORS[0], linewidth=0.8, label=f"{rope_bases[0]:,g} alone")
    envelope.plot(distances, highest, color=_COLORS[1], linewidth=0.8, label="the highest of all")
    for axis, heading in ((single, "base angle"), (envelope, None)):
        axis.legend(title=heading, loc="center left", bbox_to_anchor=(1.0, 0.5))
    single.set_title(title, fontsize=10)
    envelope.set_xscale("log")
    envelope.set_xlim(1, context_length)
    envelope.set_xlabel("distance in tokens")
    for axis in (single, envelope):
        axis.set_ylabel("bound on attention")
        axis.grid(alpha=0.3)
    return figure


def _array(values: torch.Tensor) -> Any:
    """`values`, of whatever device and precision, as matplotlib takes them."""
    return values.detach().float().cpu().numpy()


def _names_of(experts: int, names: Sequence[str] | None) -> list[str]:
    if names is None:
        return [f"expert {expert}" for expert in range(experts)]
    if len(names) != experts:
        raise ValueError(f"There are {experts} experts, but `names` holds {len(names)}. Give one for each.")
    return list(names)


def _colors_of(gates: torch.Tensor) -> dict[str, Any]:
    """Colours of gates from zero to one, or of either side of zero, equally strong at equal distance."""
    low, high = gates.min().item(), max(1.0, gates.abs().max().item())
    return {"vmin": -high, "vmax": high, "cmap": "RdBu_r"} if low < 0 else {"vmin": 0, "vmax": high, "cmap": "cividis"}


def _name_tokens(axis: "Axes", tokens: Sequence[str]) -> None:
    step = max(1, len(tokens) // 60)
    shown = range(0, len(tokens), step)
    axis.set_xticks(shown, [tokens[index].replace("$", r"\$") for index in shown], rotation=90, fontsize=7)
    axis.set_xlim(-0.5, len(tokens) - 0.5)


def _distinct(names: Iterable[str]) -> list[str]:
    """Names without repetitions."""
    names = list(dict.fromkeys(names))
    if len(names) > len(_COLORS):
        raise ValueError(f"{len(names)} curves cannot be told apart; draw at most {len(_COLORS)} in a picture.")
    return names


def _legend_below(figure: "Figure", axes: "Sequence[Axes]") -> None:
    """One legend for all panels, where it hides no data."""
    entries: dict[str, Artist] = {}
    for axis in axes:
        entries |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if not entries:  # matplotlib leaves out names that are empty or begin with an underscore
        return
    # A letter takes about a fourteenth of an inch, a line's sample with its margins as much as eight letters.
    fitting = int(figure.get_figwidth() * 14 / (8 + max(map(len, entries))))
    columns = max(1, min(4, len(entries), fitting))
    # Further rows add to the picture and take nothing of what is drawn.
    rows = -(-len(entries) // columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * (rows - 1))
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns, fontsize=9)


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plotting needs matplotlib: pip install 'peft_moice[plot]'.") from error
    return Figure(figsize=(width, height), layout="constrained")
