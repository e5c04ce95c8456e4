"""A row of tokens: what one place in a batch is made of."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

PADDING = -1  # in place of a document's number


@dataclass(frozen=True)
class Sample:
    tokens: npt.NDArray[np.int64]
    """[S+1]; shorter only before `padded`. EOS where padded."""
    document_ids: npt.NDArray[np.int32]
    """[S+1]: 0, 1, 2, … within the row; a document's EOS belongs to it. -1 where padded, at the end."""
    epoch: int = 0
    """Epoch in which the row's first document was given."""
    documents: int = 0
    """Documents that end in the row."""
    cut_documents: int = 0
    """Those of them that have a part in another row."""
    source: int = 0
    """Number of the mixture's source."""
    text_bytes: npt.NDArray[np.int64] | None = None
    """[S+1]: bytes of UTF-8 text that each token stands for; 0 where padded. Validation rows have them."""

    def padded(self, length: int, eos_id: int) -> "Sample":
        missing = length - len(self.tokens)
        if not missing:
            return self
        return replace(
            self,
            tokens=np.pad(self.tokens, (0, missing), constant_values=eos_id),
            document_ids=np.pad(self.document_ids, (0, missing), constant_values=PADDING),
            text_bytes=None if self.text_bytes is None else np.pad(self.text_bytes, (0, missing)),
        )
