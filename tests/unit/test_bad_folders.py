"""Each command, given folders and options that cannot work: one line, exit code 2, and nothing half-written."""

import json
import resource
import shutil

import pytest
import torch
from safetensors import SafetensorError
from test_files import PAGE, POINTER
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_encdec_distill.cli import info
from hf_encdec_distill.cli._checkpoints import RECIPE_HEADER
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.files import sha256
from hf_encdec_distill.models.vocabulary import trim_tokenizer


@pytest.fixture
def refused(whole, tmp_path, monkeypatch, capsys):
    """Runs a command in a folder of its own, {teacher}, {student} and {data} filled in, and returns the one line."""
    monkeypatch.chdir(tmp_path)
    lines = (f"Number {number} is followed by {number + 1}, as everybody knows.\n\n" for number in range(400))
    (tmp_path / "text.md").write_text("".join(lines))
    data = f"--dataset {whole / 'pairs.csv'} --source-column text --target-column short"

    def run(command, teacher=whole / "teacher", student=whole / "student"):
        before = set(tmp_path.rglob("*"))
        capsys.readouterr()
        try:
            code = main(command.format(teacher=teacher, student=student, data=data).split())
        except SystemExit as stop:  # argparse's way
            code = stop.code
        said = capsys.readouterr()
        errors = [line for line in said.err.splitlines() if "error: " in line]
        assert code == 2 and len(errors) == 1 and said.err.splitlines()[-1] == errors[0], said.err
        assert said.out == "" and "Traceback" not in said.err and len(errors[0]) < 800
        assert set(tmp_path.rglob("*")) == before
        return errors[0]

    return run


OF_TEACHER = {
    "init": "init {teacher} --output new {data}",
    "teach": "teach {teacher} --output new {data} --max-steps 1 --use_cpu True",
    "cache": "cache {teacher} --output new {data}",
    "distill": "distill {student} --teacher {teacher} --output new {data} --max-steps 1 --use_cpu True",
    "heal": "heal {student} --teacher {teacher} --text text.md --eval-rows 0 --output new --max-steps 1",
    "evaluate": "evaluate {student} --teacher {teacher} {data} --rows 2",
    "quickstart": "quickstart --teacher {teacher} --output new {data} --encoder-layers 2 --decoder-layers 1",
}
OF_STUDENT = {
    "distill": OF_TEACHER["distill"],
    "heal": OF_TEACHER["heal"],
    "evaluate": "evaluate {student} {data} --rows 2",
    "export": "export {student} new --target onnx {data}",
    "generate": "generate {student} hello",
}


@pytest.mark.parametrize("command", OF_TEACHER)
def test_a_teacher_whose_weights_are_a_pointer(refused, whole, tmp_path, command):
    folder = shutil.copytree(whole / "teacher", tmp_path / "teacher")
    (folder / "model.safetensors").write_bytes(POINTER)
    if command == "quickstart":  # which looks at the config at first, and would load the weights minutes later
        (folder / "config.json").write_bytes(POINTER)
    assert "Git LFS pointer" in refused(OF_TEACHER[command], teacher=folder)


@pytest.mark.parametrize("command", OF_STUDENT)
def test_a_student_whose_weights_are_cut(refused, whole, tmp_path, command):
    folder = shutil.copytree(whole / "student", tmp_path / "student")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "it was cut or altered" in refused(OF_STUDENT[command], student=folder)


@pytest.mark.parametrize("command", ["info {student}", *OF_STUDENT.values()])
def test_a_folder_without_a_config(refused, tmp_path, command):
    (tmp_path / "bare").mkdir()
    assert "bare holds no model, there is no config.json" in refused(command, student=tmp_path / "bare")


@pytest.mark.parametrize("command", OF_TEACHER.values())
def test_a_student_in_place_of_the_teacher_is_called_one(refused, whole, command):
    said = refused(command, teacher=whole / "student")
    assert "is an encoder-decoder as students are (rope_encdec): give a decoder-only model" in said
    assert "AutoModel" not in said


@pytest.mark.parametrize("command", ["init", "quickstart"])
def test_a_teacher_of_another_family_is_refused_at_once(refused, whole, tmp_path, command):
    folder = shutil.copytree(whole / "teacher", tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config(n_layer=4, n_head=1, n_embd=8, vocab_size=300)).save_pretrained(folder)
    assert "model_type='gpt2' is not supported" in refused(OF_TEACHER[command], teacher=folder)


@pytest.fixture
def small_disk():
    """No file of more than 70 kB can be written: the weights do not fit, all else does."""
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, most))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("more", ["", "--decoder-only 1"])
def test_a_disk_without_room_for_the_weights(refused, small_disk, more):
    """What was written before them goes, so that the same command works once there is room."""
    assert "a file could not be written (SafetensorError" in refused(f"{OF_TEACHER['init']} {more}")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "memory ran out"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "memory ran out"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 435904 vs 435796"), "make room on"),
        (RuntimeError("unable to write to file </tmp/a>: No space left on device (28)"), "make room on"),
        (SafetensorError("Error while serializing: IoError(Os { code: 28, kind: StorageFull })"), "make room on"),
        (RuntimeError("llama_model_quantize: failed to quantize: basic_ios::clear: iostream error"), "make room on"),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), "make room on"),
    ],
)
def test_what_the_machine_lacks_is_no_bug(refused, monkeypatch, error, message):
    def run(args):
        raise error

    monkeypatch.setattr(info, "run", run)
    assert message in refused("info {student}")


def test_memory_that_does_not_suffice(refused, monkeypatch):
    monkeypatch.setattr(info, "run", lambda args: torch.empty(10**14))
    assert "memory ran out" in refused("info {student}")


def test_text_is_not_healed_into_its_own_folder(refused):
    """A checkpoint has the model's code in it, and `--resume` would read other windows than the run had."""
    for output in ("new", "new/../corpus", "."):
        assert "lies in --text ." in refused(OF_TEACHER["heal"].replace("text.md", ".").replace("new", output))


def test_numbers_that_cannot_work_are_refused_at_once(refused):
    assert "seed=-1 is out of range" in refused(OF_TEACHER["quickstart"] + " --seed -1")
    assert "--eval-rows -1 is below 0" in refused(OF_TEACHER["heal"].replace("--eval-rows 0", "--eval-rows -1"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("init --encoder-layers 9", "--encoder-layers 9: the teacher has 2 layers, give 1 to 2"),
        ("init --decoder-layers 0", "--decoder-layers 0: the teacher has 2 layers, give 1 to 2"),
        ("init --decoder-only 9", "--decoder-only 9: the teacher has 2 layers, give 1 to 2"),
        ("init --vocabulary 5", "a vocabulary of 5 tokens is too small"),
        ("cache --max-source-length 2", "max_source_length=2 leaves no token for the source"),
    ],
)
def test_a_number_that_the_teacher_does_not_allow(refused, command, message):
    name, _, option = command.partition(" ")
    assert message in refused(f"{OF_TEACHER[name]} {option}")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("bench --compare no.json text.md", "no.json is not there: give the bench.json of an earlier bench"),
        ("bench {student} --against no.json", "no.json is not there: give the bench.json of an earlier bench"),
        ("convert-mu no.pt --output new", "no.pt is not there: give the .pt file"),
        ("convert-mu text.md no.json --output new", "no.json is not there: give the .json file beside"),
        ("distill no.yaml", "no.yaml is not there: give a recipe"),
        ("distill --reproduce no --output new", "no/recipe.yaml is not there: give a recipe, or to --reproduce a"),
        ("cache --merge no --output new", "no is no cache of a teacher, it has no manifest.json: name a folder that"),
        ("init empty --output new {data}", "empty holds no model, there is no config.json"),
    ],
)
def test_a_file_that_is_not_there(refused, tmp_path, command, message):
    (tmp_path / "empty").mkdir()
    said = refused(command)
    assert message in said and "Errno" not in said


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--learning-rate -1", "Invalid learning rate: -1.0"),
        ("--per-device-train-batch-size 0", "batch_size=0"),
        ("--max-source-length 2", "max_source_length=2 leaves no token for the source"),
    ],
)
def test_a_mistake_that_the_first_step_finds(refused, whole, tmp_path, option, message):
    """It leaves nothing in a new folder, and a folder that was there as it was."""
    assert message in refused(f"{OF_TEACHER['distill']} {option}")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "recipe.yaml").write_text(RECIPE_HEADER)
    (tmp_path / "new" / "provenance.json").write_text('{"result": null}')
    assert message in refused(f"{OF_TEACHER['distill']} {option}")


def test_a_teacher_in_place_of_the_student_is_called_one(refused, whole):
    said = refused(OF_STUDENT["export"], student=whole / "teacher")
    assert "hf-encdec-distill init" in said and "decoder-only model" in said


TEMPLATES = ("{% for m in", "{{ raise_exception('no system role') }}", "{{ a.b.c }}")


@pytest.mark.parametrize(
    ("command", "template"),
    [
        *((command, "{{ 1 / 0 }}") for command in ("init", "teach", "cache", "distill", "evaluate")),
        *(("init", template) for template in TEMPLATES),
    ],
)
def test_a_chat_template_that_fails(refused, whole, tmp_path, command, template):
    folder = shutil.copytree(whole / "teacher", tmp_path / "teacher")
    for file in folder.glob("*"):  # where the version that wrote it keeps templates
        if file.name == "chat_template.jinja":
            file.write_text(template)
        elif file.name == "tokenizer_config.json" and "chat_template" in (content := json.loads(file.read_text())):
            file.write_text(json.dumps({**content, "chat_template": template}))
    assert "the chat template of the tokenizer" in refused(OF_TEACHER[command], teacher=folder)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--report-to wandb", "report_to='wandb' is unknown or not installed here"),
        ("--report-to nonsense", "report_to='nonsense' is unknown or not installed here"),
        ("--gradient-accumulation-steps 0", "gradient_accumulation_steps=0 is out of range; it has to be 1 or more"),
        ("--gradient-accumulation-steps -1", "gradient_accumulation_steps=-1 is out of range"),
        ("--num-train-epochs inf", "num_train_epochs=inf is out of range; it has to be a finite number"),
        ("--label_smoothing_factor 2", "label_smoothing_factor=2.0 is out of range"),
        ("--lr_scheduler_kwargs 3", "lr_scheduler_kwargs"),
        pytest.param(
            '--lr_scheduler_type polynomial --lr_scheduler_kwargs {{"x":1}}',
            "lr_scheduler_kwargs={'x': 1} do not go with",
            id="kwargs-of-another-scheduler",
        ),
        ("--neftune_noise_alpha nan", "neftune_noise_alpha=nan is out of range"),
    ],
)
@pytest.mark.parametrize("command", ["distill", "teach"])
def test_training_arguments_that_transformers_stumbles_over(refused, command, option, message):
    assert message in refused(f"{OF_TEACHER[command]} {option}")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("distill --resume_from_checkpoint there", "--resume_from_checkpoint there: go on with --resume"),
        ("heal --resume_from_checkpoint there", "--resume_from_checkpoint there: go on with --resume"),
        ("teach --resume_from_checkpoint there", "--resume_from_checkpoint there: leave it out, this command starts"),
        ("heal --max_source_length 10", "--max_source_length 10: healing cuts text into windows; give --window"),
        ("heal --max-target-length 10", "--max_target_length 10: healing cuts text into windows; give --window"),
        ("heal --window 4096", "--window 4096: the student has positions for 2048 tokens"),
        ("cache --private", "--private without --push-to-hub"),
        ("cache --requests 4", "--requests without --server"),
        ("cache --server-model other", "--server-model without --server"),
        ("cache --mixed-precision bf16", "--mixed-precision without --encoder-states"),
        ("cache --kind dense --k 7", "--k is for --kind top_k, and the kind is dense: leave one out"),
        ("cache --kind sampled --k 7", "--k is for --kind top_k, and the kind is sampled"),
        ("cache --kind dense --rounds 3", "--rounds is for --kind sampled, and the kind is dense"),
        ("cache --proposal-power 0.5", "--proposal-power is for --kind sampled, and the kind is top_k"),
    ],
)
def test_options_that_would_have_no_effect(refused, command, message):
    name, _, option = command.partition(" ")
    assert message in refused(f"{OF_TEACHER[name]} {option}")


@pytest.mark.parametrize(
    "option",
    [
        *("--generate", "--kind dense", "--shard 0/2", "--server http://localhost:1", "--mixed-precision bf16"),
        *("--batch-size 2", "--max-source-length 9", "--prompt-date 2026-01-01", "--splits train", "--dataset x.csv"),
    ],
)
def test_a_merge_captures_nothing(refused, option):
    assert f"{option.split()[0]} with --merge" in refused(f"cache --merge old --output new {option}")


@pytest.mark.parametrize(
    "option",
    [
        *(
            "--kind dense",
            "--k 7",
            "--rounds 3",
            "--proposal-power 0.5",
            "--temperature 2",
            "--vocab-policy universal",
        ),
        *("--student {student}", "--teacher-dtype float32", "--teacher-quantization 8bit", "--prompt-date 2026-01-01"),
        *("--max-source-length 9", "--batch-size 2"),
    ],
)
def test_a_server_that_writes_records_no_distributions(refused, option):
    command = f"cache toy --generate --server http://localhost:1 --output new {{data}} {option}"
    assert f"{option.split()[0]} with --generate --server" in refused(command)


def test_a_plan_takes_no_number_of_another_kind(refused):
    command = "plan --teacher 70b --student 1b --tokens 1B --kind dense --k 7"
    assert "--k is for --kind top_k, and the kind is dense" in refused(command)


@pytest.mark.parametrize("command", [name for name in OF_TEACHER if name != "evaluate"])
def test_an_output_that_cannot_be_made(refused, tmp_path, command):
    (tmp_path / "link").symlink_to("nowhere")
    for output, reason in (("link", "link is a link to nothing"), ("text.md/new", "text.md is a file")):
        said = refused(OF_TEACHER[command].replace("--output new", f"--output {output}"), teacher="no/teacher")
        assert f"{output} cannot be made, {reason}: choose another folder" in said


@pytest.mark.parametrize("command", ["distill", "teach"])
@pytest.mark.parametrize("option", ["--num-train-epochs 0", "--max-steps 1 --dataloader_drop_last True"])
def test_a_training_without_a_step(refused, command, option):
    words = OF_TEACHER[command].replace("--max-steps 1", "--report-to none --per-device-train-batch-size 999")
    for strategy in ("no", "epoch"):  # `Trainer` would save at the end of an epoch without a step
        said = refused(f"{words} {option} --save-strategy {strategy}")
        assert "no step was made, with num_train_epochs=" in said


def test_a_tokenizer_with_more_tokens_than_its_model(refused, whole, tmp_path):
    folder = shutil.copytree(whole / "teacher", tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"unused {n}" for n in range(size - len(tokenizer))] + ["red"])
    tokenizer.save_pretrained(folder)
    said = refused(f"{OF_TEACHER['init']} --decoder-layers 1", teacher=folder)
    assert f"the tokenizer in {folder} has the token {size}, 'red', and its model has embeddings for 0 to" in said


def test_an_empty_text_is_told_by_its_number(whole, tmp_path, make_bpe_tokenizer, capsys):
    folder = shutil.copytree(whole / "student", tmp_path / "student")
    make_bpe_tokenizer().save_pretrained(folder)  # which puts nothing around a text
    assert main(["generate", str(folder), "one", "", "three"]) == 2
    assert "text 2 of 3 is a prompt of 0 tokens: give a text" in capsys.readouterr().err


def test_a_cache_has_no_teacher_to_load_in_a_dtype(refused, whole, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "manifest.json").write_text("{}")
    command = OF_TEACHER["distill"] + " --teacher-quantization 4bit"
    assert "teacher_quantization with the cache" in refused(command, teacher=tmp_path / "cache")


def test_text_is_cut_for_students_with_the_ids_of_their_teacher(refused, whole, tmp_path):
    """A window in the ids of another tokenizer would be garbage to the student."""
    folder = shutil.copytree(whole / "student", tmp_path / "student")
    trim_tokenizer(AutoTokenizer.from_pretrained(whole / "teacher"), ["red and blue"], 270).save_pretrained(folder)
    said = refused(OF_TEACHER["heal"], student=folder)
    assert "heal takes students with their teacher's tokenizer" in said and "id_map" not in said


def test_draws_that_no_memory_holds(refused):
    option = "--kind sampled --rounds 1000000000000"
    assert "rounds=1000000000000 is out of range" in refused(f"{OF_TEACHER['cache']} {option}")


def test_a_student_that_is_a_file_is_told_before_the_built_in_data_are_mined(refused, whole):
    command = f"distill {whole / 'pairs.csv'} --teacher {{teacher}} --output new --max-steps 1"
    assert "is a file, expected a folder" in refused(command)


def test_a_metric_that_is_not_measured(whole, tmp_path, capsys):
    """`Trainer` finds out after its first evaluation, and says it as a KeyError."""
    command = f"{OF_TEACHER['distill']} --metric_for_best_model nonsense --load_best_model_at_end True --save-steps 1"
    command += " --eval-strategy steps --save-strategy steps --eval-steps 1 --report-to none"
    data = f"--dataset {whole / 'pairs.csv'} --source-column text --target-column short"
    words = command.format(teacher=whole / "teacher", student=whole / "student", data=data).split()
    words[words.index("--output") + 1] = str(tmp_path / "run")
    assert main(words) == 2
    assert "'eval_nonsense', which is not found" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("minutes", ["inf", "nan", "-1", "0"])
def test_a_time_that_is_none(refused, minutes):
    assert "give a number above 0" in refused(f"quickstart --output new --minutes {minutes}")


# Records ---------------------------------------------------------

ODD = ("", "[]", "null", "{", PAGE.decode(), "{}", '{"results": 3, "settings": []}')


@pytest.mark.parametrize("content", ODD)
def test_a_state_that_is_none(refused, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text(content)
    assert "state.json" in refused("quickstart --resume --output run")


# As an earlier version wrote it.
PLAN = {"load": 1.0, "score": 1.0, "generate": 1.0, "request": 1.0, "student_size": 0.5, "held_out": 8, "rounds": 2}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"settings": {"minutes": "soon"}}, "minutes='soon' is of type str, expected float"),
        ({"settings": {"hours": 1}}, "unknown key 'hours'"),
        ({"settings": {"encoder_layers": None, "minutes": -3.0}}, "minutes=-3.0"),
        ({"results": {"teacher": "built-in"}}, "as 'teacher', expected type object"),
        ({"results": {"teacher": {"max_prompt": "all"}}}, "'all' as 'max_prompt', expected type integer"),
        ({"results": {"teacher": {"max_prompt": -1}}}, "-1 as 'max_prompt', expected a finite number above 0"),
        ({"begun": {"teacher": "long"}}, "as 'teacher', expected type number"),
        ({"earlier": {}}, "earlier has no 'rounds'"),
        ({"results": {"before": {"ce": []}}}, "before has no 'plan'"),
        ({"results": {"before": {"plan": {"load": 1.0, "score": "fast"}}}}, "'fast' as 'score', expected type number"),
        ({"results": {"before": {"plan": PLAN}}}, "before, plan has no 'trained', expected one of type integer"),
        ({"seconds_used": None}, "as 'seconds_used', expected type number"),
    ],
)
def test_a_state_with_odd_fields(refused, tmp_path, changed, message):
    earlier = {"rounds": 0, "minutes": 0.0, "seconds": 0.0, "steps": 0, "twin_cost": 1.0, "stages": {}}
    state = {"settings": {"minutes": 1.0}, "results": {}, "begun": {}, "seconds_used": 1.0, "earlier": earlier}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text(json.dumps({**state, **changed}))
    assert message in refused("quickstart --resume --output run")


RECORD = {
    "fingerprints": {},
    "versions": {},
    "machine": {"device": "cpu", "threads": 1},
    "result": {"steps": 1, "metrics": {"eval_loss": 1.0}, "losses": {}, "weights": "0"},
}


@pytest.mark.parametrize(
    "content",
    [
        *ODD,
        json.dumps({**RECORD, "machine": {"device": 3}}),
        json.dumps({**RECORD, "machine": {"device": "cpu", "threads": 0}}),
        json.dumps({**RECORD, "machine": {"device": "cpu", "threads": "all"}}),
        json.dumps({**RECORD, "result": [1]}),
        json.dumps({**RECORD, "result": {}}),
        json.dumps({**RECORD, "result": {**RECORD["result"], "metrics": {"eval_loss": "low"}}}),
    ],
)
def test_a_provenance_that_is_none(refused, whole, tmp_path, content):
    (tmp_path / "run").mkdir()
    data = f"dataset: {whole / 'pairs.csv'}\nsource_column: text\ntarget_column: short\n"
    recipe = f"student: {whole / 'student'}\nteacher: {whole / 'teacher'}\noutput: before\nmax_steps: 1\n{data}"
    (tmp_path / "run" / "recipe.yaml").write_text(recipe)
    (tmp_path / "run" / "provenance.json").write_text(content)
    assert "run has no record of its run" in refused("distill --reproduce run --output new")


@pytest.mark.parametrize("content", ODD)
def test_a_manifest_of_an_export_that_is_none(refused, whole, tmp_path, content):
    folder = shutil.copytree(whole / "student", tmp_path / "exported")
    (folder / "exported.json").write_text(content)
    assert "exported.json" in refused("generate exported hello")


EXPORTED = {"version": 1, "target": "onnx", "variant": "fp32", "shapes": "dynamic", "stateful": False}
EXPORTED |= {"cache_dtype": "float32"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target": "abacus"}, "names the target 'abacus'"),
        ({"version": "1"}, "as 'version', expected type integer"),
        ({"shapes": "fixed:no"}, "shapes 'fixed:no'"),
        ({"files": {"../secret": "0"}}, "expected the name of a file in that folder"),
        ({"files": {"decoder.onnx": 3}}, "decoder.onnx is missing"),
        ({"files": {}}, "has no hash of any file, expected one of each file of the graphs"),
        ({"cache_dtype": "float31"}, "stores keys and values as 'float31'"),
    ],
)
def test_a_manifest_of_an_export_with_odd_fields(refused, whole, tmp_path, changed, message):
    folder = shutil.copytree(whole / "student", tmp_path / "exported")
    files = {"config.json": sha256(folder / "config.json")}
    (folder / "exported.json").write_text(json.dumps({**EXPORTED, "files": files, **changed}))
    assert message in refused("generate exported hello")


@pytest.mark.parametrize(
    "content", [*ODD, '{"format": 2}', '{"format": 2, "kind": [], "vocab_size": 1, "temperature": 1}']
)
def test_a_manifest_of_a_cache_that_is_none(refused, tmp_path, content):
    (tmp_path / "cached").mkdir()
    (tmp_path / "cached" / "manifest.json").write_text(content)
    assert "cached is no cache of a teacher" in refused(OF_TEACHER["distill"], teacher="cached")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[]", "expected a JSON object"),
        ("config.json", '{"model_type": "rope_encdec", "auto_map": ["a"]}', "has the auto_map"),
        ("config.json", '{"model_type": "rope_encdec", "auto_map": {"AutoModel": 3}}', "has the auto_map"),
        ("model.safetensors.index.json", "{}", "has no 'weight_map'"),
        ("model.safetensors.index.json", "[]", "expected a JSON object"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 3}}', "expected the name of a file"),
        ("onnx/parity.json", "[]", "expected a JSON object"),
        ("onnx/parity.json", "{}", "has no 'failures'"),
    ],
)
def test_push_of_a_folder_with_odd_files(refused, whole, tmp_path, file, content, message):
    folder = shutil.copytree(whole / "student", tmp_path / "student")
    if "index" in file:
        (folder / "model.safetensors").unlink()
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(content)
    assert message in refused("push {student} ann/student --dry-run", student=folder)


# `built-in` ------------------------------------------------------


def test_built_in_names_the_teacher_wherever_a_teacher_is_named(whole, monkeypatch, capsys):
    import hf_encdec_distill.data as data

    monkeypatch.setattr(data, "fetch_builtin_teacher", lambda: whole / "teacher", raising=False)
    for argv in (["info", "built-in"], ["info", str(whole / "student"), "--teacher", "built-in"]):
        assert main([*argv, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)
    columns = ["--dataset", str(whole / "pairs.csv"), "--source-column", "text", "--target-column", "short"]
    assert main(["evaluate", "built-in", "--rows", "2", "--metrics", "ce", *columns, "--json"]) == 0
    assert "built-in" in json.loads(capsys.readouterr().out)["models"]
