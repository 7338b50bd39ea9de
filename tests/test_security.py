"Nothing is ever unpickled, and no name in a file leads out of its folder."
import ast, io, json, pickle, shutil, tarfile, zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

PACKAGE = Path(__file__).parent.parent/"noisy_student"


class Hostile:
    "Creates a file when it is unpickled."
    def __init__(self, file): self.file = str(file)
    def __reduce__(self): return open, (self.file, "w")


def calls(tree):
    for o in ast.walk(tree):
        if isinstance(o, ast.Call) and isinstance(o.func, ast.Attribute) and isinstance(o.func.value, ast.Name):
            yield f"{o.func.value.id}.{o.func.attr}", {k.arg: getattr(k.value, "value", None)
                                                       for k in o.keywords}, o.lineno


def test_the_package_calls_nothing_that_unpickles():
    for file in PACKAGE.glob("*.py"):
        tree = ast.parse(file.read_text())
        names = {a.name.split(".")[0] for o in ast.walk(tree) if isinstance(o, ast.Import) for a in o.names} | \
                {o.module.split(".")[0] for o in ast.walk(tree) if isinstance(o, ast.ImportFrom) and o.module}
        assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, file.name
        assert not {o.id for o in ast.walk(tree) if isinstance(o, ast.Name)} & {"eval", "load_learner"}, file.name
        # archives are read in place
        assert not {o.attr for o in ast.walk(tree) if isinstance(o, ast.Attribute)} & {"extractall",
                                                                                       "extract"}, file.name
        for name, kw, line in calls(tree):
            where = f"{file.name}:{line}: {name}"
            assert name not in ("pd.read_pickle", "torch.hub.load", "shutil.unpack_archive"), where
            if name == "torch.load": assert kw.get("weights_only") is True, where
            if name == "np.load": assert kw.get("allow_pickle") is False, where


def test_the_test_above_can_fail():
    found = list(calls(ast.parse("torch.load(f)\nnp.load(f, allow_pickle=True)")))
    assert [o[:2] for o in found] == [("torch.load", {}), ("np.load", {"allow_pickle": True})]


def hostile_files(marker):
    "The same pickle in every wrapping: bare, in torch's zip and old formats, in .npy and .npz."
    o, found = Hostile(marker), {}
    found["pickle"] = pickle.dumps(dict(state_dict=o))
    for name, new in (("torch", True), ("torch, old", False)):
        torch.save(dict(state_dict=o), b := io.BytesIO(), _use_new_zipfile_serialization=new)
        found[name] = b.getvalue()
    np.save(b := io.BytesIO(), np.array([o], dtype=object), allow_pickle=True); found["npy"] = b.getvalue()
    np.savez(b := io.BytesIO(), X=np.array([o], dtype=object), allow_pickle=True); found["npz"] = b.getvalue()
    return found


def test_hostile_pickles_work_where_they_are_loaded(tmp_path):
    pickle.loads(hostile_files(tmp_path/"marker")["pickle"])
    assert (tmp_path/"marker").exists()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".npy"])
def test_weights(tmp_path, suffix):
    from noisy_student.models import create_model, load_weights
    from noisy_student.rounds import load_model
    for data in hostile_files(tmp_path/"marker").values():
        (file := tmp_path/f"model{suffix}").write_bytes(data)
        for read in (lambda: create_model("resnet9_4", 10, pretrained=str(file)), lambda: load_model(file),
                     lambda: load_weights(torch.nn.Linear(2, 2), file)):
            with pytest.raises((ValueError, OSError), match=f"model{suffix}"): read()
    assert not (tmp_path/"marker").exists()


def test_a_run_directory(tmp_path):
    "A hostile pickle in the place of any file of a finished run."
    from faults import kinds, make_pictures, noisy_student
    pictures, marker = make_pictures(tmp_path/"pictures"), tmp_path/"marker"
    noisy_student(pictures, tmp_path/"run", rounds=1, epochs=1, teacher_epochs=1).fit()
    data = hostile_files(marker)
    for i, file in enumerate(kinds(tmp_path/"run").values()):
        shutil.copytree(tmp_path/"run", copy := tmp_path/f"{i}")
        (copy/file).write_bytes(data["npy" if file.suffix == ".npy" else "torch" if file.suffix == ".safetensors"
                                     else "pickle"])
        for f in copy.glob("round_*/SHA256SUMS"): f.unlink()  # who plants a file can write its checksum
        try: noisy_student(pictures, copy, rounds=1, epochs=1, teacher_epochs=1).fit()
        except (ValueError, OSError): pass
        shutil.rmtree(copy)
    assert not marker.exists()


def test_tables_and_data_sets(tmp_path):
    from noisy_student.datasets import svhn
    from noisy_student.pseudo_labels import PseudoLabelError, read_selection, select_pseudo_labels
    marker = tmp_path/"marker"
    data = hostile_files(marker)
    table = pa.table(dict(item=["a"], label=pa.array([0], pa.int32()), confidence=pa.array([.9], pa.float32()),
                          probs=[[.9, .1]], copies=pa.array([1], pa.int32())))
    for key in ("classes", "teacher", "pandas", "ARROW:schema", "sha256"):
        pq.write_table(table.replace_schema_metadata({"classes": '["a", "b"]', key: data["pickle"]}),
                       tmp_path/"p.parquet", store_schema=key != "ARROW:schema")
        for read in (lambda: select_pseudo_labels(tmp_path/"p.parquet", tmp_path/"s.parquet", 0.),
                     lambda: read_selection(tmp_path/"p.parquet")):
            try: read()
            except PseudoLabelError: pass
    for name in ("train", "test", "extra"):
        for end in ("-images.npy", "-labels.npy"): (tmp_path/f"{name}_32x32{end}").write_bytes(data["npy"])
        (tmp_path/f"{name}_32x32.mat").write_bytes(data["pickle"]); (tmp_path/f"{name}_32x32.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="train_32x32.mat"): svhn(root=tmp_path)
    assert not marker.exists()


def test_names_stay_in_their_folder(tmp_path):
    "Checksums of files elsewhere are not looked at, hence nothing elsewhere is removed as damaged."
    from noisy_student.files import altered, read_sums
    (tmp_path/"precious").write_text("mine"); (folder := tmp_path/"round_0").mkdir()
    names = ["../precious", str(tmp_path/"precious"), "..", "a/../../precious"]
    (folder/"SHA256SUMS").write_text("".join(f"{'0' * 64}  {o}\n" for o in names))
    assert altered(folder) == [] and read_sums(folder/"SHA256SUMS") == {}


def test_downloads_are_unpacked_in_their_folder(tmp_path):
    "What fastai unpacks for us is looked through first."
    from noisy_student.datasets import _check_members
    def archive(name, kind=tarfile.REGTYPE):
        (o := tarfile.TarInfo(name)).type, o.linkname = kind, "../.."
        with tarfile.open(tmp_path/"a.tgz", "w:gz") as t: t.addfile(tarfile.TarInfo("fine/..png")); t.addfile(o)
        return tmp_path/"a.tgz"
    _check_members(archive("cifar10/train/a.png"))
    for name, kind in (("../evil", tarfile.REGTYPE), ("a/../../evil", tarfile.REGTYPE), ("/evil", tarfile.REGTYPE),
                       ("out", tarfile.SYMTYPE), ("out", tarfile.LNKTYPE), ("pipe", tarfile.FIFOTYPE)):
        with pytest.raises(ValueError, match="a.tgz holds"): _check_members(archive(name, kind))


def test_a_manifest_opens_no_file(tmp_path):
    from noisy_student.pseudo_labels import PseudoLabelError, predict_pseudo_labels, select_pseudo_labels
    model, images = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)), np.zeros((8, 4, 4, 3), np.uint8)
    out = predict_pseudo_labels(model, images, tmp_path/"out")
    (tmp_path/"elsewhere.parquet").write_bytes(next(out.glob("part-*")).read_bytes())
    (out/"_shard-00000-of-00001.json").write_text(json.dumps(dict(parts={"../elsewhere.parquet": 8})))
    with pytest.raises(PseudoLabelError, match="not complete"): select_pseudo_labels(out, tmp_path/"s.parquet", 0.)


def test_images_are_limited(tmp_path):
    from PIL import Image, ImageFile
    from noisy_student.datasets import MAX_PIXELS, load_images
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    Image.new("1", (10_000, 10_000)).save(tmp_path/"large.png")
    Image.new("RGB", (64, 64)).save(tmp_path/"torn.jpg")
    (tmp_path/"torn.jpg").write_bytes((tmp_path/"torn.jpg").read_bytes()[:400])
    with zipfile.ZipFile(tmp_path/"bomb.png", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("a", bytes(10**7))
    found = load_images([str(tmp_path/o) for o in ("large.png", "torn.jpg", "bomb.png")], 32)
    assert not len(found.images) and f"{MAX_PIXELS:,}" in found.bad[0].reason and len(found.bad) == 3
