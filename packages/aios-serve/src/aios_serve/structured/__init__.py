"""Structured output: what a request's output must look like, and how tokens are kept to it.

In the HTTP process: `request.py` reads the fields of a body, `checker.py` has the constraint compiled by a `worker.py`
process that may be killed. In the engine process: `store.py` compiles it again, beside the steps, and `processor.py`
masks logits. Both know tokens from `vocabulary.py` and grammars from `grammar.py`, over llguidance.
"""
