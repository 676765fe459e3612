"""`accelerate launch` with the files in examples/accelerate, on two processes of a CPU, and what a lost process costs.

Run as a script this file is `hf-encdec-distill`, on a CPU that FSDP is admitted to (see cpu_fsdp.py).
"""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from distillation_toys import write_pairs, write_teacher
from transformers import AutoModelForSeq2SeqLM, Trainer


CONFIGURATIONS = Path(__file__).parents[2] / "examples" / "accelerate"
DIES_AT = "TEST_DIES_AT_STEP"


def lose_a_process_while_it_saves(step):
    save = Trainer._save_rng_state

    def save_or_die(self, output_dir):
        if self.state.global_step == step and self.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, output_dir)

    Trainer._save_rng_state = save_or_die


@pytest.fixture(scope="module")
def launch(tmp_path_factory, make_bpe_tokenizer):
    """`distill` by two processes, as a configuration says, into a folder beside the others."""
    work = tmp_path_factory.mktemp("launched")
    write_teacher(work / "teacher", make_bpe_tokenizer(chat_template=None), layers=3)
    write_pairs(work / "pairs.csv", 32)
    recipe = {
        "teacher": str(work / "teacher"),
        "dataset": str(work / "pairs.csv"),
        "source_column": "text",
        "target_column": "short",
        "init": {"encoder_layers": 2, "decoder_layers": 2},
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-2,  # at 1e-8 the first steps are the signs of gradients, and no rounding is small
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "ddp_backend": "gloo",
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    paths = [str(Path(__file__).parents[1]), str(Path(sys.modules["hf_encdec_distill"].__file__).parents[1])]

    def run(configuration, output, *more, **environment):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        command += ["--config_file", str(CONFIGURATIONS / configuration), __file__, "distill"]
        command += [str(work / "recipe.yaml"), "--output", str(work / output), *more]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment}
        return work / output, subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.process
def test_a_lost_process_costs_the_steps_since_the_last_checkpoint(launch):
    """FSDP2, killed while it writes a checkpoint and resumed, comes to the weights of an undisturbed run under DDP."""
    undisturbed, done = launch("ddp.yaml", "ddp")
    assert done.returncode == 0, done.stderr[-3000:]
    output, lost = launch("fsdp2.yaml", "fsdp2", **{DIES_AT: "4"})
    assert lost.returncode != 0
    assert "SIGKILL" in lost.stderr and "rank      : 1" in lost.stderr
    assert (output / "checkpoint-2" / "trainer_state.json").is_file()
    assert (output / "checkpoint-4").is_dir() and not (output / "checkpoint-4" / "trainer_state.json").exists()

    output, done = launch("fsdp2.yaml", "fsdp2", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-4 is not whole, and passed over" in done.stderr
    one, other = (AutoModelForSeq2SeqLM.from_pretrained(folder) for folder in (undisturbed, output))
    start = AutoModelForSeq2SeqLM.from_pretrained(output / "checkpoint-2")
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert any(
        not torch.allclose(start.state_dict()[name], weight, atol=1e-3) for name, weight in one.state_dict().items()
    )
    assert "eval_teacher_agreement" in done.stdout


@pytest.fixture
def launched(monkeypatch):
    """The environment that a configuration's processes would get, as accelerate's own launcher makes it."""

    def read(name):
        path = str(CONFIGURATIONS / name)
        load_config_from_file(path)  # accelerate refuses keys that it does not know
        args = launch_command_parser().parse_args(["--config_file", path, "--main_process_port", "0", "script.py"])
        args, _, _ = _validate_launch_command(args)
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ""
            environment = prepare_deepspeed_cmd_env(args)[1]
        else:
            environment = prepare_multi_gpu_env(args)
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        return args

    return read


def test_ddp_yaml(launched):
    args = launched("ddp.yaml")
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed, args.num_processes) == (True, False, False, 2)


def test_fsdp2_yaml(launched):
    """Each key of the file arrives in accelerate's plugin."""
    assert launched("fsdp2.yaml").use_fsdp
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_yaml(stage, launched):
    """Each key arrives in accelerate's plugin; what the trainer decides is left to it."""
    assert launched(f"deepspeed_zero{stage}.yaml").use_deepspeed
    plugin = DeepSpeedPlugin()
    config = plugin.hf_ds_config.config
    assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"


if __name__ == "__main__":
    import cpu_fsdp

    cpu_fsdp.admit()
    if DIES_AT in os.environ:
        lose_a_process_while_it_saves(int(os.environ[DIES_AT]))
    runpy.run_module("hf_encdec_distill", run_name="__main__", alter_sys=True)
