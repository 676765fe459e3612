"""Metrics against hand values, rouge_score and sacrebleu themselves, SQuAD's script, and a real `Seq2SeqTrainer`."""

import re
import sys

import numpy as np
import pytest
import sacrebleu
import torch
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from hf_encdec_distill.metrics import texts as metrics
from hf_encdec_distill.metrics.texts import (
    Bleu,
    ChrF,
    DistinctShare,
    Rouge,
    Squad,
    bleu,
    chrf,
    distinct_share,
    exact_match,
    f1,
    generation_metrics,
    normalize_answer,
    rouge,
    rouge_l,
    squad,
    text_statistics,
)


PREDICTIONS = ["the cat sat", "Returning the numbers.", "a b c", ""]
REFERENCES = ["the cat sat on the mat", "return the number", "c b a", "x y"]


@pytest.fixture
def tokenizer(make_bpe_tokenizer):
    return make_bpe_tokenizer()


def _f1(prediction, reference):
    """ROUGE-L F1 by its definition, for words that stemming leaves alone."""
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, reference))
    table = np.zeros((len(a) + 1, len(b) + 1))
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return 2 * table[-1, -1] / (len(a) + len(b))


@pytest.mark.parametrize(
    ("prediction", "reference", "value"),
    [
        ("the cat sat", "the cat sat on the mat", 2 / 3),  # 3 in order; precision 1, recall 1/2
        ("a b c", "c b a", 1 / 3),
        ("Return the sum!", "return  the sum", 1.0),
        ("returned numbers", "returning number", 1.0),  # stemmed
        ("", "x", 0.0),
        ("x", "y", 0.0),
    ],
)
def test_rouge_l_by_hand(prediction, reference, value):
    assert rouge_l(prediction, reference) == pytest.approx(value)


def test_rouge_l_by_definition():
    draw = np.random.default_rng(0)
    for _ in range(50):
        prediction, reference = (" ".join(draw.choice(list("abcdef"), draw.integers(1, 9))) for _ in range(2))
        assert rouge_l(prediction, reference) == pytest.approx(_f1(prediction, reference))


def test_rouge_is_the_mean_of_rouge_score():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(b, a) for a, b in zip(PREDICTIONS, REFERENCES)]
    result = Rouge().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert result == pytest.approx({name: np.mean([s[name].fmeasure for s in scores]) for name in scores[0]})
    assert result["rougeL"] == pytest.approx((2 / 3 + 1 + 1 / 3 + 0) / 4)


def test_rouge_in_batches_is_rouge_at_once():
    metric = Rouge()
    for start in (0, 3):
        metric.add_batch(predictions=PREDICTIONS[start : start + 3], references=REFERENCES[start : start + 3])
    assert metric.compute() == Rouge().compute(predictions=PREDICTIONS, references=REFERENCES)


def test_distinct_by_hand():
    assert distinct_share(["a b", "a  b\n", "c", "A b"]) == 3 / 4
    assert distinct_share(["same"] * 10) == 1 / 10
    assert DistinctShare().compute(predictions=["a", "a"], references=["b", "c"]) == {"distinct": 0.5}


# What compute_exact and compute_f1 of transformers 4.57.6 (data/metrics/squad_metrics.py) give; 5.x has them no more.
SQUAD = [
    ("The cat, sat!", "a cat sat", 1, 1.0),
    ("Returns the sum of two numbers.", "Return the sum of the two numbers", 0, 0.8),
    ("the", "an", 1, 1),
    ("x", "y", 0, 0),
    ("the a", "x", 0, 0),
    ("don't  stop", "dont stop now", 0, 0.8),
    ("b b c", "b c c", 0, 2 / 3),
]


@pytest.mark.parametrize(("prediction", "reference", "exact", "overlap"), SQUAD)
def test_squad_by_its_script(prediction, reference, exact, overlap):
    assert (exact_match(prediction, reference), f1(prediction, reference)) == (exact, pytest.approx(overlap))


def test_squad_means_and_several_references():
    assert normalize_answer("An  anthem: The\tU.S.A.") == "anthem usa"
    predictions, references = [row[0] for row in SQUAD], [row[1] for row in SQUAD]
    means = {"exact_match": 2 / 7, "f1": (2 + 0.8 + 0.8 + 2 / 3) / 7}
    assert squad(predictions, references) == pytest.approx(means)
    assert Squad().compute(predictions=predictions, references=references) == pytest.approx(means)
    # The better of each: "b c" of three and two words, 4 of 5; the second one of the other text.
    several = [["x", "b c"], ["x", "y", "z"]]
    assert Squad().compute(predictions=["b b c", "y"], references=several) == {"exact_match": 0.5, "f1": 0.9}
    with pytest.raises(ValueError, match="empty list of references"):
        squad(["a"], [[]])


def test_bleu_and_chrf_are_those_of_sacrebleu():
    predictions = ["the cat sat on a mat", "Returning the numbers in order .", "a b c d e"]
    references = ["the cat sat on the mat", "return the numbers in order.", "a b c d e f"]
    expected = {"bleu": sacrebleu.corpus_bleu(predictions, [references]).score}
    expected["chrf"] = sacrebleu.corpus_chrf(predictions, [references]).score
    assert 20 < expected["bleu"] < 80 < expected["chrf"] + 20
    for function, metric in ((bleu, Bleu), (chrf, ChrF)):
        name = function.__name__
        assert function(predictions, references) == pytest.approx({name: expected[name]})
        assert metric().compute(predictions=predictions, references=references) == pytest.approx(
            function(predictions, references)
        )
    # BLEU-4 by hand: 3 of 4, 2 of 3, 1 of 2 and 0 of 1 n-grams, the last smoothed to 1/2; as long as the reference.
    by_hand = 100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert bleu(["a b c x"], ["a b c d"]) == pytest.approx({"bleu": by_hand})


def test_several_references_need_not_be_equally_many():
    predictions, references = (
        ["the cat sat on a mat", "one two three four"],
        [["no", "the cat sat on the mat"], ["one two three"]],
    )
    streams = [["no", "one two three"], ["the cat sat on the mat", None]]
    expected = sacrebleu.corpus_bleu(predictions, streams).score
    assert Bleu().compute(predictions=predictions, references=references)["bleu"] == pytest.approx(expected)
    expected = sacrebleu.corpus_chrf(predictions, streams).score
    assert ChrF().compute(predictions=predictions, references=references)["chrf"] == pytest.approx(expected)
    signature = text_statistics("bleu", predictions, references)[2]
    assert signature == f"nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], ["a", "b"])])
def test_texts_that_do_not_match_in_number(predictions, references):
    for function in (rouge, squad, bleu, chrf):
        with pytest.raises(ValueError, match=f"{len(predictions)} predictions and {len(references)} references"):
            function(predictions, references)
    with pytest.raises(ValueError):
        Rouge().compute(predictions=predictions, references=references)


def test_no_texts_are_never_distinct():
    with pytest.raises(ValueError, match="0 predictions"):
        distinct_share([])


def test_missing_rouge_score(monkeypatch):
    metrics._scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r'pip install "hf-encdec-distill\[demo\]"'):
        rouge_l("a", "b")


def test_missing_sacrebleu(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match=r'pip install "hf-encdec-distill\[demo\]"'):
        chrf(["a"], ["b"])


@pytest.mark.parametrize("filler", [-100, "pad"])
def test_fillers_and_special_tokens_do_not_count(tokenizer, filler):
    if filler == "pad":
        filler = tokenizer.pad_token_id
    texts, references = ["return a", "return the sum"], ["return a", "two numbers or more"]
    predicted, labels = (
        [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in side] for side in (texts, references)
    )
    lengths = [len(ids) - 1 for ids in predicted]
    # As `generate` returns them: the decoder's start in front, fillers behind.
    predicted = [[tokenizer.bos_token_id, *ids] for ids in predicted]
    result = generation_metrics(tokenizer)(EvalPrediction(_padded(predicted, filler), _padded(labels, filler)))
    expected = Rouge().compute(predictions=texts, references=references)
    counted = {"distinct": 1, "generated_tokens": np.mean(lengths)}
    assert result == pytest.approx({**expected, "exact_match": 0.5, "f1": 0.5, **counted})
    chosen = generation_metrics(tokenizer, metrics=[chrf, Squad().compute])
    result = chosen(EvalPrediction(_padded(predicted, filler), _padded(labels, filler)))
    assert result == pytest.approx({**chrf(texts, references), "exact_match": 0.5, "f1": 0.5, **counted})


def _padded(rows, filler):
    array = np.full((len(rows), max(map(len, rows)) + 3), filler)
    for row, ids in zip(array, rows):
        row[: len(ids)] = ids
    return array


def test_tuple_of_predictions(tokenizer):
    ids = np.array([tokenizer("return a")["input_ids"]])
    assert generation_metrics(tokenizer)(EvalPrediction((ids, np.zeros(3)), ids))["exact_match"] == 1


def test_the_start_token_is_no_part_of_a_prediction(tokenizer):
    start = tokenizer("x")["input_ids"][0]
    labels = np.array([tokenizer("return a")["input_ids"], tokenizer("return b")["input_ids"]])
    generated = EvalPrediction(np.insert(labels, 0, start, axis=1), labels)
    assert generation_metrics(tokenizer, start)(generated)["exact_match"] == 1
    assert generation_metrics(tokenizer, start)(EvalPrediction(labels, labels))["exact_match"] == 1
    assert generation_metrics(tokenizer)(generated)["exact_match"] == 0


def test_logits_in_place_of_tokens(tokenizer):
    with pytest.raises(ValueError, match=r"shape \(2, 3, 5\).*predict_with_generate=True"):
        generation_metrics(tokenizer)(EvalPrediction(np.zeros((2, 3, 5)), np.zeros((2, 3))))


def test_tokenizer_that_cannot_fill(make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer(pad_token=None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither pad_token nor eos_token"):
        generation_metrics(tokenizer)


def test_in_a_seq2seq_trainer(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
    )
    model = BartForConditionalGeneration(config).eval()
    texts = ["return a", "sum of two numbers", "add b"]
    columns = {name: [tokenizer(text)["input_ids"] for text in texts] for name in ("input_ids", "labels")}
    rows = Dataset.from_dict(columns)
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            str(tmp_path), predict_with_generate=True, generation_max_length=7, report_to=[], use_cpu=True
        ),
        eval_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        compute_metrics=generation_metrics(tokenizer),
    )
    result = trainer.evaluate()
    with torch.no_grad():
        outputs = [
            model.generate(torch.tensor([ids]), max_length=7, do_sample=False)[0] for ids in columns["input_ids"]
        ]
    outputs = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in outputs]
    assert result["eval_rougeL"] == pytest.approx(np.mean([rouge_l(a, b) for a, b in zip(outputs, texts)]))
    assert result["eval_distinct"] == distinct_share(outputs)
    assert result["eval_generated_tokens"] <= 6
