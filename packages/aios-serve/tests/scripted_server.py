"""`run_server` around the scripted engine, as a program. Its argument is JSON: `{"engine": {...}, "server": {...}}`.

`"template"` beside them names one of `support/chat_templates.py`.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

from rich.console import Console

from aios_model.errors import ModelNotFoundError
from aios_serve import server
from aios_serve.config import EngineConfig
from aios_serve.logging_setup import configure_logging
from aios_serve.server_config import ServerConfig


def main():
    spec = importlib.util.spec_from_file_location("scripted", Path(__file__).with_name("conftest.py"))
    scripted = importlib.util.module_from_spec(spec)
    sys.modules["scripted"] = scripted
    spec.loader.exec_module(scripted)
    options = json.loads(sys.argv[1])
    engine = options.get("engine", {})
    if "load_error" in engine:
        engine["load_error"] = ModelNotFoundError(engine["load_error"])
    if "template" in options:
        sys.path.append(str(Path(__file__).with_name("support")))
        chat_templates = importlib.import_module("chat_templates")
        engine["tokenizer"] = chat_templates.byte_tokenizer(getattr(chat_templates, options["template"]))
        engine["max_model_len"] = 4096
    config = {
        name: Path(value) if name in ("uds", "tenants", "ssl_certfile", "ssl_keyfile") else value
        for name, value in options.get("server", {}).items()
    }
    server.AsyncEngine = lambda config: scripted.ScriptedEngine(config=config, **engine)
    console = Console(stderr=True)
    configure_logging("info", console)
    return server.run_server(EngineConfig(), ServerConfig(**config), console=console)


if __name__ == "__main__":
    sys.exit(main())
