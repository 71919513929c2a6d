"""The hand-written decoder layer: what a layer is (`description`), how it is read from the modules
of transformers (`recognise`), its halves, its passes over a row, and the comparison with the
layer's own code (`proof`).
"""
