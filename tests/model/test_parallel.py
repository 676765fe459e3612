"""Several processes, several devices: data parallel, tensor parallel, a model that does not fit in one place."""

import os
import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import cpu_offload, disk_offload, dispatch_model, infer_auto_device_map
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from forked import forking
from torch.nn.parallel import DistributedDataParallel
from toys import KINDS, make_model, ragged, random_ids

from hf_encdec_distill import RopeEncDecEncoderModel, RopeEncDecForConditionalGeneration, RopeEncDecModel


pytestmark = pytest.mark.process

SPREAD = (*KINDS, "shared")  # over processes
BIG_ENCODER = {"encoder_num_hidden_layers": 4}  # a merged decoder of two layers leaves the last one unread


def batch():
    torch.manual_seed(3)
    ids, mask, _ = ragged("right")
    labels = random_ids(3, 6)
    labels[1, 4:] = labels[2, 2:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(model, forward, rows=slice(None), ranks=1):
    inputs = batch()
    count = (inputs["labels"] != -100).sum() / ranks  # DDP averages over ranks, the count is of all
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        forward(**{name: value[rows] for name, value in inputs.items()}, num_items_in_batch=count).loss.backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def on_two_processes(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for kind in SPREAD:
        model = RopeEncDecForConditionalGeneration.from_pretrained(folder / kind).train()
        wrapped = DistributedDataParallel(model)  # no find_unused_parameters: every trainable one is used
        results[f"data parallel {kind}"] = train(model, wrapped, slice(0, 1) if rank == 0 else slice(1, 3), ranks=2)
    for kind in SPREAD:
        model = RopeEncDecForConditionalGeneration.from_pretrained(folder / kind, tp_plan="auto")
        query = model.model.decoder.layers[0].self_attn.q_proj.weight
        local = query.to_local() if hasattr(query, "to_local") else query
        inputs = batch()
        with torch.no_grad():
            logits = model(**inputs).logits
        tokens = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=5)
        results[f"tensor parallel {kind}"] = {"rows": local.shape[0], "logits": logits, "tokens": tokens}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two gloo processes made of one saved model of each kind, and those models."""
    folder = tmp_path_factory.mktemp("two_processes")
    models = {kind: make_model(kind, num_key_value_heads=2, **BIG_ENCODER) for kind in SPREAD}
    for kind, model in models.items():
        model.save_pretrained(folder / kind)
    forking()  # from one that has imported what these need
    mp.start_processes(on_two_processes, args=(folder,), nprocs=2, start_method="forkserver")
    return models, torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("kind", SPREAD)
def test_tensor_parallel_gives_the_same_logits(kind, two_processes):
    models, results = two_processes
    result, inputs = results[f"tensor parallel {kind}"], batch()
    assert result["rows"] == 16  # half of the heads
    with torch.no_grad():
        torch.testing.assert_close(result["logits"], models[kind](**inputs).logits, atol=2e-5, rtol=1e-5)
    tokens = models[kind].generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=5)
    assert torch.equal(result["tokens"], tokens)


@pytest.mark.parametrize("kind", SPREAD)
def test_two_processes_train_what_one_trains(kind, two_processes):
    models, results = two_processes
    model = models[kind].train()
    torch.testing.assert_close(results[f"data parallel {kind}"], train(model, model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cls", [RopeEncDecModel, RopeEncDecForConditionalGeneration, RopeEncDecEncoderModel])
@pytest.mark.parametrize("kind", SPREAD)
@pytest.mark.parametrize("gated", [True, False])
def test_the_tensor_parallel_plan_names_every_projection_and_nothing_else(cls, kind, gated):
    model = make_model(kind, cls=cls, gated_mlp=gated)
    modules = {re.sub(r"\.\d+\.", ".*.", name): module for name, module in model.named_modules()}
    assert set(model.tp_plan) <= set(modules)
    sharded = {name for name in modules if isinstance(modules[name], torch.nn.Linear) and name != "lm_head"}
    assert set(model.tp_plan) == sharded and sharded
    assert model.supports_tp_plan
    for name, style in model.tp_plan.items():
        assert style == ("rowwise" if name.endswith(("o_proj", "down_proj")) else "colwise")


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_never_split_between_devices(kind):
    model = make_model(kind)
    sizes = sum(p.numel() * 4 for p in model.parameters())
    no_split = list(model._no_split_modules)
    device_map = infer_auto_device_map(model, {0: sizes // 3, "cpu": sizes}, no_split_module_classes=no_split)
    assert len(set(device_map.values())) == 2
    whole = re.compile(r"model\.(encoder|decoder)(\.(layers(\.\d+)?|norm|rotary_emb|embed_tokens))?$|model$|lm_head$")
    assert all(whole.match(name) for name in device_map), device_map


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_weights_give_the_same(kind, offload, tmp_path):
    model, inputs = make_model(kind), batch()
    settings = {"attention_mask": inputs["attention_mask"], "max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        logits = model(**inputs).logits
        tokens = model.generate(inputs["input_ids"], **settings)
        offload(model, **({"offload_dir": str(tmp_path)} if offload is disk_offload else {}), execution_device="cpu")
        assert next(model.parameters()).device.type == "meta"
        torch.testing.assert_close(model(**inputs).logits, logits)
        assert torch.equal(model.generate(inputs["input_ids"], **settings), tokens)


@pytest.mark.parametrize("kind", [*KINDS, "pooled", "shared"])
def test_layers_on_two_devices(kind):
    """As a device_map puts them on two GPUs; `meta` stands for the second, where shapes are computed."""
    model = make_model(kind)
    encoder, decoder = model.model.encoder, model.model.decoder
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    for module in (encoder.embed_tokens, encoder.layers[0], encoder.rotary_emb):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    second = [*encoder.layers[1:], encoder.norm, *decoder.layers, decoder.norm, decoder.rotary_emb, model.lm_head]
    for module in second:
        module.to("meta")
        add_hook_to_module(module, AlignDevicesHook(execution_device="meta"))
    inputs = batch()
    logits = model(**inputs).logits
    assert logits.device.type == "meta"
    assert logits.shape == (*inputs["labels"].shape, model.config.vocab_size)


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_of_two_places(kind, tmp_path):
    """Part in memory, part on disk, block by block as `_no_split_modules` allows."""
    model, inputs = make_model(kind), batch()
    with torch.no_grad():
        logits = model(**inputs).logits
        sizes = sum(p.numel() * 4 for p in model.parameters())
        device_map = infer_auto_device_map(
            model, {"cpu": sizes // 2, "disk": sizes}, no_split_module_classes=list(model._no_split_modules)
        )
        assert set(device_map.values()) == {"cpu", "disk"}
        dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path))
        torch.testing.assert_close(model(**inputs).logits, logits)
