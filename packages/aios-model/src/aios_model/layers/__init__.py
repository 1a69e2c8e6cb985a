"""The parts a decoder is made of, each of them a few lines of tensor arithmetic.

Shapes, here and everywhere: T packed tokens, S context tokens, D model, F feed-forward, N query heads, K kv heads,
G = N / K query heads per kv head, H head size, V vocabulary, E experts.
"""
