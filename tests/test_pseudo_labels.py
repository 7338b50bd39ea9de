"Pseudo labels: faults, resumption, fastai's own pipeline as a peer, and an independent selection in pandas."
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn

from noisy_student.losses import temperature_probs, temperature_softmax
from noisy_student.pseudo_labels import (PseudoLabelError, model_hash, predict_pseudo_labels, read_selection,
                                         relabel_pseudo_labels, select_pseudo_labels)

torch.set_num_threads(1)


def conv_net(seed=0, n_out=3):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                        nn.Dropout(0.5), nn.Linear(32, n_out))
    net[0].bias.data.zero_(); net[6].bias.data.zero_(); net[6].weight.data.mul_(4)
    return net  # every class gets some of `random_images`


def random_images(n, size=12, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 256, (n, size, size, 3)) * rng.random((n, 1, 1, 3))).astype(np.uint8)


class Fixed(nn.Module):
    "Gives the logits that are written in the first pixels of the image."
    def __init__(self, k): super().__init__(); self.k = k
    def forward(self, x): return x.flatten(1)[:, :self.k] * 255 / 16


def coded(logits):  # int 0..255 (n, k) -> images for Fixed
    return np.asarray(logits, dtype=np.uint8)[:, None, :, None]


@pytest.fixture
def files(tmp_path):
    "Forty PNG files of two sizes, in two folders named by class."
    for i, img in enumerate(random_images(40, 20)):
        f = tmp_path/"img"/"ab"[i % 2]/f"{i:02d}.png"
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(img[:, :16] if i % 3 else img).save(f)
    return sorted(map(str, (tmp_path/"img").rglob("*.png")))


def table(folder): return pd.read_parquet(folder).sort_values("item").reset_index(drop=True)


def same(a, b):
    assert list(a.columns) == list(b.columns) and len(a) == len(b)
    for c in a.columns: assert np.array_equal(np.stack(a[c].values), np.stack(b[c].values)), c


# prediction

def test_format(files, tmp_path):
    model = conv_net()
    out = predict_pseudo_labels(model, files, tmp_path/"out", size=16, temperature=2., classes=["x", "y", "z"])
    part, = out.glob("*.parquet")
    assert part.name == "part-00000-of-00001-00000.parquet"
    schema = pq.read_schema(part)
    assert [str(schema.field(c).type).split("[")[0] for c in ("item", "label", "confidence")] == ["string", "int32",
                                                                                                  "float"]
    assert schema.field("probs").type.list_size == 3 and str(schema.field("probs").type.value_type) == "halffloat"
    meta = schema.metadata
    assert json.loads(meta[b"classes"]) == ["x", "y", "z"] and json.loads(meta[b"temperature"]) == 2.
    assert meta[b"teacher"].decode() == model_hash(model) and meta[b"version"]
    df = table(out)
    assert list(df.item) == files
    probs = np.stack(df.probs)  # rounding to float16 can make a tie of a near tie, but never turn an order around
    assert (probs[range(40), df.label] == probs.max(1)).all() and df.label.nunique() == 3
    assert duckdb.connect().execute(f"select count(*), min(len(probs)) from '{part}'").fetchone() == (40, 3)
    assert pq.read_schema(predict_pseudo_labels(model, random_images(3),
                                                tmp_path/"array")/part.name).field("item").type == "int64"


def test_confidence_is_not_rounded(tmp_path):
    model, x = conv_net(), random_images(50)
    df = table(predict_pseudo_labels(model, x, tmp_path))
    with torch.no_grad(): p = model.eval()(torch.tensor(x).permute(0, 3, 1, 2) / 255).softmax(1).max(1).values.numpy()
    np.testing.assert_allclose(df.confidence, p, rtol=1e-6)
    assert (df.confidence != np.stack(df.probs).max(1)).any()


@pytest.mark.parametrize("num_shards, part_size", [(1, 7), (3, 8192), (7, 4)])
def test_sharding_changes_no_bit(tmp_path, num_shards, part_size):
    model, x = conv_net(), random_images(50)
    one = predict_pseudo_labels(model, x, tmp_path/"one", bs=16)
    for i in range(num_shards):
        predict_pseudo_labels(model, x, tmp_path/"many", shard=i, num_shards=num_shards, part_size=part_size, bs=16)
    same(table(one), table(tmp_path/"many"))
    a = select_pseudo_labels(one, tmp_path/"a.parquet", threshold=0.34, per_class=9)
    b = select_pseudo_labels(tmp_path/"many", tmp_path/"b.parquet", threshold=0.34, per_class=9)
    assert a.path.read_bytes() == b.path.read_bytes()
    pd.testing.assert_frame_equal(a.summary, b.summary)


def test_unnoised_and_restored(tmp_path):
    model, x = conv_net(), random_images(20)
    model.train()
    model[1].eval()  # a frozen batch norm has to stay frozen
    before = {k: v.clone() for k, v in model.state_dict().items()}
    same(table(predict_pseudo_labels(model, x, tmp_path/"a")), table(predict_pseudo_labels(model, x, tmp_path/"b")))
    assert [m.training for m in model] == [True, False, True, True, True, True, True] and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    bad = conv_net(); bad[6].weight.data.fill_(float("nan")); bad.train()
    with pytest.raises(PseudoLabelError): predict_pseudo_labels(bad, x, tmp_path/"c")
    assert all(m.training for m in bad.modules())


def test_temperature(tmp_path):
    model, x = conv_net(), random_images(20)
    p = np.stack(table(predict_pseudo_labels(model, x, tmp_path/"1")).probs)
    for T in (0.5, 3.):
        df = table(predict_pseudo_labels(model, x, tmp_path/str(T), temperature=T))
        with torch.no_grad(): z = model.eval()(torch.tensor(x).permute(0, 3, 1, 2) / 255)
        np.testing.assert_allclose(np.stack(df.probs), temperature_softmax(z, T), atol=5e-4)
        np.testing.assert_allclose(np.stack(df.probs), temperature_probs(torch.tensor(p), T), atol=2e-3)


def test_hash():
    a, b = conv_net(), conv_net()
    assert model_hash(a) == model_hash(b) == model_hash(a.eval()) != model_hash(conv_net(1))
    b[1].running_mean[0] += 1e-6
    assert model_hash(a) != model_hash(b)
    assert model_hash(conv_net().bfloat16()) != model_hash(a)


def test_timm_model_brings_its_view(files, tmp_path):
    import timm
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    cfg = model.pretrained_cfg
    a = predict_pseudo_labels(model, files[:4], tmp_path/"a")
    b = predict_pseudo_labels(model, files[:4], tmp_path/"b", size=cfg["input_size"][-1], mean=cfg["mean"],
                              std=cfg["std"])
    c = predict_pseudo_labels(model, files[:4], tmp_path/"c", size=cfg["input_size"][-1], mean=(0, 0, 0), std=(1, 1, 1))
    same(table(a), table(b))
    assert not np.array_equal(table(a).confidence, table(c).confidence)


def test_learner_equals_fastai(files, tmp_path):
    from fastai.learner import Learner
    from fastai.vision.augment import Resize, aug_transforms
    from fastai.vision.data import ImageDataLoaders
    from fastai.data.transforms import Normalize
    from fastai.vision.core import imagenet_stats
    tfms = [*aug_transforms(size=12), Normalize.from_stats(*imagenet_stats)]
    dls = ImageDataLoaders.from_folder(tmp_path/"img", valid_pct=0.3, item_tfms=Resize(16), batch_tfms=tfms, bs=8,
                                       num_workers=0, device="cpu")
    learn = Learner(dls, conv_net(n_out=2), loss_func=nn.CrossEntropyLoss())
    df = table(predict_pseudo_labels(learn, files, tmp_path/"out", bs=13))
    assert learn.model.training
    preds = learn.get_preds(dl=dls.test_dl([Path(f) for f in files], num_workers=0), act=lambda z: z.softmax(1))[0]
    np.testing.assert_allclose(df.confidence, preds.max(1).values, rtol=1e-5)
    np.testing.assert_allclose(np.stack(df.probs), preds, atol=5e-4)
    assert json.loads(pq.read_schema(tmp_path/"out"/"part-00000-of-00001-00000.parquet")
                      .metadata[b"classes"]) == ["a", "b"]
    arrays = np.stack([np.asarray(Image.open(f).resize((16, 16))) for f in files])
    df = table(predict_pseudo_labels(learn, arrays, tmp_path/"arrays"))
    np.testing.assert_allclose(df.confidence, learn.get_preds(dl=dls.test_dl(list(arrays), num_workers=0),
                                                              act=lambda z: z.softmax(1))[0].max(1).values, rtol=1e-5)
    with pytest.raises(PseudoLabelError, match="size"): predict_pseudo_labels(learn, files, tmp_path/"x", size=16)


def test_gray_learner_gets_gray_images(files, tmp_path):
    from fastai.data.block import CategoryBlock, DataBlock
    from fastai.data.transforms import get_image_files, parent_label
    from fastai.learner import Learner
    from fastai.vision.augment import Resize
    from fastai.vision.core import PILImageBW
    from fastai.vision.data import ImageBlock
    dls = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_items=get_image_files, get_y=parent_label,
                    item_tfms=Resize(16)).dataloaders(tmp_path/"img", bs=8, num_workers=0, device="cpu")
    torch.manual_seed(0)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(256, 2)), loss_func=nn.CrossEntropyLoss())
    df = table(predict_pseudo_labels(learn, files, tmp_path/"out"))
    preds = learn.get_preds(dl=dls.test_dl([Path(f) for f in files], num_workers=0), act=lambda z: z.softmax(1))[0]
    np.testing.assert_allclose(df.confidence, preds.max(1).values, rtol=1e-5)


def test_learner_with_clean_view(files, tmp_path):
    from fastai.learner import Learner
    from fastai.data.core import DataLoaders
    from noisy_student.datasets import load_images

    class Own(DataLoaders):
        size, vocab = 10, ["a", "b"]
        def clean_view(self, images): return torch.tensor(images).permute(0, 3, 1, 2) / 255 - 0.5

    model = conv_net(n_out=2)
    learn = Learner(Own([1], [1]), model, loss_func=nn.CrossEntropyLoss())
    df = table(predict_pseudo_labels(learn, files, tmp_path/"out"))
    with torch.no_grad(): z = model.eval()(torch.tensor(load_images(files, 10).images).permute(0, 3, 1, 2) / 255 - 0.5)
    np.testing.assert_allclose(df.confidence, z.softmax(1).max(1).values, rtol=1e-5)


def test_rows_of_a_table(tmp_path):
    from fastai.data.block import CategoryBlock
    from fastai.data.transforms import Normalize
    from fastai.tabular.core import Categorify
    from fastai.tabular.data import TabularDataLoaders
    from fastai.tabular.learner import tabular_learner
    import fastai.callback.progress  # noqa: F401  (no_bar)
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.normal(size=60), b=rng.choice(list("xyz"), 60), y=rng.choice(["no", "yes"], 60)))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=["b"], cont_names=["a"], y_names="y",
                                     y_block=CategoryBlock(), valid_idx=range(40, 60), bs=16, device="cpu")
    torch.manual_seed(0)
    learn = tabular_learner(dls, [8])
    pool = df.drop(columns="y").sample(frac=1, random_state=0)  # its index is no position
    one = table(predict_pseudo_labels(learn, pool, tmp_path/"one", bs=7))
    for i in range(3): predict_pseudo_labels(learn, pool, tmp_path/"three", i, 3, bs=7)
    same(one, table(tmp_path/"three"))
    with learn.no_bar(): probs = learn.get_preds(dl=dls.test_dl(pool))[0].numpy()
    np.testing.assert_allclose(one.confidence, probs.max(1), rtol=1e-5)
    np.testing.assert_allclose(np.stack(one.probs), probs, atol=5e-4)
    sel = select_pseudo_labels(tmp_path/"three", tmp_path/"s.parquet", 0., 20)
    assert read_selection(sel).classes == ["no", "yes"]
    re = relabel_pseudo_labels(learn, sel, tmp_path/"r.parquet", items=pool)
    np.testing.assert_allclose(re.to_pandas().confidence, sel.to_pandas().confidence, rtol=1e-5)
    with pytest.raises(PseudoLabelError, match="another pool"):
        relabel_pseudo_labels(learn, sel, tmp_path/"r.parquet", items=pool.iloc[::-1])
    with pytest.raises(PseudoLabelError, match="tabular learner"): predict_pseudo_labels(conv_net(), pool, tmp_path/"x")


def test_progress(tmp_path):
    seen = []
    for _ in range(2):  # labeled, then found done
        predict_pseudo_labels(conv_net(), random_images(50), tmp_path, shard=1, num_shards=2, bs=8, part_size=10,
                              progress=lambda *o: seen.append(o))
        assert seen[-1] == (25, 25) and [d for d, _ in seen] == sorted(d for d, _ in seen)
        seen.clear()


# faults

def test_bad_images_are_skipped_and_listed(files, tmp_path):
    Path(files[3]).write_bytes(b"")
    Path(files[20]).write_bytes(Path(files[20]).read_bytes()[:60])
    Path(files[21]).write_text("no image")
    items = [*files, str(tmp_path/"img"/"gone.png")]
    expected = {files[3], files[20], files[21], items[-1]}
    for run in range(2):  # uninterrupted, then resumed with a part lost
        with pytest.warns(UserWarning, match="4 of 41 images could not be read"):
            out = predict_pseudo_labels(conv_net(), items, tmp_path/"out", size=16, bs=8, part_size=11)
        skipped = pd.read_csv(out/"_skipped-00000-of-00001.csv")
        assert set(skipped.item) == expected and skipped.reason.notna().all()
        assert set(table(out).item) == set(items) - expected
        manifest = json.loads((out/"_shard-00000-of-00001.json").read_text())
        assert (manifest["items"], manifest["skipped"], sum(manifest["parts"].values())) == (41, 4, 37)
        (out/"part-00000-of-00001-00001.parquet").unlink()
    with pytest.warns(UserWarning): # the same from fastai's pipeline, and the others stay with their own file
        for i in range(3):
            predict_pseudo_labels(conv_net(), items, tmp_path/"shards", size=16, bs=8, shard=i, num_shards=3)
        predict_pseudo_labels(conv_net(), items, out, size=16, bs=8, part_size=11)
    same(table(out), table(tmp_path/"shards"))


def test_bad_images_through_a_learner(files, tmp_path):
    from fastai.learner import Learner
    from fastai.vision.augment import Resize
    from fastai.vision.data import ImageDataLoaders
    dls = ImageDataLoaders.from_folder(tmp_path/"img", valid_pct=0.3, item_tfms=Resize(16), bs=8, num_workers=0,
                                       device="cpu")
    learn = Learner(dls, conv_net(n_out=2), loss_func=nn.CrossEntropyLoss())
    whole = table(predict_pseudo_labels(learn, files, tmp_path/"whole")).set_index("item")
    for i in (0, 9, 39): Path(files[i]).write_text("no image")
    with pytest.warns(UserWarning, match="3 of 40"):
        df = table(predict_pseudo_labels(learn, files, tmp_path/"out", bs=16))
    assert list(df.item) == [f for i, f in enumerate(files) if i not in (0, 9, 39)]
    np.testing.assert_allclose(df.confidence, whole.confidence[df.item], rtol=1e-5)


def test_all_images_bad_then_repaired(files, tmp_path):
    names = [f + ".moved" for f in files]
    with pytest.raises(PseudoLabelError, match="none of the 40 images"):
        predict_pseudo_labels(conv_net(), names, tmp_path/"out", size=16)
    with pytest.raises(PseudoLabelError, match="not complete"):
        select_pseudo_labels(tmp_path/"out", tmp_path/"s.parquet")
    for f in files: os.rename(f, f + ".moved")
    assert len(table(predict_pseudo_labels(conv_net(), names, tmp_path/"out", size=16))) == 40


@pytest.mark.parametrize("change, message", [
    (dict(items=[]), "no unlabeled images"), (dict(items="folder"), "single name"),
                                             (dict(items=["a.png", "a.png"]), "twice"),
    (dict(items=np.zeros((3, 4, 4))), "uint8"), (dict(items=["\udcff.png"], size=8), "UTF-8"),
                                             (dict(items=["a.png"]), "size is needed"),
    (dict(shard=2, num_shards=2), r"shard=2 must be in 0\.\.1"), (dict(shard=-1), "shard=-1"),
                                             (dict(num_shards=0), "num_shards=0"),
    (dict(num_shards=11), "num_shards=11"), (dict(temperature=0), "temperature"), (dict(bs=0), "bs=0"),
    (dict(classes=["a", "b"]), "3 outputs but there are 2 classes")])
def test_mistakes_are_named(tmp_path, change, message):
    args = dict(teacher=conv_net(), items=random_images(10), out=tmp_path/"out") | change
    with pytest.raises(PseudoLabelError, match=message): predict_pseudo_labels(**args)
    assert not list(tmp_path.rglob("*part*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(files, tmp_path, value):
    class Broken(nn.Module):
        def forward(self, x):
            z = x.mean((2, 3))
            z[5] = value
            return z
    with pytest.raises(ValueError, match=f"{files[5]} is not finite.*learning rate"):
        predict_pseudo_labels(Broken(), files, tmp_path/"out", size=16, classes="abc")
    with pytest.raises(ValueError, match="image 5 is not finite"):
        predict_pseudo_labels(Broken(), random_images(10), tmp_path/"out", classes="abc")
    assert not list((tmp_path/"out").glob("[!.]*"))


def test_other_labels_are_refused(tmp_path):
    x, out = random_images(10), tmp_path/"out"
    predict_pseudo_labels(conv_net(), x, out)
    for change, what in ((dict(teacher=conv_net(1)), "teacher"), (dict(temperature=2.), "temperature"),
                         (dict(size=8), "view"),
                         (dict(classes="xyz"), "classes"), (dict(items=random_images(10, seed=1)), "pool"),
                         (dict(items=x[:9]), "pool"), (dict(num_shards=2), "num_shards"),
                         (dict(part_size=5), "part_size")):
        before = {f: f.read_bytes() for f in out.iterdir()}
        with pytest.raises(PseudoLabelError, match=f"what differs: .*{what}.*remove the folder"):
            predict_pseudo_labels(**(dict(teacher=conv_net(), items=x, out=out) | change))
        assert {f: f.read_bytes() for f in out.iterdir()} == before


def test_a_network_with_its_normalization_is_a_teacher(tmp_path):
    "It takes pixels as they are: nothing is normalized twice, and its classes are known."
    from noisy_student.network import Network
    net, images = Network(conv_net(), "tiny", list("abc"), 12, [.5] * 3, [.2] * 3), random_images(20)
    found = table(predict_pseudo_labels(net, images, tmp_path/"net"))
    same(found, table(predict_pseudo_labels(net.model, images, tmp_path/"model", size=12, mean=[.5] * 3, std=[.2] * 3)))
    assert (found["label"].to_numpy() == net.scores(images).argmax(1)).all()
    with pytest.raises(PseudoLabelError, match="leave subset out"):
        predict_pseudo_labels(Network(conv_net(), size=12, subset=[1]), images, tmp_path/"x")


def test_unwritable_and_full(tmp_path, monkeypatch):
    (tmp_path/"file").write_text("")
    for out in (tmp_path/"file", tmp_path/"file"/"sub"):
        with pytest.raises(OSError, match=f"cannot write pseudo labels to {out}"):
            predict_pseudo_labels(conv_net(), random_images(5), out)
    n, replace = [], os.replace

    def full(*args):
        n.append(1)
        if len(n) > 2: raise OSError(errno.ENOSPC, "No space left on device")
        return replace(*args)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=f"cannot write pseudo labels to {tmp_path/'out'}: No space left on device") as e:
        predict_pseudo_labels(conv_net(), random_images(50), tmp_path/"out", part_size=10, bs=10)
    assert e.value.errno == errno.ENOSPC
    assert len(list((tmp_path/"out").glob("part-*"))) == 2
    assert not list((tmp_path/"out").glob("*.tmp")) + list((tmp_path/"out").glob(".*.tmp"))
    monkeypatch.undo()
    predict_pseudo_labels(conv_net(), random_images(50), tmp_path/"out", part_size=10, bs=10)
    same(table(tmp_path/"out"), table(predict_pseudo_labels(conv_net(), random_images(50), tmp_path/"whole", bs=10)))
    with pytest.raises(OSError, match="cannot write"):
        select_pseudo_labels(tmp_path/"out", tmp_path/"file"/"s.parquet", 0.)


def test_killed_and_started_again(tmp_path):
    from noisy_student.files import _here
    code = textwrap.dedent(f"""
        import os, signal, sys
        sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
        from test_pseudo_labels import *
        def progress(done, total):
            if done > 25: os.kill(os.getpid(), signal.SIGKILL)
        predict_pseudo_labels(conv_net(), random_images(60), {str(tmp_path/'out')!r}, part_size=10, bs=5,
                              progress=progress)
    """)
    killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert killed.wait() == -signal.SIGKILL
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path/"out").glob("part-*")}
    assert len(kept) in (1, 2)  # the second may still have been in the writing
    (tmp_path/"out"/f".part-00000-of-00001-00002.parquet.{_here()}.{killed.pid}.a.tmp").write_bytes(b"half a file")
    with pytest.raises(PseudoLabelError, match="shard 0 of 1 .* is not complete"):
        select_pseudo_labels(tmp_path/"out", tmp_path/"s.parquet")
    predict_pseudo_labels(conv_net(), random_images(60), tmp_path/"out", part_size=10, bs=5)
    predict_pseudo_labels(conv_net(), random_images(60), tmp_path/"whole", part_size=10, bs=5)
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    assert {f.name: f.read_bytes() for f in (tmp_path/"out").iterdir()} == {f.name: f.read_bytes()
                                                                            for f in (tmp_path/"whole").iterdir()}


def test_damaged_part_is_made_again(tmp_path):
    x = random_images(30)
    out = predict_pseudo_labels(conv_net(), x, tmp_path/"out", part_size=10)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    torn = out/"part-00000-of-00001-00001.parquet"
    torn.write_bytes(torn.read_bytes()[:200])
    with pytest.raises(PseudoLabelError, match=torn.name): select_pseudo_labels(out, tmp_path/"s.parquet")
    with pytest.warns(UserWarning, match=f"{torn.name} is damaged"):
        predict_pseudo_labels(conv_net(), x, out, part_size=10)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    data = bytearray(before[torn.name]); data[10:200] = b"\xff" * 190  # a whole footer, broken pages
    torn.write_bytes(data)
    with pytest.raises(PseudoLabelError, match=f"{torn.name} is damaged"):
        select_pseudo_labels(out, tmp_path/"s.parquet")
    assert not (tmp_path/"s.parquet").exists() and not list(tmp_path.glob(".*"))


# selection

def by_pandas(df, n, threshold, strict=False):
    "{item: copies}, written independently: copies are dealt out one by one."
    out, df = {}, df[df.confidence > threshold] if strict else df[df.confidence >= threshold]
    sizes = df.groupby("label").size()
    n = dict(mean=-(-sizes.sum() // max(len(sizes), 1)), largest=sizes.max()).get(n, n)
    for _, g in df.groupby("label"):
        g = sorted(g[["confidence", "item"]].itertuples(index=False), key=lambda o: (-o.confidence, o.item))
        for i in range(len(g) if n is None else n): out[g[i % len(g)].item] = out.get(g[i % len(g)].item, 0) + 1
    return out


def handmade(path, label, confidence, items=None, k=4):
    probs = np.full((len(label), k), 0.1)
    pd.DataFrame(dict(item=range(len(label)) if items is None else items, label=np.asarray(label, "int32"),
                      confidence=np.asarray(confidence, "float32"), probs=list(probs))).to_parquet(path)
    return pd.read_parquet(path)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.2, 0.3, 0.5, 0.5001, 0.9])), min_size=1, max_size=40),
       st.sampled_from([1, 2, 3, 7, 100, "mean", "largest", None]), st.booleans(), st.booleans(), st.randoms())
def test_select_equals_pandas(rows, n, strict, named, rnd):
    import tempfile
    with tempfile.TemporaryDirectory() as tmp, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        items = rnd.sample(range(1000), len(rows))
        df = handmade(f"{tmp}/p.parquet", *zip(*rows), items=[f"ß{i}.png" for i in items] if named else items)
        expected = by_pandas(df, n, np.float32(0.3), strict)
        if not expected:
            with pytest.raises(PseudoLabelError, match="highest confidence"):
                select_pseudo_labels(f"{tmp}/p.parquet", f"{tmp}/s.parquet", strict=strict, per_class=n)
            return
        sel = select_pseudo_labels(f"{tmp}/p.parquet", f"{tmp}/s.parquet", strict=strict, per_class=n)
        got = sel.to_pandas()
        assert dict(zip(got["item"], got["copies"])) == expected and len(sel) == len(got) == len(expected)
        order = got.sort_values(["label", "confidence", "item"], ascending=[True, False, True])
        assert list(order["item"]) == list(got["item"])
        assert sel.summary["rows"].sum() == sum(expected.values()) and sel.summary.seen.sum() == len(rows)
        if isinstance(n, int): assert set(sel.summary["rows"]) <= {0, n}


def binned_by_numpy(df, n, threshold, seed, strict=False):
    "{item: (edge, n of its class, copies)}, written independently: tails of all edges, the draw from hashlib's MD5."
    out, df = {}, df[df.confidence > threshold] if strict else df[df.confidence >= threshold]
    n = dict(mean=-(-len(df) // max(df.label.nunique(), 1)), largest=df.groupby("label").size().max()).get(n, n)
    for _, g in df.groupby("label"):
        tails = [(g.confidence.to_numpy() >= np.float32(i / 100)).sum() for i in range(101)]
        i = max([i for i in range(101) if tails[i] >= n], default=0)
        for o in g[g.confidence >= np.float32(i / 100)].itertuples():
            low = int.from_bytes(hashlib.md5(f"{seed}:{o.item}".encode()).digest()[8:], "little")
            copies = n // tails[i] + ((low >> 11) / 2**53 < n / tails[i] % 1)
            if copies: out[o.item] = (i, tails[i], copies)
    return out


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(20, 100), st.sampled_from([-1, 0, 0, 1])), min_size=1,
                max_size=40), st.sampled_from([1, 2, 3, 7, 100, "mean", "largest"]), st.integers(0, 5), st.booleans(),
       st.booleans(), st.randoms())
def test_binned_equals_numpy(rows, n, seed, named, strict, rnd):
    import tempfile
    with tempfile.TemporaryDirectory() as tmp, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        items = rnd.sample(range(1000), len(rows))  # confidences on the edges, and one float32 below and above them
        confidence = [np.nextafter(np.float32(i / 100), np.float32(i / 100 + d)) for _, i, d in rows]
        if named: items = [f"ß{i}.png" for i in items]
        df = handmade(f"{tmp}/p.parquet", [k for k, *_ in rows], confidence, items)
        expected = binned_by_numpy(df, n, np.float32(0.3), seed, strict)
        def select():
            return select_pseudo_labels(f"{tmp}/p.parquet", f"{tmp}/s.parquet", 0.3, n, strict, binned=True, seed=seed)
        if not expected:
            with pytest.raises(PseudoLabelError, match="highest confidence|drawn no image"): select()
            return
        got = select().to_pandas()
        assert dict(zip(got["item"], got["copies"])) == {k: c for k, (*_, c) in expected.items()}


def test_binned_on_average(tmp_path):
    "As measured on the reference for N=50: of 200 images the 53 above the edge .87, all of 20, exactly 50 of 50."
    sizes = np.tile([200, 20, 50], 60)  # every class draws for itself
    confidence = np.concatenate([np.linspace(0.51, 1, n) for n in sizes])
    df = handmade(tmp_path/"p.parquet", np.repeat(np.arange(180), sizes), confidence, k=180)
    assert [(df.confidence[df.label == 0] >= np.float32(e)).sum() for e in (0.87, 0.88)] == [53, 49]
    draws = []
    for seed in range(2):
        sel = select_pseudo_labels(tmp_path/"p.parquet", tmp_path/"s.parquet", 0.3, 50, binned=True, seed=seed)
        assert sel.to_pandas().query("label % 3 == 0").confidence.min() >= np.float32(0.87)
        draws.append(sel.summary["rows"].to_numpy().reshape(60, 3))
    rows = np.concatenate(draws)
    assert (rows[:, 2] == 50).all() and rows[:, 0].max() <= 53 and 40 <= rows[:, 1].min() <= rows[:, 1].max() <= 60
    for k, n in ((0, 53), (1, 20)):  # the sum of n Bernoulli draws of probability q has this mean and deviation
        q = 50 / n % 1
        assert abs(rows[:, k].mean() - 50) < 4 * (n * q * (1 - q) / 120) ** .5
        assert 0.8 < rows[:, k].std() / (n * q * (1 - q)) ** .5 < 1.25


def test_binned_does_not_depend_on_sharding(tmp_path):
    model, x = conv_net(), random_images(80)
    for i in range(3): predict_pseudo_labels(model, x, tmp_path/"many", shard=i, num_shards=3, part_size=7, bs=16)
    for name, src in (("a", predict_pseudo_labels(model, x, tmp_path/"one", bs=16)), ("b", tmp_path/"many")):
        select_pseudo_labels(src, tmp_path/f"{name}.parquet", 0.34, 9, binned=True, seed=3)
    assert (tmp_path/"a.parquet").read_bytes() == (tmp_path/"b.parquet").read_bytes()
    meta = pq.read_schema(tmp_path/"a.parquet").metadata
    assert (meta[b"binned"], meta[b"seed"]) == (b"true", b"3")
    table(tmp_path/"one").sample(frac=1, random_state=0).to_parquet(tmp_path/"shuffled.parquet")
    shuffled = select_pseudo_labels(tmp_path/"shuffled.parquet", tmp_path/"d.parquet", 0.34, 9, binned=True, seed=3)
    same(shuffled.to_pandas(), pd.read_parquet(tmp_path/"a.parquet"))  # nor on the order of the rows
    other = select_pseudo_labels(tmp_path/"many", tmp_path/"c.parquet", 0.34, 9, binned=True, seed=4)
    assert other.path.read_bytes() != (tmp_path/"a.parquet").read_bytes()


def test_the_keras_way(tmp_path):
    "A study of the method with Keras on CIFAR-10: confidence > .75, every class tiled up to the size of the largest."
    conf = np.r_[[0.75] * 3, np.linspace(0.76, 0.99, 7), np.linspace(0.8, 0.9, 3), [0.75, 0.99, 0.98]]
    df = handmade(tmp_path/"p.parquet", [0] * 10 + [1] * 3 + [2] * 3, conf, k=3)
    sel = select_pseudo_labels(tmp_path/"p.parquet", tmp_path/"s.parquet", 0.75, "largest", strict=True)
    got = sel.to_pandas()
    tiled = [i for k in range(3) for i in np.resize(df[(df.label == k) & (df.confidence > 0.75)].sort_values(
        "confidence", ascending=False)["item"], 7)]
    assert sorted(np.repeat(got["item"], got["copies"])) == sorted(tiled)
    assert list(sel.summary.passed) == [7, 3, 2] and list(sel.summary["rows"]) == [7, 7, 7]


def test_copies_of_a_short_class(tmp_path):
    handmade(tmp_path/"p.parquet", [0] * 20 + [1] * 50 + [2] * 200, np.linspace(0.9, 0.4, 270), k=3)
    sel = select_pseudo_labels(tmp_path/"p.parquet", tmp_path/"s.parquet", per_class=50)
    df = sel.to_pandas()
    assert list(sel.summary["rows"]) == [50, 50, 50] and list(sel.summary.kept) == [20, 50, 50]
    assert list(df[df.label == 0].copies) == [3] * 10 + [2] * 10 and set(df[df.label == 2].item) == set(range(70, 120))


def test_probabilities_stay_with_their_image(tmp_path):
    z = np.random.default_rng(0).integers(0, 100, (200, 4))
    out = predict_pseudo_labels(Fixed(4), coded(z), tmp_path/"out", bs=32, part_size=64)
    df = select_pseudo_labels(out, tmp_path/"s.parquet", threshold=0.5, per_class=30).to_pandas()
    p = torch.tensor(z[df.item]).float().div(16).softmax(1).numpy()
    np.testing.assert_allclose(np.stack(df.probs), p, atol=5e-4)
    np.testing.assert_allclose(df.confidence, p.max(1), rtol=1e-5)
    meta = pq.read_schema(tmp_path/"s.parquet").metadata
    assert meta[b"teacher"].decode() == model_hash(Fixed(4)) and json.loads(meta[b"threshold"]) == 0.5


def test_threshold_is_inclusive_at_float_precision(tmp_path):
    for t in (0.3, 0.7, 0.75):
        handmade(tmp_path/"p.parquet", [0, 0], [t, t + 0.1], k=1)
        for strict, n in ((False, 2), (True, 1)):
            assert len(select_pseudo_labels(tmp_path/"p.parquet", tmp_path/"s.parquet", t, None, strict=strict)) == n


def test_empty_class_is_named(tmp_path):
    out = predict_pseudo_labels(Fixed(3), coded([[200, 0, 0], [100, 0, 50]]), tmp_path/"out",
                                classes=["cat", "dog", "owl"])
    with pytest.warns(UserWarning, match="no image the class dog, owl: "):
        sel = select_pseudo_labels(out, tmp_path/"s.parquet", per_class=5)
    assert list(sel.summary["rows"]) == [5, 0, 0] and list(sel.summary["class"]) == ["cat", "dog", "owl"]
    with pytest.raises(PseudoLabelError, match=r"threshold=1.0: the highest confidence is \d\.\d+; lower"):
        select_pseudo_labels(predict_pseudo_labels(conv_net(), random_images(9), tmp_path/"low"), tmp_path/"x.parquet",
                             1.)


@pytest.mark.parametrize("change, message", [(dict(threshold=1.5), "threshold=1.5"),
                                             (dict(threshold=float("nan")), "threshold=nan"),
    (dict(per_class=0), "per_class=0"), (dict(per_class="median"), "per_class='median'"),
                                             (dict(per_class=True), "per_class=True"),
    (dict(binned=True, per_class=None), "binned=True"), (dict(src="nowhere"), "no such file"),
                                             (dict(src="."), "no pseudo labels in")])
def test_selection_mistakes_are_named(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"in").mkdir()
    handmade("in/p.parquet", [0], [0.5])
    with pytest.raises(PseudoLabelError, match=message):
        select_pseudo_labels(**(dict(src="in", out="out/s.parquet") | change))
    assert not Path("out").exists()


@pytest.mark.filterwarnings("ignore:no pseudo label of")
def test_broken_tables(tmp_path):
    for label, confidence, message in (([0, 1], [0.5, np.nan], "no confidence"),
                                       ([0, 7], [0.5, 0.5], r"labels must be in 0\.\.3"), ([], [], "no row")):
        handmade(tmp_path/"p.parquet", label, confidence)
        with pytest.raises(PseudoLabelError, match=message):
            select_pseudo_labels(tmp_path/"p.parquet", tmp_path/"s.parquet")
    handmade(tmp_path/"p.parquet", [0, 1], [0.5, 0.5], items=["a", "a"])
    with pytest.raises(PseudoLabelError, match="image a has two"):
        select_pseudo_labels(tmp_path/"p.parquet", tmp_path/"s.parquet")
    pd.DataFrame(dict(a=[1])).to_parquet(tmp_path/"p.parquet")
    with pytest.raises(PseudoLabelError, match="item"): select_pseudo_labels(tmp_path/"p.parquet", tmp_path/"s.parquet")


def test_shards_must_be_complete_and_belong_together(files, tmp_path):
    def label(out, shard=0, num_shards=1, items=files, seed=0, **kw):
        return predict_pseudo_labels(conv_net(seed), items, tmp_path/out, shard, num_shards, size=16, part_size=5, **kw)
    def refuse(src, message):
        with pytest.raises(PseudoLabelError, match=message): select_pseudo_labels(src, tmp_path/"s.parquet", 0.)
    for i in (0, 2): label("four", i, 4)
    refuse(tmp_path/"four", r"missing: \[1, 3\].*shard=1, num_shards=4")
    part = min((tmp_path/"four").glob("part-*"))
    table = pq.read_table(part)
    meta = {**table.schema.metadata, b"num_shards": str(2**31).encode()}
    (tmp_path/"claims").mkdir(); pq.write_table(table.replace_schema_metadata(meta), tmp_path/"claims"/part.name)
    refuse(tmp_path/"claims", r"claims these are missing: \[1, 2, 3, .*, 20\]")  # at once, and in no memory
    for i in (1, 3): label(f"machine{i}", i, 4)
    folders = [tmp_path/o for o in ("four", "machine1", "machine3")]
    a = select_pseudo_labels(folders, tmp_path/"a.parquet", 0.)
    b = select_pseudo_labels(label("one"), tmp_path/"b.parquet", 0.)
    assert a.path.read_bytes() == b.path.read_bytes()
    label("again", 1, 4)
    refuse([*folders, tmp_path/"again"], "shard 1 is there twice")
    refuse([tmp_path/"one", *folders], "and in .* shards")
    refuse(sorted((tmp_path/"one").glob("part-*"))[1:], "shard 0 of 1 .* is not complete")
    (tmp_path/"machine3"/"part-00003-of-00004-00001.parquet").unlink()
    refuse(folders, "shard 3 of 4 .* is not complete")
    label("half1", items=files[:20]); label("half2", items=files[20:]); label("overlap", items=files[19:])
    assert len(select_pseudo_labels([tmp_path/"half1", tmp_path/"half2"], tmp_path/"c.parquet", 0., None)) == 40
    refuse([tmp_path/"half1", tmp_path/"overlap"], f"image {files[19]} has two pseudo labels")
    label("other", items=files[20:], seed=1)
    refuse([tmp_path/"half1", tmp_path/"other"], "do not belong together .*teacher")
    label("hot", items=files[20:], temperature=2.)
    refuse([tmp_path/"half1", tmp_path/"hot"], "do not belong together .*temperature")
    label("named", items=files[20:], classes="xyz")
    refuse([tmp_path/"half1", tmp_path/"named"], "do not belong together .*classes")


def test_folder_names(tmp_path):
    for name in ("a [1] *", "it's", "label=3", "ü ?"):
        out = predict_pseudo_labels(conv_net(), random_images(9), tmp_path/name/"in")
        assert len(select_pseudo_labels(out, tmp_path/name/"s.parquet", 0., None)) == 9


# relabel and read

def test_relabel_files(files, tmp_path):
    out = predict_pseudo_labels(conv_net(), files, tmp_path/"out", size=16)
    sel = select_pseudo_labels(out, tmp_path/"s.parquet", 0.34, 10)
    new, full = conv_net(5), table(predict_pseudo_labels(conv_net(5), files, tmp_path/"new", size=16))
    steps = []
    re = relabel_pseudo_labels(new, sel, tmp_path/"r.parquet", size=16, bs=7, progress=lambda *o: steps.append(o))
    a, b = sel.to_pandas(), re.to_pandas()
    assert list(a["item"]) == list(b["item"]) and list(a.copies) == list(b.copies) and steps[-1] == (len(a), len(a))
    full = full.set_index("item").loc[b["item"]]
    np.testing.assert_allclose(b.confidence, full.confidence, rtol=1e-5)
    assert list(b.label) == list(full.label) and (b.label != a.label).any()
    assert re.summary["rows"].sum() == sel.summary["rows"].sum()
    assert pq.read_schema(re.path).metadata[b"teacher"].decode() == model_hash(new)
    relabel_pseudo_labels(new, tmp_path/"s.parquet", tmp_path/"s.parquet", size=16, bs=7)  # in place
    assert (tmp_path/"s.parquet").read_bytes() == (tmp_path/"r.parquet").read_bytes()
    Path(a["item"][0]).write_text("no image")
    before = (tmp_path/"s.parquet").read_bytes()
    with pytest.raises(PseudoLabelError, match="can no longer be read"):
        relabel_pseudo_labels(new, sel, tmp_path/"s.parquet", size=16)
    with pytest.raises(PseudoLabelError, match="4 outputs"):
        relabel_pseudo_labels(conv_net(n_out=4), sel, tmp_path/"x.parquet", size=16)
    assert (tmp_path/"s.parquet").read_bytes() == before and not (tmp_path/"x.parquet").exists()
    assert not list(tmp_path.glob(".*"))


def test_relabel_needs_the_array(tmp_path):
    sel = select_pseudo_labels(predict_pseudo_labels(conv_net(), random_images(9), tmp_path/"out"),
                               tmp_path/"s.parquet", 0.)
    with pytest.raises(PseudoLabelError, match="give the array as items="):
        relabel_pseudo_labels(conv_net(), sel, tmp_path/"r.parquet")


def test_read_selection(files, tmp_path):
    out = predict_pseudo_labels(conv_net(), files, tmp_path/"out", size=16, classes="abc")
    sel = select_pseudo_labels(out, tmp_path/"s.parquet", 0., 20)
    r, df = read_selection(tmp_path/"s.parquet"), sel.to_pandas()
    assert r.items == list(df["item"]) and r.classes == ["a", "b", "c"] and len(r) == len(df)
    assert (r.copies == df.copies).all() and (r.labels == df.label).all() and (r.confidence == df.confidence).all()
    np.testing.assert_allclose(r.probs, np.stack(df.probs), atol=1e-3)
    np.testing.assert_allclose(r.probs.sum(1), 1, atol=1e-6)
    assert r.probs.dtype == np.float32 and r.labels.dtype == np.int64
    for bad in (tmp_path/"nowhere.parquet", next(out.glob("part-*"))):
        with pytest.raises(PseudoLabelError, match="make .* with select_pseudo_labels"): read_selection(bad)
    arr = select_pseudo_labels(predict_pseudo_labels(conv_net(), random_images(9), tmp_path/"a"), tmp_path/"t.parquet",
                               0.)
    assert read_selection(arr).items.dtype == np.int64


class Crowded(torch.nn.Module):
    "Runs out of memory above `room` images, as a GPU does"
    def __init__(self, room): super().__init__(); self.room, self.seen, self.fc = room, [], torch.nn.Linear(48, 3)
    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.room: raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.fc(x.flatten(1))

def _pool(n): return np.random.default_rng(0).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)

def test_out_of_memory_halves_the_batch(tmp_path):
    "Labels are those of a model with room for everything; the size that fits is kept"
    torch.manual_seed(0)
    small, large = Crowded(10), Crowded(1000)
    small.load_state_dict(large.state_dict())
    tables = [pq.read_table(predict_pseudo_labels(m, _pool(150), tmp_path/name, bs=64)) for m,
              name in ((small, 'small'), (large, 'large'))]
    a, b = (np.stack(t.column('probs').to_numpy()).astype(np.float32) for t in tables)
    np.testing.assert_allclose(a, b, atol=1e-3)
    assert small.seen[:5] == [1, 64, 32, 16, 8] and max(small.seen[5:]) == 8  # 1: the classes are counted on one image
    assert large.seen == [1, 64, 64, 22]

def test_out_of_memory_with_one_image(tmp_path):
    with pytest.raises(torch.cuda.OutOfMemoryError):
        predict_pseudo_labels(Crowded(0), _pool(5), tmp_path/'t', classes=list('abc'))

def test_writing_beside_computing(tmp_path, monkeypatch):
    "A part is written while the next one is computed; when writing fails, that is the error, and no later part appears"
    torch.manual_seed(0)
    model, wrote, threads = Crowded(1000), [], set()
    write = pq.write_table
    def watched(table, file, *args, **kw):
        threads.add(threading.current_thread() is threading.main_thread())
        if len(wrote) == 2: raise OSError(28, 'No space left on device')
        wrote.append(file)
        return write(table, file, *args, **kw)
    monkeypatch.setattr(pq, 'write_table', watched)
    with pytest.raises(OSError, match='No space left'):
        predict_pseudo_labels(model, _pool(60), tmp_path/'t', part_size=10)
    assert threads == {False} and len(list((tmp_path/'t').glob('*.parquet'))) == 2
    monkeypatch.undo()
    predict_pseudo_labels(model, _pool(60), tmp_path/'t', part_size=10)  # goes on
    predict_pseudo_labels(model, _pool(60), tmp_path/'whole', part_size=10)
    a, b = (pq.read_table(tmp_path/o) for o in ('t', 'whole'))
    assert a.equals(b)

def test_bf16_labels_are_labels_apart(tmp_path):
    "Half precision changes probabilities a little, and a table of both kinds is refused"
    torch.manual_seed(0)
    model = Crowded(1000)
    a, b = (np.stack(pq.read_table(predict_pseudo_labels(model, _pool(50), tmp_path/str(o), bf16=o)).column('probs')
                     .to_numpy()).astype(np.float32)
            for o in (False, True))
    assert 0 < np.abs(a - b).max() < .03
    with pytest.raises(PseudoLabelError, match='precision'):
        predict_pseudo_labels(model, _pool(50), tmp_path/'False', bf16=True)


def test_labels_left_out_are_known_when_labeling_goes_on(tmp_path):
    "A part whose images are partly left out is kept as it is by the same call, and refused by another."
    torch.manual_seed(0)
    images, net = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3),
                                                    np.uint8), torch.nn.Sequential(torch.nn.Flatten(),
                                                                                   torch.nn.Linear(192, 3))
    for names in (None, [f"{i}.png" for i in range(20)]):
        call, gone = dict(part_size=8, bs=4, names=names), {3: "also a test image", 11: "also a test image"}
        out = predict_pseudo_labels(net, images, tmp_path/str(names is None), **call, leave_out=gone)
        made = {o: o.stat().st_mtime_ns for o in out.glob("part-*")}
        predict_pseudo_labels(net, images, out, **call, leave_out=gone)
        assert {o: o.stat().st_mtime_ns for o in made} == made
        items = [o for f in sorted(made) for o in pd.read_parquet(f).item]
        assert items == [i if names is None else names[i] for i in range(20) if i not in gone]
        for other in (None, {4: "also a test image", 11: "also a test image"}):
            with pytest.raises(PseudoLabelError, match="what differs: left_out"):
                predict_pseudo_labels(net, images, out, **call, leave_out=other)


def test_duckdb_is_needed_for_nothing_but_selecting(tmp_path, monkeypatch):
    "Labeling, relabeling and reading go without it; no module loads it by being imported."
    import ast, noisy_student
    for f in Path(noisy_student.__file__).parent.glob("*.py"):
        top = [o for node in ast.parse(f.read_text()).body
               for o in ([node] if isinstance(node, (ast.Import, ast.ImportFrom)) else [])]
        assert "duckdb" not in [o.name.split(".")[0] for node in top for o in node.names] + [getattr(o, "module", None)
                                                                                             for o in top], f
    x = random_images(20)
    sel = select_pseudo_labels(predict_pseudo_labels(conv_net(), x, tmp_path/"a"), tmp_path/"s.parquet", 0., 5)
    monkeypatch.setitem(sys.modules, "duckdb", None)  # as where it is not installed
    out = predict_pseudo_labels(conv_net(), x, tmp_path/"b")
    assert relabel_pseudo_labels(conv_net(1), sel, tmp_path/"r.parquet",
                                 x).summary["rows"].sum() == sel.summary["rows"].sum()
    assert len(read_selection(tmp_path/"r.parquet")) == len(sel)
    with pytest.raises(ImportError, match="pip install duckdb"): select_pseudo_labels(out, tmp_path/"t.parquet", 0.)


def test_pixels_are_hashed_beside_the_computing(tmp_path, monkeypatch):
    "The next parts while one is labeled, and what a part says of itself is the hash of its pixels as before"
    from noisy_student import label_shards
    from noisy_student.label_table import read_metadata
    images, model, where, hashed = random_images(40), conv_net(), [], label_shards.digest
    def digest(items):
        where.append((len(items), threading.current_thread() is threading.main_thread()))
        return hashed(items)
    monkeypatch.setattr(label_shards, "digest", digest)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(len(where)))
    predict_pseudo_labels(model, images, tmp_path/"t", part_size=10, bs=10)
    assert where == [(10, False)] * 4
    assert any(n > i for i, n in enumerate(seen[1:], 1))  # the first pass counts the classes, before all parts
    for i, o in enumerate(sorted((tmp_path/"t").glob("part-*"))):
        assert read_metadata(o)["items"] == hashlib.sha256(images[10 * i:10 * i + 10]).hexdigest()[:16]
