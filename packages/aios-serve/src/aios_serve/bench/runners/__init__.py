"""What runs inside a peer's environment: one module per engine, loaded by `__main__.py` with that peer's Python.

Nothing of AIOS and nothing outside the standard library is imported when these modules are; a peer's own packages are
imported by name when a job starts, since they exist in its environment only.
"""
