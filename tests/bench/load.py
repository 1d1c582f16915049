"""Memory of loading and saving a synthetic DeepSeek-V3 in FP8: a dense layer and one of 256 experts."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SUMMARY = (
    "peak memory of model.load and model.save, 256 experts of DeepSeek-V3's width, FP8 blocks, bf16 in memory"
)
INNER = 512
"""Inner width of an expert; the release has 2,048, which in bf16 is more than a 24 GiB machine holds."""
MAKE = f"""
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from safetensors.torch import save_file
from model import DEEPSEEK_V3, Transformer
from model.checkpoint import public_tensors, read_config
torch.set_num_threads(1)
path = Path(sys.argv[1])
config = replace(DEEPSEEK_V3, num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=0,
                 vocab_size=1024, moe_intermediate_size={INNER}, max_position_embeddings=4096)
with torch.device("meta"):
    net = Transformer(config)
path.joinpath("config.json").write_text(json.dumps(config.to_dict()))
shard, size, files, weight_map, total = {{}}, 0, [], {{}}, 0
def flush():
    global shard, size
    file = f"model-{{len(files) + 1:05d}}.safetensors"
    files.append(file)
    save_file(shard, path / file)
    weight_map.update(dict.fromkeys(shard, file))
    shard, size = {{}}, 0
generator = torch.Generator().manual_seed(0)
for name, tensor in public_tensors(net.state_dict(keep_vars=True), net.config):
    total += 2 * tensor.numel()
    if name.endswith("proj.weight") or "_proj_with_mqa" in name:
        bits = torch.randint(0, 120, tensor.shape, dtype=torch.uint8, generator=generator)
        shard[name] = bits.view(torch.float8_e4m3fn)
        shard[name + "_scale_inv"] = torch.full([-(-n // 128) for n in tensor.shape], 1e-4)
    else:
        shard[name] = torch.randn(tensor.shape, generator=generator).to(torch.bfloat16) * 0.02
    size += shard[name].nbytes
    if size > 1e9:
        flush()
flush()
path.joinpath("model.safetensors.index.json").write_text(json.dumps({{"weight_map": weight_map}}))
print(json.dumps({{"bytes": total, "parameters": total // 2}}))
"""
PASS = """
import json, sys, time
import torch
import model
from tests.bench.measure import peak_bytes as peak
torch.set_num_threads(1)
before, begin = peak(), time.perf_counter()
net = model.load(sys.argv[1], dtype=torch.bfloat16)
loaded, middle = peak(), time.perf_counter()
with torch.no_grad():  # looking at every weight would take a copy of the largest
    finite = net.logits(torch.arange(8)[None]).isfinite().all()
begin_save = time.perf_counter()
model.save(net, sys.argv[2])
print(json.dumps({"load_bytes": loaded - before, "save_bytes": peak() - before, "finite": bool(finite),
                  "load_s": middle - begin, "save_s": time.perf_counter() - begin_save}))
"""


def script(text: str, *args: object) -> dict[str, Any]:
    """The JSON that a Python of its own prints."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", text, *map(str, args)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def run() -> dict[str, Any]:
    """Peaks over what the process had before, as a share of the network's bytes in bf16."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "fp8"), Path(folder, "bf16")
        source.mkdir()
        made = script(MAKE, source)
        measured = script(PASS, source, target)
        shards = len(list(target.glob("*.safetensors")))
    assert measured["finite"]
    load, save = (measured[key] / made["bytes"] for key in ("load_bytes", "save_bytes"))
    return {
        "claims": [
            {"claim": "peak of load", "value": load, "at_most": 1.3},
            {
                "claim": "peak of load and save",
                "value": save,
                "at_most": 1.3,
            },
        ],
        "inner_width_of_an_expert": INNER,
        "shards_written": shards,
        **made,
        **measured,
    }
