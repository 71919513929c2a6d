"""Layers that carry a state along the document: recurrences and short convolutions, exact over any
layout of the row, without an exchange of tokens.

`fragments` says which stretches of documents a rank holds and where each one's state comes from,
`chunked` computes recurrences over them, `convolution` the short convolutions, and `layers` puts
both into the mixers of transformers' models, where `exchange` decides what travels.

`chunked` takes `heads` in parts. Each is `computed` by Triton (`chunk_kernels`) or by PyTorch
(`within` chunks, and `states` along them); `passing` carries states from rank to rank.
"""
