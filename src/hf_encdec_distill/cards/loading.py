"""How to load a student and its exports: the section of a card that changes when the student moves or is exported."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from ..export.backends import backend_of, targets
from ..files import check_fields, inside, read_json, write_text


Reads = Literal["source", "prompt", "chat"]

PARITY = "parity.json"
_BEGIN = "<!-- How to load {name}: export and push rewrite this section; delete this line to keep yours. -->"
_END = "<!-- End of how to load. -->"
# Of one line, and without the beginning of another inside: text that anybody may have written is searched for it.
_SECTION = re.compile(
    re.escape(_BEGIN).replace(r"\{name\}", "(?P<name>[^\n]+?)") + "(?:(?!<!-- How to load ).)*?" + re.escape(_END),
    re.DOTALL,
)
_SOURCE = re.compile("^source = (.+)$", re.MULTILINE)
_PLACEHOLDER = "The text that the model is to read."
_INSTALL = """```bash
pip install torch "transformers>=4.57"
```"""
_INSTALL_FOR_IMAGES = _INSTALL.replace("torch", "torch pillow")
READS_IMAGES = "rope_encdec_vision"  # the model_type
# What a card says of an export.
_FIELDS = {
    **{"target": str, "variant": str, "shapes_taken": str, "logits": float, "rows": int},
    **dict.fromkeys(("megabytes", "tokens", "ce"), dict),
}
_UNFINISHED = (".rejected", ".partial")


def why_not_proven(export: Path) -> str | None:
    """Says why an export is not proven equal to PyTorch; None if everything that was compared is within bounds."""
    if export.suffix in _UNFINISHED or not (export / PARITY).is_file():
        return f"there is no {PARITY} that proves it equal to PyTorch"
    failures = read_parity(export)["failures"]
    return f"not equal to PyTorch within bounds: {', '.join(failures)}" if failures else None


def read_parity(export: Path) -> dict:
    """What was compared with PyTorch; raises ValueError where the file does not say it."""
    return read_json(export / PARITY, fields={"failures": list})


def proven_exports(folder: Path) -> dict[str, dict]:
    """Name of a subfolder -> the `parity.json` of the export in it, for exports that are proven.

    Raises:
        ValueError: a link leads out of the folder.
    """
    found = sorted(inside(folder, file.relative_to(folder).as_posix()).parent for file in folder.glob(f"*/{PARITY}"))
    proven = [export for export in found if why_not_proven(export) is None]
    return {export.name: read_parity(export) for export in proven}


def loading_section(
    name: str,
    model_type: str,
    exports: Mapping[str, Mapping],
    source: str = _PLACEHOLDER,
    reads: Reads = "source",
) -> str:
    """PyTorch always, a runtime for each target that has an export, and what each export was proven to be.

    Args:
        name: what `from_pretrained` is given, a folder or `user/name`.
        exports: as `proven_exports` returns them.
        source: the text that the lines answer.
        reads: an encoder-decoder reads it as the source, a decoder-only model as its prompt or as a user's message in
            its chat template.

    Raises:
        ValueError: what was proven of an export is not said.
    """
    for folder, report in exports.items():
        check_fields(report, _FIELDS, f"{folder}/{PARITY}")
    in_pytorch = _in_pytorch(name, model_type, source) if reads == "source" else _decoder_only(name, source, reads)
    parts = [_BEGIN.format(name=name), "## How to load", in_pytorch]
    for target in targets():
        export = next((folder for folder, report in exports.items() if report["target"] == target), None)
        if export is not None:
            backend = backend_of(target)
            heading, lines = backend.card_lines(export) or (backend.runtime, _in_runtime(name, export, target, source))
            parts.append(f"### {heading}\n\n{lines}")
    if exports:
        parts.append(_exports(exports))
    return "\n\n".join([*parts, _END])


def with_loading(text: str, model_type: str, exports: Mapping[str, Mapping], name: str | None = None) -> str:
    """The text of a card with a new section on loading; without such a section, the text as it is.

    Args:
        name: by default the one in the section.
    """

    def section(found: re.Match) -> str:
        written = _SOURCE.search(found[0])
        try:
            source = json.loads(written[1]) if written else _PLACEHOLDER
        except ValueError:  # edited by hand
            source = _PLACEHOLDER
        # A section says itself what kind of model it loads.
        chats, decoder_only = (word in found[0] for word in ("apply_chat_template", "AutoModelForCausalLM"))
        reads: Reads = "chat" if chats else "prompt" if decoder_only else "source"
        return loading_section(name or found["name"], model_type, exports, source, reads)

    return _SECTION.sub(section, text, count=1)


def note_exports(folder: Path, model_type: str) -> None:
    """Lists the proven exports of a student's folder in its card, if the card is ours."""
    card = inside(folder, "README.md")
    if not card.is_file():
        return
    before = card.read_text(encoding="utf-8")
    after = with_loading(before, model_type, proven_exports(folder))
    if after != before:
        write_text(card, after)


def _answer_about_image(source: str) -> str:
    return f"""from PIL import Image
image = Image.new("RGB", (640, 480), "navy")  # yours: Image.open("picture.png")
source = {_quoted(source)}
inputs = processor(images=image, text=processor.image_token + source, return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=48)[0], skip_special_tokens=True))
"""


def _answer(source: str) -> str:
    return f"""source = {_quoted(source)}
inputs = tokenizer(source, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=48)[0], skip_special_tokens=True))
"""


def _quoted(text: str) -> str:
    """As a string of Python."""
    return json.dumps(text, ensure_ascii=False)


def _decoder_only(name: str, source: str, reads: Reads) -> str:
    inputs = 'tokenizer(source, return_tensors="pt")'
    if reads == "chat":
        inputs = """tokenizer.apply_chat_template(
    [{"role": "user", "content": source}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
    return f"""{_INSTALL}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({_quoted(name)})
model = AutoModelForCausalLM.from_pretrained({_quoted(name)})
source = {_quoted(source)}
inputs = {inputs}
answer = model.generate(**inputs, max_new_tokens=48)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```"""


def _in_pytorch(name: str, model_type: str, source: str) -> str:
    reads_images = model_type == READS_IMAGES
    model_class, reader_class, reader, install, answer = (
        ("AutoModelForImageTextToText", "AutoProcessor", "processor", _INSTALL_FOR_IMAGES, _answer_about_image(source))
        if reads_images
        else ("AutoModelForSeq2SeqLM", "AutoTokenizer", "tokenizer", _INSTALL, _answer(source))
    )

    def lines(option: str = "") -> str:
        return f"""from transformers import {model_class}, {reader_class}
{reader} = {reader_class}.from_pretrained({_quoted(name)}{option})
model = {model_class}.from_pretrained({_quoted(name)}{option})
"""

    if not (reads_images or model_type == "rope_encdec"):  # transformers itself has it
        return f"{install}\n\n```python\n{lines()}{answer}```"
    return f"""{install}

```python
{lines(", trust_remote_code=True")}```

`trust_remote_code=True` is your decision: it runs the Python files beside the weights. Read them first, and pin
`revision=` to the commit that you read. With `pip install hf-encdec-distill` no remote code is needed:

```python
import hf_encdec_distill  # registers the architecture with transformers
{lines()}```

Then, in either case:

```python
{answer}```"""


def _in_runtime(name: str, export: str, target: str, source: str) -> str:
    if "/" in name:  # of the Hub
        folder = f"""from huggingface_hub import snapshot_download
folder = snapshot_download({_quoted(name)}, allow_patterns={_quoted(f"{export}/*")}) + {_quoted(f"/{export}")}
"""
    else:
        folder = f"folder = {_quoted(f'{name}/{export}')}\n"
    return f"""```bash
pip install "hf-encdec-distill[{target}]"
```

```python
from transformers import AutoTokenizer
from hf_encdec_distill.export.runtime import ExportedForConditionalGeneration
{folder}tokenizer = AutoTokenizer.from_pretrained(folder)
model = ExportedForConditionalGeneration.from_pretrained(folder)
{_answer(source)}```"""


def _exports(exports: Mapping[str, Mapping]) -> str:
    header = ["folder", "", "size, MB", "largest logit difference", "greedy answers equal", "CE", "ROUGE-L"]
    rows = []
    for folder, report in exports.items():
        rouge = report.get("rouge_l")
        rows.append(
            [
                f"`{folder}`",
                f"{report['target']}, {report['variant']}, {report['shapes_taken']}",
                f"{report['megabytes']['exported']:.1f}",
                f"{report['logits']:.1e}",
                f"{report['tokens']['greedy']:.0%}",
                f"{report['ce']['exported']:.3f} ({report['ce']['pytorch']:.3f})",
                f"{100 * rouge['exported']:.1f} ({100 * rouge['pytorch']:.1f})" if rouge else None,
            ]
        )
    count = ", ".join(sorted({str(report["rows"]) for report in exports.values()}))
    note = (
        f"Each export was compared with this model in PyTorch (fp32, numbers in brackets) on {count} held-out rows. "
        "Logit differences are a share of the largest logit."
    )
    return f"### Exports\n\n{table(header, rows)}\n\n{note}"


def table(header: Sequence, rows) -> str:
    """In Markdown; a cell that is None is a dash."""

    def line(cells):
        texts = ("–" if cell is None else " ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
        return "| " + " | ".join(texts) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])
