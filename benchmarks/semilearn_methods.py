"""semilearn's (USB's) pseudolabel and FixMatch, called by methods.py.

It goes the way that semilearn's notebooks show for own data: `get_config`, `get_algorithm` with a function that makes
the network, `BasicDataset`, `get_data_loader`, `Trainer`. The settings are those of its own files for CIFAR-10,
config/classic_cv: batches of 64 labeled images and 7 times (pseudolabel: once) as many unlabeled ones, SGD with
Nesterov momentum at .03, weight decay 5e-4, cosine schedule over all iterations, averaged weights with .999, threshold
.95, labeled images in the unlabeled pile too, its weak and strong augmentation. Ours is only what has to be: the
images, the network, their mean and standard deviation, the number of iterations, and that images are mirrored only
where our recipe mirrors them, since a mirrored 2 is no digit. Its RandAugment draws a rectangle of three colors, so
gray images are RGB while it works.

Version 0.3.2 runs on a GPU only. On a GPU nothing of it is changed. On a CPU `on_cpu` stands in for what is not there:
`.cuda()` returns the tensor or network itself, torch.cuda.Event is a clock, torch.cuda.set_device and synchronize do
nothing; and packages that are imported but not used for images (torchaudio, transformers, aim, wandb) are empty modules
if they are missing or do not load. Loaders have no worker processes on a CPU, whose seconds would not be counted.

Two networks are there at the end, the last one, which `Trainer.evaluate` takes by default, and the average, which
semilearn's own training script takes. The one that is better on the validation images counts; after few iterations an
average with .999 is still close to where it began.

These methods are made for 2**20 iterations on a GPU. What a minute or two of a CPU allows is far from that: about a
hundred of FixMatch's, three fifths of whose seconds go into Pillow's augmentation.

Tried on a CPU only. On a GPU torchaudio has to be for the same version of CUDA as torch, or it does not import.
"""
import importlib
import io
import logging
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torchvision import transforms as T

from noisy_student.models import create_model
from noisy_student.checkpoints import seeded

COMMON = dict(batch_size=64, eval_batch_size=256, ulb_loss_ratio=1., p_cutoff=.95, ema_m=.999, optim="SGD", lr=.03,
              momentum=.9, weight_decay=5e-4, layer_decay=1., crop_ratio=.875, amp=False, use_cat=True)
ALGORITHMS = dict(pseudolabel=dict(uratio=1, unsup_warm_up=.4), fixmatch=dict(uratio=7, hard_label=True, T=.5))
NAMES = dict(pseudolabel="semilearn pseudolabel", fixmatch="semilearn FixMatch")
UNUSED = ("torchaudio", "aim", "wandb", "transformers", "transformers.data", "transformers.file_utils",
          "transformers.tokenization_utils_base")


class Event: # for torch.cuda.Event
    def __init__(self, **_): self.at = 0.
    def record(self): self.at = time.perf_counter()
    def elapsed_time(self, other): return 1000 * (other.at - self.at)


def itself(o, *_, **__): return o
def nothing(*_, **__): pass


@contextmanager
def on_cpu():
    "Inside, code that was written for a GPU runs on the CPU."
    with ExitStack() as stack:
        for owner, name, new in ((torch.Tensor, "cuda", itself), (nn.Module, "cuda", itself),
                                 (torch.cuda, "Event", Event),
                                 (torch.cuda, "set_device", nothing), (torch.cuda, "synchronize", nothing)):
            stack.enter_context(patch.object(owner, name, new))
        yield


def empty(name): # a module that has every name
    def get(o):
        if o.startswith("__"): raise AttributeError(o)
        return object
    module = ModuleType(name)
    module.__getattr__, module.__path__, module.__spec__ = get, [], ModuleSpec(name, None)
    return module


def loads(name):
    try: importlib.import_module(name)
    except Exception: return False # also torchaudio's RuntimeError if it is for another version of CUDA than torch
    return True


def package(device):
    "The package; for a CPU empty modules stand in for what it imports and images do not need. Raises ImportError."
    missing = [] if device.type != "cpu" else [o for o in UNUSED if not loads(o.split(".")[0])]
    sys.modules.update({o: empty(o) for o in missing})
    try: import semilearn
    except Exception as e: raise ImportError(f"semilearn cannot be imported: {e}") from e
    finally:
        for o in missing: sys.modules.pop(o, None)
    return semilearn


class Net(nn.Module): # forward as semilearn wants it
    def __init__(self, arch, n_out, c_in):
        super().__init__()
        self.net, self.head = create_model(arch, n_out, c_in), {}
        last = [o for o in self.net.modules() if isinstance(o, nn.Linear)][-1]
        last.register_forward_pre_hook(lambda _, x: self.head.update(feat=x[0]))

    def forward(self, x): return dict(logits=self.net(x), feat=self.head.pop("feat"))


def views(ns): # its weak view, strong view and view for evaluation (datasets/cv_datasets/cifar.py) at our size
    from semilearn.datasets.augmentation import RandAugment
    size, (mean, std) = ns.opened.images("labeled").images.shape[1], ns.learners.stats(0)
    crop = [T.RandomCrop(size, padding=int(size * (1 - COMMON["crop_ratio"])), padding_mode="reflect")]
    flip = [T.RandomHorizontalFlip()] if ns.recipe.flip else []
    end = [*([T.Grayscale(1)] if len(mean) == 1 else []), T.ToTensor(), T.Normalize(mean, std)]
    return T.Compose([*crop, *flip, *end]), T.Compose([*crop, *flip, RandAugment(3, 5), *end]), T.Compose(end)


def fit(ns, name, iterations, seed, folder):
    "A `Trainer` after that many iterations, and the loaders of validation and test images."
    from semilearn import BasicDataset, Trainer, get_algorithm, get_config, get_data_loader
    data, gpu = ns.data, ns.device.type == "cuda"
    images = {o: np.asarray(ns.opened.images(o).images[:]) for o in ("labeled", "unlabeled", "valid", "test")}
    labels = {o: np.asarray(getattr(data, o).labels, dtype=np.int64) for o in ("labeled", "valid", "test")}
    c_in, n_out, size = images["labeled"].shape[-1], len(data.classes), images["labeled"].shape[1]
    if c_in == 1: images = {k: v.repeat(3, axis=-1) for k, v in images.items()}
    config = get_config(dict(
        COMMON, **ALGORITHMS[name], algorithm=name, dataset="own", num_classes=n_out, num_labels=len(data.labeled),
        img_size=size, epoch=1, num_train_iter=iterations, num_eval_iter=iterations, num_log_iter=0,
        num_workers=4 if gpu else 0, save_dir=folder, save_name=f"{name}_{iterations}", seed=seed,
        gpu=ns.device.index or 0, rank=0, world_size=1, distributed=False))
    weak, strong, plain = views(ns)
    pile = np.concatenate([images["labeled"], images["unlabeled"]])
    labeled = BasicDataset(name, images["labeled"], labels["labeled"], n_out, weak, False, strong)
    unlabeled = BasicDataset(name, pile, None, n_out, weak, True, strong)
    workers, bs = config.num_workers, config.batch_size
    loaders = {o: get_data_loader(config, BasicDataset(name, images[o], labels[o], n_out, plain),
                                  config.eval_batch_size,
                                  data_sampler=None, num_workers=workers, drop_last=False) for o in ("valid", "test")}
    def net(num_classes, pretrained=False, pretrained_path=None): return Net(ns.archs[-1], num_classes, c_in)
    algorithm = get_algorithm(config, net, tb_log=None, logger=None)
    trainer = Trainer(config, algorithm)
    algorithm.ema_model.to(ns.device) # Trainer moves the network only
    trainer.fit(get_data_loader(config, labeled, bs, num_workers=workers, pin_memory=gpu),
                get_data_loader(config, unlabeled, bs * config.uratio, num_workers=2 * workers, pin_memory=gpu),
                loaders["valid"])
    for o in trainer.logger.handlers[:]: o.close(), trainer.logger.removeHandler(o)
    return trainer, loaders


@contextmanager
def quiet(seed, device):
    "A folder; inside seeded, without its messages, on a CPU with what it needs there."
    with ExitStack() as stack:
        stack.enter_context(seeded(seed))
        stack.enter_context(redirect_stdout(io.StringIO()))
        if device.type == "cpu": stack.enter_context(on_cpu())
        logging.disable(logging.INFO)
        try: yield stack.enter_context(tempfile.TemporaryDirectory())
        finally: logging.disable(logging.NOTSET)


def semilearn(ns, seed, budget, clock) -> list[dict]:
    "Its methods, for as many iterations as fit into the budget by the speed of a trial of at least a thirtieth of it."
    package(ns.device)
    def timed(name, iterations):
        with quiet(seed, ns.device) as folder:
            begun = clock(ns.device)
            trainer, loaders = fit(ns, name, iterations, seed, folder)
            spent, ends = clock(ns.device) - begun, []
            for average in (False, True):
                parts = {o: trainer.predict(v, use_ema_model=average, return_gt=True) for o, v in loaders.items()}
                ends.append({f"{o}_accuracy": float((y == truth).mean()) for o, (y, _, truth) in parts.items()})
            return spent, max(ends, key=lambda o: o["valid_accuracy"])
    rows = []
    for name in ALGORITHMS:
        timed(name, 1) # what happens once in a process
        once, n = timed(name, 1)[0], 8 # what happens once in a training: loaders, evaluation, files
        while (trial := timed(name, n)[0] - once) < budget / 30: n *= 2
        n = max(1, round(1 + (budget - once) / trial * (n - 1)))
        spent, accuracies = timed(name, n)
        rows.append(dict(method=NAMES[name], seconds=spent, **accuracies, iterations=n))
    return rows
