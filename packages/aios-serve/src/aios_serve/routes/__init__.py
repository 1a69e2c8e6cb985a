"""One file per concern; each exports a `router`. The path of a request begins in `chat.py`."""
