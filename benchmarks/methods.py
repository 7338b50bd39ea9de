"""Noisy Student beside other methods: the same images, the same network, equal seconds of computing.

    python benchmarks/methods.py digits --seeds 0 1 2 --threads 1
    python benchmarks/methods.py digits --seeds 0 1 2 --threads 1 --methods semilearn
    python benchmarks/methods.py cifar10 --seeds 0 1 2 --device cuda

Ours always runs first, with the settings of `noisy-student run`; its seconds are the budget of every other method that
trains the network: the number of epochs or iterations follows from the speed of a short trial. On a CPU these are
seconds of the processor, which a busy machine does not stretch. No method has been tuned on these data but ours (whose
recipe was chosen on validation images of other seeds); none chooses anything by test images; the last network counts.
Methods:

- supervised, same augmentation: the network on the labeled images alone, with the students' view and noise, learning
  rate schedule included, and once without noise.
- scikit-learn's SelfTrainingClassifier around a support vector machine (digits only): no network, about a second.
- modssc (pip install modssc), where it is installed: its NoisyStudentMethod and FixMatchMethod with their defaults. It
  takes arrays, not augmentations: labeled images come in 20 augmented versions, unlabeled ones in 20 pairs of a clean
  and a RandAugmented view. AdamW at a constant rate, since it takes no schedule that knows its end.
- semilearn (pip install semilearn), where it is installed: its pseudolabel and FixMatch, twice; semilearn_methods.py
  says how, and what stands in on a CPU for the GPU that it needs.
- scikit-learn's self-training around the network makes no sense at equal seconds: it trains anew up to ten times.

Writes results/methods_DATA.csv, a row per machine, seed and method, with the versions and the commit. Rows of other
machines, seeds and methods stay as they are. Seconds of two machines are different budgets: compare the methods of one
machine.
"""
import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from runs import machine, svc

from noisy_student.cli import DATA, load_data
from noisy_student.learner import Noise
from noisy_student.models import create_model
from noisy_student.recipes import get_recipe
from noisy_student.checkpoints import seeded
from noisy_student.fitting import student_view
from noisy_student.rounds import NoisyStudent

VERSIONS = 20 # augmented versions of every image, for methods that take arrays


def seconds(device): return time.perf_counter() if device.type == "cuda" else time.process_time()


def network(data, recipe, path, seed, device, supervised) -> tuple[list[dict], float, object]:
    "Ours, and if wanted the same network on labeled images alone for as long."
    def run(name, **settings):
        r = get_recipe(recipe, **settings)
        ns = NoisyStudent(data, None, path / name, seed=seed, recipe=r, device=device, progress=lambda *_: None)
        begun = seconds(ns.device)
        return ns, ns.fit().iloc[-1], seconds(ns.device) - begun
    ns, teacher, first = run("ours", rounds=0)
    ns, last, rest = run("ours") # goes on from the teacher
    budget, last_arch = first + rest, ns.archs[-1]
    rows = [dict(method="Noisy Student", seconds=budget, valid_accuracy=last.valid_accuracy,
                 test_accuracy=last.test_accuracy)]
    if not supervised: return rows, budget, ns
    _, _, trial = run("trial", rounds=0, archs=(last_arch,), teacher_noise=recipe.noise, teacher_epochs=2)
    for name, noise in (("supervised, same augmentation", recipe.noise), ("supervised, no noise", Noise.none())):
        _, o, spent = run(name, rounds=0, archs=(last_arch,), teacher_noise=noise,
                          teacher_epochs=max(1, round(2 * budget / trial)))
        rows.append(dict(method=name, seconds=spent, valid_accuracy=o.valid_accuracy, test_accuracy=o.test_accuracy))
    return rows, budget, ns


def usb(ns, seed, budget) -> list[dict]:
    "semilearn's methods, for as many iterations as fit into the budget."
    from semilearn_methods import semilearn
    try: return semilearn(ns, seed, budget, seconds)
    except ImportError as e:
        warnings.warn(f"semilearn is left out: {e}")
        return []


def augmented(ns, images, noised): # float (VERSIONS * N, C, S, S), normalized
    mean, std = (torch.tensor(o).view(-1, 1, 1) for o in ns.learners.stats(0))
    x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    tfms = [*student_view(ns.recipe), *ns.recipe.noise.transforms()] if noised else []
    from fastai.torch_core import TensorImage
    def once():
        y = TensorImage(x)
        for t in tfms: y = t(y, split_idx=0)
        return ((y.as_subclass(torch.Tensor) - mean) / std)
    return torch.cat([once() for _ in range(VERSIONS)])


def modssc(ns, seed, budget) -> list[dict]:
    "Its methods, for as many epochs as fit into the budget."
    try:
        from modssc.inductive.deep import TorchModelBundle
        from modssc.inductive.methods.fixmatch import FixMatchMethod, FixMatchSpec
        from modssc.inductive.methods.noisy_student import NoisyStudentMethod, NoisyStudentSpec
        from modssc.inductive.types import DeviceSpec, InductiveDataset
    except ImportError as e:
        warnings.warn(f"modssc is left out: {e}")
        return []
    data, r, device = ns.data, ns.recipe, DeviceSpec(ns.device.type)
    with seeded(seed):
        x_l, x_us = (augmented(ns, ns.opened.images(o).images, True).to(ns.device) for o in ("labeled", "unlabeled"))
        x_uw = augmented(ns, ns.opened.images("unlabeled").images, False).to(ns.device)
    y_l = torch.from_numpy(np.tile(data.labeled.labels, VERSIONS)).to(ns.device)
    held = {o: augmented(ns, ns.opened.images(o).images[:], False)[:len(ns.opened.images(o).images)].to(ns.device)
            for o in ("valid", "test")}
    def fit(kind, spec, **epochs):
        with seeded(seed):
            model = create_model(ns.archs[-1], len(data.classes), x_l.shape[1]).to(ns.device)
            bundle = TorchModelBundle(model, torch.optim.AdamW(model.parameters(), r.lr / 2.5, weight_decay=r.wd))
            method = kind(spec(model_bundle=bundle, batch_size=r.bs, **epochs, **settings[kind]))
            begun = seconds(ns.device)
            method.fit(InductiveDataset(X_l=x_l, y_l=y_l, X_u=part[0], X_u_w=part[0], X_u_s=part[1]), device=device,
                       seed=seed)
            return model.eval(), seconds(ns.device) - begun
    settings = {NoisyStudentMethod: dict(freeze_bn=False), FixMatchMethod: {}}
    rows = []
    for name, kind, spec in (("modssc NoisyStudentMethod", NoisyStudentMethod, NoisyStudentSpec),
                             ("modssc FixMatchMethod", FixMatchMethod, FixMatchSpec)):
        part, teacher = (x_uw[:len(x_uw) // VERSIONS], x_us[:len(x_us) // VERSIONS]), kind is NoisyStudentMethod
        # an epoch is as long as the longer of both piles
        _, one = fit(kind, spec, max_epochs=1, **(dict(teacher_epochs=0) if teacher else {}))
        pass_l = fit(kind, spec, max_epochs=1, teacher_epochs=1)[1] - one if teacher else 0.
        n_teacher = max(1, round(.2 * budget / max(pass_l, 1e-3))) if teacher else 0
        n = max(1, round((.8 if teacher else 1.) * budget / one))
        # all versions in turn: as many passes over single versions as the budget allows are one or more over all of
        # them
        many = max(1, min(VERSIONS, n))
        part = x_uw[:many * len(x_uw) // VERSIONS], x_us[:many * len(x_us) // VERSIONS]
        _, whole = fit(kind, spec, max_epochs=1, **(dict(teacher_epochs=0) if teacher
                                                    else {})) if many > 1 else (None, one)
        n = max(1, round((.8 if teacher else 1.) * budget / whole))
        model, spent = fit(kind, spec, max_epochs=n, **(dict(teacher_epochs=n_teacher) if teacher else {}))
        with torch.inference_mode():
            accuracy = {f"{o}_accuracy": float((torch.cat([model(b) for b in x.split(512)]).argmax(1).cpu()
                                                .numpy() == getattr(data, o).labels).mean()) for o, x in held.items()}
        rows.append(dict(method=name, seconds=spent, **accuracy))
    return rows


def with_others(table, file): # after the rows of the file that were not measured again
    if not file.exists(): return table
    keys = ["machine", "seed", "method"]
    old = pd.read_csv(file)
    both = pd.concat([old[~pd.MultiIndex.from_frame(old[keys]).isin(pd.MultiIndex.from_frame(table[keys]))], table],
                     ignore_index=True)
    return both.astype({"iterations": "Int64"}) if "iterations" in both else both


METHODS = ["supervised", "modssc", "semilearn", "svc"]

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", choices=["digits", "cifar10"])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="beside ours; default: all")
    p.add_argument("--device")
    p.add_argument("--threads", type=int, help="of torch; default: its own choice")
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    rows, about, out = [], machine(), Path(__file__).parent / "results" / f"methods_{a.data}.csv"
    for seed in a.seeds:
        data = load_data(a.data, seed=seed)
        with tempfile.TemporaryDirectory() as tmp:
            mine, budget, ns = network(data, get_recipe(DATA[a.data].recipe), Path(tmp), seed, a.device,
                                       "supervised" in a.methods)
            if "modssc" in a.methods: mine += modssc(ns, seed, budget)
            if "semilearn" in a.methods: mine += usb(ns, seed, budget)
            if "svc" in a.methods and a.data == "digits":
                begun = time.process_time()
                o = svc(data)
                mine.append(dict(method=o.pop("role"), seconds=time.process_time() - begun, **o))
        rows += [dict(data=a.data, seed=seed, **o) for o in mine]
        table = pd.DataFrame(rows)
        with_others(table.assign(**about), out).to_csv(out, index=False)
        print(table[table.seed == seed].round(4).to_string(index=False), flush=True)
    print((100 * table.groupby("method", sort=False).test_accuracy.agg(["mean", "std", "min"])).round(2).to_string())
