"""The sets of versions that every commit has to pass, each in an environment of its own: `nox`, or `nox -s optimum`.

`.ci/run` runs README's test command, which is what `latest` is, and then the others.
"""

import re
import shutil
import subprocess

import nox


nox.options.default_venv_backend = "venv"
REQUIREMENTS = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]


@nox.session
def lint(session):
    """Format and lint, and nothing in the package that Python 3.10 does not have."""
    session.install("ruff>=0.14,<0.15", "vermin>=1.6")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    # `tensor.long()` is not Python 2's.
    session.run(
        "vermin", "--target=3.10-", "--violations", "--no-tips", "--eval-annotations", "--exclude", "long", "src"
    )


@nox.session
def types(session):
    """The package's annotations, against the types of the newest packages."""
    session.install("-e", ".[all,dev]")
    session.run("mypy")


@nox.session(default=False)
def quick(session):
    """Model, losses, alignment, trainer, config: an answer in minutes, while a change is being made."""
    session.install("-e", ".[all,dev]")
    session.run("pytest", "-m", "quick", *session.posargs)


@nox.session
def latest(session):
    """The newest transformers 5: what `pip install -e ".[all,dev]"` gives."""
    session.install("-e", ".[all,dev]")
    session.run("pytest", *session.posargs)


@nox.session
def optimum(session):
    """transformers 4.57 with Optimum, whose newest optimum-onnx admits no later one."""
    session.install("-e", ".[coreml,demo,dev,genai,optimum]")
    session.run("pytest", *session.posargs)


@nox.session
def openvino(session):
    """OpenVINO through the newest optimum-intel, which admits transformers up to 5.5 and no optimum-onnx."""
    session.install(
        "-e", ".[openvino]", "optimum-intel>=2.2,<3", "pytest>=8.3", "pytest-timeout>=2.3", "pytest-xdist>=3.8"
    )
    session.run("pytest", "-n", "0", "tests/export/test_optimum.py", "tests/export/test_optimum_openvino.py")


def lowest_python():
    """3.10, where there is one; otherwise None, which is the one that runs nox."""
    program = shutil.which("python3.10")
    # One that pyenv only lists is found, and does not run.
    runs = program is not None and subprocess.run([program, "--version"], capture_output=True).returncode == 0
    return "3.10" if runs else None


@nox.session(python=lowest_python())
def lowest(session):
    """The lowest version of each package that the package needs, under the tests of the model and of its parts."""
    pins = [re.sub(r">=([\d.]+).*", r"==\1", requirement) for requirement in REQUIREMENTS]
    session.install("-e", ".[demo,dev]", *pins)
    # torch 2.6 neither exports nor compiles the masks that transformers makes. The extras for exports ask for 2.7, and
    # tests that need a runtime of theirs are left to the other sessions.
    beyond = (
        "tests/model/test_common.py::test_torch_export_with_dynamic_lengths",
        "tests/model/test_cache_and_generation.py::test_a_compiled_decode_step_on_a_static_cache",
        # On Python 3.10 alone.
        "tests/model/test_attention_backends.py::test_a_compiled_encoder_that_slides",
        "tests/model/test_vision.py::test_compiled_it_is_one_graph_with_the_same_logits",
        "tests/unit/test_cli_shell.py::test_doctor_finds_what_is_there",
        "tests/unit/test_demo.py::test_an_export_of_fixed_shapes_is_given_what_it_takes",
        # Resumed within an epoch, a training is another with these versions: tests/invariants/test_trainer_resume.py,
        # which is left to the other sessions, fails as well.
        "tests/unit/test_quickstart_time.py::test_a_finished_run_trains_on_for_more_minutes",
        # transformers 4.57.0 itself takes no lr_scheduler_kwargs on a command line.
        *(
            f"tests/unit/test_bad_folders.py::test_training_arguments_that_transformers_stumbles_over[{command}-"
            "kwargs-of-another-scheduler]"
            for command in ("distill", "teach")
        ),
    )
    deselected = [f"--deselect={test}" for test in beyond]
    # Tests with processes of their own take minutes, and are about files and signals more than about versions.
    chosen = ("-m", "not slow and not wheel and not process", "tests/unit", "tests/model", *deselected)
    session.run("pytest", *(session.posargs or chosen))


@nox.session
def wheel(session):
    """What people get, built and installed into empty environments, from the quickstart to the Hub and back."""
    session.install("-e", ".[all,dev]")
    session.run("pytest", "-m", "wheel", "-n", "0")
