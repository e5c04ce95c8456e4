"""The embedding's gradient, added to a float32 sum in place.

Autograd would make a table of all tokens' gradients for each micro-batch. It would be mostly zeros, and its scattered
additions would be in no fixed order or rounded to bfloat16. The Triton form is in `embedding_triton`, imported only
when the sum is on a GPU.
"""

from torch import Tensor


def add_embedding_gradient_(dweight_VH: Tensor, tokens_T: Tensor, dx_TH: Tensor) -> None:
    """dweight[token] += Σ dx over the token's places, in a fixed order; rows of absent tokens are not touched.

    `dweight_VH` is float32 (float64 on a CPU), `tokens_T` int64, `dx_TH` of any floating dtype; all contiguous.
    """
    if dweight_VH.is_cuda:
        from p828.kernels.embedding_triton import add_embedding_gradient_triton_

        add_embedding_gradient_triton_(dweight_VH, tokens_T, dx_TH)
    else:
        add_embedding_gradient_plain_(dweight_VH, tokens_T, dx_TH)


def add_embedding_gradient_plain_(dweight_VH: Tensor, tokens_T: Tensor, dx_TH: Tensor) -> None:
    """The plain twin."""
    dweight_VH.index_add_(0, tokens_T, dx_TH.to(dweight_VH.dtype))
