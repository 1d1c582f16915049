"""Checkpoints: bit-equal round trips, shards, FP8 blocks, and errors that name the tensor and the file."""

import json
from dataclasses import replace

import pytest
import torch
from model_shapes import BASE, SHAPES, make
from safetensors.torch import load_file, save_file

import model
from model import CheckpointError


def rewrite(path, change):
    """Apply `change` to the dict of tensors of a checkpoint directory."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def saved(tmp_path):
    model.save(make(BASE), tmp_path)
    return tmp_path


@pytest.mark.parametrize("shape", SHAPES)
def test_save_and_load_are_bit_equal(shape, tmp_path):
    net = make(SHAPES[shape])
    model.save(net, tmp_path)
    back = model.load(tmp_path)
    assert back.config == net.config
    assert list(back.state_dict()) == list(net.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), back.state_dict().values(), strict=True)
    )
    assert (back.lm_head.weight is back.embed_tokens.weight) == net.config.tie_word_embeddings
    assert back.router_load().sum() == 0
    tokens = torch.randint(97, (1, 8))
    assert torch.equal(net.logits(tokens), back.logits(tokens))


def test_names_are_the_released_ones(saved):
    names = set(load_file(saved / "model.safetensors"))
    for name in (
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.mlp.experts.7.up_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.shared_experts.down_proj.weight",
        "model.layers.2.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.3.eh_proj.weight",
        "model.layers.3.shared_head.norm.weight",
        "model.layers.3.shared_head.head.weight",
        "model.layers.3.embed_tokens.weight",
        "model.layers.3.mlp.experts.0.gate_proj.weight",
    ):
        assert name in names, name
    config = json.loads((saved / "config.json").read_text())
    assert (config["topk_method"], config["scoring_func"]) == ("noaux_tc", "sigmoid")
    assert config["num_nextn_predict_layers"] == 1 and config["architectures"] == ["DeepseekV3ForCausalLM"]


def test_dtype_is_kept_and_converted(tmp_path):
    net = make(BASE).to(torch.bfloat16)
    model.save(net, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (
        load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"].dtype
        is torch.float
    )
    wide = model.load(tmp_path)
    assert torch.equal(wide.norm.weight, net.norm.weight.float())
    assert model.load(tmp_path, dtype=torch.bfloat16).norm.weight.dtype is torch.bfloat16


def test_shards_are_read(saved):
    want = model.load(saved).state_dict()
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, saved / file)
    weight_map = {n: file for file, part in parts.items() for n in part}
    (saved / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    assert all(torch.equal(want[n], t) for n, t in model.load(saved).state_dict().items())
    (saved / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        model.load(saved)


def test_large_networks_are_written_in_shards(tmp_path, monkeypatch):
    from model import checkpoint

    monkeypatch.setattr(checkpoint, "SMALLEST_SHARD", 1)
    monkeypatch.setattr(checkpoint, "RELEASE_BYTES", 1000)
    net = make(BASE)
    model.save(net, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) >= 12 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    total = sum(file.stat().st_size for file in files)
    assert max(file.stat().st_size for file in files) < total / 8
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
    back = model.load(tmp_path)
    assert all(torch.equal(t, back.state_dict()[n]) for n, t in net.state_dict().items())
    transformers = pytest.importorskip("transformers")
    peer = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(9)[None]
    torch.testing.assert_close(peer(tokens).logits, net.logits(tokens), atol=1e-5, rtol=1e-5)

    monkeypatch.undo()
    model.save(net, tmp_path)  # one file now: nothing of the shards is left to be read
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]


def test_fp8_blocks_are_dequantized(saved):
    name = "model.layers.0.mlp.down_proj.weight"
    config = replace(BASE, intermediate_size=160)
    model.save(make(config), saved)
    weight = load_file(saved / "model.safetensors")[name]  # 48 x 160: 1 x 2 blocks
    scale = torch.tensor([[0.5, 0.25]])
    quantized = (weight / torch.cat([torch.full((48, 128), 0.5), torch.full((48, 32), 0.25)], 1)).to(
        torch.float8_e4m3fn
    )
    rewrite(saved, lambda t: t.update({name: quantized, f"{name}_scale_inv": scale}))
    got = model.load(saved).layers[0].mlp.down_proj.weight
    assert torch.equal(got[:, :128], quantized[:, :128].float() * 0.5)
    assert torch.equal(got[:, 128:], quantized[:, 128:].float() * 0.25)


def test_errors_name_the_tensor_and_the_file(saved):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    complete = load_file(saved / "model.safetensors")
    cases = {
        f"lacks the tensor {name}": lambda t: t.pop(name),
        "model.layers.9.surprise": lambda t: t.update({"model.layers.9.surprise": torch.zeros(1)}),
        rf"{name} is \(2, 2\), the config expects \(24, 48\)": lambda t: t.update({name: torch.zeros(2, 2)}),
        "differs from the trunk's": lambda t: t["model.layers.3.embed_tokens.weight"].zero_(),
        "lacks the tensor model.layers.3.hnorm": lambda t: t.pop("model.layers.3.hnorm.weight"),
        f"{name} is int8 without a scale": lambda t: t.update({name: t[name].to(torch.int8)}),
        f"{name} is float8_e4m3fn without a scale": lambda t: t.update(
            {name: t[name].to(torch.float8_e4m3fn)}
        ),
        f"{name} is int8 with a scale": lambda t: t.update(
            {name: t[name].to(torch.int8), f"{name}_scale_inv": torch.ones(1, 1)}
        ),
        f"{name} is float32 with a scale": lambda t: t.update({f"{name}_scale_inv": torch.ones(1, 1)}),
    }
    for message, change in cases.items():
        save_file(complete, saved / "model.safetensors")
        rewrite(saved, change)
        with pytest.raises(CheckpointError, match=message) as error:
            model.load(saved)
        assert str(saved) in str(error.value)


def test_broken_directories_are_refused(saved, tmp_path_factory):
    file = saved / "model.safetensors"
    data = file.read_bytes()
    for broken in (data[: len(data) // 2], data[:4], b"", b"not safetensors at all, but long enough"):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
            model.load(saved)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        model.load(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        model.load(saved)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        model.load(tmp_path_factory.mktemp("empty"))
