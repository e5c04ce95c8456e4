"""Whether all ranks were given the same settings: each host's command is another one to mistype."""

from p828.config import Config
from p828.config.values import flatten, shown
from p828.distributed.group import ProcessGroup
from p828.errors import ConfigError

MISSING = object()


def check_same_settings(config: Config, ranks: ProcessGroup) -> None:
    """Raises ConfigError, on all ranks, which must call it, where a rank was given other settings than rank 0."""
    first, *others = ranks.all_gather_object(flatten(config))
    for rank, other in enumerate(others, start=1):
        differing = [key for key in {**first, **other} if first.get(key, MISSING) != other.get(key, MISSING)]
        # A stage that is given sets the engine, too: the stage says more.
        key = min(differing, key=lambda key: key == "engine", default="")
        if key:
            own, of_first = (shown(found[key]) if key in found else "nothing" for found in (other, first))
            raise ranks.on_all_ranks(
                ConfigError(f"{key}: rank {rank} was given {own}, and rank 0 {of_first}; all ranks need the same")
            )
