"""RandAugment's kernels: are they right on this device, how near a copy are they, and what they are compiled to.

    python benchmarks/kernels.py --device cuda
    python benchmarks/kernels.py --device cpu --quick

`equal`: images of every dtype, memory format and of odd sizes through every operation twice, against torch's operations
on the CPU; `different` counts the images that are not equal in every pixel, and the exit code is 1 if there are any, or
if a kernel cannot be compiled. On a CPU Triton's interpreter carries the kernels out; there one step of bfloat16 is
allowed, since it cuts float32 off where a GPU rounds.

`_tables_kernel`, `_pixels_kernel`: as they were launched at first and as they are now for 224 px, registers and bytes
on the stack of a thread (spilled registers are there), shared memory of a program, and the share of a multiprocessor's
64 warps that the registers leave, read from the binary for the device's capability; without a GPU for sm_90 (H100,
H200). `bytes_at_once` is the widest read and write of memory by a thread.

`host`: microseconds of the host's part of a batch, drawing and the eleven numbers per image, against the same with a
loop over operations (`loop`), which is checked to give the same bits. The clock of `common.py`.

`conversion`: microseconds of RandAugment and the conversion of bytes to floats, in this order (`on bytes`) and the
other (`on floats`); on a CPU with torch's operations, and the same bits.

`speed`, on a GPU only: images per second of the kernels (`fused`) and of torch's operations (`groups`) with two
operations, draws made before, and the share of the bandwidth of a copy that they reach if every byte is read and
written once per operation. Writes results/kernels.csv after each case.
"""
import json, os, re, subprocess, sys, tempfile, warnings

if "cpu" in sys.argv or "cuda" not in sys.argv: os.environ["TRITON_INTERPRET"] = "1"  # decided at Triton's import

import inspect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import NOT_MEASURED, arguments, in_turns, seconds_of, write

from noisy_student import batch_ops
from noisy_student.image_ops import FAMILY, OPS, SIGNED, Draws, posterize_bits, solarize_threshold, source_matrices
from noisy_student.randaugment import BatchRandAugment

DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
# images (B, H, W, C), dtypes, memory formats: every kind of these is compiled anew, a second for each of its kernels
EQUAL = {"cuda": (((256, 32, 32, 3), DTYPES, (True, False)), ((64, 224, 224, 3), DTYPES, (True, False)),
                  ((96, 37, 53, 3), DTYPES[:2], (True,)), ((64, 28, 28, 1), DTYPES[:1], (False,)),
                  ((33, 1, 5, 3), DTYPES[:1], (False,))),
         "cpu": (((16, 9, 14, 3), DTYPES, (True, False)), ((16, 1, 5, 1), DTYPES, (True, False)))}
BATCHES = ((32, 64), (32, 2048), (224, 256))  # side, images
COMPILE_ONLY = "--compile-only"


def case_name(dtype, nhwc) -> str: return f"{str(dtype)[6:]} {'channels last' if nhwc else 'channels first'}"


def images(shape, dtype, nhwc, rng):
    "Noise, every third image of a narrow range, every seventh constant"
    n, h, w, c = shape
    x = torch.from_numpy(rng.integers(0, 256, (n, h, w, c) if nhwc else (n, c, h, w), dtype=np.uint8))
    x[::3] //= 8
    x[1::7] = 77
    x = x.permute(0, 3, 1, 2) if nhwc else x
    return x if dtype == torch.uint8 else (x.double() / 255).to(dtype)


def equal(device: str) -> Iterator[list[dict]]:
    "Every case against torch's operations on the CPU."
    from noisy_student.fused import augment
    rng = np.random.default_rng(0)
    for shape, dtypes, formats in EQUAL[device]:
        for dtype in dtypes:
            for nhwc in formats:
                wrong = 0
                for reference in (False, True) if dtype in DTYPES[:2] else (False,):
                    n, size = shape[0], shape[1:3]
                    tfm = BatchRandAugment(2, 27, ops=OPS, schedule="random", seed=n, reference=reference)
                    draws = tfm.draw(n, size)
                    draws.op[0] = np.arange(n) % len(OPS)
                    x = images(shape, dtype, nhwc, rng)
                    made = augment(x.to(device), draws, reference).cpu().float()
                    step = 1 / 256 if device == "cpu" and dtype == torch.bfloat16 else 0
                    expected = batch_ops.augment(x, draws, reference).float()
                    wrong += int(((made - expected).abs() > step).flatten(1).any(1).sum())
                yield [dict(device=device, case="equal", size=shape[1], batch=shape[0], different=wrong,
                            candidate=case_name(dtype, nhwc),
                            kernels="compiled" if device == "cuda" else "interpreted")]


def resources(kernel, launch: dict, read: str, write: str, nhwc: bool, capability: int) -> dict:
    "What a kernel is compiled to, as it is launched for images whose sides are divisible by 16."
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names = inspect.signature(kernel.fn).parameters
    one = ("channel", "out_channel") if nhwc else ("column", "out_column")
    given = dict(C=3, BLOCK=launch["BLOCK"], REFERENCE=False, **dict.fromkeys(one, 1))
    constants = {k: v for k, v in given.items() if k in names}
    pointers = dict(x=read, out=write, tables="*u8", plan="*i64")
    types = {o: pointers.get(o, "constexpr" if o in constants else "i32") for o in names}
    even = ("h", "w", "batch", "row", "out_batch", "out_row", *(() if nhwc else ("channel", "out_channel")))
    attrs = {(i,): [["tt.divisibility", 16]] for i, o in enumerate(names) if o in pointers or o in even}
    made = triton.compile(ASTSource(kernel, types, constants, attrs), GPUTarget("cuda", capability, 32),
                          dict(enable_fp_fusion=False, num_warps=launch["num_warps"]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(made.asm["cubin"])
        f.flush()
        said = subprocess.run([Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "-res-usage", f.name],
                              capture_output=True, text=True, check=True).stdout
    use = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED):(\d+)", said)}
    per_warp = -(-use["REG"] * 32 // 256) * 256  # registers are given out in such pieces
    warps = 65536 // per_warp // made.metadata.num_warps * made.metadata.num_warps
    def widest(what):
        found = re.findall(rf"{what}\.global(?:\.\w+)*?(?:\.v(\d))?\.[bu](8|16|32)\b", made.asm["ptx"])
        return max((int(v or 1) * int(b) // 8 for v, b in found), default=0)
    return dict(registers=use["REG"], stack=use["STACK"], shared=use["SHARED"], occupancy=round(min(warps, 64) / 64, 2),
                bytes_at_once=f"{widest('ld')} / {widest('st')}")


def compiled(device: str) -> Iterator[list[dict]]:
    "Each kernel, for two dtypes and both memory formats."
    from noisy_student import fused
    capability = 10 * torch.cuda.get_device_capability()[0] if device == "cuda" else 90
    tables, pixels = fused._tables_kernel, fused._pixels_kernel
    (large, ours), before = fused._launches(224 * 224), dict(BLOCK=1024, num_warps=4)
    for kernel, launch in ((tables, before), (tables, large), (pixels, before), (pixels, ours)):
        for dtype, pointer in ((torch.uint8, "*u8"), (torch.float32, "*fp32")):
            for nhwc in (False, True):
                name = f"{case_name(dtype, nhwc)}, {launch['BLOCK']} px by {launch['num_warps']} warps"
                yield [dict(device=f"sm_{capability}", case=kernel.fn.__name__, candidate=name,
                            **resources(kernel, launch, pointer, pointer, nhwc, capability))]


def compiled_elsewhere() -> Iterator[list[dict]]:
    "In a process of its own, where Triton compiles instead of interpreting."
    done = subprocess.run([sys.executable, __file__, COMPILE_ONLY, "cuda"], env=dict(os.environ, TRITON_INTERPRET="0"),
                          capture_output=True, text=True)
    if done.returncode:
        yield [dict(device="sm_90", case="compiled", candidate="all", kernels="skipped: " + done.stderr.strip()[-200:])]
    for line in done.stdout.splitlines(): yield json.loads(line)


ARGUMENTS = {"Rotate": lambda m, px: 30 * m, "Posterize": lambda m, px: np.trunc(4 * m).clip(1, 8),
             "Solarize": lambda m, px: np.trunc(256 * m).clip(0, 256), "TranslateX": lambda m, px: px * m,
             "TranslateY": lambda m, px: px * m, "ShearX": lambda m, px: .3 * m, "ShearY": lambda m, px: .3 * m,
             **{o: lambda m, px: 1.8 * m + .1 for o in ("Color", "Contrast", "Brightness", "Sharpness")},
             **{o: lambda m, px: 0 * m for o in ("AutoContrast", "Equalize", "Invert")}}


def loop_draw(tfm, batch: int, size: tuple[int, int]) -> Draws:
    "Drawing as it was, an operation at a time."
    u = torch.rand(tfm.n, batch, 5, dtype=torch.float64, generator=tfm._generator()).numpy()
    op = np.array([OPS.index(o) for o in tfm.ops])[(u[..., 0] * len(tfm.ops)).astype(int)]
    m, value = np.full(op.shape, float(tfm.m)), np.empty(op.shape)
    for k in np.unique(op):
        value[op == k] = ARGUMENTS[OPS[k]](m[op == k] / 10, min(size) / 8 if min(size) <= 64 else 100.)
    value[SIGNED[op] & (u[..., 2] < .5)] *= -1
    return Draws(op, value, (u[..., 3:] * size).astype(int))


def loop_plan(draws: Draws, size: tuple[int, int]) -> np.ndarray:
    "Eleven numbers per image as they were, each computed for all images."
    op, v, center = draws
    def drew(*names): return np.isin(op, [OPS.index(o) for o in names])
    whole = [(drew("Posterize"), 0xff << 8 - posterize_bits(v, False)),
             (drew("Solarize"), solarize_threshold(v, False).clip(0, 256)),
             (drew("SolarizeAdd", "Cutout"), np.trunc(v).clip(-2**24, 2**24))]
    argument = np.select(*zip(*whole), v.astype(np.float32).view(np.int32))
    plan = [op[..., None], FAMILY[op][..., None], argument[..., None], center, *source_matrices(op, v, size)]
    return np.concatenate(plan, -1).astype(np.int64)


def host(budget: float) -> Iterator[list[dict]]:
    "The host's part of a batch, before and after, in turns."
    from noisy_student.fused import _plan
    for side, batch in BATCHES:
        size, repeat = (side, side), max(1, 4096 // batch)
        old, new = BatchRandAugment(2, 10, seed=1), BatchRandAugment(2, 10, seed=1)
        a, b = loop_draw(old, batch, size), new.draw(batch, size)
        assert all(i.tobytes() == j.tobytes() for i, j in zip(a, b))
        p, q = loop_plan(a, size), _plan(a, size, False)
        used = q != 0
        assert np.array_equal(p[..., :5], q[..., :5]) and np.array_equal(p[used], q[used])
        def times(f, repeat=repeat): return lambda: [f() for _ in range(repeat)]
        for what, fs in (("draw", dict(loop=lambda: loop_draw(old, batch, size), ours=lambda: new.draw(batch, size))),
                         ("plan", dict(loop=lambda: loop_plan(a, size), ours=lambda: _plan(a, size, False)))):
            rows = in_turns({k: times(f) for k, f in fs.items()}, "cpu", budget, "loop")
            yield [dict(device="host", case=what, size=side, batch=batch, candidate=k,
                        microseconds=round(v.pop("seconds") / repeat * 1e6, 1), **v) for k, v in rows.items()]


def conversion(device: str, budget: float) -> Iterator[list[dict]]:
    "Floats out of bytes, RandAugment after the conversion and before it."
    for side, batch in BATCHES:
        x = images((batch, side, side, 3), torch.uint8, True, np.random.default_rng(0)).to(device)
        tfm = BatchRandAugment(2, 10, seed=0)
        draws = tfm.draw(batch, (side, side))
        fs = {"on floats": lambda: tfm.apply(x.float().div_(255), draws),
              "on bytes": lambda: tfm.apply(x, draws).float().div_(255)}
        if device == "cpu": assert torch.equal(*(f() for f in fs.values()))
        rows = in_turns(fs, device, budget, "on floats")
        yield [dict(device=device, case="conversion", size=side, batch=batch, candidate=k,
                    microseconds=round(v.pop("seconds") * 1e6, 1), **v) for k, v in rows.items()]


def speed(device: str, budget: float) -> Iterator[list[dict]]:
    "Images per second on the device."
    from noisy_student.fused import augment
    big = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    big.clone()
    copied = 2 * big.numel() / min(seconds_of(big.clone, device) for _ in range(10))
    del big
    for side, batch in BATCHES:
        for dtype, nhwc in ((torch.uint8, True), (torch.uint8, False), (torch.float32, True)):
            x = images((batch, side, side, 3), dtype, nhwc, np.random.default_rng(0)).to(device)
            draws = [BatchRandAugment(2, 10, seed=i).draw(batch, (side, side)) for i in range(8)]
            fs = dict(fused=lambda: [augment(x, d) for d in draws],
                      groups=lambda: [batch_ops.augment(x, d) for d in draws])
            rows = in_turns(fs, device, budget, "groups")
            for v in rows.values(): v["seconds"] = v["seconds"] / len(draws)
            moved = x.numel() * (2 * x.element_size() + 2)  # between the operations bytes
            yield [dict(device=device, case=f"speed, {case_name(dtype, nhwc)}", size=side, batch=batch, candidate=k,
                        images_per_s=round(batch / v["seconds"]), copy_tb_per_s=round(copied / 1e12, 2),
                        of_copy=round(moved / v["seconds"] / copied, 3), **v) for k, v in rows.items()]


def cases(a) -> Iterator[list[dict]]:
    yield from equal(a.device)
    yield from compiled(a.device) if a.device == "cuda" else compiled_elsewhere()
    if a.device == "cuda": yield from speed(a.device, a.seconds)
    yield from conversion(a.device, a.seconds)
    yield from host(a.seconds)
    if a.device == "cpu":
        yield [dict(device="cuda", case=f"speed, {case_name(torch.uint8, True)}", size=s, batch=b, candidate="fused",
                    images_per_s=NOT_MEASURED) for s, b in BATCHES]


if __name__ == "__main__":
    if COMPILE_ONLY in sys.argv:
        for rows in compiled("cpu"): print(json.dumps(rows))
        sys.exit()
    p = arguments(__doc__, seconds=3)
    p.add_argument("--quick", action="store_true", help="a few small images, a moment each")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    warnings.simplefilter("error", UserWarning)
    if a.quick: a.seconds = min(a.seconds, .1)
    rows = []
    for new in cases(a):
        print(pd.DataFrame(new).to_string(index=False), flush=True)
        rows += new
        write("kernels", rows, a)
    sys.exit(bool(sum(o.get("different", 0) for o in rows)))
