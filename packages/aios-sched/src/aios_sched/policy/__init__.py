"""Who is admitted next, and who gives way? `base.py` is the socket, `registry.py` knows the policies by name."""
