"""Conversations to samples of tokens: as many as fit in a row, each whole, with the assistant's tokens as targets."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from p828.config import DataConfig
from p828.data.batch import Sample
from p828.data.text.documents import DocumentStream
from p828.data.text.packing import BestFitPacker, Packer, Packing
from p828.data.tokenizer.chat_template import ChatTemplate
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import ConfigError


class ConversationPacker(BestFitPacker):
    """Iterator of `Sample`s of conversations: every token once, no EOS but what the template writes.

    Only a conversation of more than a row is split, and rows are padded. Targets are what the assistant says.
    """

    fills = False

    def _encode(self, texts: list[str]) -> list[npt.NDArray[Any]]:
        return [*self.tokenizer.encode_marked(texts)]

    def _tokens(self, encoded: Sequence[npt.NDArray[Any]], document_ids: npt.NDArray[np.int32]) -> Sample:
        tokens = np.concatenate(encoded)
        is_first = np.diff(document_ids, prepend=-1) != 0  # what comes before belongs to another conversation
        return Sample(
            np.ascontiguousarray(tokens["id"]),
            document_ids,
            text_bytes=tokens["text_bytes"],
            is_target=tokens["is_target"] & ~is_first,
        )


def open_packer(config: DataConfig, documents: DocumentStream, tokenizer: Tokenizer) -> Packing:
    """The training samples of a source's documents."""
    if config.messages_field:
        return ConversationPacker(documents, tokenizer, config.sequence_length)
    pack: type[Packer] | type[BestFitPacker] = Packer if config.packing == "concatenate" else BestFitPacker
    return pack(documents, tokenizer, config.sequence_length)


def template_of(config: DataConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of the source's conversations; None of text.

    Raises ConfigError if the tokenizer has none, or one that cannot be trained with.
    """
    if not config.messages_field:
        return None
    if tokenizer.template is None:
        raise ConfigError(
            f"data.messages_field = {config.messages_field!r}: the run's tokenizer has no chat template to write "
            "conversations with"
        )
    tokenizer.template.check()
    return tokenizer.template
