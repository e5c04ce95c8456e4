"""p828 trains Mixture-of-Experts language models from scratch.

The names below come from `p828.api` when they are first used: `import p828` by itself imports nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from p828.api import (
        Config,
        ConfigError,
        DataError,
        P828Error,
        Run,
        RunFailed,
        RunPaused,
        RunStopped,
        batches,
        build_engine,
        build_model,
        build_tokenizer,
        load_config,
        load_run,
        loss,
        train_run,
    )

__all__ = [
    "Config",
    "ConfigError",
    "DataError",
    "P828Error",
    "Run",
    "RunFailed",
    "RunPaused",
    "RunStopped",
    "batches",
    "build_engine",
    "build_model",
    "build_tokenizer",
    "load_config",
    "load_run",
    "loss",
    "train_run",
]

if not TYPE_CHECKING:  # a type checker is to see the names above alone

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from p828 import api

        return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
