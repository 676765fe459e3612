"""The model card of a distilled student, written from `metrics.json`: what is not in the file is not in the card.

`hf-encdec-distill evaluate` writes the same structure without the keys about training; `cards.index` adds its numbers
to an existing card.

`metrics.json` is one JSON object. Every key is optional unless marked (required); unknown keys are ignored.

    Estimate    a number, or {"value": x, "low": lo, "high": hi} with lo <= x <= hi; "spread" says once what lo and hi
                are. `metrics.measures.estimate([...])` combines one value per seed. "rows" in it is the number of
                held-out items that it was measured on, where that is not the entry's n.
    shares      rouge_l, exact_match, f1, teacher_agreement, ece and distinct lie in 0 ... 1 (cards and plots multiply
                by 100); chrf and bleu keep sacrebleu's scale, 0 ... 100; judge lies in 1 ... 5
    nats        ce, kl and entropy_gap (the model's entropy minus the teacher's), per target token

    title       heading; default student["name"], then the folder's name
    task        {"name", "description", "pipeline_tag", "language", "prompt_template", "built_in"}; built_in: whether
                the student's tokenizer adds the prompt itself, by default that it is merged
    teacher     {"name", "hub_id", "license", "adaptation"}; hub_id becomes base_model; adaptation, free text, says how
                the teacher was fine-tuned on the task
    student     {"name", "model_type", "encoder_layers", "decoder_layers", "cross_attention", "encoder_attention",
                "parameters", "license"}; license defaults to the teacher's, model_type to "rope_encdec". Of a
                decoder-only student {"layers", "chat_template"}, the latter whether its tokenizer has one, in place
                of what is about encoder and decoder
    vision_tower  of a student that reads images, {"name", "hub_id", "license", "model_type"}; hub_id is a second
                base_model
    data        {"name", "hub_id", "description", "license", "train_rows", "validation_rows", "test_rows", "split"};
                split is the one that the models were measured on, default "test"
    judge       {"name", "template", "probability_of_a_digit"}, the model whose scores are "judge"
    signatures  {"bleu" or "chrf": sacrebleu's signature}
    recipe      {setting: value, ...}, printed in this order
    stages      [{"name", "steps", "seconds", "note"}, ...]
    seeds       [0, 1, ...] (required with models)
    spread      what low and high of the models and differences are (required if any of them has these), for instance
                "95 % interval, bootstrap over 229 held-out functions"
    models      {key: {"n" (required, held-out items), "label", "parameters", any Estimates named in METRICS ("kl" is
                to the tuned teacher), and "logged", {name: number} for numbers of other names and scales}};
                known keys, in the order shown: teacher_before, teacher, student_start, student_ce, student_kd,
                lead_baseline; others follow. A key that ends in "_baseline" is a baseline without a model
    differences [{"of": key, "minus": key, and the same Estimates as models, paired}, ...]
    verdict     {"sentences": [...], "command"}, from `metrics.verdict`: what a reader has to know before using the
                weights, and how their training goes on; default a sentence for each baseline that scores higher
    published   the entry of models that describes the saved weights, default "student_kd"; it becomes the model-index
    latency     `hf_encdec_distill.bench.compare_latency(...).to_dict()`
    cost        `hf_encdec_distill.bench.compare_cost(...).to_dict()`
    exports     {folder: `hf_encdec_distill.export.parity.prove(...)`}; default `proven_exports` of the card's folder
    machine     `hf_encdec_distill.bench.machine_description()`, of the training
    energy      of the training, {"kwh", "counters"} from `hf_encdec_distill.bench.EnergyMeter`, and
                {"grid_g_per_kwh", "location"}, grams of CO2 equivalent and where; both together give the metadata
                co2_eq_emissions
    curves      {key of models: [Trainer log_history rows]}, for the plots
    samples     [{"source", "reference", and one text for any key of models}, ...]; the card shows ten, and has the
                shortest source in its widget and its code
    figures     {caption: path of a picture, relative to the card's folder}
    limits      [sentence, ...], added to those that hold for every such model
    note        a line before the heading, for instance a comment
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..files import inside, read_json, write_text
from ..metrics.measures import METRICS, OF_TEACHER, bounds, model_label, model_order
from ..metrics.verdict import below_baselines
from .index import eval_results
from .loading import READS_IMAGES, Reads, loading_section, proven_exports, table


PAPER = "https://arxiv.org/abs/2501.16273"
_SAMPLES = 10
_KINDS: dict[type, tuple[tuple[str, ...], str]] = {
    Mapping: (
        ("task", "teacher", "student", "vision_tower", "data", "judge", "signatures", "recipe", "models", "verdict")
        + ("latency", "cost", "exports", "machine", "energy", "curves", "figures"),
        "a mapping of names to values",
    ),
    Sequence: (("stages", "seeds", "differences", "samples", "limits"), "a list"),
    str: (("title", "spread", "published", "note"), "a text"),
}


def write_model_card(path_or_dir: str | Path, metrics: Mapping | str | Path, repo_id: str | None = None) -> Path:
    """Writes a card to a folder's `README.md`, or to a path that ends in `.md`.

    Args:
        metrics: the structure in the module docstring, or the path of its JSON file.
        repo_id: the name in the lines that load the model, `"user/name"`; default the folder's name.

    Returns:
        The path written.

    Raises:
        ValueError: if an entry contradicts the structure, naming it.
    """
    path = Path(path_or_dir)
    path = path if path.suffix == ".md" else path / "README.md"
    given = metrics if isinstance(metrics, Mapping) else read_json(Path(metrics))
    check(given)
    text = card_text({"exports": proven_exports(path.parent), **given}, path.resolve().parent.name, repo_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def card_text(metrics: Mapping, folder: str, repo_id: str | None = None) -> str:
    """The card, whose structure `check` has passed.

    Args:
        metrics: with `exports`.
        folder: the name of the one that the card is for.
        repo_id: as `write_model_card` takes it.
    """
    title = metrics.get("title") or metrics.get("student", {}).get("name") or folder
    example = _example(metrics)
    loading = {"source": example["source"]} if example else {}
    sections = (
        f"# {title}\n\n{_summary(metrics)}",
        _use(metrics),
        loading_section(
            repo_id or folder, _model_type(metrics), metrics.get("exports") or {}, **loading, reads=_reads(metrics)
        ),
        _results(metrics),
        _figures(metrics),
        _speed(metrics),
        _samples(metrics),
        _training(metrics),
        _environment(metrics),
        _limits(metrics),
        _license_section(metrics),
        "" if _is_decoder_only(metrics) else _citation(),
    )
    text = "\n\n".join(filter(None, (metrics.get("note"), *sections)))
    return f"---\n{_card_data(metrics, title).to_yaml()}\n---\n\n{text}\n"


def check(metrics: Mapping) -> None:
    """Raises ValueError for an entry that contradicts the structure, naming it."""
    for kind, (known, words) in _KINDS.items():
        for key in known:
            value = metrics.get(key)
            if value is not None and (not isinstance(value, kind) or (kind is Sequence and isinstance(value, str))):
                raise ValueError(f"{key}={value!r} is of type {type(value).__name__}, expected {words}")
    energy = metrics.get("energy") or {}
    if "grid_g_per_kwh" in energy and "location" not in energy:
        raise ValueError("energy has grid_g_per_kwh but no location: give where the electricity is from")
    models, spread = metrics.get("models", {}), metrics.get("spread")
    if models and not metrics.get("seeds"):
        raise ValueError("metrics has models but no seeds: give the list of seeds that they were trained with")
    published = metrics.get("published", "student_kd")
    if models and published not in models:
        raise ValueError(
            f"published={published!r} is not among models, which has {', '.join(models)}; name one of these"
        )
    for key, entry in models.items():
        if not isinstance(entry.get("n"), int):
            raise ValueError(
                f"models[{key!r}] has n={entry.get('n')!r}: give the number of held-out items it was measured on"
            )
    rows = [*((f"models[{key!r}]", entry) for key, entry in models.items())]
    for index, row in enumerate(metrics.get("differences", [])):
        unknown = [row.get(side) for side in ("of", "minus") if row.get(side) not in models]
        if unknown:
            raise ValueError(
                f"differences[{index}] names {unknown[0]!r}, which is not among models: {', '.join(models)}"
            )
        rows.append((f"differences[{index}]", row))
    for where, row in rows:
        for name, (_, _, _, share) in METRICS.items():
            if row.get(name) is not None:
                _, low, high = bounds(row[name], f"{where}[{name!r}]", share and where.startswith("models"))
                if low < high and not spread:
                    raise ValueError(
                        f"{where}[{name!r}] has a spread, but metrics has no 'spread' that says what it is"
                    )


def _card_data(metrics: Mapping, title: str) -> ModelCardData:
    task, data = (metrics.get(key, {}) for key in ("task", "data"))
    made_of = [(metrics.get(key) or {}).get("hub_id") for key in ("teacher", "vision_tower")]
    on_hub = [name for name in made_of if name]
    known: dict[str, Any] = {
        # base_model, datasets and the license are links on the Hub: only what the caller gave, never a guess
        "base_model": on_hub if len(on_hub) > 1 else next(iter(on_hub), None),
        "datasets": [data["hub_id"]] if data.get("hub_id") else None,
        "language": task.get("language"),
        "license": _license(metrics),
        "pipeline_tag": task.get("pipeline_tag") or ("image-text-to-text" if _reads_images(metrics) else None),
        "widget": _widget(metrics),
    }
    emissions = _emissions(metrics)
    if emissions is not None:  # https://huggingface.co/docs/hub/model-cards-co2
        energy = metrics["energy"]
        known["co2_eq_emissions"] = {
            "emissions": round(emissions, 3),
            "source": f"counters of {energy['counters']}, {energy['grid_g_per_kwh']} g per kWh",
            "training_type": "fine-tuning",
            "geographical_location": energy["location"],
            "hardware_used": _hardware(metrics),
        }
    key = metrics.get("published", "student_kd")
    results = eval_results(metrics, key) if key in metrics.get("models", {}) else []
    if results:
        known |= {"model_name": title, "eval_results": results}
    return ModelCardData(
        library_name="transformers",
        tags=[
            *([] if _is_decoder_only(metrics) else ["encoder-decoder"]),
            "knowledge-distillation",
            _model_type(metrics),
        ],
        **{key: value for key, value in known.items() if value is not None},
    )


def _example(metrics: Mapping) -> Mapping | None:
    """The sample with the shortest source."""
    samples = [sample for sample in metrics.get("samples", []) if sample.get("source")]
    return min(samples, key=lambda sample: len(sample["source"]), default=None)


def _widget(metrics: Mapping) -> list[dict] | None:
    """An example for the Hub to show: https://huggingface.co/docs/hub/models-widgets."""
    example = _example(metrics)
    if example is None or _reads_images(metrics):  # that would need a picture on the Hub
        return None
    answer = example.get(metrics.get("published", "student_kd"))
    return [{"text": example["source"], **({"output": {"text": answer}} if answer else {})}]


def _license(metrics: Mapping) -> str | None:
    return metrics.get("student", {}).get("license") or metrics.get("teacher", {}).get("license")


def license_of(name: str | Path) -> str | None:
    """The license in the card of a model, in its folder or on the Hub; None if no card can be read."""
    try:
        path = inside(Path(name), "README.md") if Path(name).exists() else name
        license = ModelCard.load(path, ignore_metadata_errors=True).data.get("license")
    except Exception:  # of whatever a stranger has written there
        return None
    return license if isinstance(license, str) else None


def teacher_entry(name: str | Path) -> dict[str, str | None]:
    """`teacher` of a metrics structure, from a folder or a Hub id and the card there."""
    is_folder = os.path.isdir(name)
    on_hub = not is_folder and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name))
    license = license_of(name) if is_folder or on_hub else None
    return {"name": Path(name).name, "hub_id": str(name) if on_hub else None, "license": license}


def _model_type(metrics: Mapping) -> str:
    return metrics.get("student", {}).get("model_type") or "rope_encdec"


def _is_decoder_only(metrics: Mapping) -> bool:
    return "layers" in metrics.get("student", {})


def _reads_images(metrics: Mapping) -> bool:
    return _model_type(metrics) == READS_IMAGES


def _reads(metrics: Mapping) -> Reads:
    """As `loading_section` takes it."""
    if not _is_decoder_only(metrics):
        return "source"
    return "chat" if metrics["student"].get("chat_template") else "prompt"


def _summary(metrics: Mapping) -> str:
    student, teacher, task = (metrics.get(key, {}) for key in ("student", "teacher", "task"))
    layers = [
        f"{student[side]} {side.split('_')[0]}" for side in ("encoder_layers", "decoder_layers") if side in student
    ]
    layers = [str(student["layers"])] if _is_decoder_only(metrics) else layers
    size = ([f"{student['parameters'] / 1e6:.1f} M parameters"] if "parameters" in student else []) + (
        [f"{' and '.join(layers)} layers"] if layers else []
    )
    kind = _model_type(metrics)
    text = "A RoPE encoder-decoder" if kind == "rope_encdec" else f"An encoder-decoder of type `{kind}`"
    text = "A RoPE encoder-decoder that reads images" if _reads_images(metrics) else text
    text = f"A decoder-only model of type `{kind}`" if _is_decoder_only(metrics) else text
    text += f" ({', '.join(size)})" if size else ""
    text += f" for one task, {task['name']}" if task.get("name") else ""
    text += f", distilled from the decoder-only model {_link(teacher)}." if teacher.get("name") else "."
    tower = metrics.get("vision_tower") or {}
    if tower.get("name"):
        kind = f" (`{tower['model_type']}`)" if tower.get("model_type") else ""
        text += f" Its vision tower is that of {_link(tower)}{kind}."
    attention = {
        "merged": "Each decoder layer attends to the prompt and to its own tokens in one softmax (`merged`)",
        "separate": "The decoder reads the encoder through cross-attention blocks of its own (`separate`)",
    }.get(student.get("cross_attention"))
    if attention:
        text += f" {attention}"
        text += (
            f"; the encoder's attention is {student['encoder_attention']}."
            if student.get("encoder_attention")
            else "."
        )
    return text


def _link(entry: Mapping) -> str:
    return f"[{entry['name']}](https://huggingface.co/{entry['hub_id']})" if entry.get("hub_id") else entry["name"]


def _use(metrics: Mapping) -> str:
    task = metrics.get("task", {})
    text = "## Intended use\n\n" + (
        task.get("description")
        or f"The task{' above: ' + task['name'] if task.get('name') else ' that it was trained on'}."
    )
    if task.get("prompt_template"):
        merged = metrics.get("student", {}).get("cross_attention") == "merged"
        if _is_decoder_only(metrics) and task.get("built_in"):
            whose = "The tokenizer's chat template makes this prompt, so give it the bare source as a user's message"
        elif task.get("built_in", merged):
            whose = "The tokenizer adds this prompt, so give it the bare source"
        elif merged:
            whose = (
                "The tokenizer does not add this prompt: make the input with "
                "`hf_encdec_distill.models.prompts.encode_prompt`, without its last token"
            )
        else:
            whose = "The teacher's prompt"
        text += f"\n\n{whose}:\n\n"
        text += fenced(task["prompt_template"])
    return text


def _number(estimate, name: str, factor: float = 1, decimals: int = 1, signed: bool = False) -> str:
    """An Estimate for a reader: `29.9`, or with a spread `29.9 (28.1 to 31.6)`; without an estimate a dash."""
    if estimate is None:
        return "–"
    value, low, high = (f"{factor * x:{'+' if signed else ''}.{decimals}f}" for x in bounds(estimate, name))
    text = value if low == high else f"{value} ({low} to {high})"
    return text.replace("-", "−")


def _results(metrics: Mapping) -> str:
    models = metrics.get("models", {})
    if not models:
        return ""
    shown = {name: spec for name, spec in METRICS.items() if any(row.get(name) is not None for row in models.values())}
    rows = []
    published = metrics.get("published", "student_kd")
    for key in model_order(models):
        row, label = models[key], model_label(key, models)
        size = f"{row['parameters'] / 1e6:.1f}" if row.get("parameters") else "–"
        values = [_number(row.get(name), name, factor, decimals) for name, (_, factor, decimals, _) in shown.items()]
        rows.append([f"**{label}** (these weights)" if key == published else label, size, *values, row["n"]])
    text = "## Results\n\n" + table(["", "Parameters, M", *(spec[0] for spec in shown.values()), "Items"], rows)
    seeds = metrics["seeds"]
    text += f"\n\n{'Seed' if len(seeds) == 1 else 'Seeds'} {', '.join(map(str, seeds))}."
    text += f" In brackets: {metrics['spread']}." if metrics.get("spread") else " No spread was measured."
    if "rouge_l" in shown:
        text += " A constant text can score well in ROUGE-L; read it together with the share of distinct outputs."
    text += _reference(metrics, shown) + _verdict(metrics, published)
    for key in model_order(models):
        if models[key].get("logged"):
            logged = "\n".join(f"- {name}: {value:.5g}" for name, value in models[key]["logged"].items())
            text += f"\n\nLogged values, *{model_label(key, models)}*:\n\n{logged}"
    for row in metrics.get("differences", []):
        parts = []
        for name, (heading, factor, decimals, _) in METRICS.items():
            if row.get(name) is not None:
                _, low, high = bounds(row[name], name)
                tie = ", not distinguishable from zero" if low < high and low <= 0 <= high else ""
                parts.append(f"- {heading}: {_number(row[name], name, factor, decimals, signed=True)}{tie}")
        if parts:
            of, minus = (model_label(row[side], models) for side in ("of", "minus"))
            text += f"\n\nDifference, *{of}* minus *{minus}*:\n\n" + "\n".join(parts)
    return text


def _reference(metrics: Mapping, shown: Mapping) -> str:
    """Which teacher the measures of closeness refer to: seldom the one on the Hub."""
    names = [f"*{METRICS[name][0].split(',')[0]}*" for name in shown if name in OF_TEACHER]
    teacher = metrics.get("teacher", {})
    if not names or not teacher.get("name"):
        return ""
    tuned = teacher.get("adaptation")
    named = f"tuned teacher, {teacher['name']} after fine-tuning" if tuned else f"teacher, {teacher['name']}"
    return f"\n\n{' and '.join(names)} {'is' if len(names) == 1 else 'are'} measured against the {named}."


def _verdict(metrics: Mapping, published: str) -> str:
    """What a run has found about its student, else a sentence for each baseline that scores higher."""
    said = metrics.get("verdict") or {"sentences": below_baselines(metrics["models"], published)}
    paragraphs = ["**{}.** {}".format(*sentence.split(". ", 1)) for sentence in said["sentences"]]
    if said.get("command"):
        paragraphs.append(f"Training goes on from here with\n\n```bash\n{said['command']}\n```")
    return "".join(f"\n\n{paragraph}" for paragraph in paragraphs)


def _figures(metrics: Mapping) -> str:
    return "\n\n".join(f"![{caption}]({file})" for caption, file in metrics.get("figures", {}).items())


def _speed(metrics: Mapping) -> str:
    latency, cost = metrics.get("latency"), metrics.get("cost")
    rows, notes = [], []
    if latency:
        for label, key, ratio, decimals in (
            ("First token, ms", "first_token_ms", "first_token", 1),
            ("Each further token, ms", "step_ms", "step", 2),
            ("Tokens per second after the first", "tokens_per_second", None, 1),
            ("Whole request, ms", "request_ms", "request", 1),
        ):
            sides = [_number(latency[side][key], key, 1, decimals) for side in ("teacher", "student")]
            rows.append([label, *sides, _number(latency["ratio"].get(ratio), key, 1, 2)])
        notes.append(
            f"Times: batch {latency['batch_size']}, {latency['prompt_length']:g} tokens in, {latency['new_tokens']} "
            f"out, greedy, {latency['dtype']} ({latency['dtype_reason']}), PyTorch, both in the same generation loop "
            f"with key/value caches; {latency['spread']}, ratios within a round. {_machine(latency['machine'])}"
        )
    if cost:
        for label, key, unit in (
            ("First token, GFLOPs (counted)", "first_token_flops", 1e9),
            ("Each further token, MFLOPs (counted)", "flops_per_token", 1e6),
            ("Read per further token, MB (counted)", "bytes_per_token", 1e6),
            ("Key/value cache, MB (counted)", "kv_cache_bytes", 1e6),
        ):
            sides = [f"{cost[side][key] / unit:.4g}" for side in ("teacher", "student")]
            rows.append([label, *sides, f"{cost['ratio'][key]:.2f}"])
        parameters = [cost[side]["parameters"] for side in ("teacher", "student")]
        for part, label in (
            ("total", "Parameters, M"),
            *((p, f"– {p}, M") for p in ("embedding", "encoder", "decoder", "head")),
        ):
            if part == "encoder" and not any(side[part] for side in parameters):
                continue
            ratio = f"{cost['ratio']['parameters']:.2f}" if part == "total" else "–"
            rows.append([label, *(f"{side[part] / 1e6:.1f}" for side in parameters), ratio])
        notes.append(
            f"Counted from the two configs for {cost['prompt_length']} tokens in and {cost['new_tokens']} out in "
            f"{cost['dtype']}, with the head at one position. A head of 0 is tied to the embedding."
        )
    if not rows:
        return ""
    header = ["", "decoder-only teacher", "student", "student / teacher"]
    return "## Speed and size against the teacher\n\n" + table(header, rows) + "\n\n" + "\n\n".join(notes)


def _machine(machine: Mapping) -> str:
    facts = (
        ("gpus", "{}"),
        ("cpu", "{}"),
        ("usable_cores", "{} usable cores"),
        ("threads", "{} threads"),
        ("memory_gib", "{} GiB"),
        ("load", "load {} at the start"),
        ("python", "Python {}"),
        ("torch", "torch {}"),
        ("transformers", "transformers {}"),
    )
    found = [form.format(machine[key]) for key, form in facts if machine.get(key) is not None]
    return f"Machine: {', '.join(found)}." if found else ""


def _samples(metrics: Mapping) -> str:
    samples, models = metrics.get("samples", []), metrics.get("models", {})
    if not samples:
        return ""
    shown = samples[:_SAMPLES]
    parts = [
        "## Samples",
        # Markdown inside of HTML: the attribute is MkDocs', the Hub and GitHub need none.
        f'<details markdown="1">\n<summary>{len(shown)} held-out inputs with their outputs</summary>',
    ]
    for index, sample in enumerate(shown, 1):
        lines = [f"- reference: {_code(sample['reference'])}"] if sample.get("reference") is not None else []
        outputs = model_order({key: text for key, text in sample.items() if key not in ("source", "reference")})
        lines += [
            f"- {model_label(key, models)}: {_code(sample[key])}" for key in outputs if isinstance(sample[key], str)
        ]
        source = f"\n\n{fenced(sample['source'])}" if sample.get("source") is not None else ""
        parts.append(f"### Sample {index}{source}\n\n" + "\n".join(lines))
    return "\n\n".join([*parts, "</details>"])


def _training(metrics: Mapping) -> str:
    teacher, data = metrics.get("teacher", {}), metrics.get("data", {})
    parts = []
    if teacher.get("name"):
        tuned = f" Fine-tuned on the task first: {teacher['adaptation']}." if teacher.get("adaptation") else ""
        parts.append(f"**Teacher.** {_link(teacher)}, {teacher.get('license') or 'license not stated'}.{tuned}")
    if data:
        rows = [
            f"{data[f'{split}_rows']:,} {split}"
            for split in ("train", "validation", "test")
            if data.get(f"{split}_rows") is not None
        ]
        described = [data.get("name"), data.get("description"), f"Rows: {', '.join(rows)}" if rows else None]
        described.append(f"License: {data['license']}" if data.get("license") else None)
        parts.append("**Data.** " + " ".join(f"{text.rstrip('.')}." for text in described if text))
    if metrics.get("recipe"):
        parts.append("**Recipe.**\n\n" + table(["Setting", "Value"], metrics["recipe"].items()))
    if metrics.get("stages"):
        stages = [
            [
                stage.get("name"),
                stage.get("steps"),
                f"{stage['seconds']:.0f}" if stage.get("seconds") is not None else None,
                stage.get("note") or "",
            ]
            for stage in metrics["stages"]
        ]
        parts.append("**Stages.**\n\n" + table(["Stage", "Steps", "Seconds", ""], stages))
    if metrics.get("machine"):
        parts.append(_machine(metrics["machine"]))
    return "## Training\n\n" + "\n\n".join(filter(None, parts)) if parts else ""


def _hardware(metrics: Mapping) -> str:
    """The hardware of the training in a few words; empty if it is not known."""
    machine = metrics.get("machine", {})
    cores = f"{machine['usable_cores']} cores" if machine.get("usable_cores") else None
    return machine.get("gpus") or ", ".join(filter(None, (machine.get("cpu"), cores)))


def _environment(metrics: Mapping) -> str:
    seconds = sum(stage.get("seconds") or 0 for stage in metrics.get("stages", []))
    if not seconds:
        return ""
    hardware = _hardware(metrics)
    text = "## Environmental cost\n\n"
    text += f"{_duration(seconds)} on {hardware or 'unrecorded hardware'}. "
    energy, emissions = metrics.get("energy") or {}, _emissions(metrics)
    if "kwh" not in energy:
        return text + "Energy was not measured."
    text += (
        f"{energy['kwh']:.3g} kWh by the counters of {energy['counters']}; the rest of the machine is not included."
    )
    if emissions is not None:
        text += (
            f" That is {emissions:.3g} g of CO2 equivalent at {energy['grid_g_per_kwh']} g per kWh "
            f"({energy['location']})."
        )
    return text


def _emissions(metrics: Mapping) -> float | None:
    """Grams of CO2 equivalent, if both the energy and its source are known."""
    energy = metrics.get("energy") or {}
    known = "kwh" in energy and "grid_g_per_kwh" in energy
    return energy["kwh"] * energy["grid_g_per_kwh"] if known else None


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.2f} hours" if seconds >= 360 else f"{seconds:.0f} seconds"


def _limits(metrics: Mapping) -> str:
    limits = ["Trained and evaluated on the task above only. It may fail on any other."]
    if metrics.get("models") and len(metrics["seeds"]) == 1:
        limits.append("Trained with one seed: the numbers above do not include the variation between seeds.")
    if metrics.get("latency"):
        limits.append(
            "Latencies hold for the machine, dtype and lengths given with them; measure on your own hardware."
        )
    limits.append("Its outputs can be wrong, and it inherits the biases of its teacher and of its training data.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in [*limits, *metrics.get("limits", [])])


def _license_section(metrics: Mapping) -> str:
    """The license of the weights, and those of the teacher and the data."""
    license, teacher, data = _license(metrics), metrics.get("teacher", {}), metrics.get("data", {})
    text = f"{license}." if license else "Not stated."
    text += " The weights derive from the teacher's"
    if teacher.get("license") and teacher.get("name"):
        text += f", {teacher['name']} ({teacher['license']})."
    else:
        text += ": its license applies to them."
    tower = metrics.get("vision_tower") or {}
    if tower.get("name"):
        text += f" Those of its vision tower are of {tower['name']} ({tower.get('license') or 'license not stated'})."
    if data.get("name"):
        text += f" The data, {data['name']}: {data.get('license') or 'license not stated'}."
    return f"## License\n\n{text}"


def _citation() -> str:
    return f"""## Citation

A deep encoder with a shallow decoder, distilled from a decoder-only model, is the idea of
[Return of the Encoder: Maximizing Parameter Efficiency for SLMs]({PAPER}):

```bibtex
@article{{elfeki2025return,
  title   = {{Return of the Encoder: Maximizing Parameter Efficiency for SLMs}},
  author  = {{Elfeki, Mohamed and Liu, Rui and Voegele, Chad}},
  journal = {{arXiv preprint arXiv:2501.16273}},
  year    = {{2025}}
}}
```"""


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def fenced(text: str, language: str = "") -> str:
    """A code block that no backticks inside the text can end."""
    ticks = "`" * max(3, _longest_ticks(text) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _code(text: str) -> str:
    """One line of code, in enough backticks for any text."""
    text = " ".join(text.split())
    if not text:
        return "*(empty)*"
    ticks = "`" * (_longest_ticks(text) + 1)
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"
