"""Compiles every GPU kernel ahead of time, without a GPU, and shows what ptxas says: python tests/aot.py

Triton kernels go through Triton's own compiler, csrc/cuda/*.cu through nvcc, each for sm_80, sm_90 and sm_100. Fails on
a spilled register, on a compile error, on an instruction that a variant must have and has not, and on machine code
(machine_code.py) that is worse by more than 5 % than in bench/results/machine_code.csv, which --write makes anew.
Without nvcc only the Triton part runs.

What the PTX of sparse_adamw shows (Triton 3.6): exp_avg, exp_avg_sq and the master are read and written 16 bytes a
thread (ld.global.v4.b32, st.global.v4.b32; v2.b64 for float64), exp_avg and exp_avg_sq in bfloat16 8 bytes (v2.b32),
four uint16 columns in one ld.global.v2.b32, four int32 columns in one ld.global.v4.b32, in the body for full blocks.
The body for the last block reads element by element, because its mask is not constant over a vector. Parameters and
dense gradients are gathered; only the parameters are stored with neighbouring entries in neighbouring threads.
"""

import argparse
import functools
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import machine_code
from machine_code_table import TABLE, Row, cells_of, table, worse_than_table, write_table

ROOT = Path(__file__).resolve().parents[1]
ARCHS = (80, 90, 100)
TENSOR_CORES = {80: "mma.sync.", 90: "wgmma.mma_async.", 100: "tcgen05.mma."}


class Variant(NamedTuple):
    """One specialisation of a Triton kernel."""

    module: str
    kernel: str
    name: str
    # Parameter -> a Triton type ("*fp32": a pointer divisible by 16; "i64"; "i32:16": a multiple of 16) or a
    # compile-time constant (anything that is no str, and whatever a tl.constexpr parameter has).
    arguments: dict
    options: dict
    must_have: tuple[str, ...] = ()  # of the PTX
    tensor_cores: bool = False  # whether it must have the architecture's instruction in TENSOR_CORES too


# ---- the variants of the Triton kernels ----
COMPUTE = {"bf16": "fp32", "fp16": "fp32", "fp32": "fp32", "fp64": "fp64"}


def triton_dtypes() -> dict:
    import triton.language as tl

    return {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32, "fp64": tl.float64}


def constants_of(module, *names: str) -> dict:
    return {name: getattr(module, name) for name in names}


# parameter, gradient, what else: "compact", "master", "all" (every option), "seed", "i32" (columns), "bf16 state",
# "changed", "full" (no columns)
SPARSE_ADAMW = [
    ("bf16", "bf16", "master"),
    ("bf16", "fp32", "compact", "master"),
    ("bf16", "bf16", "compact"),
    ("bf16", "bf16", "master", "all", "i32"),
    ("fp16", "fp32", "master", "all"),
    ("fp32", "fp32"),
    ("fp32", "fp32", "compact"),
    ("fp32", "fp32", "all", "i32"),
    ("fp64", "fp64", "all"),
    ("bf16", "bf16", "bf16 state"),
    ("bf16", "bf16", "bf16 state", "seed"),
    ("bf16", "bf16", "bf16 state", "seed", "compact"),
    ("bf16", "bf16", "seed"),
    ("bf16", "fp32", "bf16 state", "seed", "all", "i32"),
    ("bf16", "bf16", "bf16 state", "seed", "master"),
    ("fp16", "fp16", "bf16 state", "seed", "master", "all"),
    ("fp32", "fp32", "bf16 state", "seed", "all", "i32"),
    ("bf16", "bf16", "master", "changed"),
    ("bf16", "bf16", "master", "changed", "full"),
    ("fp32", "fp32", "full"),
]


def sparse_adamw_variants() -> Iterator[Variant]:
    from deftx_kernels.kernels import sparse_adamw as module

    for param, grad, *chosen in SPARSE_ADAMW:
        compute, everything, compact = COMPUTE[param], "all" in chosen, "compact" in chosen
        state = "bf16" if "bf16 state" in chosen else compute
        columns = None if "full" in chosen else "*i32" if "i32" in chosen else "*u16"
        vector = {"fp64": "v2.b64", "fp32": "v4.b32", "bf16": "v2.b32"}[state]
        arguments = {
            "table": "*i64",
            "grad_table": None if compact else "*i64",
            "grad": f"*{grad}" if compact else None,
            **dict.fromkeys(("exp_avg", "exp_avg_sq"), f"*{state}"),
            "values": f"*{compute}" if "master" in chosen else None,
            "decay_to": f"*{compute}" if everything else None,
            "crow_indices": "*i64",
            "col_indices": columns,
            **dict.fromkeys(("step", "lr"), "*fp32"),
            **dict.fromkeys(("grad_scale", "found_inf"), "*fp32" if everything else None),
            "changed": "*i32" if "changed" in chosen else None,
            "blocks": "*i32",
            **dict.fromkeys(module._ANY_VALUE, "i64"),
            **dict.fromkeys(("MAXIMIZE", "HAS_L1"), everything),
            "HAS_SEED": "seed" in chosen,
            "PARAM": triton_dtypes()[param],
            "GRAD": triton_dtypes()[grad],
            "BITS": module.BITS[triton_dtypes()[param].primitive_bitwidth // 8],
            **constants_of(module, "BLOCK", "GROUP", "HEAD"),
        }
        column_loads = {"*u16": ("ld.global.v2.b32",), "*i32": ("ld.global.v4.b32",), None: ()}[columns]
        must_have = (f"ld.global.{vector}", f"st.global.{vector}", *column_loads)
        name = ", ".join([param, f"{grad} gradient", *chosen])
        options = {"num_warps": module.NUM_WARPS}
        yield Variant(module.__name__, "_sparse_adamw_kernel", name, arguments, options, must_have)


def square_sum_variants() -> Iterator[Variant]:
    from deftx_kernels.kernels import square_sum as module

    for (name, dtype), columns in itertools.product(triton_dtypes().items(), ("u16", "i32")):
        arguments = {
            **dict.fromkeys(("table", "crow_indices"), "*i64"),
            "col_indices": f"*{columns}",
            "partial_sums": "*fp64",
            "blocks": "*i32",
            **dict.fromkeys(("nnz", "n_tensors"), "i64"),
            "DTYPE": dtype,
            **constants_of(module, "BLOCK", "GROUP", "HEAD"),
        }
        options = {"num_warps": module.NUM_WARPS}
        yield Variant(module.__name__, "_square_sum_kernel", f"{name}, {columns}", arguments, options)


def low_rank_variants() -> Iterator[Variant]:
    from deftx_kernels.kernels import low_rank as module

    output = {"histogram": "*i64", "ties": "*i64", "rows": "*i32", "denoised": "*fp32"}
    for (epilogue, out), any_size in itertools.product(output.items(), (False, True)):
        arguments = {
            **dict.fromkeys(("delta", "left", "right"), "*fp32"),
            "key": "*i64",
            "out": out,
            **dict.fromkeys(("m", "shift", "out_stride"), "i32"),
            "n": "i32" if any_size else "i32:16",
            "r": "i32:16",
            "EPILOGUE": epilogue,
            **constants_of(module, "BLOCK_M", "BLOCK_N", "BLOCK_K"),
        }
        options = {"num_warps": module.NUM_WARPS, "num_stages": module.NUM_STAGES}
        name = f"{epilogue}{', any size' * any_size}"
        yield Variant(module.__name__, "_low_rank_kernel", name, arguments, options)


def split_bf16_variants() -> Iterator[Variant]:
    from deftx_kernels.denoise.products import LEFT, RIGHT
    from deftx_kernels.kernels import split_bf16 as module

    # what it reads, slots along the columns, slots along the rows
    for source, columns, rows in [
        ("matrix", (0, 1), ()),
        ("list", (0, 1), ()),
        ("matrix", LEFT, ()),
        ("list", LEFT, ()),
        ("matrix", (), RIGHT),
        ("list", (), RIGHT),
        ("matrix", LEFT, RIGHT),
        ("list", (0, 1, 2), ()),
    ]:
        # In a list of any size the widest access is that to an address: the count would say nothing about the rest.
        for any_size in (False, True) if source == "matrix" else (False,):
            size = "i32" if any_size else "i32:16"
            arguments = {
                "x": "*i64" if source == "list" else "*fp32",
                "columns": "*bf16" if columns else None,
                "rows": "*bf16" if rows else None,
                "m": "i32",
                "each": 1,
                **dict.fromkeys(("n", "x_batch", "x_row"), size),
                **dict.fromkeys((f"columns_{x}" for x in ("batch", "row", "slot")), size if columns else "i32:16"),
                **dict.fromkeys((f"rows_{x}" for x in ("batch", "row", "slot")), size if rows else "i32:16"),
                "ALIGNMENT": 4 if any_size else 16,
                "COLUMN_SLOTS": columns,
                "ROW_SLOTS": rows,
                **constants_of(module, "BLOCK_M", "BLOCK_N"),
            }
            vectors = () if any_size else ("ld.global.v4.b32", "st.global.v4.b32")
            slots = [f"{kind} {s}" for kind, s in (("columns", columns), ("rows", rows)) if s]
            name = ", ".join([source, *slots, *["any size"] * any_size])
            options = {"num_warps": module.NUM_WARPS}
            yield Variant(module.__name__, "_split_bf16_kernel", name, arguments, options, vectors)


def masked_linear_grad_variants() -> Iterator[Variant]:
    from deftx_kernels.kernels import masked_linear_grad as module

    dtypes = triton_dtypes()
    for dtype, precision, columns, out in [
        ("bf16", "ieee", "u16", "fp32"),  # split tokens, or a float32 gradient
        ("bf16", "ieee", "u16", "bf16"),
        ("bf16", "ieee", "i32", "fp32"),
        ("bf16", "ieee", "i32", "bf16"),
        ("fp16", "ieee", "u16", "fp32"),
        ("fp16", "ieee", "u16", "fp16"),
        ("fp32", "ieee", "u16", "fp32"),
        ("fp32", "ieee", "i32", "fp32"),
        ("fp32", "tf32", "u16", "fp32"),
        ("fp32", "tf32", "i32", "fp32"),
        ("fp64", "ieee", "u16", "fp64"),
    ]:
        size = int(dtype[2:]) // 8
        arguments = {
            **dict.fromkeys(("grad_output", "input"), f"*{dtype}"),
            "crow_indices": "*i64",
            "col_indices": f"*{columns}",
            "out": f"*{out}",
            **dict.fromkeys(("tokens", "m", "tokens_each"), "i32"),
            **dict.fromkeys(("grad_stride", "input_stride"), "i32:16"),  # all that the launcher makes
            "nnz": "i64",
            "ACC": dtypes[COMPUTE[dtype]],
            "PRECISION": precision,
            **dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), module.TILES[size])),
            **constants_of(module, "GROUP", "WAYS", "CHUNK"),
        }
        options = {"num_warps": module.NUM_WARPS, "num_stages": module.NUM_STAGES}
        name = f"{dtype} {precision}, {columns}, {out} out"
        cores = size == 2 or precision == "tf32"
        yield Variant(module.__name__, "_masked_linear_grad_kernel", name, arguments, options, tensor_cores=cores)
    for acc, out in (("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("fp64", "fp64")):
        arguments = {"partial_sums": f"*{acc}", "out": f"*{out}", "splits": "i32", "nnz": "i64"}
        arguments["BLOCK"] = module.SUM_BLOCK
        yield Variant(module.__name__, "_sum_kernel", f"{acc}, {out} out", arguments, {"num_warps": 4})


def product_strips_variants() -> Iterator[Variant]:
    from deftx_kernels.kernels import product_strips as module

    for acc, out, columns in [
        ("fp32", "fp32", "u16"),
        ("fp32", "fp32", "i32"),
        ("fp32", "bf16", "u16"),
        ("fp32", "fp16", "u16"),
        ("fp64", "fp64", "u16"),
        ("fp64", "fp32", "i32"),
    ]:
        arguments = {
            "product": f"*{acc}",
            "crow_indices": "*i64",
            "col_indices": f"*{columns}",
            "out": f"*{out}",
            "first_row": "i32",
            "stride": "i32:16",
            "nnz": "i64",
            **constants_of(module, "BLOCK"),
        }
        name, options = f"{acc}, {out} out, {columns}", {"num_warps": module.NUM_WARPS}
        yield Variant(module.__name__, "_gather_strip_kernel", name, arguments, options)


def masked_embedding_grad_variants() -> Iterator[Variant]:
    from deftx_kernels.kernels import masked_embedding_grad as module

    for kernel, dtype, out, keys, columns, any_size in [
        ("_segment_kernel", "bf16", "fp32", "i64", "u16", False),
        ("_segment_kernel", "bf16", "bf16", "i64", "u16", True),
        ("_segment_kernel", "fp16", "fp32", "i32", "i32", False),
        ("_segment_kernel", "fp32", "fp32", "i64", "u16", False),
        ("_segment_kernel", "fp64", "fp64", "i64", "i32", True),
        ("_finish_kernel", None, "fp32", "i64", None, False),
        ("_finish_kernel", None, "bf16", "i32", None, True),
        ("_finish_kernel", None, "fp64", "i64", None, False),
    ]:
        arguments = {
            "keys": f"*{keys}",
            "crow_indices": "*i64",
            "out": f"*{out}",
            "partial_sums": f"*{COMPUTE[out]}",
            "tokens": "i32",
            "d": "i32" if any_size else "i32:16",
            **dict.fromkeys(("rows", "nnz", "padding_idx"), "i64"),
            **constants_of(module, "SEGMENT", "OCCURRENCES", "PARTS", "ENTRIES"),
        }
        if dtype:
            arguments |= {"grad_output": f"*{dtype}", "order": "*i64", "col_indices": f"*{columns}"}
        name = ", ".join([*filter(None, (dtype, f"{out} out", f"{keys} keys", columns)), *["any size"] * any_size])
        yield Variant(module.__name__, kernel, name, arguments, {"num_warps": module.NUM_WARPS})


def triton_variants() -> list[Variant]:
    return [
        *sparse_adamw_variants(),
        *square_sum_variants(),
        *low_rank_variants(),
        *split_bf16_variants(),
        *masked_linear_grad_variants(),
        *product_strips_variants(),
        *masked_embedding_grad_variants(),
    ]


# ---- compiling ----
# Without a stack frame, ptxas leaves out the line of the spills.
_USAGE = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'"
    r"(?:(?!Compiling entry).)*?(?:(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"(?:(?!Compiling entry).)*?)?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def usage(log: str) -> Iterator[tuple[str, str, int, int, int, int]]:
    """Of each kernel in ptxas -v's output: mangled name, architecture, registers, spill stores and loads, static shared
    memory.
    """
    for found in _USAGE.finditer(log):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        counts = (int(found[x] or 0) for x in ("registers", "stores", "loads"))
        yield found["name"], "sm_" + found["arch"], *counts, int(shared[1]) if shared else 0


def run(command: list) -> str:
    result = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def compile_triton(variant: Variant, arch: int) -> list[Row]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    index = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    constants = {p.name: p.is_constexpr or not isinstance(variant.arguments[p.name], str) for p in kernel.params}
    signature = {
        n: "constexpr" if constant else variant.arguments[n].removesuffix(":16") for n, constant in constants.items()
    }
    constants = {index[n]: variant.arguments[n] for n, constant in constants.items() if constant}
    typed = {n: variant.arguments[n] for n, kind in signature.items() if kind != "constexpr"}
    aligned = {
        index[n]: [["tt.divisibility", 16]] for n, kind in typed.items() if kind.startswith("*") or kind.endswith(":16")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options)
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target\s+(\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        log = run([get_ptxas(arch).path, "-v", f"--gpu-name={target}", file, "-o", file.with_suffix(".cubin")])
        codes = machine_code.read(file.with_suffix(".cubin"))
    wanted = (*variant.must_have, *([TENSOR_CORES[arch]] if variant.tensor_cores else []))
    missing = tuple(x for x in wanted if x not in ptx)
    return [
        Row(
            *(variant.kernel, variant.name, sm, registers, stores, loads, max(shared, compiled.metadata.shared)),
            missing,
            codes[name],
        )
        for name, sm, registers, stores, loads, shared in usage(log)
    ]


def demangled(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    return run([tool, *names]).splitlines() if tool and names else names


def compile_cuda(source: Path, arch: int) -> list[Row]:
    import torch

    include = Path(torch.__path__[0], "include")
    with tempfile.TemporaryDirectory() as folder:
        flags = f"-cubin -arch=sm_{arch} -O3 -std=c++17 -Xptxas -v -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020A000000000000"
        cubin = Path(folder, "out.cubin")
        log = run(["nvcc", *flags.split(), "-isystem", include, source, "-o", cubin])
        codes = machine_code.read(cubin)
    rows = [row for row in usage(log) if not row[0].startswith("_ZN3cub")]  # CUB's own kernels are not compared
    names = demangled([row[0] for row in rows])
    return [Row(*split_name(name), *row[1:], (), codes[row[0]]) for name, row in zip(names, rows)]


def split_name(demangled: str) -> tuple[str, str]:
    """("kernel", "template arguments") of a C++ name."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|^void ", "", demangled)
    head, _, rest = name.partition("<")
    if not rest:
        return head.partition("(")[0].split("::")[-1], ""
    depth = 1
    for i, c in enumerate(rest):
        depth += (c == "<") - (c == ">")
        if depth == 0:
            return head.split("::")[-1], rest[:i]
    return head, rest


def attempt(job) -> list[Row] | str:
    """A job's rows, or its error as text: not every compiler's exception can be pickled."""
    try:
        return job()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="compute capabilities (default: 80 90 100)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)} instead of comparing")
    options = parser.parse_args()
    if options.write and (tuple(options.arch) != ARCHS or not shutil.which("nvcc")):
        parser.error("--write needs nvcc and all architectures")
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

    jobs = {}
    if shutil.which("nvcc"):
        for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
            jobs |= {
                f"{source.name}, sm_{arch}": functools.partial(compile_cuda, source, arch) for arch in options.arch
            }
    else:
        print("nvcc is not on the PATH: csrc/cuda is left out, only the Triton kernels are compiled\n", file=sys.stderr)
    for v in triton_variants():
        jobs |= {
            f"{v.kernel}, {v.name}, sm_{arch}": functools.partial(compile_triton, v, arch) for arch in options.arch
        }

    with ProcessPoolExecutor(options.jobs) as pool:
        results = dict(zip(jobs, pool.map(attempt, jobs.values())))
    rows = sorted(row for result in results.values() if isinstance(result, list) for row in result)
    shown = [cells_of(row) for row in rows]
    print(table(shown))

    faults = [f"{name}: {result}" for name, result in results.items() if isinstance(result, str)]
    faults += [f"{name}: ptxas reported no kernel" for name, result in results.items() if result == []]
    if options.write and not faults:
        write_table(shown)
    elif not options.write:
        faults += worse_than_table(shown)
    for row in rows:
        label = ", ".join(filter(None, row[:3]))
        if row.spill_stores or row.spill_loads:
            faults.append(f"{label}: spills {row.spill_stores} bytes stored, {row.spill_loads} bytes loaded")
        if row.missing:
            faults.append(f"{label}: the PTX has no {', '.join(row.missing)}")
    print(f"\n{len(rows)} kernels compiled, {len(faults)} faults", *faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
