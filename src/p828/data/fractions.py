"""The fraction of a run's tokens that comes from each of its sources, and numbers of tokens in words: no PyTorch."""

from p828.config import Config

MANY_EPOCHS = 4  # up to which repeated text is worth nearly as much as new (arXiv 2305.16264)


def planned_fractions(config: Config) -> list[float]:
    """The fraction of the whole run's tokens that comes from each source."""
    data, steps = config.data, config.train.steps
    if not data.mixture:
        return [1.0]
    fractions = [0.0] * len(data.mixture)
    for number, begin in enumerate(data.mixture_steps):
        end = data.mixture_steps[number + 1] if number + 1 < len(data.mixture_steps) else steps
        weights = [mixed.weights[number] for mixed in data.mixture]
        for source, weight in enumerate(weights):
            fractions[source] += weight / sum(weights) * max(min(end, steps) - begin, 0) / steps
    return fractions


def short(count: float) -> str:
    """`512`, `1.5 k`, `1.2 M`, `3 B`: three digits."""
    for unit in ("", " k", " M", " B"):
        if abs(count) < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} T"
