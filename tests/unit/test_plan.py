"""What `plan` says against hand-computed numbers, torch's FLOP counter, and a record that was really written."""

import json

import pytest
import torch
from distillation_toys import make_rope, make_teacher
from torch.utils.flop_counter import FlopCounterMode

from hf_encdec_distill.bench.hardware import GPUS, OF_GPUS, Efficiency, Hardware
from hf_encdec_distill.bench.plan import PARQUET_SHARE, Work, make_plan, row_flops, served_bytes, step_flops
from hf_encdec_distill.cli import plan as command
from hf_encdec_distill.cli.main import main
from hf_encdec_distill.distillation import LiveTeacher, capture
from hf_encdec_distill.distillation.teachers.recorded import CachedTeacher, record_bytes
from hf_encdec_distill.models.memory import WEIGHT_BYTES, forward_bytes, weight_bytes
from hf_encdec_distill.models.sizes import split_config, typical_config


SEVENTY, ONE = (typical_config(size)[1] for size in (70 * 10**9, 10**9))
STUDENT = split_config(ONE, 8, 8)
EXACT = Efficiency(0.5, 0.25, 1.0, "a test")


def planned(capsys, *argv):
    assert main(["plan", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# What a record takes --------------------------------------------------------------------------------------------


def test_bytes_of_a_record_by_hand():
    assert record_bytes("top_k", 32, 50, 128_256) == 32 * (4 + 4) + 4
    assert record_bytes("sampled", 32, 50, 128_256) == 50 * (4 + 4 + 4) + 4 + 4
    assert record_bytes("dense", 32, 50, 128_256) == 2 * 128_256


@pytest.mark.parametrize("kind", ["top_k", "sampled", "dense"])
def test_bytes_of_a_record_that_was_written(kind, tmp_path):
    ids = torch.randint(4, 280, (12, 10), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row[:6], "attention_mask": [1] * 6, "labels": row[6:]} for row in ids]
    capture(LiveTeacher(make_teacher()), rows, tmp_path, kind=kind, k=8, rounds=6, progress=False)
    columns = CachedTeacher(tmp_path).records.with_format("arrow")[:]
    stored = sum(
        len(values) * columns.schema.field(name).type.value_type.bit_width // 8
        for name in columns.column_names
        if name != "key"
        for values in columns[name]
    )
    expected = sum(len(row["labels"]) for row in rows) * record_bytes(kind, 8, 6, 280)
    assert stored < expected if kind == "sampled" else stored == expected  # a token that is drawn twice is kept once


def test_the_disk_of_a_plan_is_a_share_of_the_record():
    disk = make_plan(SEVENTY, STUDENT, Work(1280, target_length=128), GPUS["h100"], 8, OF_GPUS, 260).disk
    assert disk["arrow"] == 1280 * 260 + 10 * 16
    assert disk["value"] == PARQUET_SHARE["value"] * disk["arrow"] and disk["low"] < disk["value"] < disk["high"]


# How long it takes --------------------------------------------------------------------------------------------


def test_flops_of_a_step_are_those_that_torch_counts():
    fields = {"hidden_size": 64, "intermediate_size": 192, "cross_attention_layers": [1, 2]}  # no encoder layer unread
    student, teacher = make_rope("merged", **fields), make_teacher(hidden_size=64)
    for model in (student, teacher):
        model.set_attn_implementation("eager")  # which shows all products
    batch, prompt, target = 2, 200, 12
    ids, labels = torch.ones(batch, prompt - 1, dtype=torch.long), torch.ones(batch, target, dtype=torch.long)
    with FlopCounterMode(display=False) as trained:
        student(input_ids=ids, labels=labels).loss.backward()
    whole = torch.ones(batch, prompt + target - 1, dtype=torch.long)
    with FlopCounterMode(display=False) as asked, torch.no_grad():
        teacher(whole, logits_to_keep=target)
    work = Work(batch * target, prompt, target, batch)
    # The counter has the masked half of the targets' attention too, and the first layer no gradient of its input.
    assert step_flops(student.config, work) == pytest.approx(trained.get_total_flops(), rel=0.05)
    assert batch * row_flops(teacher.config, prompt, target) == pytest.approx(asked.get_total_flops(), rel=0.05)
    both = step_flops(student.config, work, teacher.config)
    assert both == step_flops(student.config, work) + batch * row_flops(teacher.config, prompt, target)
    more = row_flops(teacher.config, prompt, target, logits_everywhere=True) - row_flops(
        teacher.config, prompt, target
    )
    assert more == 2 * prompt * 280 * 64
    checkpoints = Work(batch * target, prompt, target, batch, checkpointing=True)
    assert step_flops(student.config, checkpoints) == step_flops(student.config, work) * 4 / 3


def test_hours_by_hand():
    work = Work(tokens=32_000, prompt_length=100, target_length=20, batch_size=4, passes=2)
    hardware = Hardware("a test", 1e12, 1e12, 1e11)
    plan = make_plan(SEVENTY, STUDENT, work, hardware, 2, EXACT, 260)
    live, recorded, served = plan.ways
    assert plan.steps == 2 * 1600 / (4 * 2)
    update = plan.steps * 40 * 1_235_816_448 / 1e11
    flops = plan.steps * 3 * 4 * row_flops(STUDENT, 100, 20)
    assert recorded.training == pytest.approx(
        {"value": flops / 0.5e12 + update, "low": flops / 1e12 + update, "high": flops / 0.25e12 + update}
    )
    of_teacher = row_flops(SEVENTY, 100, 20)
    assert live.training["low"] - recorded.training["low"] == pytest.approx(plan.steps * 4 * of_teacher / 1e12)
    assert recorded.capture["low"] == pytest.approx(1600 * of_teacher / 2e12) and live.capture["low"] == 0
    assert served.capture["low"] == pytest.approx(1600 * row_flops(SEVENTY, 100, 20, True) / 2e12)
    assert plan.best == "recorded" and recorded.seconds == recorded.capture["value"] + recorded.training["value"]


# What fits --------------------------------------------------------------------------------------------


def test_a_large_teacher_is_served_and_a_small_one_recorded_or_live():
    work = Work(10**9)
    plan = make_plan(SEVENTY, STUDENT, work, GPUS["h100"], 8, OF_GPUS, 260)
    assert plan.teacher_bytes == 2 * 70_553_706_496
    assert [(way.name, way.devices, way.fits) for way in plan.ways] == [
        ("live", 1, False),
        ("recorded", 1, False),
        ("served", 4, True),
    ]
    assert plan.sharding == "ddp" and plan.best == "served"
    live = make_plan(ONE, STUDENT, work, GPUS["h100"], 8, OF_GPUS, 260).ways[0]
    beside = weight_bytes(ONE, "bfloat16") + forward_bytes(ONE, 8, 512, 128)
    assert live.fits and live.device_bytes == plan.memory["ddp"]["total"] + beside + 5 * 128 * 128_256  # 29 - 24 bytes
    alone = make_plan(SEVENTY, STUDENT, work, GPUS["h100"], 2, OF_GPUS, 260)
    assert alone.best is None and not alone.ways[-1].fits
    quantized = make_plan(SEVENTY, STUDENT, work, GPUS["h100"], 2, OF_GPUS, 260, "4bit")
    assert quantized.best == "recorded"


def test_a_served_teacher_by_hand():
    weights = 2 * 70_553_706_496
    number, each = served_bytes(SEVENTY, Work(10**9), GPUS["h100"], weights)
    keys_and_values = 2 * 80 * 8 * 128 * 2 * (8192 + 1)
    states = 2 * 8192 * (4 * 8192 + 3 * 28_672) + 2 * 128_256
    assert number == 4
    assert each == pytest.approx((weights + keys_and_values + states) / 4 + 6 * 640 * 128_256, abs=1)
    assert served_bytes(ONE, Work(10**9), GPUS["h100"], 2 * 1_235_814_400)[0] == 1
    # 64 query heads cannot be spread over 128 GPUs.
    assert served_bytes(SEVENTY, Work(10**9), Hardware("small", 1e9, 1e12, 1e12), weights)[0] == 64


def test_a_student_too_large_for_one_gpu_is_sharded():
    student = split_config(typical_config(8 * 10**9)[1], 16, 16)
    plan = make_plan(SEVENTY, student, Work(10**9), GPUS["h100"], 8, OF_GPUS, 260)
    assert plan.memory["ddp"]["total"] > 80e9 > plan.memory["fsdp2"]["total"]
    assert plan.sharding == "fsdp2" and plan.batch_sizes["ddp"] == 0
    rows = plan.batch_sizes["fsdp2"]
    for batch_size, fits in ((rows, True), (rows + 1, False)):
        again = make_plan(SEVENTY, student, Work(10**9, batch_size=batch_size), GPUS["h100"], 8, OF_GPUS, 260)
        assert (again.memory["fsdp2"]["total"] <= 0.9 * 80e9) is fits


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 0}, "tokens=0"),
        ({"passes": 0}, "passes=0"),
        ({"passes": float("inf")}, "passes=inf"),
        ({"target_length": 1}, "target_length=1"),
    ],
)
def test_work_that_is_none(fields, message):
    with pytest.raises(ValueError, match=message):
        Work(**{"tokens": 100, **fields})


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="efficiency=1.5"):
        Efficiency(1.5, 1.5, 1.5, "")
    with pytest.raises(ValueError, match="0 devices"):
        make_plan(SEVENTY, STUDENT, Work(100), GPUS["h100"], 0, OF_GPUS, 260)


# The command --------------------------------------------------------------------------------------------


def test_the_choices_of_the_command_are_those_of_the_tables():
    assert set(command._DEVICES) == {*GPUS, "cpu"} and set(command._DTYPES) == set(WEIGHT_BYTES)


def test_the_command_plans_sizes(capsys):
    said = planned(capsys, "--teacher", "70b", "--student", "1b", "--tokens", "1B", "--gpus", "8")
    assert said["models"] == {
        "teacher": "the shape of Llama-3.1-70B",
        "student": "8 + 8 layers of the shape of Llama-3.2-1B, merged",
    }
    assert said["parameters"] == {"teacher": 70_553_706_496, "student": 1_235_816_448}
    assert said["record_bytes"] == 260 and said["best"] == "served"
    assert any("has been measured on a GPU" in line for line in said["assumptions"])
    assert said["efficiency"]["low"] < said["efficiency"]["value"] < said["efficiency"]["high"]
    given = ["--efficiency", "0.5", "--kind", "dense", "--student", "1b", "--tokens", "1B", "--gpus", "8"]
    other = planned(capsys, "--teacher", "70b", *given)
    assert other["record_bytes"] == 2 * 128_256 and other["efficiency"]["source"] == "given with --efficiency"
    assert other["ways"][2]["capture"]["value"] == pytest.approx(said["ways"][2]["capture"]["value"] * 0.3 / 0.5)


def test_the_page_fits_a_terminal_and_says_what_was_assumed(capsys):
    assert main(["plan", "--teacher", "70b", "--student", "1b", "--tokens", "300M", "--gpus", "8"]) == 0
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 80
    for words in (
        "Assumed:",
        "FSDP2",
        "serve the teacher over 4 GPUs",
        "Parquet",
        "Nothing of this has been measured",
    ):
        assert words in " ".join(page.split())


def test_folders_of_a_student_and_its_teacher(capsys, tmp_path):
    make_rope("merged").save_pretrained(tmp_path / "student")
    make_teacher().save_pretrained(tmp_path / "7b")  # a folder, whatever its name
    models = ["--teacher", str(tmp_path / "7b"), "--student", str(tmp_path / "student"), "--tokens", "2000"]
    said = planned(capsys, *models)
    assert said["parameters"] == {
        "teacher": make_teacher().num_parameters(),
        "student": make_rope("merged").num_parameters(),
    }
    assert said["models"] == {"teacher": "7b", "student": "student"}
    models[3] = models[1]
    assert planned(capsys, *models)["models"]["student"] == "7b, decoder-only"
    assert planned(capsys, *models, "--decoder-layers", "1")["models"]["student"] == "2 + 1 layers of 7b, merged"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "many"], "--tokens many: give a number"),
        (["--tokens", "1B", "--device", "cpu", "--gpus", "2"], "leave --gpus out"),
        (["--tokens", "1B", "--gpus", "0"], "0 devices"),
        (["--tokens", "1B", "--k", "0"], "--k 0: give at least 1"),
        (["--tokens", "1B", "--teacher", "200b"], "no published shape is near 200 B"),
    ],
)
def test_mistakes_are_named(options, message, capsys):
    assert main(["plan", "--teacher", "70b", "--student", "1b", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_cpu_is_measured(capsys, monkeypatch):
    rates = {"read": 1e10, "fp32": 2e11, "bf16": 1e12}
    monkeypatch.setattr("hf_encdec_distill.bench.floors.measure_rates", lambda threads: rates)
    said = planned(capsys, "--teacher", "135m", "--student", "135m", "--tokens", "20k", "--device", "cpu")
    assert said["hardware"]["matrix_rate"] in (2e11, 1e12) and said["hardware"]["read_rate"] == 1e10
    assert said["hardware"]["process"] > 5e8 and "measured" in said["efficiency"]["source"]
