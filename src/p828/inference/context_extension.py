"""Loss by position in the context, with and without YaRN: whether a model reads further than it was trained to.

P counts the ranges of positions, M the models, N the targets of a batch.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from p828.config import Config, RopeScaling, validate
from p828.data.batch import NO_TARGET, Batch
from p828.errors import ConfigError, DataError
from p828.inference.evaluate import evaluation_mode, perplexity
from p828.inference.load import LoadedModel
from p828.model.loss import token_losses
from p828.model.transformer import Transformer

RANGES = 8
"""Of positions, equally wide: with a factor of 2, 4 or 8 one begins where the trained context ends."""


@dataclass(frozen=True)
class PositionRange:
    """The targets that are predicted from tokens at these positions of their context."""

    first: int
    last: int
    tokens: int
    losses: tuple[float | None, ...]
    """Mean nats per target of each model; None without a target."""

    @property
    def perplexities(self) -> tuple[float | None, ...]:
        return tuple(None if loss is None else perplexity(loss) for loss in self.losses)


def trained_context(loaded: LoadedModel) -> int:
    """Tokens of context that the unscaled frequencies were trained for.

    A configuration says so where it has YaRN. Else they are a training row's, and of an imported model, whose rows are
    not known, the longest context that it names.
    """
    model = loaded.config.model
    if model.rope_scaling.factor > 1:
        return model.rope_scaling.original_max_position_embeddings
    return loaded.config.data.sequence_length if loaded.has_text else model.max_position_embeddings


def extended_config(config: Config, loaded: LoadedModel, context: int, factor: float | None) -> Config:
    """`config` with rows of `context` tokens, and YaRN by `factor` over the trained context; None takes the model's.

    Raises ConfigError for a context beyond `factor` times the trained one, with the factor that reaches it.
    """
    trained = trained_context(loaded)
    scaling = replace(config.model.rope_scaling, original_max_position_embeddings=trained)
    scaling = scaling if factor is None else replace(scaling, factor=factor)
    model = replace(config.model, rope_scaling=scaling, max_position_embeddings=max(trained, context))
    extended = replace(config, model=model, data=replace(config.data, sequence_length=context))
    validate(extended)
    if context > trained * scaling.factor:
        needed = math.ceil(1000 * context / trained) / 1000
        raise ConfigError(
            f"--context {context}: at most {int(trained * scaling.factor)} is accepted, the trained context of "
            f"{trained:,} times model.rope_scaling.factor = {scaling.factor:g}; "
            f"--model.rope-scaling.factor {needed:g} reaches it"
        )
    return extended


def with_rope_scaling(model: Transformer, scaling: RopeScaling) -> Transformer:
    """A model that shares all weights with `model`, in evaluation mode."""
    with torch.device("meta"):
        twin = Transformer(replace(model.config, rope_scaling=scaling))
    twin.reset_buffers(model.head_weight.device)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval()


def losses_by_position(
    models: Sequence[Transformer], batches: Iterable[Batch], context: int, dtype: torch.dtype
) -> list[PositionRange]:
    """The losses of several models on one device at the same targets, computed in `dtype`, in RANGES of positions.

    A target belongs to the position of the token before it: what `model.mask_documents` counts from the document's
    first token. Raises DataError when there is no target.
    """
    device = models[0].head_weight.device
    width = math.ceil(context / RANGES)
    ranges = math.ceil(context / width)
    nats_MP = torch.zeros(len(models), ranges, dtype=torch.float64, device=device)
    tokens_P = torch.zeros(ranges, dtype=torch.int64, device=device)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluation_mode(model))
        for batch in batches:
            batch = batch.to(device)
            has_target_BS = batch.targets_BS != NO_TARGET
            targets_N, range_N = batch.targets_BS[has_target_BS], batch.positions_BS[has_target_BS] // width
            tokens_P += range_N.bincount(minlength=ranges)
            for model, nats_P in zip(models, nats_MP, strict=True):
                output = model(batch.tokens_BS, batch.positions_BS, batch.document_ids_BS, dtype=dtype)
                losses_N = token_losses(output.hidden_BSH[has_target_BS], model.head_weight, targets_N)
                nats_P.index_add_(0, range_N, losses_N.double())
    tokens, nats = tokens_P.tolist(), nats_MP.T.tolist()
    if not sum(tokens):
        raise DataError("nothing to evaluate: the rows hold no target token")
    return [
        PositionRange(
            first=number * width,
            last=min((number + 1) * width, context) - 1,
            tokens=count,
            losses=tuple(total / count if count else None for total in totals),
        )
        for number, (count, totals) in enumerate(zip(tokens, nats, strict=True))
    ]


def position_table(names: Sequence[str], ranges: Sequence[PositionRange]) -> list[str]:
    """A line for each range with the perplexity of each named model; `-` where no target is."""
    width = len(f"{ranges[-1].last:,}")
    places = [f"{one.first:>{width},} to {one.last:>{width},}" for one in ranges]
    first = max(len("position"), len(places[0]))
    lines = [f"{'position':<{first}}{'tokens':>12}" + "".join(f"{name:>{len(name) + 3}}" for name in names)]
    for place, one in zip(places, ranges, strict=True):
        cells = zip(names, one.perplexities, strict=True)
        lines.append(
            f"{place:<{first}}{one.tokens:>12,}" + "".join(f"{_cell(v):>{len(name) + 3}}" for name, v in cells)
        )
    return lines


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 1e5 else f"{value:.3g}"
