"""Layers with slots for adapters, from which every model family is built.

Shape letters: B batch, T length, S length of keys (cache included), D embed, F mlp, N heads, K key/value heads,
H head_dim, V vocab, L layers, R rank, P virtual tokens.
Logical axes of parameters: layers vocab embed heads kv_heads head_dim mlp rank block batch length.
"""
