"""A GPU that is none: tensors on the CPU that say they are on 'cuda', so that what CUDA code does can be watched
without one.

Inside `PretendedGPU()` tensors that go to 'cuda' stay in the host's memory, but their storage is marked. Marked tensors
say `device=cuda:0`, everything computed from them is marked, too, and the rules of CUDA hold: an operation on tensors
of both places raises, `.numpy()` raises, random numbers come from a generator of the device's own. Written down, with
the line that did it, are all moments at which PyTorch would make the host wait for the device, all copies between the
two, and the number of kernels that would be launched.

It is no GPU. It has one memory, no streams and no speed, computes with the CPU's kernels, and autocasts by the CPU's
list of operations. What a CUDA kernel itself does - waits inside of it, operations that it lacks, other rounding - is
not seen. `torch.cuda` is replaced by the few functions below; whatever else of it is called, fails as it does without a
GPU.
"""
import contextlib, sys, threading
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
T, aten = torch.Tensor, torch.ops.aten
LIBRARIES = ("noisy_student", "benchmarks", "fastai", "timm", "fasttransform", "torch/optim", "torch/amp", "tests")


class Event(NamedTuple):
    "Something that the device, or the way to it, was asked for."
    # 'wait': the host waits; 'to device', 'to host': a copy that the host does not wait for; 'pageable': likewise, of
    # memory that is not pinned
    kind: str
    what: str  # operation, and bytes if it is a copy
    where: str  # file:line of the innermost caller of interest

    def __str__(self): return f"{self.kind}: {self.what} at {self.where}"


def on_gpu(t) -> bool: return getattr(t.untyped_storage(), "pretended", "") == "cuda"
def _mark(t, place="cuda"): t.untyped_storage().pretended = place; return t
def _is_gpu(device) -> bool: return device is not None and torch.device(device).type == "cuda"
def _tensors(*args):
    found = []
    for o in args:
        if isinstance(o, T): found.append(o)
        elif isinstance(o, (list, tuple)): found += _tensors(*o)
        elif isinstance(o, dict): found += _tensors(*o.values())
    return found


def _where():
    best, f = "?", sys._getframe(1)
    while f := f.f_back:
        if f.f_code.co_filename == __file__: continue
        if (name := next((o for o in LIBRARIES if f"/{o}/" in f.f_code.co_filename), None)) is None: continue
        at = f"{f.f_code.co_filename[f.f_code.co_filename.rindex(f'/{name}/') + 1:]}:{f.f_lineno}"
        if name in ("noisy_student", "benchmarks"): return at if best == "?" else f"{best}, by {at}"
        if best == "?": best = at
    return best


# what waits for the device by itself: its result, or the shape of it, is needed on the host
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim,
         aten.unique_consecutive, aten.bincount, aten.equal, aten.is_nonzero, aten.repeat_interleave, aten.argwhere}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
COPIES = {aten.copy_, aten._to_copy, aten.copy}
SCALARS = {aten.index_put_, aten.index_put, aten._index_put_impl_, aten.where, aten.masked_fill, aten.masked_fill_,
           aten.fill_, aten.lerp, aten.lerp_}


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        new = super().__new__(cls, "cpu")
        new.pretended = _is_gpu(device)
        return new


class _Dispatch(TorchDispatchMode):
    "Sees every operation, those of the backward pass and of the inside of functions among them"
    def __init__(self, gpu): super().__init__(); self.gpu = gpu
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        g, kwargs, op = self.gpu, kwargs or {}, func.overloadpacket
        given = _tensors(args, kwargs)
        there = [on_gpu(o) for o in given]
        here = any(there) if given else g.inside.__dict__.get("making", False)
        if here and not all(there): self.mixed(func, op, args, kwargs, given, there)
        if (rng := kwargs.get("generator")) is not None and here != getattr(rng, "pretended", False):
            raise RuntimeError(f"Expected a {'cuda' if here else 'cpu'} device type for generator ({func})")
        before = {id(o.untyped_storage()) for o in given}
        own = here and rng is None and torch.Tag.nondeterministic_seeded in func.tags
        with g.own_random_numbers() if own else contextlib.nullcontext():
            out = func(*args, **kwargs)
        if not here or g.inside.__dict__.get("moving"): return out
        new = [o for o in _tensors(out) if id(o.untyped_storage()) not in before]
        for o in new: _mark(o)
        if op in WAITS or op in INDEXING and any(o.dtype in (torch.bool, torch.uint8) for o in _tensors(args[1])):
            g.note("wait", str(op))
        if (new or func._schema.is_mutable) and "empty" not in str(op): g.kernels[str(op)] += 1
        return out

    def mixed(self, func, op, args, kwargs, given, there):
        if op in COPIES:
            if op is aten.copy_ and not self.gpu.inside.__dict__.get("moving"):
                (dst, src), blocking = args[:2], not (args[2:] and args[2] or kwargs.get("non_blocking"))
                self.gpu.copied(src, dst, not blocking)
            return
        if op in INDEXING and there[0] and all(on_gpu(o) or o.ndim == 0 for o in _tensors(args[2:3])):
            if any(not on_gpu(o) for o in _tensors(args[1])): self.gpu.note("wait", f"{op} with positions on the host")
            return
        if op in SCALARS or torch.Tag.pointwise in func.tags:  # a number on the host is an argument of the kernel
            if all(o.ndim == 0 for o, t in zip(given, there) if not t): return
        places = ", ".join(f"{'cuda:0' if t else 'cpu'} {tuple(o.shape)}" for o, t in zip(given, there))
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {places}")


class _Function(TorchFunctionMode):
    "Sees what Python calls: where a tensor says it is, and where it is asked to go"
    def __init__(self, gpu): super().__init__(); self.gpu = gpu
    def __torch_function__(self, func, types, args=(), kwargs=None):
        own = _OWN.get(func)
        if own is None and func.__name__ in ("__get__", "size", "stride", "dim"): return func(*args, **(kwargs or {}))
        return (own or _any)(self.gpu, func, args, dict(kwargs or {}))


def _any(g, func, args, kwargs):
    pinned = kwargs.pop("pin_memory", False)
    here = any(on_gpu(o) for o in _tensors(args, kwargs))
    if isinstance(func, type) or (device := kwargs.get("device")) is None: wanted = here
    else:
        wanted, kwargs["device"] = _is_gpu(device), "cpu"
        if func in (torch.tensor, torch.as_tensor, torch.asarray, T.new_tensor) and wanted and not here:
            g.note("wait", f"{func.__name__} makes it on the host and copies it")
    with g.making(wanted): out = func(*args, **kwargs)
    if pinned: _mark(out, "pinned")
    if here != wanted or func is T.__deepcopy__:
        for o in _tensors(out): _mark(o, "cuda" if wanted else "")
    return out


def _to(g, func, args, kwargs):
    x, rest = args[0], list(args[1:])
    target = kwargs.pop("device", None)
    for i, o in enumerate(rest):
        if isinstance(o, T): target, rest[i] = CUDA if on_gpu(o) else "cpu", o.dtype
        elif isinstance(o, (str, torch.device)) or type(o) is int: target, rest[i] = o, "cpu"
    if isinstance(o := kwargs.pop("other", None), T): target, kwargs["dtype"] = CUDA if on_gpu(o) else "cpu", o.dtype
    move = target is not None and _is_gpu(target) != on_gpu(x)
    if not move:
        with g.making(on_gpu(x)): return func(x, *rest, **kwargs)
    blocking = not (kwargs.get("non_blocking") or True in [o for o in rest if type(o) is bool][:1])
    with g.making(False, moving=True):
        out = func(x, *rest, **dict(kwargs, copy=True) if True not in [o for o in rest if type(o) is bool][1:2]
                   else kwargs)
    _mark(out, "cuda" if _is_gpu(target) else "")
    g.copied(x, out, not blocking)
    return out


def _device_of(g, func, args, kwargs): return CUDA if on_gpu(args[0]) else func(*args, **kwargs)
def _refused(g, func, args, kwargs):
    if on_gpu(args[0]):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to "
                        "host memory first.")
    return func(*args, **kwargs)
def _listed(g, func, args, kwargs):
    if on_gpu(args[0]): g.note("wait", func.__name__)
    with g.making(False, moving=True): return func(*args, **kwargs)
def _pinned(g, func, args, kwargs):
    if on_gpu(args[0]): raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    return _mark(args[0].clone(), "pinned")


def _one_hot(g, func, args, kwargs):  # on a GPU it is not looked whether the classes fit
    x, n = args[0], kwargs.get("num_classes", (*args, -1)[1])
    if not on_gpu(x) or n < 0: return _any(g, func, args, kwargs)
    with g.making(True): return x.new_zeros((*x.shape, n)).scatter_(-1, x[..., None], 1)


_OWN = {
    torch._C._nn._parse_to: lambda g, f, args, kw: f(*args, **kw), torch.nn.functional.one_hot: _one_hot,
    T.device.__get__: _device_of, T.to: _to, T.pin_memory: _pinned,
    T.cuda: lambda g, f, args, kw: _to(g, T.to, (args[0], *(["cuda"] if (*args, None)[1] is None else args[1:])), kw),
    T.cpu: lambda g, f, args, kw: _to(g, T.to, (args[0], "cpu"), kw),
    T.is_cuda.__get__: lambda g, f, args, kw: on_gpu(args[0]), T.is_cpu.__get__: lambda g, f, args,
        kw: not on_gpu(args[0]),
    T.get_device: lambda g, f, args, kw: 0 if on_gpu(args[0]) else -1,
    T.is_pinned: lambda g, f, args, kw: getattr(args[0].untyped_storage(), "pretended", "") == "pinned",
    T.numpy: _refused, T.__array__: _refused, T.tolist: _listed, T.__repr__: _listed, T.__format__: _listed,
}


class PretendedGPU:
    "A context in which 'cuda' can be used, and what was asked of it."
    def __init__(self,
        bf16: bool = True,  # Does it have units for bfloat16?
        free: int = 1 << 30,  # Bytes of memory that are free: a figure that the library asks for, nothing is refused
    ):
        self.bf16, self.free = bf16, free
        self.events: list[Event] = []
        self.kernels: Counter[str] = Counter()
        self.inside, self.lock, self.rng = threading.local(), threading.RLock(), torch.Generator().manual_seed(0)

    def note(self, kind, what):
        with self.lock: self.events.append(Event(kind, what, _where()))

    def copied(self, src, dst, non_blocking):
        what = f"copy of {src.numel() * src.element_size()} bytes to the {'device' if on_gpu(dst) else 'host'}"
        if not non_blocking: return self.note("wait", what)
        pinned = any(getattr(o.untyped_storage(), "pretended", "") == "pinned" for o in (src, dst))
        self.note(("to device" if on_gpu(dst) else "to host") if pinned else "pageable", what)

    @property
    def waits(self) -> list[Event]: return [o for o in self.events if o.kind == "wait"]

    def forget(self):
        self.events.clear(); self.kernels.clear()

    @contextlib.contextmanager
    def making(self, gpu, moving=False):  # what a function makes inside that says nothing of its place
        d, before = self.inside.__dict__, dict(self.inside.__dict__)
        d.update(making=gpu, moving=moving)
        try: yield
        finally: d.clear(); d.update(before)

    @contextlib.contextmanager
    def own_random_numbers(self):
        with self.lock:
            host = torch.default_generator.get_state()
            torch.default_generator.set_state(self.rng.get_state())
            try: yield
            finally:
                self.rng.set_state(torch.default_generator.get_state())
                torch.default_generator.set_state(host)

    @contextlib.contextmanager
    def modes(self):  # of one thread
        with _Dispatch(self), _Function(self): yield

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        run, autocast, load, gpu = threading.Thread.run, torch.autocast.__init__, torch.load, self
        def in_thread(thread):
            with gpu.modes(): run(thread)
        def as_cpu(own, device_type, *args, **kwargs):
            autocast(own, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)
        def as_subclass(t, cls):  # the same memory; before torch 2.5 a mode that sees it made that impossible
            with torch._C._DisableTorchDispatch(): return torch._C.TensorBase.as_subclass(t, cls)
        def seed(s): self.rng.manual_seed(int(s))
        def memory(device=None):
            if isinstance(device, (str, torch.device)) and torch.device(device).index is None:
                raise ValueError("torch 2.4 wants an index")
            return self.free, self.free
        def loaded(*args, map_location=None, **kwargs):
            if map_location is None or not _is_gpu(map_location):
                return load(*args, map_location=map_location, **kwargs)
            found = load(*args, map_location="cpu", **kwargs)
            for o in _tensors(found): _mark(o)
            return found
        def wait(device=None): self.note("wait", "synchronize")
        group = torch.optim.Optimizer._group_tensors_by_device_and_dtype  # by C++, which sees through the mark
        def grouped(*args, **kwargs):
            return {(CUDA if _tensors(o[0])[:1] and on_gpu(_tensors(o[0])[0]) else d, t): o for (d, t),
                    o in group(*args, **kwargs).items()}
        self.stack.enter_context(patch.object(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype",
                                              staticmethod(grouped)))
        self.stack.enter_context(patch.object(threading.Thread, "run", in_thread))
        self.stack.enter_context(patch.object(torch.Tensor, "as_subclass", as_subclass))
        self.stack.enter_context(patch.object(torch.autocast, "__init__", as_cpu))
        self.stack.enter_context(patch.multiple(torch, Generator=_Generator, load=loaded))
        self.stack.enter_context(patch.multiple(
            torch.cuda, is_available=lambda: True, is_initialized=lambda: True, _lazy_init=lambda: None,
                                                device_count=lambda: 1, current_device=lambda: 0,
            set_device=lambda device: None, device_of=lambda x: contextlib.nullcontext(),
                                                is_bf16_supported=lambda including_emulation=True: self.bf16
                                                or including_emulation,
            mem_get_info=memory, empty_cache=lambda: None, synchronize=wait,
            memory_reserved=lambda device=None: 0, memory_allocated=lambda device=None: 0,
            get_device_properties=lambda device=None: SimpleNamespace(L2_cache_size=1 << 22,
                                                                      major=9 if self.bf16 else 7, minor=0),
            get_device_name=lambda device=None: "pretended GPU", manual_seed=seed, manual_seed_all=seed,
            get_rng_state=lambda device="cuda": self.rng.get_state(), set_rng_state=lambda state,
                                                device="cuda": self.rng.set_state(state),
            get_rng_state_all=lambda: [self.rng.get_state()],
                                                set_rng_state_all=lambda states: self.rng.set_state(states[0])))
        for name in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):  # asks the driver
            if hasattr(torch.optim.Optimizer, name):
                self.stack.enter_context(patch.object(torch.optim.Optimizer, name, lambda own: None))
        self.stack.enter_context(self.modes())
        return self

    def __exit__(self, *exc): return self.stack.__exit__(*exc)
