"""What AIOS is checked with.

    nox -l                              lists the sessions
    nox -t ci                           runs everything that must pass
    nox -s test-sched -- -k preempt     passes what follows `--` to the session's tool

A layer is tested in an environment that holds this layer and the layers below it and nothing else, so that importing an
upper layer fails as a ModuleNotFoundError. The environments live in `.nox/` and share their files with uv's cache.
"""

from __future__ import annotations

import nox

nox.needs_version = ">=2026.10"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"  # `uv sync` removes from an environment what does not belong into it
nox.options.tags = ["ci"]


@nox.session(tags=["ci"])
def lint(session: nox.Session) -> None:
    """Style, formatting, types and import contracts: ruff, basedpyright, import-linter."""
    sync(session, "--all-packages", "--group=lint", "--group=test")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports")
    session.run("basedpyright", f"--pythonpath={session.bin}/python")


@nox.session(tags=["ci"])
def docs(session: nox.Session) -> None:
    """The documentation site, strictly; `nox -s docs -- serve` shows it on http://127.0.0.1:8000 while you write."""
    sync(session, "--only-group=docs")
    session.run("mkdocs", *(session.posargs or ["build", "--strict"]), env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(name="test-model", tags=["ci"])
def test_model(session: nox.Session) -> None:
    """aios-model alone, compared with transformers and the gguf package."""
    sync(session, "--package=aios-model", "--group=test", "--group=oracle")
    pytest(session, "packages/aios-model")


@nox.session(name="test-kvcache", tags=["ci"])
def test_kvcache(session: nox.Session) -> None:
    """aios-kvcache over aios-model."""
    sync(session, "--package=aios-kvcache", "--group=test")
    pytest(session, "packages/aios-kvcache")


@nox.session(name="test-sched", tags=["ci"])
def test_sched(session: nox.Session) -> None:
    """aios-sched over the two layers below."""
    sync(session, "--package=aios-sched", "--group=test")
    pytest(session, "packages/aios-sched")


@nox.session(name="test-parallel", tags=["ci"])
def test_parallel(session: nox.Session) -> None:
    """aios-parallel over the layers below it: ranks are threads and processes of this machine."""
    sync(session, "--package=aios-parallel", "--group=test")
    pytest(session, "packages/aios-parallel")


@nox.session(name="test-quant", tags=["ci"])
def test_quant(session: nox.Session) -> None:
    """aios-quant over the layers below it; its checkpoints are read by transformers too."""
    sync(session, "--package=aios-quant", "--group=test", "--group=oracle")
    pytest(session, "packages/aios-quant")


@nox.session(name="test-serve", tags=["ci"])
def test_serve(session: nox.Session) -> None:
    """aios-serve over everything: HTTP in process, then end to end with the openai client and the bundled model."""
    sync(session, "--package=aios-serve", "--group=test", "--group=oracle", "--group=e2e")
    pytest(session, "packages/aios-serve")


@nox.session(name="test-cluster", tags=["ci"])
def test_cluster(session: nox.Session) -> None:
    """What needs a Ray cluster: it is started on this machine, and nothing of it is left behind."""
    sync(session, "--package=aios-serve", "--group=test", "--group=e2e", "--group=cluster")
    pytest(session, "packages/aios-serve/tests/cluster")


@nox.session(name="test-workspace", tags=["ci"])
def test_workspace(session: nox.Session) -> None:
    """What no package can say alone: who imports torch, what the members may depend on, what the documents promise."""
    sync(session, "--all-packages", "--group=test")
    pytest(session, "tests")


@nox.session
def gpu(session: nox.Session) -> None:
    """The tests marked `gpu`, of all packages; they skip with a reason where there is no CUDA device."""
    sync(session, "--all-packages", "--group=test", "--group=oracle", "--group=e2e")
    pytest(session, "packages", "-m", "gpu")


def sync(session: nox.Session, *selection: str) -> None:
    """Make the session's own environment hold exactly what `selection` (options of `uv sync`) names."""
    environment = {"UV_PROJECT_ENVIRONMENT": session.virtualenv.location, "VIRTUAL_ENV": session.virtualenv.location}
    session.run_install("uv", "sync", "--quiet", "--no-default-groups", *selection, env=environment)


def pytest(session: nox.Session, *arguments: str) -> None:
    """Run pytest with `arguments`, then with what the user wrote after `--`."""
    # One thread per process: tests run tiny models, and threads that spin for each other on shared cores cost tenfold.
    session.run("pytest", *arguments, *session.posargs, env={"OMP_NUM_THREADS": "1"})
