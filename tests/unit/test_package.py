"""The package as a whole: which way imports point, what travels to the Hub, what an import costs."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_encdec_distill


ROOT = Path(hf_encdec_distill.__file__).parent
REPOSITORY = Path(__file__).parents[2]
PACKAGES = {path.stem for path in ROOT.iterdir()} - {"__init__"}
# Which package imports which; CONTRIBUTING prints the same list. What is named nowhere imports nothing of ours.
ARROWS = {
    "cli": "cards bench evaluation export distillation data metrics models hub files devices progress",
    "cards": "bench export distillation metrics files",
    "bench": "export metrics models files devices",
    "evaluation": "distillation metrics models devices progress",
    "export": "metrics models files",
    "distillation": "metrics models hub files",
    "data": "models files",
    "models": "files",
}
ANYWHERE = {"_lazy", "_moved"}
TRAVELS = [
    "compat_rope_encdec",
    "configuration_rope_encdec",
    "configuration_rope_encdec_vision",
    "modeling_rope_encdec",
    "modeling_rope_encdec_vision",
    "processing_rope_encdec_vision",
]


def imported_modules(path):
    """Absolute names of all modules that a file imports, at whatever depth of nesting."""
    package = ["hf_encdec_distill", *path.relative_to(ROOT).with_suffix("").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            if node.module is None or module == "hf_encdec_distill":
                yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts in (("__init__",), ("__main__",)):
        return  # the front doors: the first knows everything, and imports most of it on first use
    allowed = {parts[0], *ANYWHERE, *ARROWS.get(parts[0], "").split()}
    for module in imported_modules(path):
        names = module.split(".")
        if names[0] == "hf_encdec_distill" and len(names) > 1 and names[1] in PACKAGES:
            assert names[1] in allowed, f"{parts[0]} must not import {names[1]}"


def test_contributing_prints_the_arrows():
    printed = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "\n".join(f"{package} -> {imported}" for package, imported in ARROWS.items()) in printed


@pytest.mark.parametrize("name", TRAVELS)
def test_what_travels_imports_torch_transformers_and_its_siblings(name):
    path = ROOT / "models" / "rope_encdec" / f"{name}.py"
    siblings = {f"hf_encdec_distill.models.rope_encdec.{sibling}" for sibling in TRAVELS}
    allowed_by_name = {"torch", "transformers", *sys.stdlib_module_names}
    if name.startswith("processing"):  # of images
        allowed_by_name |= {"numpy", "PIL"}
    for module in imported_modules(path):
        if module.removeprefix("hf_encdec_distill.models.rope_encdec.") in ("initialization", "vision"):
            continue  # in `from_decoder_only` and `from_parts`, which say what to install where it is not there
        assert module.split(".")[0] in allowed_by_name or module in siblings


def modules_of(code, before=""):
    """Names of the modules that `code` loads in a fresh interpreter, beyond those of the code `before`."""
    program = f"import sys\n{before}\nthere = set(sys.modules)\n{code}\nprint(*set(sys.modules) - there)"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


@pytest.mark.process
def test_importing_the_package_loads_neither_torch_nor_transformers():
    added = modules_of("import hf_encdec_distill")
    assert {name.split(".")[0] for name in added} - sys.stdlib_module_names == {"hf_encdec_distill"}


@pytest.mark.process
@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "transformers first"])
def test_the_model_is_registered_in_either_order_of_imports(ours_first):
    imports = ["import hf_encdec_distill", "from transformers import AutoConfig, AutoModelForSeq2SeqLM"]
    code = "\n".join(
        [
            *(imports if ours_first else reversed(imports)),
            "config = AutoConfig.for_model('rope_encdec', encoder_num_hidden_layers=1, decoder_num_hidden_layers=1,",
            "    vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2)",
            "print(type(AutoModelForSeq2SeqLM.from_config(config)).__module__)",
        ]
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "hf_encdec_distill.models.rope_encdec.modeling_rope_encdec", run.stderr


@pytest.mark.process
def test_the_model_loads_little_more_than_transformers():
    before = "from transformers import PreTrainedModel, AutoModelForSeq2SeqLM"
    added = modules_of("from hf_encdec_distill import RopeEncDecForConditionalGeneration", before)
    heavy = {"datasets", "evaluate", "peft", "matplotlib", "rich", "optimum", "openvino", "coremltools", "onnxruntime"}
    assert not {name.split(".")[0] for name in added} & heavy
    assert not {name for name in added if name.startswith("transformers.trainer")}
    ours = {name for name in added if name.startswith("hf_encdec_distill")}
    assert len(ours) == 11, ours
    # What any model that generates loads of transformers itself is upstream's choice, and differs by version.
    assert len([name for name in added if not name.startswith("transformers.")]) < 40


@pytest.mark.process
def test_the_trainer_loads_no_metrics():
    """`evaluate` imports SciPy, which takes a third as long as all the rest."""
    added = modules_of("from hf_encdec_distill import DistillationTrainer")
    assert "transformers.trainer" in added
    assert not {name.split(".")[0] for name in added} & {"evaluate", "matplotlib", "optimum", "rouge_score"}


def test_names_are_there_on_first_use():
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    assert issubclass(hf_encdec_distill.DistillationTrainer, Seq2SeqTrainer)
    assert issubclass(hf_encdec_distill.DistillationTrainingArguments, Seq2SeqTrainingArguments)
    assert set(hf_encdec_distill.__all__) <= set(dir(hf_encdec_distill))
    with pytest.raises(AttributeError, match="no_such_name"):
        hf_encdec_distill.no_such_name  # noqa: B018


# Packages whose names are imported on first use, and names that documentation leads people to.
LAZY = {
    "": "DistillationTrainer",
    ".bench": "compare_latency",
    ".cards": "write_model_card",
    ".data": "load_pairs",
    ".distillation": "capture",
    ".evaluation": "score",
    ".metrics": "rouge",
}


@pytest.mark.process
def test_a_type_checker_knows_what_is_imported_on_first_use(tmp_path):
    """To a type checker `__getattr__` gives `Any`: each name stands in `if TYPE_CHECKING:` too."""
    names = {}
    for package, known in LAZY.items():
        module = importlib.import_module(f"hf_encdec_distill{package}")
        lazy = set(dir(module)) - set(vars(module))
        assert known in lazy
        values = {name: getattr(module, name) for name in lazy}
        names |= {f"{module.__name__}.{name}": value for name, value in values.items() if callable(value)}
    program = tmp_path / "program.py"
    lines = [*(f"import hf_encdec_distill{package}" for package in LAZY), *(f"reveal_type({name})" for name in names)]
    lines += [f"hf_encdec_distill{package}.no_such_name" for package in LAZY]
    program.write_text("\n".join(lines), encoding="utf-8")
    # Of other packages only the decorators that ours use are read, which takes seconds, not a minute.
    settings = ["[mypy]\nfollow_imports = skip\nmypy_path = ", str(ROOT.parent)]
    for read in ("hf_encdec_distill.*", "torch", "torch.autograd.*", "torch.utils._contextlib"):
        settings.append(f"\n[mypy-{read}]\nfollow_imports = silent")
    (tmp_path / "mypy.ini").write_text("".join(settings), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file=mypy.ini", "--cache-dir=cache", program.name]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    revealed = re.findall(r'Revealed type is "(.*)"', run.stdout)
    assert len(revealed) == len(names), run.stdout + run.stderr
    assert run.stdout.count('has no attribute "no_such_name"') == len(LAZY), run.stdout
    for (name, value), seen in zip(names.items(), revealed):
        if inspect.isclass(value):
            assert f"{value.__module__}.{value.__qualname__}" in seen, (name, seen)
        else:
            assert re.findall(r"(\w+): ", seen) == list(inspect.signature(value).parameters), (name, seen)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("distillation.metrics.generation_metrics", "metrics.generation_metrics"),
        ("distillation.metrics.rouge", "metrics.rouge"),
        ("distillation.fidelity.Fidelity", "evaluation.Fidelity"),
        ("distillation.cache.is_cache", "distillation.is_cache"),
        ("distillation.cache.capture", "distillation.capture"),
        ("model_card.write_model_card", "cards.write_model_card"),
        ("model_card.model_index", "cards.model_index"),
        ("model_card.estimate", "metrics.estimate"),
        ("model_card_callback.ModelCardCallback", "cards.ModelCardCallback"),
    ],
)
def test_a_name_is_found_where_documentation_had_it(old, new):
    def imported(path):
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(f"hf_encdec_distill.{module}"), name)

    with pytest.warns(DeprecationWarning, match=f"{old} has moved to"):
        found = imported(old)
    assert found is imported(new)
    with pytest.raises(ImportError):
        exec(f"from hf_encdec_distill.{old.rpartition('.')[0]} import no_such_name")
