"""The configuration of a run: its settings (`schema`), the files they come from, and the rules they keep.

What stands here is for all of p828; the modules behind it hold what their name says, and depend on each other in the
order facts, data_sections, schema, old_names and values, resolve, rules, files.
"""

from p828.config.data_sections import (
    DataConfig,
    MixedSource,
    PrepareConfig,
    SourceConfig,
    TokenizerConfig,
    ValidationConfig,
)
from p828.config.facts import Facts, facts_by_key, facts_of
from p828.config.files import RUN_FILE, from_dict, load, load_given, preset_names
from p828.config.resolve import rounded_vocabulary, with_steps, with_vocabulary
from p828.config.rules import validate
from p828.config.schema import (
    BalanceConfig,
    CheckpointConfig,
    Config,
    DeepSpeedConfig,
    EvaluationConfig,
    HealthConfig,
    ModelConfig,
    OptimizerConfig,
    RollbackConfig,
    RopeScaling,
    ScheduleConfig,
    ShardedConfig,
    TrackersConfig,
    TrainConfig,
    WandbConfig,
)

__all__ = [
    "RUN_FILE",
    "BalanceConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DeepSpeedConfig",
    "EvaluationConfig",
    "Facts",
    "HealthConfig",
    "MixedSource",
    "ModelConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "RollbackConfig",
    "RopeScaling",
    "ScheduleConfig",
    "ShardedConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrackersConfig",
    "TrainConfig",
    "ValidationConfig",
    "WandbConfig",
    "facts_by_key",
    "facts_of",
    "from_dict",
    "load",
    "load_given",
    "preset_names",
    "rounded_vocabulary",
    "validate",
    "with_steps",
    "with_vocabulary",
]
