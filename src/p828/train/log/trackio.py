"""What trackio gets of a run's records, through its own library."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from p828.config import Config
from p828.config.values import to_dict
from p828.errors import ConfigError
from p828.runs.file_names import TRACKIO_ID_FILE
from p828.train.log.board_id import board_id
from p828.train.log.panels import ALERT_LEVELS, SAMPLES, alert_text


class TrackioTracker:
    """The trackio run, begun or continued, of a run's directory, which holds the id that is a part of its name.

    trackio finds a run by its name, and names of runs come again in other directories. It keeps runs on this machine,
    or sends them to where its variables TRACKIO_SPACE_ID and TRACKIO_SERVER_URL say. It keeps every row that it is
    given: of steps that come again after a rewind, both are there.
    """

    key, name = "trackio", "trackio"

    def __init__(self, run_dir: Path, config: Config) -> None:
        self.config, self.project = config, config.trackers.trackio_project
        self.id_file = run_dir / TRACKIO_ID_FILE
        self.where, self.problem = "", ""
        self._run: Any = None

    def import_library(self) -> None:
        try:
            import trackio.run  # noqa: F401  # a module of it: a directory of runs may be named trackio
        except ImportError as error:
            raise ConfigError(
                f"trackers.trackio = true: trackio cannot be imported: {error}\npip install 'p828[trackio]'"
            ) from None

    def start(self) -> None:
        """Raises ConfigError for what trackio does not take, and where it has no token for a space."""
        self.import_library()
        import trackio.run
        import trackio.sqlite_storage
        from huggingface_hub.errors import LocalTokenNotFoundError

        for module in (trackio, trackio.run, trackio.sqlite_storage, trackio.utils):
            # it prints and warns through the progress bar otherwise, and raises nothing
            vars(module).update(print=_nothing, _emit_nonfatal_warning=self._take_warning)
        name = f"{self.config.name}-{board_id(self.id_file, self.name)}"
        self.where = f'trackio show --project "{self.project}", run {name}'
        try:
            self._run = trackio.init(
                project=self.project,
                name=name,
                config=to_dict(self.config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        except LocalTokenNotFoundError:
            raise ConfigError(
                "TRACKIO_SPACE_ID is set, and there is no token for the hub\n"
                "run `hf auth login`, set HF_TOKEN, or unset the variable"
            ) from None
        except ValueError as error:
            raise ConfigError(
                f'trackers.trackio_project = "{self.project}", or a variable TRACKIO_… of the environment, '
                f"is not taken by trackio: {error}"
            ) from None

    def write(self, step: int, numbers: Mapping[str, float], loads: Mapping[str, Sequence[int]]) -> None:
        from trackio import Histogram

        by_expert = {  # bar n has what expert n got
            name: Histogram(np_histogram=(load_E, range(len(load_E) + 1))) for name, load_E in loads.items()
        }
        self._run.log({**numbers, **by_expert}, step=step)

    def samples(self, step: int, samples: Sequence[Sequence[str]]) -> None:
        from trackio import Table

        self._run.log({SAMPLES: Table(["prompt", "continuation"], [list(sample) for sample in samples])}, step=step)

    def alert(self, step: int, finding: Mapping[str, Any]) -> None:
        from trackio import AlertLevel

        level = AlertLevel[ALERT_LEVELS[finding["severity"]]]
        self._run.alert(finding["rule"], alert_text(finding), level=level, step=step)

    def rewind(self, step: int) -> None:
        """Nothing: trackio has no way to take rows back."""

    def update(self, config: Config) -> None:
        self._run.config.update(to_dict(config))  # which trackio sends with the first row

    def finish(self, exit_code: int) -> None:
        self._run.finish()

    def abandon(self) -> None:
        """Nothing: its threads end with the process."""

    def _take_warning(self, message: str, *options: Any, **further: Any) -> None:
        """In place of `warnings.warn`, in any of trackio's threads."""
        self.problem = f"trackio: {' '.join(message.split()).removeprefix('* ').removeprefix('trackio ')}"


def _nothing(*text: Any, **options: Any) -> None:
    """In place of trackio's `print`."""
