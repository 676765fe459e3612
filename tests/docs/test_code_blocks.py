"""Every code block of README and docs runs: README's from an empty folder, each from what the one before it made, and
those of a page in order, on toys that bear the names that the page uses.

A block that cannot run here says why in a comment before it, `<!-- not run here: ... -->`; one that needs Optimum, no
release of which admits transformers 5, `<!-- transformers 4.57 -->`, one of the other lane `<!-- transformers 5 -->`.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from distillation_toys import write_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer
from vision_toys import make_tower, write_smolvlm

from hf_encdec_distill import RopeEncDecForConditionalGeneration, data
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.models.prompts import encode_prompt


ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if "runs" not in path.parts  # what a run wrote
)
TEACHER = "HuggingFaceTB/SmolLM2-135M-Instruct"
RUNS = ("python", "bash")
# Shown, not run by a test of the docs: output, file trees, prompts, and what is to be compiled.
SHOWN = ("", "text", "swift", "cpp", "yaml", "json", "bibtex")
BLOCK = re.compile(r"(?:^<!-- (?P<note>[^>]*?) -->\n)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S)
LANE = f"transformers {'4.57' if transformers.__version__.startswith('4.') else '5'}"


def blocks(page):
    return [match.groupdict() for match in BLOCK.finditer((ROOT / page).read_text(encoding="utf-8"))]


def runs(block):
    note = block["note"] or ""
    if note.startswith("not run here") or note in ("quickstart", "test"):  # these two are what .ci/run and tests run
        return False
    return block["language"] in RUNS and not (note.startswith("transformers ") and note != LANE)


def learn(teacher, tokenizer, rows):
    """Teach it that an answer ends."""
    ids = [
        [*encode_prompt(tokenizer, row["source"]), *tokenizer(row["target"] + tokenizer.eos_token).input_ids]
        for row in rows
    ]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(teacher.train().parameters(), lr=3e-3)
    for _ in range(150):
        teacher(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    teacher.eval()


@pytest.fixture(scope="session")
def world(tmp_path_factory, make_bpe_tokenizer):
    """A folder with what the pages name and do not make themselves."""
    folder = tmp_path_factory.mktemp("world")
    rows = [{"source": f"def add{i}(a, b): return a + {i}", "target": f"Return a and {i}."} for i in range(60)]
    write_teacher(folder / TEACHER, make_bpe_tokenizer(), layers=13, std=0.1)
    teacher = AutoModelForCausalLM.from_pretrained(folder / TEACHER)
    tokenizer = AutoTokenizer.from_pretrained(folder / TEACHER)
    learn(teacher, tokenizer, rows[:32])
    teacher.save_pretrained(folder / TEACHER)
    run = folder / "runs" / "quickstart"
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher,
        tokenizer=tokenizer,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        layer_selection="even",
    )
    student.save_pretrained(run / "student")
    student.tokenizer.save_pretrained(run / "student")
    shutil.copytree(folder / TEACHER, run / "work" / "teacher")
    (run / "metrics.json").write_text("{}")
    make_tower("clip").save_pretrained(folder / "openai" / "clip-vit-large-patch14-336")
    write_smolvlm(folder / "HuggingFaceTB" / "SmolVLM-256M-Instruct", tokenizer)
    with open(folder / "pairs.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with open(folder / "pairs.csv", "w") as file:
        file.write("source,target\n")
        file.writelines('"{source}","{target}"\n'.format(**row) for row in rows)
    (folder / "corpus").mkdir()
    for i in range(200):
        (folder / "corpus" / f"{i}.txt").write_text(
            f"Of {i} things to read, a part is read and the rest is written.\n" * 4
        )
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def run_shell(code):
    """Our own commands in this process, since each would import torch again; everything else as it is."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["hf-encdec-distill", "export"]:
            words += ["--rows", "2"]  # of a toy more of them would say nothing more
        if "--max-steps" in words:  # the last one counts
            words += ["--max-steps", "2"]
        if words[:2] == ["hf-encdec-distill", "quickstart"]:
            words += ["--minutes", "0.1", "--encoder-layers", "2", "--decoder-layers", "2"]
        if words[:1] == ["hf-encdec-distill"]:
            assert main(words[1:]) == 0, line
        elif words[:1] == ["pip"]:
            assert words[1] == "install", line  # what it installs is there: the tests need it too
        elif words and "venv" not in words:  # the tests run in one
            program = Path(sys.executable).with_name(words[0])
            command = [str(program) if program.exists() else words[0], *words[1:]]
            subprocess.run(command, check=True, capture_output=True, text=True)


def run_block(page, block, namespace):
    if block["language"] == "bash":
        run_shell(block["code"])
    else:
        exec(compile(block["code"], f"{page}: {block['code'].splitlines()[0]}", "exec"), namespace)


@pytest.mark.process
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page, world, tmp_path, monkeypatch):
    shutil.copytree(world, tmp_path / "world", symlinks=True)
    monkeypatch.chdir(tmp_path / "world")
    namespace = {"__name__": page}
    for block in filter(runs, blocks(page)):
        run_block(page, block, namespace)


def test_readme_runs_in_an_empty_folder(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "fetch_builtin_teacher", lambda: world / TEACHER, raising=False)
    monkeypatch.chdir(tmp_path)
    verbosity = transformers.logging.get_verbosity()
    for block in blocks("README.md"):
        if block["note"] == "quickstart":
            run_shell(block["code"])
            transformers.logging.set_verbosity(verbosity)  # which the command sets for its whole process
        elif runs(block):
            block["code"] = block["code"].replace("max_steps=20", "max_steps=2")
            run_block("README.md", block, {"__name__": "README.md"})
            assert block["code"].splitlines()[-1].startswith("# ") and capsys.readouterr().out, "output as a comment"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "all else would be a change of the clone"


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_blocks_are_of_a_known_kind(page):
    for block in blocks(page):
        assert block["language"] in (*RUNS, *SHOWN), block["code"]
        if (block["note"] or "").startswith("not run here"):
            assert len(block["note"].removeprefix("not run here").strip(" :")) > 10, "say why"


def test_a_block_that_fails_is_found(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "page.md").write_text("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        test_blocks_run("page.md", world, tmp_path, monkeypatch)
    (tmp_path / "page.md").write_text("```bash\nhf-encdec-distill info nothing-there\n```\n")
    shutil.rmtree(tmp_path / "world")
    with pytest.raises(AssertionError):
        test_blocks_run("page.md", world, tmp_path, monkeypatch)


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = [
        match for line in page.splitlines() if line.startswith("**") for match in re.findall(r"\*\*`(.+?)`", line)
    ]
    assert len(headings) > 10
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    code = re.sub(r'"\n\s+f?"', "", code)  # sentences go over several lines
    theirs = {"Transformers does not recognize this architecture", "transformers"}
    assert [heading for heading in headings if heading not in code and heading not in theirs] == []
