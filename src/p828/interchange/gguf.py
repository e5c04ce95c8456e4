"""llama.cpp's file format, GGUF: a checkpoint as one file that llama.cpp runs, where it has exactly the model.

llama.cpp's `src/models/*.cpp` say which keys and tensors an architecture has. The `gguf` package knows their names.
"""

import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from p828.config import Config, ModelConfig
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import ConfigError, DataError, RunFailed
from p828.files import new_file
from p828.inference.load import SavedModel, opened_model
from p828.interchange.architectures.architecture import STACKED, Piece
from p828.interchange.architectures.llama_cpp import LlamaCppArchitecture, architecture_of
from p828.interchange.export import check_room
from p828.interchange.gguf_vocabulary import Vocabulary, vocabulary
from p828.interchange.weights import WeightsReader, WrittenTensor, written_tensors
from p828.model.costs import projected_width

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TENSOR_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # of `gguf.GGMLQuantizationType`
FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}  # of `gguf.LlamaFileType`


class GGUFExport(NamedTuple):
    checkpoint: Path
    step: int
    architecture: str
    """llama.cpp's."""
    bytes: int
    """Of the weights."""


def export_gguf(checkpoint: str | Path, file: Path, dtype: Dtype) -> GGUFExport:
    """Write a checkpoint's model and tokenizer as one file, whole or not at all.

    `dtype` is that of the matrices; the router, its bias, norms and sinks are float32. Tensors are read and written one
    by one. Raises what `inference.load.opened_model` does; ConfigError when llama.cpp has no such model or tokenizer,
    and for a `file` that is there; DataError for a number that `dtype` does not have; RunFailed when the file cannot be
    written.
    """
    if find_spec("gguf") is None:
        raise ConfigError(f"{file}: gguf, the package that writes it, is not installed: pip install 'p828[export]'")
    if os.path.lexists(file):  # before the checkpoint is read
        raise ConfigError(f"{file}: is there already; a new name is accepted")
    with opened_model(checkpoint) as saved:
        architecture = architecture_of(saved.config.model)
        entries = vocabulary(saved.tokenizer, saved.config.model.vocab_size)
        pieces = partial(_pieces, _names(architecture, saved.config.model), architecture.name)
        tensors = written_tensors(pieces, saved.config.model, saved.checkpoint.tensors, DTYPES[dtype])
        needed = sum(tensor.bytes for tensor in tensors)
        try:
            with new_file(file) as temporary:
                check_room(temporary.parent, file, needed)
                _write(temporary, architecture.name, saved, tensors, entries, FILE_TYPES[dtype])
        except OSError as error:
            raise RunFailed(f"{file}: cannot be written: {error.strerror or error}") from None
        return GGUFExport(saved.checkpoint.path, saved.checkpoint.step, architecture.name, needed)


def _names(architecture: LlamaCppArchitecture, config: ModelConfig) -> Any:
    """`gguf.TensorNameMap`: llama.cpp's name of a tensor, without .weight or .bias, by Hugging Face's."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (arch,) = [arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture.name]
    return get_tensor_name_map(arch, config.num_hidden_layers)


def _pieces(names: Any, architecture: str, ours: str, config: ModelConfig) -> list[Piece]:
    """llama.cpp's tensors that are one of our state's: experts stay stacked, and gate and up projection are two."""
    module, _, last = ours.rpartition(".")
    if last == "e_score_correction_bias":
        return [Piece(f"{names.get_name(f'{module}.e_score_correction')}.bias", ())]
    if STACKED.fullmatch(ours) and last == "gate_up_proj":
        width = projected_width(config.hidden_act, config.moe_intermediate_size)
        halves = (("gate_proj", slice(0, width)), ("up_proj", slice(width, 2 * width)))
        return [
            Piece(f"{names.get_name(f'{module}.{projection}')}.weight", (slice(None), half))
            for projection, half in halves
        ]
    found = [Piece(f"{names.get_name(ours.removesuffix('.weight'))}.weight", ())]
    if ours == "model.embed_tokens.weight" and config.tie_word_embeddings and architecture == "mimo2":
        found.append(Piece("output.weight", ()))  # the other architectures take the embedding for a missing head
    return found


def _write(
    path: Path,
    architecture: str,
    saved: SavedModel,
    tensors: list[WrittenTensor],
    entries: Vocabulary,
    file_type: str,
) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, architecture)
    try:
        _add_keys(writer, saved.config, file_type)
        _add_vocabulary(writer, entries, saved.tokenizer)
        for tensor in tensors:
            kind = GGMLQuantizationType[TENSOR_TYPES[tensor.dtype]]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        reader = WeightsReader(saved.checkpoint.tensors)
        for tensor in tensors:
            writer.write_tensor_data(_stored(reader.read(tensor), tensor))
    finally:
        writer.close()


def _stored(values: Tensor, tensor: WrittenTensor) -> "np.ndarray[Any, Any]":
    """Numbers as the file holds them. Raises DataError when float16 has no such number."""
    if tensor.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy()  # numpy has no bfloat16
    if tensor.dtype == torch.float16:
        rounded = values.half()
        if not torch.equal(rounded.isfinite(), values.isfinite()):
            largest = values.abs().max().item()
            raise DataError(
                f"{tensor.source}: float16 has no {largest:g}, only up to 65504; bfloat16 or float32 has it"
            )
        return rounded.numpy()
    return values.numpy()


def _add_keys(writer: Any, config: Config, file_type: str) -> None:
    """What llama.cpp must know of the model; keys of the other architecture are passed over by it."""
    from gguf import ExpertGatingFuncType, LlamaFileType, RopeScalingType

    model, scaling = config.model, config.model.rope_scaling
    writer.add_type("model")
    writer.add_name(config.name)
    writer.add_file_type(LlamaFileType[file_type])
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_hidden_layers)
    writer.add_feed_forward_length(model.moe_intermediate_size)  # of dense layers, of which there are none
    writer.add_leading_dense_block_count(0)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    if scaling.factor != 1:  # llama.cpp's own factor on cos and sin is p828's, 0.1 ln s + 1
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
    writer.add_expert_count(model.n_routed_experts)
    writer.add_expert_used_count(model.num_experts_per_tok)
    writer.add_expert_feed_forward_length(model.moe_intermediate_size)
    writer.add_expert_shared_count(model.n_shared_experts)
    writer.add_expert_gating_func(ExpertGatingFuncType[model.scoring_func.upper()])
    writer.add_expert_weights_norm(model.norm_topk_prob)
    writer.add_expert_weights_scale(model.routed_scaling_factor)
    if model.topk_group < model.n_group:  # llama.cpp takes no group that limits nothing
        writer.add_expert_group_count(model.n_group)
        writer.add_expert_group_used_count(model.topk_group)
    if writer.arch == "mimo2":  # a window of the whole context, and no other base in it
        writer.add_sliding_window(model.max_position_embeddings)
        writer.add_sliding_window_pattern([True] * model.num_hidden_layers)
        writer.add_rope_freq_base_swa(model.rope_theta)


def _add_vocabulary(writer: Any, entries: Vocabulary, tokenizer: Tokenizer) -> None:
    template = tokenizer.template
    first: int | None = None
    writer.add_tokenizer_model("gpt2")  # llama.cpp's word for byte-level BPE
    writer.add_tokenizer_pre(entries.pre_tokenizer)
    writer.add_token_list(entries.tokens)
    writer.add_token_types(entries.types)
    writer.add_token_merges(entries.merges)
    if template is not None:
        writer.add_chat_template(template.source)
        first = tokenizer.inner.token_to_id(template.variables.get("bos_token", ""))  # what the template may write
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_bos_token_id(tokenizer.eos_id if first is None else first)  # without it llama.cpp takes 11, GPT-2's
    writer.add_add_bos_token(False)
    if tokenizer.end_ids[-1] != tokenizer.eos_id:
        writer.add_eot_token_id(tokenizer.end_ids[-1])  # ends an answer
