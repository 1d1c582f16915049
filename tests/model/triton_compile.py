"""Compile the Triton kernels for a Hopper GPU, without one, and print what came out. For test_fp8_kernels.py.

One JSON line a kernel: the tensor-core instructions on FP8, the conversions to E4M3, bytes of shared memory,
and whether registers spilled.
"""

import json
import re

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from model.kernels import fused
from model.kernels.fp8 import grouped, quantize

FP8, FP32, BF16, INT, LONG, NUMBER = "*fp8e4nv", "*fp32", "*bf16", "*i32", "*i64", "fp32"
FORMAT = {"FLOOR": 1e-12, "MOST": 448.0, "BLOCK": 128}
SIZES = {"ROWS": grouped.ROWS, "COLUMNS": grouped.COLUMNS, "BLOCK": 128}
OPERANDS = {"a": FP8, "a_scale": FP32, "b": FP8, "b_scale": FP32}
SPANS = {"starts": INT, "ends": INT}

KERNELS = [
    (
        quantize._tiles,
        {"x": BF16, "x_scale": FP32, "values": FP8, "scale": FP32, **SPANS},
        {
            "SEGMENTS": False,
            "REQUANTIZE": False,
            "POWER_OF_TWO": True,
            "ROWS": quantize.ROWS,
            "x_c": 1,
            **FORMAT,
        },
    ),
    (
        quantize._tiles,
        {"x": FP8, "x_scale": FP32, "values": FP8, "scale": FP32, **SPANS},
        {
            "SEGMENTS": True,
            "REQUANTIZE": True,
            "POWER_OF_TWO": True,
            "ROWS": quantize.ROWS,
            "x_m": 1,
            **FORMAT,
        },
    ),
    (
        quantize._blocks,
        {"x": FP32, "values": FP8, "scale": FP32},
        {"POWER_OF_TWO": False, "x_c": 1, **FORMAT},
    ),
    (
        grouped._rows_times_experts,
        {**OPERANDS, "out": BF16, "experts": INT, **SPANS},
        {"as_m": 1, "bs_t": 1, **SIZES},
    ),
    (grouped._over_tokens, {**OPERANDS, "out": FP32, "firsts": INT}, {"as_m": 1, "bs_n": 1, **SIZES}),
    (
        fused._log_softmax,
        {"z": BF16, "targets": LONG, "rows": FP32, "times": NUMBER},
        {"ENTROPY": True, "BLOCK": fused.HOW["BLOCK"]},
    ),
    (
        fused._logits_gradient,
        {
            **{"z": BF16, "out": BF16, "targets": LONG, "rows": FP32, "d": FP32, "e": FP32},
            **dict.fromkeys(("times", "rate", "uncap"), NUMBER),
        },
        {"ENTROPY": True, "SOFTCAP": True, "BLOCK": fused.HOW["BLOCK"]},
    ),
]
ALIGNED = {"x_m", "x_c", "v_m", "v_width", "c", "n", "a_m", "b_n", "b_e", "out_m", "v", "z_n"}
"""Sizes and strides that are multiples of 16 in a real model."""


def anywhere(kernel):
    """Arguments whose address says nothing to the compiler."""
    return {p.name for p in kernel.params if p.do_not_specialize_on_alignment}


for kernel, pointers, constants in KERNELS:
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    assert set(pointers) | set(constants) <= set(names)
    whole = [name for name in pointers if types[name].startswith("*") and name not in anywhere(kernel)]
    aligned = [name for name in names if name in whole or (name in ALIGNED and name not in constants)]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    how = fused.HOW if kernel.fn.__module__ == fused.__name__ else {}
    options = {key: value for key, value in how.items() if key != "BLOCK"}
    done = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = done.asm["ptx"]
    print(
        json.dumps(
            {
                "kernel": kernel.__name__,
                "products": sorted(set(re.findall(r"wgmma\.mma_async\.\S*", ptx))),
                "casts": sorted(set(re.findall(r"cvt\.\S*e4m3x2\.f32", ptx))),
                "logits": sorted(set(re.findall(r"ld\.global\.v\S*", ptx))),
                "divisions": sorted(set(re.findall(r"div\.\S*f32", ptx))),
                "shared_bytes": done.metadata.shared,
                "spills": "__local_depot" in ptx,
                "binary_bytes": len(done.asm["cubin"]),
            }
        )
    )
