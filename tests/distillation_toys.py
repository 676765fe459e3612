"""Toy students and teachers; EOS is 2, as for the toy tokenizer of conftest.py."""

import csv
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from hf_encdec_distill import (
    DistillationTrainer,
    DistillationTrainingArguments,
    RopeEncDecConfig,
    RopeEncDecForConditionalGeneration,
)


EOS = 2
TEMPLATE = "{source}\n#"


def spread(model, std=0.2, seed=0):
    """Random weights large enough that a wrong position or an ignored mask shows; norms stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std, generator=generator)
    return model.eval()


def make_teacher(vocab_size=280, seed=1, hidden_size=32):
    """Two layers of Llama, eval mode."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=3,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return spread(LlamaForCausalLM(config), seed=seed)


def write_teacher(folder, tokenizer, layers=4, std=0.2):
    """A folder with a small Llama and `tokenizer`, as `from_pretrained` takes it; returns the folder."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    spread(LlamaForCausalLM(config), std=std).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_writer(folder, tokenizer):
    """The same, of a teacher that ends some of its answers within 30 tokens and others not."""
    teacher = LlamaForCausalLM.from_pretrained(write_teacher(folder, tokenizer))
    with torch.no_grad():
        teacher.model.embed_tokens.weight[teacher.config.eos_token_id] *= 3
        for parameter in teacher.model.layers.parameters():
            if parameter.dim() > 1:
                parameter *= 3
    teacher.save_pretrained(folder)
    return folder


def logged_loss(trainer, name="loss"):
    """Train, and the first value that was logged under the name."""
    trainer.train()
    return next(entry[name] for entry in trainer.state.log_history if name in entry)


def write_pairs(path, rows):
    """A CSV file with the columns `text` and `short`, whose target can be read off the source; returns the path."""
    colours = ("red", "green", "blue", "black", "white")
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "short"])
        for number in range(rows):
            first, last = colours[number % 5], colours[number // 5 % 5]
            writer.writerow([f"{first} {number} {last}", f"It is {first} and {last}."])
    return path


def make_t5(vocab_size=280, dropout=0.0, seed=2):
    """Two layers of T5 on each side, eval mode."""
    config = T5Config(
        vocab_size=vocab_size,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=EOS,
    )
    return spread(T5ForConditionalGeneration(config), std=0.5, seed=seed)


_BART_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}


def make_bart(**fields):
    """Two layers of BART on each side, eval mode; `fields` of the config count for more."""
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _BART_SIDE.items()}
    tokens = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": EOS, "decoder_start_token_id": EOS}
    shape = {"vocab_size": 280, "d_model": 32, "max_position_embeddings": 64, "dropout": 0.0, **sides, **tokens}
    return spread(BartForConditionalGeneration(BartConfig(**{**shape, "forced_eos_token_id": EOS, **fields})))


def make_rope(cross_attention, seed=3, **fields):
    """Two layers of RopeEncDec on each side, eval mode; `cross_attention` is "separate" or "merged"; `fields` of the
    config count for more."""
    layers = {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, **layers}
    tokens = {"decoder_start_token_id": 1, "bos_token_id": 3, "eos_token_id": EOS, "pad_token_id": 0}
    config = {"vocab_size": 280, "cross_attention": cross_attention, **shape, **tokens, **fields}
    return spread(RopeEncDecForConditionalGeneration(RopeEncDecConfig(**config)), seed=seed)


STUDENTS = {
    "t5": make_t5,
    "separate": partial(make_rope, "separate"),
    "merged": partial(make_rope, "merged", cross_attention_layers=[1, 2]),  # so that no encoder layer goes unread
}


def ragged_rows(count, vocab_size=60, seed=0):
    """Ready rows of different lengths, the targets from 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(4, vocab_size, (length,), generator=generator).tolist()

    def length(least, most):
        return int(torch.randint(least, most + 1, (1,), generator=generator))

    rows = [{"input_ids": ids(length(2, 7)), "labels": [*ids(length(0, 8)), EOS]} for _ in range(count)]
    return [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]


def arguments(output_dir, cls=DistillationTrainingArguments, **changed):
    """Arguments of a short run on the CPU that writes nothing but what a test asks for."""
    settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return cls(output_dir=str(output_dir), **{**settings, **changed})


def token_terms(student, teacher, rows, temperature=1.0):
    """CE, KL(teacher || student) and top-1 agreement, `[N]` each, over the target tokens of ready rows.

    One row at a time without any padding, with the models' own shifts: no part of it is the package's.
    """
    ce, kl, agree = [], [], []
    for row in rows:
        source, target = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        student_logits = student(input_ids=source, labels=target[None]).logits[0]
        sequence = torch.cat([source[0], target])[None]
        with torch.no_grad():
            teacher_logits = teacher(sequence).logits[0, source.shape[1] - 1 : -1, : student_logits.shape[-1]]
        ce.append(F.cross_entropy(student_logits, target, reduction="none"))
        log_q, log_p = (F.log_softmax(logits / temperature, -1) for logits in (student_logits, teacher_logits))
        kl.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
        agree.append((student_logits.argmax(-1) == teacher_logits.argmax(-1)).float())
    return torch.cat(ce), torch.cat(kl), torch.cat(agree)


class LargestTensor(TorchDispatchMode):
    """How many elements the largest tensor has that is made meanwhile."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


class InOrder(DistillationTrainer):
    """Rows in their order, so that a step can be written by hand and is the same however many processes share it."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


class KeepLogs(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


class Stream(IterableDataset):
    """Rows one after another, whose number nobody knows beforehand."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def collate(rows):
    """Padded on the right with 0, without a tokenizer."""

    def pad(values, fill):
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(v) for v in values], True, padding_value=fill)

    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: pad([row[name] for row in rows], fill) for name, fill in fills.items()}
