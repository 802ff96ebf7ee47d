"""Scores as text: a table, and what it says."""

from ..evaluation import Result

_CELL = 18


def score_table(results: list[Result]) -> str:
    """Scores of several models on one task with 95% intervals, by length and position."""
    first = results[0]
    columns: list[float | None] = [*first.positions, None]
    heads = [*(f"at {position:.0%}" for position in first.positions), "mean"]
    width = max(24, *(len(result.model) for result in results))
    lines = [f"{first.task}: share of right answers [95% interval]"]
    for length in first.lengths:
        lines.append(f"  {f'{length:,} {first.unit}':<{width}}" + "".join(f"{head:>{_CELL}}" for head in heads))
        for result in results:
            if length not in result.lengths:
                continue
            cells = []
            for position in columns:
                low, high = result.interval(length=length, position=position)
                cells.append(f"{result.mean(length=length, position=position):.2f} [{low:.2f} {high:.2f}]")
            lines.append(f"  {result.model:<{width}}" + "".join(f"{cell:>{_CELL}}" for cell in cells))
    return "\n".join(lines)


def difference(name: str, after: Result, before: Result) -> str:
    """What an adapter changed on the questions of a task."""
    mean, (low, high) = after.difference(before)
    text = f"{after.task}: {name}: {mean:+.2f} in the mean ({low:+.2f} to {high:+.2f}, paired)"
    return f"{text}, gap {before.gap():.2f} to {after.gap():.2f}"


def verdict(result: Result) -> str:
    """What the scores of one model say about positions, at the length where they differ most."""
    length = max(result.lengths, key=result.gap)
    scores = {position: result.mean(length=length, position=position) for position in result.positions}
    best, worst = max(scores, key=lambda at: scores[at]), min(scores, key=lambda at: scores[at])
    high, low = (result.interval(length=length, position=position) for position in (best, worst))
    where = f"{result.task}, {length:,} {result.unit}"
    if low[1] < high[0]:
        return (
            f"{where}: {result.model} answers right {scores[best]:.0%} at {best:.0%} of the prompt and "
            f"{scores[worst]:.0%} at {worst:.0%}. It loses what stands there, which routers may repair."
        )
    if result.mean(length=length) < 0.1:
        return f"{where}: {result.model} hardly answers anywhere. Ask something easier, or less at once."
    return (
        f"{where}: no position is clearly worse than another. Longer prompts, or more --questions, may show a "
        "difference."
    )
