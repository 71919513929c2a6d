"""The hand-written decoder layer.

What a layer is: `description`; how it is read from the modules of transformers: `recognise`, with
`families` for what only their code says.

What is computed: `passes` over a row, made of `attention_half` (with `latent`) and `mlp_half` (with
`mixtures`, `token_input`), of products and norms in `linears`; and `proof`, the comparison with the
layer's own code.
"""
