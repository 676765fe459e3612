"""Both sets of versions that every commit has to pass: `nox` runs them, each in an environment of its own."""

import nox


nox.options.sessions = ["lint", "optimum", "latest", "wheel"]
nox.options.default_venv_backend = "venv"


@nox.session
def lint(session):
    """Format and lint."""
    session.install("ruff>=0.14,<0.15")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session
def optimum(session):
    """transformers 4.57 with Optimum: what `pip install -e ".[all,dev]"` gives."""
    session.install("-e", ".[all,dev]")
    session.run("pytest", *session.posargs)


@nox.session
def latest(session):
    """The newest transformers 5, which no release of optimum-onnx admits."""
    session.install("-e", ".[demo,dev,exporters]", "transformers>=5.23,<6", "trl>=1.16")
    session.run("pytest", *session.posargs)


@nox.session
def wheel(session):
    """What people get, built and installed into an empty environment, from the quickstart to the Hub and back."""
    session.install("-e", ".[demo,dev]", "transformers>=5.23,<6")
    session.run("pytest", "-m", "wheel", "-n", "0")
