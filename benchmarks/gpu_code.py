"""What the Triton kernels become on GPUs, compiled for them without one: registers, spills and bytes an instruction.

    python benchmarks/gpu_code.py [--generations 80 90 100 120]

Each kernel is compiled as it is launched for V = 128,256 and 12 or 50 labels, by the compiler that the package `triton`
brings along. Spilled registers go through memory, and loads of fewer than 16 bytes a thread waste its bandwidth: both
should be none but for the few places of a row that are read alone. `rows` is how many of a kernel's programs the
registers and threads of an SM hold. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsekd import fused_triton, inversion, inversion_triton

VOCABULARY, REGISTERS, THREADS = 128_256, 65_536, 2048  # of an SM
NAMES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel with what its launch gives: by argument's name a tensor's dtype, or a number's type."""

    kernel: Any
    pointers: dict[str, torch.dtype]
    constants: dict[str, Any]
    integers: tuple[str, ...]
    warps: int


def row_losses(dtype: torch.dtype, labels: int, **flags: bool) -> Case:
    options = {"BIAS": False, "SOFTCAP": False, "UNIFORM": False, "GRADIENT": True, "TWO": False} | flags
    shape = fused_triton.launch(VOCABULARY)
    inputs = dict.fromkeys(
        ("bias_V", "sparse_CJ", "mass_C", "constant_C", "uniform_C", "scale_C", "losses_C"), torch.float32
    )
    return Case(
        kernel=fused_triton._row_kernel,
        pointers=inputs | {"logits_CV": dtype, "ids_CJ": torch.int64},
        constants=options | {"BLOCK": shape["BLOCK"], "READS": triton.next_power_of_2(labels + 1)},
        integers=("stride", "width", "reads"),
        warps=shape["num_warps"],
    )


def block_masses(dtype: torch.dtype) -> Case:
    return Case(
        kernel=inversion_triton._block_kernel,
        pointers={"logits_NV": dtype, "peaks": torch.float32, "sums": torch.float32},
        constants={"BLOCK": inversion.BLOCK, "BLOCKS": inversion_triton.BLOCKS},
        integers=("stride", "vocab", "blocks"),
        warps=inversion_triton.WARPS,
    )


EVERYTHING = dict.fromkeys(("BIAS", "SOFTCAP", "UNIFORM", "TWO"), True)
CASES = {
    "loss, bf16, 12 labels": row_losses(torch.bfloat16, 12),
    "loss, bf16, 50 labels": row_losses(torch.bfloat16, 50),
    "loss, bf16, every option": row_losses(torch.bfloat16, 50, **EVERYTHING),
    "loss, fp32, every option": row_losses(torch.float32, 50, **EVERYTHING),
    "samplers' blocks, bf16": block_masses(torch.bfloat16),
    "samplers' blocks, fp32": block_masses(torch.float32),
}


def compiled(case: Case, generation: int) -> Any:
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else "fp32" for name in names}
    signature |= {name: NAMES[dtype] for name, dtype in case.pointers.items()}
    signature |= dict.fromkeys(case.integers, "i32")
    even = [*case.pointers, "stride", "width", "vocab"]  # a launch sees that 16 divides them
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in even if name in names},
    )
    return triton.compile(source, target=GPUTarget("cuda", generation, 32), options={"num_warps": case.warps})


def resources(case: Case, generation: int) -> dict[str, int]:
    """Registers a thread, spilled bytes, programs an SM holds, and loads and stores of 16 bytes and of fewer."""
    code = compiled(case, generation)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(code.asm["cubin"])
        binary.flush()
        words = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary.name]
        told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", told)[1]) for name in ("REG", "STACK"))
    moved = re.findall(r"(?:ld|st)\.global\S*", code.asm["ptx"])
    threads = 32 * case.warps
    held = REGISTERS // (-(-registers // 8) * 8 * threads)
    wide = sum(".v4" in each or ".b128" in each for each in moved)
    return {
        "registers": registers,
        "spilled": stack,
        "rows": min(held, THREADS // threads),
        "wide": wide,
        "narrow": len(moved) - wide,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", type=int, nargs="+", default=[80, 90, 100, 120])
    a = parser.parse_args()
    found = {name: {one: resources(case, one) for one in a.generations} for name, case in CASES.items()}
    print(f"{'':<28}{'sm':>6}{'registers':>12}{'spilled':>10}{'rows':>8}{'wide':>8}{'narrow':>8}")
    for name, each in found.items():
        for generation, values in each.items():
            print(
                f"{name:<28}{generation:>6}"
                + "".join(f"{values[key]:>{w}}" for key, w in zip(values, (12, 10, 8, 8, 8), strict=True))
            )
    print("\n" + json.dumps({"triton": triton.__version__, "vocabulary": VOCABULARY, "kernels": found}))


if __name__ == "__main__":
    main()
