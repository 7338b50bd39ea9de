"Tables of predictions: order, broken files, several networks, and what is written for a competition."
import os
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import nn

from noisy_student.datasets import Split, load_images
from noisy_student.predictions import class_columns, predict_table, write_submission
from noisy_student.network import Network

N = 9


def network(classes=("cat", "dog", "emu"), size=8, c=3, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(c, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.5), nn.AdaptiveAvgPool2d(1),
                              nn.Flatten(), nn.Linear(4, len(classes)))
        nn.init.normal_(model[-1].weight, std=9)
    return Network(model, "tiny", list(classes), size, [.5] * c, [.25] * c)


def expected(net, images):
    "By hand: evaluation mode, no batches."
    x = (torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255 - .5) / .25
    state = net.model.training
    net.model.eval()
    with torch.no_grad(): p = net.model(x).softmax(1).numpy()
    net.model.train(state)
    return p


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(N): Image.fromarray(rng.integers(0, 256, (12, 10 + i, 3), dtype=np.uint8)).save(tmp_path/f"{i}.png")
    return tmp_path


def files(folder): return [str(folder/f"{i}.png") for i in range(N)]


def said(f):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = f()
    return result, [str(o.message) for o in seen]


def test_every_form_of_items(folder):
    "The same probabilities, in the order that was asked for, under the names that were given."
    net, p = network(), expected(network(), load_images(files(folder), 8).images)
    order = [3, 1, 8, 0]
    frame = pd.DataFrame(dict(id=order), index=[7, 7, 9, 1])
    frame.to_csv(folder/"ids.csv", index=False)
    kwargs = dict(folder=folder, image="id", suffix=".png")
    for items, given, rows, names in (
            (folder, {}, range(N), files(folder)), (files(folder)[::-1], {}, range(N)[::-1], files(folder)[::-1]),
            (folder/"4.png", {}, [4], [str(folder/"4.png")]), (frame, kwargs, order, order),
                                      (pa.Table.from_pandas(frame), kwargs, order, order),
            (folder/"ids.csv", dict(image="id", suffix=".png"), order, list(map(str, order))),
                                      (Split(files(folder)[2:4]), {}, [2, 3], files(folder)[2:4]),
            (load_images(files(folder), 8).images, {}, range(N), range(N))):
        table = predict_table(net, items, bs=2, **given)
        assert list(table) == ["image", "label", "confidence", "cat", "dog", "emu"]
        assert table.image.tolist() == list(names)
        np.testing.assert_allclose(table.iloc[:, 3:], p[list(rows)], atol=1e-5)
        np.testing.assert_allclose(table.confidence, table.iloc[:, 3:].max(axis=1))
        assert table.label.tolist() == [net.classes[i] for i in p[list(rows)].argmax(1)]
    assert list(frame.merge(predict_table(net, frame, **kwargs), left_on="id", right_on="image").id) == order


def test_network_is_left_as_it_was(folder):
    net = network()
    net.model[3].eval()
    before = {k: v.clone() for k, v in net.model.state_dict().items()}
    predict_table(net, folder)
    assert net.model.training and not net.model[3].training
    assert all(torch.equal(v, before[k]) for k, v in net.model.state_dict().items())
    with pytest.raises(RuntimeError):
        predict_table(Network(nn.Sequential(net.model, nn.Linear(7, 3)), net.arch, net.classes, net.size, net.mean,
                              net.std), folder)
    assert net.model.training


def test_mean_of_several(folder):
    nets = [network(size=8, seed=0), network(size=12, seed=1), network(size=8, seed=2)]
    p = np.mean([expected(t, load_images(files(folder), t.size).images) for t in nets], 0)
    np.testing.assert_allclose(predict_table(nets, folder, bs=4).iloc[:, 3:], p, atol=1e-5)
    for other in (network(("dog", "cat", "emu")), network(("cat", "dog"))):
        with pytest.raises(ValueError, match="same classes in the same order"): predict_table([nets[0], other], folder)


def test_gray_and_color(folder):
    "A network for gray images sees the luminance of color ones, one for color images three times the gray."
    color = load_images(files(folder), 8).images
    gray = np.stack([np.asarray(Image.fromarray(o).convert("L")) for o in color])[..., None]
    np.testing.assert_allclose(predict_table(network(c=1), folder).iloc[:, 3:], expected(network(c=1), gray), atol=.05)
    np.testing.assert_allclose(predict_table(network(), gray).iloc[:, 3:], expected(network(), np.repeat(gray, 3, -1)),
                               atol=1e-5)


def test_broken_files_keep_their_rows(folder):
    p = expected(network(), load_images(files(folder), 8).images)
    for i in (0, 4, 5, 8): (folder/f"{i}.png").write_bytes(b"no image")
    (folder/"6.png").unlink()
    table, seen = said(lambda: predict_table([network(), network(size=16)][:1], files(folder), bs=2))
    lost = table.label.isna()
    assert lost.tolist() == [i in (0, 4, 5, 6, 8) for i in range(N)] and table.label[0] is None
    assert table[lost].iloc[:, 2:].isna().all(axis=None)
    np.testing.assert_allclose(table[~lost].iloc[:, 3:].astype(float), p[~lost], atol=1e-5)
    assert len(seen) == 1 and "5 of 9 images" in seen[0] and "0.png: not an image" in seen[0]
    assert seen[0].endswith("...")
    table, seen = said(lambda: predict_table([network(), network(size=16)], files(folder)[4:6]))
    assert table.label.tolist() == [None, None] and len(seen) == 1


def test_memory_is_flat(folder, monkeypatch):
    "Only a part of the images is decoded at a time, at most one part ahead."
    from noisy_student import predictions
    monkeypatch.setattr(predictions, "_BYTES", 3 * 8 * 8 * 4)
    sizes, steps = [], []
    load = predictions.load_images
    monkeypatch.setattr(predictions, "load_images", lambda items,
                        size: (sizes.append(len(items)), load(items, size))[1])
    whole = predict_table(network(), files(folder) * 3, bs=2, progress=lambda *a: steps.append(a))
    assert max(sizes) == 4 and sum(sizes) == 3 * N and steps[0] == (0, 27) and steps[-1] == (27, 27) and len(steps) == 8
    monkeypatch.undo()
    np.testing.assert_allclose(whole.iloc[:, 3:], predict_table(network(), files(folder) * 3).iloc[:, 3:], atol=1e-5)


def test_classes_named_like_columns(folder):
    net = network(("label", "image", "confidence"))
    table = predict_table(net, folder)
    assert list(table) == ["image", "label", "confidence", "label (class)", "image (class)", "confidence (class)"]
    assert table.label.tolist() == [net.classes[i] for i in table.iloc[:, 3:].to_numpy().argmax(1)]
    assert class_columns(["a", "label", "label (class)"]) == ["a", "label (class) (class)", "label (class)"]
    written = pd.read_csv(write_submission(table, folder/"s.csv", ("id", "label", "image", "confidence")))
    np.testing.assert_allclose(written.iloc[:, 1:], table.iloc[:, 3:], rtol=1e-5)
    assert pd.read_csv(write_submission(table, folder/"s.csv", ("id", "label"))).label.tolist() == table.label.tolist()


@pytest.mark.parametrize("items, kwargs, text", [
    ([], {}, "at least one image"), (np.zeros((2, 8, 8), np.uint8), {}, "must be uint8"),
                                                 ("gone", {}, "no folder or file gone"),
    (pd.DataFrame(dict(image=["0", "gone"])), {}, 'add suffix=".png"'),
                                                 (pd.DataFrame(dict(id=["x"])), {}, "no column 'image'"),
    (["0.png"], dict(bs=0), "bs must be at least 1")])
def test_mistakes(folder, monkeypatch, items, kwargs, text):
    monkeypatch.chdir(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=text): predict_table(network(), items, **kwargs)
    with pytest.raises(ValueError, match="at least one, got an empty list"): predict_table([], folder)


def test_output_that_is_not_finite(folder):
    net = network()
    nn.init.constant_(net.model[-1].bias, float("nan"))
    with pytest.raises(ValueError, match="0.png is not finite"): predict_table(net, folder)


def written(*args, **kwargs): return pd.read_csv(write_submission(*args, **kwargs), dtype=str, keep_default_na=False)


def test_submission(folder):
    "Names without folders, then labels or probabilities, under the headers and in the order that are asked for."
    table, out = predict_table(network(), folder), folder/"new"/"s.csv"
    assert written(table, out).equals(pd.DataFrame(dict(image=[f"{i}.png" for i in range(N)],
                                                        label=table.label.astype(str)))
                                      .astype(written(table, out).dtypes))
    assert written(table, out, ("id", "label"), stem=True).id.tolist() == [str(i) for i in range(N)]
    assert list(written(table, out, ("id", "emu", "cat"))) == ["id", "emu", "cat"]
    # a class as header: its probability
    np.testing.assert_allclose(written(table, out, ("id", "emu")).emu.astype(float), table.emu, rtol=1e-5)
    np.testing.assert_allclose(written(table, out, {"id": "image", "p": "dog"}).p.astype(float), table.dog, rtol=1e-5)
    whole = pd.read_csv(write_submission(table, out, "all"))  # nothing is cut off, of names and of columns
    assert list(whole) == list(table) and whole.image.tolist() == table.image.tolist()
    np.testing.assert_allclose(whole.iloc[:, 2:], table.iloc[:, 2:], rtol=1e-5)
    some = written(table, out, ("id", "label", "confidence", "dog"))
    assert list(some) == ["id", "label", "confidence", "dog"] and some.label.tolist() == table.label.tolist()
    np.testing.assert_allclose(some.confidence.astype(float), table.confidence, rtol=1e-5)
    # as a command has them
    for one, several in (("id,label", ("id", "label")), ("id, emu,cat", ("id", "emu", "cat")), ("id,p", ("id", "p"))):
        assert written(table, out, one).equals(written(table, out, several))
    assert not [o for o in os.listdir(out.parent) if o != "s.csv"]
    for kwargs, text in ((dict(columns="id"), r"columns must be .* got 'id';"), (dict(columns="id,cat,fox"), "'fox'"),
                         (dict(columns="all", stem=True), "stem must be False .* got True: leave it out"),
                         (dict(columns=("id",)), "columns must be"), (dict(columns=("id", "cat", "fox")), "'fox'"),
                         (dict(columns={"id": "name"}), "no column 'name'"),
                         (dict(fill="fox"), "fill must be a class")):
        with pytest.raises(ValueError, match=text): write_submission(table, out, **kwargs)
    with pytest.raises(ValueError, match="of predict_table"): write_submission(table[["image", "label"]], out)
    with pytest.raises(ValueError, match="have the name of another one"):
        write_submission(pd.concat([table, table]), out)
    (folder/"file").touch()
    with pytest.raises(OSError, match="cannot write"): write_submission(table, folder/"file"/"s.csv")


def test_like_a_sample(folder):
    table = predict_table(network(), folder)
    for ids in ([5, 0, 3], ["5", "0", "3"], ["5.png", "0.png", "3.png"], [str(folder/f"{i}.png") for i in (5, 0, 3)]):
        sample = pd.DataFrame(dict(Id=ids, Category="?"))
        sample.to_csv(folder/"sample.csv", index=False)
        for like in (sample, folder/"sample.csv"):
            got, seen = said(lambda: written(table, folder/"s.csv", like=like))
            assert got.Id.tolist() == list(map(str, ids)) and got.Category.tolist() == table.label[[5, 0, 3]].tolist()
            assert len(seen) == 1 and "6 predictions are not in the sample" in seen[0]
    assert list(said(lambda: written(table, folder/"s.csv",
                                     like=pd.DataFrame(columns=["Id", "dog", "cat", "emu"],
                                                       data=[["1", 0, 0, 0]])))[0]) == ["Id", "dog", "cat", "emu"]
    with pytest.raises(ValueError, match="1 of 2 ids .* the first is '77'"):
        write_submission(table, folder/"s.csv", like=pd.DataFrame(dict(Id=[1, 77], c=0)))


def test_images_of_pil_are_seen_as_their_files(tmp_path):
    "Upright, and as dark as they are: by `predict`, and by the loaders of a run's learner."
    from noisy_student.dataloaders import mixed_dataloaders
    from noisy_student.predictions import named_images
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (40, 20, 3), dtype=np.uint8)).save(tmp_path/"turned.jpg", exif=exif)
    Image.fromarray(rng.integers(0, 9000, (30, 30), dtype=np.uint16)).save(tmp_path/"dark.png")
    Image.fromarray(rng.integers(0, 256, (30, 30, 4), dtype=np.uint8)).save(tmp_path/"clear.png")
    Image.fromarray(rng.integers(0, 256, (30, 30), dtype=np.uint8)).convert("P").save(tmp_path/"palette.png")
    photos = rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8), np.array([0, 1, 0, 1])
    dls = mixed_dataloaders(photos, photos, ["a", "b"], bs=2)
    for file in sorted(tmp_path.iterdir()):
        with Image.open(file) as img:
            whole, at_16 = named_images(img)[0], dls.test_dl([img]).one_batch()[0]
        expected = load_images([str(file)], 16).images
        assert np.array_equal(load_images(whole, 16).images, expected), file.name
        assert torch.equal(at_16, dls.test_dl([str(file)]).one_batch()[0]), file.name


def test_of_two_images_with_the_name_that_a_sample_asks_for_none_is_taken(folder, tmp_path):
    table = pd.DataFrame(dict(image=["a/1.jpg", "b/1.jpg", "b/2.jpg"], label=["cat", "dog", "cat"], confidence=.9,
                              cat=.5, dog=.5))
    sample = pd.DataFrame(dict(id=["1", "2"], label="cat"))
    with pytest.raises(ValueError, match="1 ids .* names of several images, the first is '1'"):
        write_submission(table, tmp_path/"s.csv", like=sample)
    write_submission(table, tmp_path/"s.csv", like=sample.assign(id=["b/1.jpg", "b/2.jpg"]))
    assert list(pd.read_csv(tmp_path/"s.csv").label) == ["dog", "cat"]
    write_submission(table, tmp_path/"s.csv", like=sample[1:])  # the other one is not asked for


def test_unread_images_in_a_submission(folder):
    (folder/"2.png").write_bytes(b"")
    table, _ = said(lambda: predict_table(network(), folder))
    got, seen = said(lambda: written(table, folder/"s.csv"))
    assert got.label[2] == "" and len(seen) == 1 and "1 images could not be read" in seen[0]
    got, seen = said(lambda: written(table, folder/"s.csv", fill="emu"))
    assert got.label[2] == "emu" and not seen and table.label[2] is None
    assert written(table, folder/"s.csv", ("id", "cat", "dog", "emu"),
                   fill="emu").iloc[2, 1:].astype(float).tolist() == [0, 0, 1]


def test_a_table_that_was_read_back_is_filled_too(tmp_path):
    table = pd.DataFrame(dict(image=["a", "b"], label=["x", None], confidence=["0.75", None], x=["0.75", None],
                              y=["0.25", None]))
    out = pd.read_csv(write_submission(table, tmp_path/"o.csv", ["id", "x", "y"], fill="y"))
    assert out.to_numpy().tolist() == [["a", .75, .25], ["b", 0., 1.]]
    with pytest.raises(ValueError, match="must hold numbers: .*much"):
        write_submission(table.assign(x=["much", None]), tmp_path/"o.csv", ["id", "x", "y"], fill="y")


def test_figures_are_written_alike_with_and_without_a_filled_row(tmp_path):
    table = pd.DataFrame(dict(image=["a"], label=["x"], confidence=[2 / 3], x=[2 / 3], y=[1 / 3]))
    lost = pd.concat([table, pd.DataFrame(dict(image=["b"], label=[None]))])
    one, two = (write_submission(t, tmp_path/"o.csv", ["id", "x", "y"], **more).read_text().splitlines()
                for t, more in ((table, {}), (lost, dict(fill="y"))))
    assert one == two[:2] and two[2] == "b,0,1"


def test_a_command_writes_what_the_function_writes(folder, monkeypatch):
    "Of a run whose table has names without suffix, too: a competition gets such names, 'all' keeps the whole ones."
    from noisy_student import command_predictions
    table = predict_table(network(), folder)
    for is_short in (False, True):
        monkeypatch.setattr(command_predictions, "names_without_suffix", lambda _, is_short=is_short: is_short)
        for columns, stem in ((None, is_short), ("id,label", is_short), ("id,cat,dog", is_short), ("all", False)):
            command_predictions.write_predictions(table, "model", str(folder/"a.csv"), columns)
            write_submission(table, folder/"b.csv", columns, stem=stem)
            assert (folder/"a.csv").read_text() == (folder/"b.csv").read_text()
