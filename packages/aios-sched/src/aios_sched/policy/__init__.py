"""Who is admitted next: `base.py` is the socket, the other files are policies."""
