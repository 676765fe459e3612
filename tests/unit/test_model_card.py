"""The card against huggingface_hub's own reading of it, and against the numbers that went in."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hf_encdec_distill import RopeEncDecConfig, RopeEncDecForConditionalGeneration, cards
from hf_encdec_distill.bench import LatencyComparison, compare_cost
from hf_encdec_distill.cards import model_index, update_model_card, write_model_card
from hf_encdec_distill.cards.loading import with_loading
from hf_encdec_distill.cards.model_card import teacher_entry
from hf_encdec_distill.metrics.measures import bounds, estimate


SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def student_config():
    return RopeEncDecConfig(
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=1,
        cross_attention="merged",
        decoder_start_token_id=3,
        **SIZES,
    )


def metrics():
    timing = {"first_token_ms": 80.0, "step_ms": 8.0, "tokens_per_second": 125.0, "request_ms": 112.0}
    slow = {"first_token_ms": 160.0, "step_ms": 32.0, "tokens_per_second": 31.25, "request_ms": 288.0}
    latency = LatencyComparison(
        "float32", "asked for", 96, 5, [{"student": timing, "teacher": slow}] * 2, {"cpu": "A|B", "torch": "9"}
    )
    return {
        "title": "Tiny one",
        "task": {
            "name": "echo",
            "description": "Repeats what it reads.",
            "language": "en",
            "pipeline_tag": "summarization",
            "prompt_template": "Say:\n{source}\nSaid:",
        },
        "teacher": {"name": "Big one", "hub_id": "someone/big-one", "license": "apache-2.0", "adaptation": "40 steps"},
        "student": {"encoder_layers": 2, "decoder_layers": 1, "cross_attention": "merged", "parameters": 12_345_678},
        "data": {"name": "echoes", "hub_id": "someone/echoes", "train_rows": 1234, "test_rows": 56},
        "recipe": {"divergence": "forward_kl", "pipe": "a | b"},
        "stages": [{"name": "student", "steps": 7, "seconds": 12.3}, {"name": "evaluation", "steps": None}],
        "seeds": [11],
        "spread": "95 % interval, bootstrap over items",
        "models": {
            "student_kd": {
                "n": 56,
                "parameters": 12_345_678,
                "rouge_l": {"value": 0.2994, "low": 0.28, "high": 0.32},
                "ce": 3.8512,
                "teacher_agreement": 0.5,
                "distinct": 0.96,
            },
            "student_ce": {"n": 56, "rouge_l": 0.28, "ce": 4.0},
            "teacher": {"n": 56, "rouge_l": 0.32, "ce": 2.6},
        },
        "differences": [
            {
                "of": "student_kd",
                "minus": "student_ce",
                "rouge_l": {"value": 0.0194, "low": -0.01, "high": 0.04},
                "ce": {"value": -0.15, "low": -0.2, "high": -0.1},
            }
        ],
        "latency": latency.to_dict(),
        "cost": compare_cost(
            student_config(), LlamaConfig(num_hidden_layers=3, tie_word_embeddings=True, **SIZES), 96, 5
        ).to_dict(),
        "samples": [{"source": "x = '```'", "reference": "It.", "teacher": "Is `it`.", "student_kd": ""}],
        "figures": {"Quality": "quality.png"},
        "limits": ["It has seen no French."],
    }


PARITY = {
    "target": "onnx",
    "variant": "int8",
    "shapes_taken": "dynamic",
    "megabytes": {"exported": 91.26, "pytorch_fp32": 325.6},
    "logits": 0.0512,
    "tokens": {"greedy": 0.875, "beam": 0.75},
    "ce": {"exported": 3.7123, "pytorch": 3.7},
    "rouge_l": {"exported": 0.2961, "pytorch": 0.297},
    "rows": 24,
}


def rows_of(text):
    """Cells of every table line."""
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line[:1] == "|"
    ]


@pytest.mark.parametrize(
    ("built_in", "cross_attention", "said"),
    [
        (None, "merged", "so give it the bare source"),
        (True, "merged", "so give it the bare source"),
        (False, "merged", "The tokenizer does not add this prompt: make the input with"),
        (False, "separate", "The teacher's prompt:"),
    ],
)
def test_who_puts_a_source_into_the_prompt(tmp_path, built_in, cross_attention, said):
    known = metrics()
    known["task"] |= {} if built_in is None else {"built_in": built_in}
    known["student"]["cross_attention"] = cross_attention
    assert said in ModelCard.load(write_model_card(tmp_path / "student", known)).text


def test_a_student_that_reads_images(tmp_path):
    """Both models that it was made from, the Hub's task, and lines with a processor; with_loading keeps them."""
    known = metrics()
    known["student"]["model_type"] = "rope_encdec_vision"
    known["vision_tower"] = {"name": "A tower", "hub_id": "someone/tower", "model_type": "clip_vision_model"}
    del known["task"]["pipeline_tag"]
    card = ModelCard.load(write_model_card(tmp_path / "student", known))
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.get("widget") is None
    assert card.data.base_model == ["someone/big-one", "someone/tower"]
    assert "A RoPE encoder-decoder that reads images" in card.text
    tower = "[A tower](https://huggingface.co/someone/tower) (`clip_vision_model`)"
    assert f"Its vision tower is that of {tower}." in card.text
    assert "Those of its vision tower are of A tower (license not stated)." in card.text
    moved = with_loading(card.content, "rope_encdec_vision", {}, "someone/else")
    for text, name in ((card.text, "student"), (moved, "someone/else")):
        assert "pip install torch pillow" in text and "import Image" in text
        assert f'AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)' in text
        assert f'AutoProcessor.from_pretrained("{name}")' in text
        assert "AutoModelForSeq2SeqLM" not in text and "AutoTokenizer" not in text
        assert "source = \"x = '```'\"" in text
    del known["vision_tower"], known["teacher"]["hub_id"]
    assert ModelCard.load(write_model_card(tmp_path / "student", known)).data.get("base_model") is None


def test_huggingface_hub_reads_the_card_back(tmp_path):
    card = ModelCard.load(write_model_card(tmp_path / "student", metrics()))
    data = card.data
    assert (data.base_model, data.datasets, data.language) == ("someone/big-one", ["someone/echoes"], "en")
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "summarization")
    assert data.model_name == "Tiny one" and all(isinstance(result, EvalResult) for result in data.eval_results)
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values == {
        "ROUGE-L": 29.9,
        "CE, nats/token": 3.851,
        "Agreement with teacher, %": 50.0,
        "Distinct outputs, %": 96.0,
    }
    assert {(result.dataset_type, result.dataset_split) for result in data.eval_results} == {
        ("someone/echoes", "test")
    }
    args = {result.metric_name: result.metric_args for result in data.eval_results}
    spread = {"low": 28.0, "high": 32.0, "spread": "95 % interval, bootstrap over items"}
    assert args["ROUGE-L"] == {"rows": 56, **spread}
    assert args["CE, nats/token"] == {"rows": 56}
    assert args["Agreement with teacher, %"] == {
        "rows": 56,
        "teacher": "someone/big-one, fine-tuned on the task: 40 steps",
    }


def test_the_metadata_survive_a_round_trip(tmp_path):
    path = write_model_card(tmp_path, metrics())
    card = ModelCard.load(path)
    card.save(tmp_path / "again.md")
    first, second = (
        yaml.safe_load((tmp_path / name).read_text().split("---")[1]) for name in ("README.md", "again.md")
    )
    assert first == second == card.data.to_dict()
    assert card.text == ModelCard.load(tmp_path / "again.md").text


def evaluated(**numbers):
    """What `evaluate` knows: no seeds and no published model."""
    return {
        "data": {"name": "someone/echoes", "hub_id": "someone/echoes"},
        "judge": {"name": "wise/one"},
        "signatures": {"bleu": "tok:13a"},
        "models": {"runs/student": {"n": 90, **numbers}},
    }


def test_a_card_takes_new_results_and_keeps_all_else(tmp_path):
    before = ModelCard.load(write_model_card(tmp_path / "student", metrics()))
    path = update_model_card(tmp_path / "student", evaluated(rouge_l=0.5, bleu=12.34, judge=3.456), "runs/student")
    assert path == tmp_path / "student" / "README.md"
    card = ModelCard.load(path)
    assert card.text == before.text
    others = [{k: v for k, v in c.data.to_dict().items() if k != "model-index"} for c in (card, before)]
    assert others[0] == others[1] and card.data.model_name == "Tiny one"
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {
        "CE, nats/token": 3.851,
        "Agreement with teacher, %": 50.0,
        "Distinct outputs, %": 96.0,
        "ROUGE-L": 50.0,
        "BLEU": 12.3,
        "Judge, 1 to 5": 3.46,
    }
    found = {result.metric_name: result for result in card.data.eval_results}
    assert found["BLEU"].metric_config == "tok:13a" and found["BLEU"].metric_args == {"rows": 90}
    assert found["Judge, 1 to 5"].metric_args == {"rows": 90, "judge": "wise/one"}
    assert found["CE, nats/token"].metric_args == {"rows": 56}  # what was measured on other rows says so still
    # the same results again change nothing; one dataset and task is one entry
    text = path.read_text()
    update_model_card(tmp_path / "student", evaluated(rouge_l=0.5, bleu=12.34, judge=3.456), "runs/student")
    assert path.read_text() == text and len(card.data.to_dict()["model-index"][0]["results"]) == 1
    assert [child.name for child in path.parent.iterdir()] == ["README.md"]


def test_a_card_is_not_written_through_a_link_that_lies_beside_it(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    path = write_model_card(tmp_path / "student", metrics())
    (tmp_path / "student" / "README.md.tmp").symlink_to(theirs)
    update_model_card(tmp_path / "student", evaluated(f1=0.25), "runs/student")
    assert theirs.read_text() == "theirs"
    assert not path.is_symlink() and "value: 25.0" in path.read_text()


def test_a_card_without_metadata_and_none_at_all(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    card = ModelCard.load(update_model_card(tmp_path, evaluated(f1=0.25), "runs/student"))
    assert card.text.strip() == "# Mine" and card.data.model_name == tmp_path.name
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [("f1", 25.0)]
    with pytest.raises(ValueError, match=r"no model card .*nothing.README\.md"):
        update_model_card(tmp_path / "nothing", evaluated(f1=0.25), "runs/student")


_RESULTS = "results: [{task: {type: t}, dataset: {type: d, name: d}, metrics: [{type: f1, value: 1}]}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\na: [\n---\n", "not valid"),
        ("---\nmodel-index:\n- name: x\n---\n", "not valid"),
        ("---\ntags: 5\n---\n", "not valid"),
        (f"---\nmodel-index:\n- {{name: One, {_RESULTS}}}\n- {{name: Two, {_RESULTS}}}\n---\n", "2 models, One, Two"),
        ("Über das Modell", "not valid"),
    ],
)
def test_a_card_that_cannot_be_updated_stays_as_it_is(tmp_path, text, message):
    (tmp_path / "README.md").write_bytes(before := text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"README\.md.*{message}"):
        update_model_card(tmp_path, evaluated(f1=0.25), "runs/student")
    assert (tmp_path / "README.md").read_bytes() == before


def test_a_model_index_is_metadata_of_its_own(tmp_path):
    text = model_index(evaluated(ece=0.1234), "runs/student", "student")
    assert list(yaml.safe_load(text)) == ["model-index"]
    (result,) = ModelCard(f"---\n{text}---\n").data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("ece", 12.3, "someone/echoes")


def test_the_tables_hold_the_measured_numbers(tmp_path):
    text = ModelCard.load(write_model_card(tmp_path, metrics())).text
    rows = rows_of(text)
    results = [row for row in rows if row[-1] == "56"]
    assert results == [
        ["teacher, tuned", "–", "32.0", "2.600", "–", "–", "56"],
        ["student, cross-entropy alone", "–", "28.0", "4.000", "–", "–", "56"],
        ["**student, distilled** (these weights)", "12.3", "29.9 (28.0 to 32.0)", "3.851", "50.0", "96.0", "56"],
    ]
    assert ["First token, ms", "160.0", "80.0", "0.50"] in rows
    assert ["Each further token, ms", "32.00", "8.00", "0.25"] in rows
    assert ["Tokens per second after the first", "31.2", "125.0", "–"] in rows
    total = next(row for row in rows if row[0] == "Parameters, M")
    student = sum(p.numel() for p in RopeEncDecForConditionalGeneration(student_config()).parameters())
    assert total[2] == f"{student / 1e6:.1f}"
    assert ["pipe", "a \\| b"] in rows and ["student", "7", "12", ""] in rows
    assert ["evaluation", "–", "–", ""] in rows
    assert "- ROUGE-L: +1.9 (−1.0 to +4.0), not distinguishable from zero\n" in text
    assert "- CE, nats/token: −0.150 (−0.200 to −0.100)\n" in text
    assert "Seed 11. In brackets: 95 % interval, bootstrap over items." in text
    assert "96 tokens in, 5 out, greedy, float32 (asked for)" in text and "A|B" in text
    assert "![Quality](quality.png)" in text and "- It has seen no French." in text
    assert "1,234 train, 56 test" in text and "arXiv:2501.16273" in text


def test_exports_beside_the_card_are_in_it(tmp_path):
    report = dict(PARITY)
    assert "### Exports" not in write_model_card(tmp_path, metrics()).read_text()
    for folder, failures in (("onnx", []), ("onnx_int4", ["cross-entropy rises"]), ("coreml.rejected", [])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "parity.json").write_text(json.dumps({**report, "failures": failures}))
    text = write_model_card(tmp_path, metrics()).read_text()
    row = "| `onnx` | onnx, int8, dynamic | 91.3 | 5.1e-02 | 88% | 3.712 (3.700) | 29.6 (29.7) |"
    assert row in text and "on 24 held-out rows" in text and "onnx_int4" not in text and "coreml" not in text
    del report["rouge_l"]
    assert "3.712 (3.700) | – |" in write_model_card(tmp_path, metrics() | {"exports": {"onnx": report}}).read_text()


def test_a_proof_that_says_nothing_of_its_export_is_named(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/parity.json").write_text('{"failures": []}')
    with pytest.raises(ValueError, match="onnx/parity.json has no 'target'"):
        write_model_card(tmp_path, metrics())


def test_the_lines_of_a_folder_with_quotes_are_python(tmp_path):
    text = write_model_card(tmp_path / 'my"model', {}).read_text()
    blocks = re.findall("```python\n(.*?)```", text, re.DOTALL)
    assert blocks and all(compile(block, "card", "exec") for block in blocks)


def test_samples_cannot_break_out_of_their_fences(tmp_path):
    text = ModelCard.load(write_model_card(tmp_path, metrics())).text
    assert "````\nx = '```'\n````" in text
    assert "- teacher, tuned: `` Is `it`. ``" in text and "- student, distilled: *(empty)*" in text


def test_ten_samples_are_folded_and_the_shortest_is_the_widget(tmp_path):
    """The Hub's widget, and the lines that load the model, have a source that the model was made for."""
    sources = [f'source {"é" * (20 - index)}\n"{index}"' for index in range(12)]
    samples = [{"source": source, "reference": "r", "student_kd": f"answer {source[-2]}"} for source in sources]
    card = ModelCard.load(write_model_card(tmp_path, changed(samples=samples)))
    assert card.data.widget == [{"text": sources[-1], "output": {"text": "answer 1"}}]
    before, folded, after = re.split("<details.*?>|</details>", card.text)
    assert re.findall("### Sample (.*)", folded) == [str(number) for number in range(1, 11)]
    assert "<summary>10 held-out inputs" in folded and "### Sample" not in before + after
    source = re.search("^source = .*$", card.text, re.MULTILINE)[0]
    names = {}
    exec(source, names)
    assert names["source"] == sources[-1]
    # `push` and `export` write the section again, from the card alone
    exports = {"onnx": {**PARITY, "target": "onnx"}}
    again = with_loading(card.text, "rope_encdec", exports, "me/other")
    assert again.count(source) == 2 and 'from_pretrained("me/other")' in again and "[onnx]" in again
    by_hand = with_loading(card.text.replace(source, "source = my_text"), "rope_encdec", {})
    assert 'source = "The text that the model is to read."' in by_hand


def test_an_empty_answer_is_no_output_of_a_widget(tmp_path):
    card = ModelCard.load(write_model_card(tmp_path, metrics()))
    assert card.data.widget == [{"text": "x = '```'"}]


def test_a_student_below_a_baseline_says_so(tmp_path):
    models = metrics()["models"]
    models["lead_baseline"] = {"n": 56, "rouge_l": {"value": 0.3111, "low": 0.3, "high": 0.32}, "distinct": 1.0}
    models["echo_baseline"] = {"n": 56, "label": "the source itself", "rouge_l": 0.2993}
    text = write_model_card(tmp_path, changed(models=models)).read_text()
    sentence = (
        "These weights score lower than the lead-sentence baseline, which needs no model: ROUGE-L 29.9 against 31.1."
    )
    assert text.count("**Below a trivial baseline.**") == 1 and sentence in text
    models["lead_baseline"]["rouge_l"] = 0.29
    assert "Below a trivial" not in write_model_card(tmp_path, changed(models=models)).read_text()


def test_a_card_has_what_the_run_found_about_its_student(tmp_path):
    said = {"sentences": ["Still learning. The loss falls."], "command": "hf-encdec-distill quickstart --resume"}
    text = write_model_card(tmp_path, changed(verdict=said)).read_text()
    assert "\n\n**Still learning.** The loss falls.\n\nTraining goes on from here with\n\n```bash\nhf-encdec" in text


@pytest.mark.parametrize(
    ("adaptation", "named"),
    [("40 steps", "the tuned teacher, Big one after fine-tuning"), (None, "the teacher, Big one")],
)
def test_the_teacher_that_agreement_refers_to_is_named(tmp_path, adaptation, named):
    teacher = {"name": "Big one", "hub_id": "someone/big-one", "adaptation": adaptation}
    card = ModelCard.load(write_model_card(tmp_path, changed(teacher=teacher)))
    assert f"*Agreement with teacher* is measured against {named}.\n" in card.text
    (args,) = (r.metric_args for r in card.data.eval_results if r.metric_type == "teacher_agreement")
    assert args["teacher"] == "someone/big-one" + (", fine-tuned on the task: 40 steps" if adaptation else "")


def test_what_is_not_given_is_not_there(tmp_path):
    path = write_model_card(tmp_path / "bare", {})
    card = ModelCard.load(path)
    assert set(card.data.to_dict()) == {"library_name", "tags"}
    assert card.text.lstrip().startswith("# bare\n")
    headings = re.findall("^## (.*)", card.text, re.MULTILINE)
    assert headings == ["Intended use", "How to load", "Limits", "License", "Citation"]
    assert not rows_of(card.text) and "None" not in card.text
    # no figure at all, besides those of the citation and of the call that loads the model
    body = card.text.split("## Citation")[0].replace("max_new_tokens=48)[0]", "").replace("Seq2Seq", "")
    body = body.replace("transformers>=4.57", "")
    assert not re.search(r"\d", body)


@pytest.mark.parametrize("key", [key for key in metrics() if key not in ("models", "seeds", "spread")])
def test_any_part_may_be_missing(key, tmp_path):
    whole = metrics()
    del whole[key]
    text = ModelCard.load(write_model_card(tmp_path, whole)).text
    assert "None" not in text and "## Results" in text


def test_it_can_be_written_from_the_json_file_to_any_markdown_path(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics()))
    path = write_model_card(tmp_path / "cards" / "tiny.md", tmp_path / "metrics.json", repo_id="me/tiny")
    assert path == tmp_path / "cards" / "tiny.md" and 'from_pretrained("me/tiny"' in path.read_text()
    assert [child.name for child in path.parent.iterdir()] == ["tiny.md"]


@pytest.mark.process
def test_the_lines_that_load_the_model_load_it(tmp_path, monkeypatch):
    torch.manual_seed(0)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    special["model_input_names"] = ["input_ids", "attention_mask"]
    model = RopeEncDecForConditionalGeneration(student_config()).eval()
    model.save_pretrained(tmp_path / "student")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "student")
    known = changed(samples=[{"source": "a long one"}, {"source": "a b a"}])
    text = write_model_card(tmp_path / "student", known).read_text()
    blocks = re.findall("^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3 and blocks[0].count("\n") == 3
    monkeypatch.chdir(tmp_path)
    names = {"printed": []}
    exec(blocks[1] + blocks[2].replace("print(", "printed.append("), names)
    ids = model.generate(torch.tensor([[3, 4, 3]]), attention_mask=torch.ones(1, 3), max_new_tokens=48)[0]
    expected = names["tokenizer"].decode(ids, skip_special_tokens=True)
    assert names["printed"] == [expected]
    # A process of its own: it cannot import the package, and what it loads from the folder registers itself.
    alone = 'import sys; sys.modules["hf_encdec_distill"] = None\n' + blocks[0] + blocks[2]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", alone], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert found.stdout.strip() == expected.strip(), found.stderr
    # the call that needs no trust is offered only with the package, and trust is called the reader's decision
    assert "trust_remote_code" not in blocks[1] and "import hf_encdec_distill" in blocks[1]
    assert "`trust_remote_code=True` is your decision" in text


@pytest.mark.parametrize(
    ("card", "license"),
    [
        (None, None),
        ("# No metadata\n", None),
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: mit\nmodel-index:\n- name: x\n---\n", "mit"),  # an index that cannot be read
        ("---\nlicense: [mit\n---\n", None),  # no YAML
    ],
)
def test_a_teachers_license_is_what_its_own_card_says(card, license, tmp_path):
    (tmp_path / "big").mkdir()
    if card is not None:
        (tmp_path / "big" / "README.md").write_text(card)
    assert teacher_entry(tmp_path / "big") == {"name": "big", "hub_id": None, "license": license}


def test_a_teacher_on_the_hub_is_linked_even_if_its_card_cannot_be_had():
    assert teacher_entry("someone/big-one") == {"name": "big-one", "hub_id": "someone/big-one", "license": None}


def test_items_of_a_number_that_was_measured_on_fewer(tmp_path):
    part = {"models": {"student_kd": {"n": 90, "ce": 3.0, "rouge_l": {"value": 0.5, "rows": 40}}}}
    results = ModelCard.load(write_model_card(tmp_path, changed(differences=[], **part))).data.eval_results
    assert {result.metric_type: result.metric_args["rows"] for result in results} == {"rouge": 40, "ce": 90}


@pytest.mark.process
def test_public_names_are_there_on_first_use():
    code = (
        "import sys, hf_encdec_distill.cards as cards; print(*sys.modules); print(*dir(cards)); print(*cards.__all__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, listed, public = (line.split() for line in run.stdout.splitlines())
    assert not {"torch", "transformers", "huggingface_hub"} & set(loaded) and set(public) <= set(listed)
    for name in public:
        assert getattr(cards, name).__module__.startswith("hf_encdec_distill.cards.")
    with pytest.raises(AttributeError, match="no_such_name"):
        cards.no_such_name  # noqa: B018


def test_estimates():
    assert estimate([1.0, 4.0, 2.5]) == {"value": 2.5, "low": 1.0, "high": 4.0, "n": 3}
    assert bounds(2, "x") == (2, 2, 2) and bounds({"value": 2, "low": 1, "high": 4}, "x") == (2, 1, 4)
    assert bounds({"value": 2, "low": 1}, "x") == (2, 1, 2)
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def changed(**entries):
    return {**metrics(), **entries}


def with_rouge(value):
    return changed(models={"student_kd": {"n": 1, "rouge_l": value}}, differences=[])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (changed(seeds=[]), "models but no seeds"),
        (changed(published="student"), "published='student' is not among models"),
        (changed(spread=None), r"models\['student_kd'\]\['rouge_l'\] has a spread"),
        (changed(models={"student_kd": {"rouge_l": 0.1}}), r"models\['student_kd'\] has n=None"),
        (changed(differences=[{"of": "student_kd", "minus": "x"}]), r"differences\[0\] names 'x'"),
        (changed(data="pairs"), "data='pairs' is of type str, expected a mapping"),
        (changed(limits="It has seen little."), "limits='It has seen little.' is of type str, expected a list"),
        (changed(title=3), "title=3 is of type int, expected a text"),
        (changed(energy={"kwh": 1.0, "counters": "RAPL", "grid_g_per_kwh": 56}), "grid_g_per_kwh but no location"),
        (with_rouge(29.9), "in 0 to 1; divide percentages by 100"),
        (with_rouge(float("nan")), "expected a finite number"),
        (with_rouge({"low": 0.1, "high": 0.2}), "expected a finite number"),
        (with_rouge({"value": 0.3, "low": 0.1, "high": 0.2}), "value 0.3 outside its spread, 0.1 to 0.2"),
    ],
)
def test_contradictions_are_errors_and_write_nothing(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_model_card(tmp_path / "card", wrong)
    assert not list(tmp_path.iterdir())
