"""The page of `demo`: a text goes in, student and teacher answer side by side. Nothing on it comes from elsewhere.
Images go in too where the student reads them.

Agreement is told by underline and words as much as by colour; colours are Okabe and Ito's
(https://jfly.uni-koeln.de/color/), as tints under text in the page's own colour, so that it stays readable when dark.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import gradio as gr

from ._answers import Answer, Choice, ImageReader, Reader, stream, teacher_choices, token_texts


CSS = """
.gradio-container { max-width: 1120px !important; margin: 0 auto !important; }
#text textarea { font-family: var(--font-mono); font-size: 14px; line-height: 1.5; }
.panel { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 16px 20px;
    min-height: 180px; }
#told > .html-container, #student > .html-container, #teacher > .html-container { padding: 0; }
.panel h2 { margin: 0 0 12px; font-size: 17px; font-weight: 600; }
.panel h2 small { font-weight: 400; font-size: 13px; margin-left: 6px; opacity: 75%; }
.panel .text { margin: 0 0 14px; font-size: 17px; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere; }
.panel .wait { font-size: 14px; opacity: 75%; }
.panel dl { display: flex; flex-wrap: wrap; gap: 6px 28px; margin: 0; }
.panel dt { font-size: 12px; opacity: 75%; }
.panel dd { margin: 0; font-size: 16px; font-weight: 600; font-variant-numeric: tabular-nums; }
.agree, .differ { color: inherit; border-radius: 3px; padding: 2px 0; margin-right: 1px; }
.agree { background: rgb(86 180 233 / 25%); }
.differ { background: rgb(230 159 0 / 32%); border-bottom: 3px dotted #D55E00; }
.end { font-size: 12px; padding: 2px 5px; margin-left: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 14px 0 0; font-size: 13px; }
.legend span, .legend mark { padding: 2px 5px; }
.panel details { margin-top: 10px; font-size: 13px; }
.panel summary { cursor: pointer; }
.panel td, .panel th { padding: 3px 14px 3px 0; text-align: left; white-space: pre; font-weight: 400; }
.panel td { font-family: var(--font-mono); }
.note { margin: 0; padding: 8px 12px; border-left: 3px solid #E69F00; font-size: 14px; }
"""
# Gradio's own way is Shift+Enter alone.
SUBMIT_ON_CTRL_ENTER = """<script>
document.addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) document.querySelector("#answer")?.click();
});
</script>"""
MOST_IMAGES, LARGEST_FILE = 8, "20mb"
WAITS = "waits for the student, so that each has the machine to itself"
_ASK = {Reader: "Type a text, or pick an example.", ImageReader: "Drop an image, or type a text."}


@dataclass(frozen=True)
class Side:
    """A model as it is shown.

    Args:
        detail: what runs it and in which precision, and its size.
        most_prompt, most_new: tokens that it takes and writes at most; None: no limit of its own.
    """

    model: object
    tokenizer: object
    detail: str
    most_prompt: int | None = None
    most_new: int | None = None


def answers(
    text: str,
    backend: str,
    students: Mapping[str, Side],
    teacher: Side | None,
    reader: Reader | ImageReader,
    max_new_tokens: int,
    images: Sequence[bytes] = (),
) -> Iterator[tuple[str, str, str]]:
    """Note, student's panel and teacher's panel, again and again until both have answered."""
    student = students[backend]
    blank = panel("Student", student.detail), "" if teacher is None else panel("Teacher", teacher.detail)
    if not text.strip() and not images:
        yield note(_ASK[type(reader)]), *blank
        return
    if len(images) > MOST_IMAGES:
        yield note(f"There are {len(images)} images: give at most {MOST_IMAGES}."), *blank
        return
    if isinstance(reader, ImageReader):
        try:
            question = reader.read(text, student.most_prompt, images)
        except ValueError as error:
            yield note(str(error)), *blank
            return
    else:
        question = reader.read(text, student.most_prompt)
    notes = [] if reader.mismatch is None else [f"Agreement is not shown: {reader.mismatch}"]
    if question.tokens > len(question.inputs):
        notes.append(
            f"The text is cut: the first {len(question.inputs)} of {question.tokens} tokens are read "
            "(--max-source-length)."
        )
    told = "".join(map(note, notes))
    waiting = "" if teacher is None else panel("Teacher", teacher.detail, wait=WAITS)

    most = max_new_tokens if student.most_new is None else min(max_new_tokens, student.most_new)
    for answer in stream(student.model, question.inputs, student.tokenizer, most, question.images):
        shown = escape(decoded(student.tokenizer, answer))
        yield told, panel("Student", student.detail, shown, answer), waiting
    if teacher is None:
        return
    choices = None
    if reader.vocabulary is not None:
        choices = teacher_choices(teacher.model, question.prompt, answer.ids, reader.vocabulary)
        shown = marked(student.tokenizer, answer.ids, choices)
    after = differences(student.tokenizer, answer.ids, choices)
    of_student = panel("Student", student.detail, shown, answer, choices, after)
    yield told, of_student, waiting
    for answer in stream(teacher.model, question.prompt, teacher.tokenizer, max_new_tokens):
        yield told, of_student, panel("Teacher", teacher.detail, escape(decoded(teacher.tokenizer, answer)), answer)


def decoded(tokenizer, answer: Answer) -> str:
    return tokenizer.decode(answer.ids, skip_special_tokens=True).strip()


def note(text: str) -> str:
    return f'<p class="note" role="status">{escape(text)}</p>'


def panel(
    title: str,
    detail: str,
    text: str = "",
    answer: Answer | None = None,
    choices: Sequence[Choice] | None = None,
    after: str = "",
    wait: str = "",
) -> str:
    """One side's answer. `text` and `after` are HTML, all else is text; `choices` are the teacher's."""
    figures = []
    if answer is not None and answer.times:
        speed = answer.tokens_per_second
        figures = [
            ("first token", f"{1000 * answer.times[0]:.0f} ms"),
            ("then", "–" if speed is None else f"{speed:.1f} tokens/s"),
            ("tokens", len(answer.ids)),
        ]
    if choices:
        same = sum(choice.agrees for choice in choices)
        figures.append(("agreement", f"{100 * same / len(choices):.0f} %"))
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    text = text or f'<span class="wait">{escape(wait)}</span>'
    heading = f"<h2>{escape(title)} <small>{escape(detail)}</small></h2>"
    return f'<section class="panel">{heading}<p class="text">{text}</p><dl>{listed}</dl>{after}</section>'


def marked(tokenizer, ids: Sequence[int], choices: Sequence[Choice]) -> str:
    """HTML of an answer's tokens. Those that share a character stand together, and agree if all of them do."""
    html: list[str] = []
    together: list[Choice] = []
    for index, text in enumerate(token_texts(tokenizer, ids)):
        text = text.lstrip() if not html else text
        together.append(choices[index])
        if ids[index] == tokenizer.eos_token_id:
            text, kind = "end", " end"
        elif text or index == len(ids) - 1:
            kind = ""
        else:
            continue
        wrong = [choice for choice in together if not choice.agrees]
        if wrong:
            title = f"the teacher: {_name(tokenizer, wrong[0].token_id)} ({100 * wrong[0].probability:.0f} %)"
            html.append(f'<mark class="differ{kind}" title="{escape(title)}">{escape(text)}</mark>')
        else:
            html.append(f'<span class="agree{kind}">{escape(text)}</span>')
        together = []
    return "".join(html)


def _name(tokenizer, token_id: int) -> str:
    """A token's text with its blanks visible, or its name where it has no text."""
    return "end" if token_id == tokenizer.eos_token_id else repr(tokenizer.decode([token_id]))


def differences(tokenizer, ids: Sequence[int], choices: Sequence[Choice] | None) -> str:
    """The legend, and as a table what the teacher would have put where it differs: titles need a mouse."""
    if choices is None:
        return ""
    rows = [
        f"<tr><td>{_cell(tokenizer, token_id)}</td><td>{_cell(tokenizer, choice.token_id)}</td>"
        f"<td>{100 * choice.probability:.0f} %</td></tr>"
        for token_id, choice in zip(ids, choices, strict=True)
        if not choice.agrees
    ]
    legend = (
        '<p class="legend"><span class="agree">the teacher\'s first choice too</span>'
        '<mark class="differ">the teacher puts another token first</mark></p>'
    )
    if not rows:
        return legend
    head = "<tr><th>student</th><th>teacher</th><th>its probability</th></tr>"
    return (
        f"{legend}<details><summary>What the teacher puts first where it differs ({len(rows)})</summary>"
        f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></details>"
    )


def _cell(tokenizer, token_id: int) -> str:
    return escape(_name(tokenizer, token_id))


def build(
    title: str,
    students: Mapping[str, Side],
    teacher: Side | None,
    reader: Reader | ImageReader,
    examples: Sequence[str],
    **options,
) -> gr.Blocks:
    """The page. `options` are those of `answers`."""

    def respond(text, backend, shown=None):
        images = [Path(path).read_bytes() for path, _ in shown or ()]
        yield from answers(text, backend, students, teacher, reader, images=images, **options)

    first = next(iter(students))
    # What was dropped is gone a day later, and when the page ends.
    kept = (3600, 86400) if isinstance(reader, ImageReader) else None
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=kept) as page:
        gr.Markdown(f"# {title}")
        asked: list[gr.Component] = []
        if isinstance(reader, ImageReader):
            shown = gr.Gallery(
                label=f"Images, in the order of {reader.processor.image_token} in the text, or in front of it",
                file_types=["image"],
                sources=["upload", "clipboard"],
                interactive=True,
                columns=4,
                height=240,
                object_fit="contain",
                buttons=[],
                elem_id="images",
            )
            asked.append(shown)
        text = gr.Textbox(
            label="Text (Ctrl+Enter or Shift+Enter asks)", lines=5, max_lines=12, autoscroll=False, elem_id="text"
        )
        if examples:
            gr.Examples([[example] for example in examples], [text], example_labels=[_label(e) for e in examples])
        backend = gr.Radio(list(students), value=first, label="The student runs on", visible=len(students) > 1)
        button = gr.Button("Answer", variant="primary", elem_id="answer")
        told = gr.HTML(elem_id="told")
        with gr.Row():
            with gr.Column(min_width=340):
                of_student = gr.HTML(panel("Student", students[first].detail), elem_id="student")
            with gr.Column(min_width=340, visible=teacher is not None):
                blank = panel("Teacher", teacher.detail) if teacher else ""
                of_teacher = gr.HTML(blank, elem_id="teacher")
        gr.on(
            [button.click, text.submit],
            respond,
            [text, backend, *asked],
            [told, of_student, of_teacher],
            show_progress="hidden",
            concurrency_limit=1,  # one question at a time: the others wait, and times stay a model's own
            api_visibility="private",
        )
    return page


def _label(example: str) -> str:
    line = example.strip().splitlines()[0]
    return line if len(line) <= 48 else f"{line[:47]}…"


def launch(page: gr.Blocks, host: str, port: int) -> str:
    """Serve the page from threads of its own; returns its address."""
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700")
    _, address, _ = page.queue().launch(
        server_name=host,
        server_port=port,
        theme=theme,
        css=CSS,
        head=SUBMIT_ON_CTRL_ENTER,
        footer_links=[],
        max_file_size=LARGEST_FILE,
        share=False,
        ssr_mode=False,
        show_error=True,
        quiet=True,
        prevent_thread_lock=True,
    )
    return address
