"""Memory of the sharded engine (`engine/sharded/`) at each of its stages, and the lowest stage that fits.

A micro-batch takes what it takes of the plain engine, and what each layer adds to the residual stream, which is kept
where autograd's graph is cut. Of weights' gradients those of one layer lie beside the buffers, and not those of all.
P numbers of matrices, of which V are the embedding's and head's and B a layer's, and m bytes for each of two moments,
in bfloat16 on n ranks:

    stage 1: 2 P + 4 P + (2 + 2 m) P / n
    stage 2: 2 P + 4 V + 4 (P - V) / n + (2 + 2 m) P / n + 8 B of buffers
    stage 3: 2 P / n + V + 4 V + 4 (P - V) / n + (2 + 2 m) P / n + 12 B of buffers

Norms, routers and sinks take 16 bytes a number on every rank.
"""

from p828.config import Config
from p828.plan.activations import Sizes
from p828.plan.peak import COMMUNICATION, peak
from p828.plan.setup import plain_setup
from p828.plan.state import FLOAT32, MOMENTS, State, training_state
from p828.plan.tensors import layer_shapes, parameter_shapes

STAGES = (1, 2, 3)
BUFFERS = 2  # engine/sharded/weights.py's


def sharded_state(config: Config, stage: int, ranks: int) -> State:
    """Bytes that a rank keeps between micro-batches; buffers count as weights or gradients."""
    setup = plain_setup(config)._replace(is_bfloat16=config.train.dtype != "float32")
    parameters = parameter_shapes(config.model)
    matrices = sum(one.numbers for one in parameters if one.is_matrix)
    small = sum(one.numbers for one in parameters) - matrices
    layer = sum(one.numbers for one in layer_shapes(config.model) if one.is_matrix)
    vocabulary = matrices - config.model.num_hidden_layers * layer
    number, share = setup.computed_bytes, matrices / ranks
    moment = number if setup.has_bfloat16_moments else FLOAT32
    largest = vocabulary if config.model.tie_word_embeddings else vocabulary / 2
    weights = number * (share + BUFFERS * layer + largest if stage == 3 else matrices)
    sums = matrices if stage == 1 else vocabulary + (matrices - vocabulary) / ranks
    buffers = 0 if stage == 1 else 2 * BUFFERS * layer * number
    masters = (FLOAT32 - number) * share
    return State(
        round(weights) + FLOAT32 * small,
        round(masters),
        round(FLOAT32 * sums + buffers) + FLOAT32 * small,
        round(MOMENTS * moment * share) + MOMENTS * FLOAT32 * small,
    )


def sharded_total(config: Config, stage: int, ranks: int) -> int:
    """Bytes of a run on each GPU. `config.model.vocab_size` is the model's, not 0."""
    setup = plain_setup(config)._replace(is_bfloat16=config.train.dtype != "float32")
    plain = peak(config, setup, config.train.micro_batch_size)
    micro_batch = plain.total - training_state(config.model, config.optimizer, setup).total - plain.weight_gradients
    layers = config.model.num_hidden_layers
    cuts = layers * Sizes.of(config, config.train.micro_batch_size).residual  # what a layer adds, kept for the cut
    a_layer = plain.weight_gradients // layers
    return micro_batch + cuts + a_layer + sharded_state(config, stage, ranks).total + COMMUNICATION


def lowest_stage(config: Config, ranks: int, memory_bytes: float) -> int | None:
    """The first stage with which a run takes no more than that on each GPU; None if none does."""
    return next((stage for stage in STAGES if sharded_total(config, stage, ranks) <= memory_bytes), None)
