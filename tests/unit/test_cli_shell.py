"""The command line as a shell sees it: what is on stdout, exit codes, completion, how little `--help` costs, and what
`doctor` finds."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

from hf_encdec_distill import progress
from hf_encdec_distill.cli import _display, doctor
from hf_encdec_distill.cli.main import COMMANDS, build_parser, main


DOCS = Path(__file__).parents[2] / "docs" / "commands.md"
PROGRAM = [sys.executable, "-m", "hf_encdec_distill"]
SCRIPT = "import sys\nfrom hf_encdec_distill.cli import main as cli\n{}\nsys.exit(cli.main(['info', 'model']))"


@pytest.mark.process
def test_help_of_every_command_imports_nothing_but_ours():
    code = """
import contextlib, io, sys
from hf_encdec_distill.cli.main import COMMANDS, main
for arguments in (["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        main(arguments)
    assert said.getvalue()
print("\\n".join({name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names))
"""
    startup = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before = {name.partition(".")[0] for name in startup.stdout.split()}
    assert set(run.stdout.split()) - before - {"__main__"} == {"hf_encdec_distill"}


def test_every_command_has_json():
    for name, module in COMMANDS.items():
        args, extra = build_parser().parse_known_args([*module.EXAMPLE.split()[1:], "--json"])
        assert (args.command, args.json) == (name, True) and "--json" not in extra


def test_what_libraries_print_is_not_on_stdout(monkeypatch, capsys):
    def run(args):
        print("a library's remark")
        _display.say_result(args, {"found": 1}, "one found")

    monkeypatch.setattr(COMMANDS["info"], "run", run)
    assert main(["info", "model"]) == 0
    assert tuple(capsys.readouterr()) == ("one found\n", "a library's remark\n")
    assert main(["info", "model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"found": 1}


@pytest.mark.process
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_an_answer_in_letters_that_stdout_does_not_have(encoding):
    """As on Windows, where a file that stdout goes to is in the system's encoding."""
    code = "def run(args):\n    cli.info.say_result(args, {'a': 'Ω é'}, 'Ω é')\ncli.info.run = run"
    words = [sys.executable, "-c", SCRIPT.format(code)]
    run = subprocess.run(words, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert (
        run.stdout.decode(encoding).strip()
        == {"utf-8": "Ω é", "ascii": "\\u03a9 \\xe9", "cp1252": "\\u03a9 é"}[encoding]
    )


@pytest.mark.process
def test_a_reader_that_has_seen_enough():
    code = "def run(args):\n    cli.info.say_result(args, {}, 'a line\\n' * 99_999)\ncli.info.run = run"
    words = [sys.executable, "-c", SCRIPT.format(code)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


@pytest.mark.process
def test_exit_codes_are_those_of_the_page(tmp_path):
    """In processes, as a script meets them; `2` and `130` are tested command by command in test_cli.py."""
    documented = re.findall(r"^\| (\d+) \|", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert documented == ["0", "1", "2", "130", "143"]
    raised = {
        0: "cli.info.run = lambda args: None",
        1: "def run(args):\n    raise RuntimeError('a fault of ours')\ncli.info.run = run",
        2: "def run(args):\n    raise ValueError('a mistake of yours')\ncli.info.run = run",
        130: "def run(args):\n    raise KeyboardInterrupt\ncli.info.run = run",
        143: "import os, time\ndef run(args):\n    os.kill(os.getpid(), 15)\n    time.sleep(9)\ncli.info.run = run",
    }
    for code, how in raised.items():
        run = subprocess.run([sys.executable, "-c", SCRIPT.format(how)], capture_output=True, text=True)
        assert run.returncode == code
        assert ("Traceback" in run.stderr) == (code == 1)
        assert run.stdout == ""


@pytest.mark.process
@pytest.mark.parametrize("in_background", [False, True])
def test_sigterm_ends_a_command_as_ctrl_c_does(tmp_path, in_background):
    """Also where a shell has told it to ignore Ctrl-C."""
    script = """
import os, signal, sys, time
from pathlib import Path
from hf_encdec_distill.cli import main as cli
from hf_encdec_distill.cli.quickstart.timed_training import TimeShare

def run(args):
    share = TimeShare(9.0, 1, 1.0, print)
    try:
        with share.catching_interrupts():
            os.kill(os.getpid(), signal.SIGTERM)  # the step ends, and is saved
            print(share._stop.is_set())
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)
    finally:
        print("tidied up")

cli.info.run = run
sys.exit(cli.main(["info", "model"]))
"""
    start = "import os, signal, sys; signal.signal(2, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    words = [sys.executable, "-c", script]
    run = subprocess.run(
        [sys.executable, "-c", start, *words] if in_background else words, capture_output=True, text=True
    )
    assert run.returncode == 143 and "stopping after this step" in run.stderr, run.stderr
    assert run.stderr.splitlines()[-3:] == ["True", "tidied up", "hf-encdec-distill info: interrupted"]


@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ev"], {"evaluate"}),
        (["e"], {"evaluate", "export"}),
        (["doctor", "--js"], {"--json"}),
        (["cache", "--kind", "s"], {"sampled"}),
        (["info", "--dtype", ""], {"float32", "bfloat16", "float16"}),
    ],
)
def test_bash_completes(words, expected, tmp_path):
    program = tmp_path / "hf-encdec-distill"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom hf_encdec_distill.cli.main import main\nsys.exit(main())\n"
    )
    program.chmod(0o755)
    register = shutil.which("register-python-argcomplete", path=str(Path(sys.executable).parent))
    line = " ".join([program.name, *words])
    script = f"""
eval "$({sys.executable} {register} {program.name})"
COMP_LINE='{line}' COMP_POINT={len(line)} COMP_TYPE=9 COMP_WORDS=({program.name} {" ".join(w or "''" for w in words)})
COMP_CWORD={len(words)}
$(complete -p {program.name} | sed 's/.*-F \\([^ ]*\\).*/\\1/') {program.name} '{words[-1]}' ''
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert {word.strip() for word in run.stdout.split()} == expected, run.stderr


@pytest.mark.process
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_page_says_how_each_shell_completes(shell):
    section = DOCS.read_text(encoding="utf-8").partition("## Shell completion")[2]
    (command,) = re.findall(rf"^\| {shell} \| `([^`]*)`", section, flags=re.MULTILINE)
    words = re.search(r"register-python-argcomplete[^)|\\]*", command)[0].split()
    register = shutil.which(words[0], path=str(Path(sys.executable).parent))
    run = subprocess.run([sys.executable, register, *words[1:]], capture_output=True, text=True, check=True)
    assert "hf-encdec-distill" in run.stdout and "_ARGCOMPLETE" in run.stdout


def test_progress_shows_the_time_left_of_what_takes_long(monkeypatch, capsys):
    with progress.progress("scoring") as update:
        update(0.5, "8 of 16 rows")
    assert capsys.readouterr().err == ""  # done before anybody wonders
    monkeypatch.setattr(progress, "_SECONDS_UNSEEN", 0.0)
    with progress.progress("scoring") as update:
        time.sleep(0.2)
        update(0.5, "8 of 16 rows")
        time.sleep(0.2)
        update(0.75, "12 of 16 rows")
    drawn = capsys.readouterr().err
    assert re.search(r"scoring: +50%.*00:00<00:00 .*8 of 16 rows", drawn), drawn


# The doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_finds_what_is_there(capsys):
    assert main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["healthy"] and said["broken"] == {}
    assert said["versions"]["python"] == platform.python_version()
    for name in ("torch", "transformers", "hf-encdec-distill", "onnxruntime"):
        assert said["versions"][name] == metadata.version(name)
    import onnxruntime
    import openvino

    assert said["runtimes"]["torch"][0] == "cpu"
    assert said["runtimes"]["onnxruntime"] == onnxruntime.get_available_providers()
    assert [device.split()[0] for device in said["runtimes"]["openvino"]] == openvino.Core().available_devices
    assert said["runtimes"]["coremltools"] == ["converts; runs on macOS alone"] or sys.platform == "darwin"
    assert said["machine"]["usable_cores"] >= 1 and said["machine"]["threads"] == torch.get_num_threads()
    if sys.platform == "linux" and platform.machine() == "x86_64":
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)[1].split()
        features = said["machine"]["cpu_features"]
        assert ("AVX2" in features, "VNNI" in features, "AMX" in features) == (
            "avx2" in flags,
            bool({"avx512_vnni", "avx_vnni"} & set(flags)),
            bool({"amx_int8", "amx_bf16"} & set(flags)),
        )
    assert main(["doctor"]) == 0
    assert metadata.version("torch") in capsys.readouterr().out


def test_doctor_says_what_a_missing_extra_would_add(monkeypatch, capsys):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "peft" else version(name))
    assert main(["doctor", "--json"]) == 0
    extras = json.loads(capsys.readouterr().out)["extras"]
    offered = metadata.metadata("hf-encdec-distill").get_all("Provides-Extra")
    assert set(extras) == set(offered) - {"all", "dev", "docs"}  # for those who change the package
    extra = extras["peft"]
    assert extra["missing"] == ["peft>=0.17"] and extra["install"] == 'pip install "hf-encdec-distill[peft]"'
    assert main(["doctor"]) == 0
    assert 'pip install "hf-encdec-distill[peft]"' in capsys.readouterr().out


def test_doctor_knows_traps(monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_vnni": False}, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["machine"]["cpu_features"] == ["AVX2"]
    assert any("no VNNI" in trap for trap in said["traps"]) and any("bfloat16" in trap for trap in said["traps"])


@pytest.mark.process
def test_doctor_fails_where_something_needed_is_broken(tmp_path):
    (tmp_path / "evaluate.py").write_text("raise ImportError('half an installation')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [*PROGRAM, "doctor", "--json"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.returncode == 2, run.stderr
    said = json.loads(run.stdout)
    assert not said["healthy"] and said["broken"]["evaluate"] == "ImportError: half an installation"
    error = run.stderr.splitlines()[-1]
    assert error.startswith("hf-encdec-distill doctor: error:") and "evaluate: ImportError" in error
