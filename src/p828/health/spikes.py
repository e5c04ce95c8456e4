"""Spikes of the loss, found as the steps come."""

import math
from collections import deque
from dataclasses import dataclass
from itertools import islice, pairwise

BASELINE = 128  # steps; OLMo-core, SkipStepOptimizer: rolling_interval_length = 128
SIGMAS = 6.0  # OLMo-core, SkipStepOptimizer: sigma_factor = 6
FEWEST = 24  # steps before which nothing is called usual
RECENT = 16  # of them, whose mean is the usual loss
LEAST_RISE = 0.2  # nats; of a loss that hardly varies, 6 sigma are no event
CLIMBED = 0.3  # nats above the lowest mean before: the loss was climbing already
RANGE = 40  # steps before a spike among which its new level is looked for: data that is not shuffled well moves so far
SETTLED = 8  # steps whose mean says whether the loss is back
NEW_LEVEL = 512  # steps after which a loss that did not come back is the usual one
KEPT = 64


@dataclass
class Spike:
    step: int
    """The first step far above the usual."""
    usual: float
    """Mean loss of the steps before."""
    sigma: float
    """Standard deviation of the loss of the steps before, around its trend."""
    peak: float
    """The highest loss since."""
    peak_step: int
    lowest: float
    """The lowest mean of some steps in a row before."""
    highest: float
    """The highest mean of some steps in a row among those not long before: the range in which the loss moves."""
    last: int
    """The last step at which the loss was not yet usual again."""
    recovered: int | None = None
    """The step at which the loss was usual again."""
    early: float = 0.0
    """The highest loss of its first steps."""
    after: float = 0.0
    """Mean of the newest losses since."""

    @property
    def is_abrupt(self) -> bool:
        """Whether most of the rise came at once; else the loss climbs, and was noticed at this step."""
        return self.early - self.usual >= (self.peak - self.usual) / 2 and self.usual - self.lowest <= CLIMBED

    @property
    def is_high(self) -> bool:
        """Whether the newest losses are higher than any not long before."""
        return self.after > self.highest + LEAST_RISE

    @property
    def limit(self) -> float:
        """A mean loss at most this high is usual again: half way down to the mean before."""
        return self.usual + max(SIGMAS * self.sigma, LEAST_RISE) / 2


class Spikes:
    """A spike is a loss above mean + 6 sigma of the steps before it, and at least 0.2 nats above that mean.

    Sigma is that of the differences between 128 steps, over √2, and the mean that of the last 16 of them: for a loss
    that stays they are OLMo-core's, and a loss that falls has no larger sigma for it (von Neumann 1941, the mean square
    successive difference). The steps of a spike do not count as usual until the loss is back.
    """

    def __init__(self) -> None:
        self.found: deque[Spike] = deque(maxlen=KEPT)
        self._usual: deque[float] = deque(maxlen=BASELINE)
        self._after: deque[float] = deque(maxlen=SETTLED)
        """The newest losses since the spike began."""

    @property
    def current(self) -> Spike | None:
        """The spike that the run is in."""
        return self.found[-1] if self.found and self.found[-1].recovered is None else None

    def begin_anew(self) -> None:
        """Forget what loss is usual, and the spike that the run is in: from here on the data is meant to be other."""
        if self.current is not None:
            self.found.pop()
        self._usual.clear()

    def add(self, step: int, loss: float) -> None:
        """Take in a step's loss, a finite number."""
        spike = self.current
        if spike is not None and step - spike.step <= NEW_LEVEL:
            self._follow(spike, step, loss)
            return
        if spike is not None and step - spike.step == NEW_LEVEL + 1:
            self._usual.clear()
        if len(self._usual) >= FEWEST:
            usual = math.fsum(islice(reversed(self._usual), RECENT)) / RECENT
            is_high = loss > usual + LEAST_RISE  # sigma, which takes longer, is asked for then only
            if is_high and loss > usual + SIGMAS * (sigma := self._sigma()):
                self.found.append(Spike(step, usual, sigma, loss, step, *self._range(), step, early=loss, after=loss))
                self._after.clear()
                self._after.append(loss)
                return
        self._usual.append(loss)

    def _sigma(self) -> float:
        squares = math.fsum((later - before) ** 2 for before, later in pairwise(self._usual))
        return math.sqrt(squares / 2 / (len(self._usual) - 1))

    def _range(self) -> tuple[float, float]:
        """The lowest mean of `RECENT` steps in a row, and the highest of `SETTLED` steps not long before."""
        losses = list(self._usual)
        return min(_means(losses, RECENT)), max(_means(losses[-RANGE:], SETTLED))

    def _follow(self, spike: Spike, step: int, loss: float) -> None:
        if loss > spike.peak:
            spike.peak, spike.peak_step = loss, step
        if step - spike.step < SETTLED:
            spike.early = max(spike.early, loss)
        self._after.append(loss)
        spike.after = math.fsum(self._after) / len(self._after)
        if len(self._after) == SETTLED and spike.after <= spike.limit:
            spike.recovered = step
        else:
            spike.last = step


def _means(losses: list[float], steps: int) -> list[float]:
    return [math.fsum(losses[i : i + steps]) / steps for i in range(len(losses) - steps + 1)]
