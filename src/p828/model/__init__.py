"""The Mixture-of-Experts transformer as plain tensor math.

Legend of the shape suffixes used in this package:

    B  rows of a batch            S  tokens of a row         T  all tokens, B * S
    H  hidden_size                V  vocab_size              L  num_hidden_layers
    N  num_attention_heads        G  num_key_value_heads     D  head_dim
    E  n_routed_experts           K  num_experts_per_tok     R  routed tokens, T * K
    I  moe_intermediate_size      P  width of gate and up projection: I, or 2 * I for `swiglu_of_product`
    C  tokens held in a key-value cache

Weights keep Hugging Face's names and orientation, (out_features, in_features). `forward` casts parameters to the dtype
it computes in where they are not stored in it.
"""
