"Tables as people have them: other frames, holes, repetitions, mistakes. And folders that are nearly right."
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, strategies as st
from PIL import Image

from noisy_student.datasets import Split, from_csv, from_df, from_folder, open_data
from noisy_student.splits import grouped

N = 12


def draw(file, i=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 10), (20 * i, 90, 200)).save(file)


@pytest.fixture
def home(tmp_path):
    for i in range(N): draw(tmp_path/"images"/f"{i}.png", i)
    return tmp_path


def frame(**columns):
    return pd.DataFrame(dict(image=[f"{i}.png" for i in range(N)], label=list("ab") * (N // 2), **columns))


def names(split): return sorted(o.rpartition("/")[2] for o in split.images)


def said(f):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = f()
    return result, [str(o.message) for o in seen]


def test_same_as_the_folder(home):
    "A table and a folder with the same images and labels give the same piles, image by image."
    for i in range(N): draw(home/"own"/"train"/"ab"[i % 2]/f"{i}.png", i)
    df = pd.DataFrame([(f"{c}/{f.name}", c) for c in "ab" for f in sorted((home/"own"/"train"/c).iterdir())],
                      columns=["image", "label"])
    a, b = from_folder(home/"own", seed=3), from_df(df, home/"own"/"train", seed=3)
    assert a.labeled.images == b.labeled.images and a.valid.images == b.valid.images and a.classes == b.classes
    assert np.array_equal(a.labeled.labels, b.labeled.labels) and np.array_equal(a.valid.labels, b.valid.labels)


def test_frames_of_other_libraries(home):
    df = frame()
    for o in (pa.Table.from_pandas(df), df.set_index(pd.Index(range(100, 100 + N))), df.convert_dtypes(),
              df.astype("category")):
        assert from_df(o, home/"images").labeled.images == from_df(df, home/"images").labeled.images
        assert open_data(o, images=home/"images").valid.images == from_df(df, home/"images").valid.images


def test_polars(home):
    polars = pytest.importorskip("polars")
    s = from_df(polars.DataFrame(dict(image=[f"{i}.png" for i in range(N)], label=[0, 1, None] * 4)), home/"images")
    assert s.classes == ["0", "1"] and len(s.unlabeled) == 4


@pytest.mark.parametrize("labels, classes", [
    ([10, 9, 2], ["2", "9", "10"]), ([2., 10., np.nan], ["2", "10"]), ([True, False, True], ["False", "True"]),
    (pd.array([10, None, 9], "Int64"), ["9", "10"]), (["b", " a ", ""], ["a", "b"]),
                                             (["two words", "x", "x"], ["two words", "x"])])
def test_labels(home, labels, classes):
    df = frame().assign(label=np.tile(np.arange(3), N // 3))
    own = isinstance(labels, pd.api.extensions.ExtensionArray)
    df["label"] = labels[df.label.to_numpy()] if own else pd.Series(labels)[df.label].to_numpy()
    s = from_df(df, home/"images")
    assert s.classes == classes and len(s.labeled) + len(s.unlabeled) + len(s.valid) == N
    assert len(s.unlabeled) == (N // 3 if len(classes) == 2 and len(set(map(str, labels))) == 3 else 0)


@pytest.mark.parametrize("change, text", [
    (dict(label=[.5, 1.] * 6), "got the number 0.5"), (dict(label=[["a"], ["a", "b"]] * 6),
                                                       "several labels for one image"),
    (dict(label=[1, "1"] * 6), "differ only in type"), (dict(label="a"), "the one class 'a'"),
                                          (dict(label=None), "no label"),
    (dict(image=[f"{i}.png" for i in range(N - 1)] + [None]),
     "1 rows of the table have no file name, the first is row 11"),
    (dict(image=["0.png"] * N),
     r"1 files have several rows with different labels, the first is .*0.png \('a' and 'b'\)"),
    (dict(image=[*range(N - 1), 'gone']), "1 of 12 .*gone.png: the others are: put it there, or drop its row"),
                                          (dict(image=[f"gone/{i}.png" for i in range(N)]), "12 of 12 image files"),
    (dict(label=["a"] * (N - 1) + ["b"]), "class 'b' in the table has one image")])
def test_mistakes(home, change, text):
    with pytest.raises((ValueError, FileNotFoundError), match=text): from_df(frame().assign(**change), home/"images")


def test_of_two_files_of_every_name_one_is_to_be_named(home):
    for i in range(N): draw(home/"images"/f"{i}.jpg", i)
    df = frame().assign(image=range(N))
    with pytest.raises(FileNotFoundError, match='add suffix=".png"'): from_df(df, home/"images")
    assert len(from_df(df, home/"images", suffix=".png").labeled)


def test_where_names_begin_is_said_before_what_columns_are_called(home):
    "Where no file of a table is found, its folder is wrong, and not the name of a column."
    for sub in ("train", "test"):
        for i in range(N): draw(home/"all"/sub/f"{i}.png", i)
    for names in (frame().image, range(N)):
        pd.DataFrame(dict(id=names, breed=frame().label)).to_csv(home/"t.csv", index=False)
        assert len(open_data(home/"t.csv", images=home/"all"/"train").classes) == 2
        with pytest.raises(FileNotFoundError, match="are not there"): open_data(home/"t.csv", images=home/"all")
        with pytest.raises(FileNotFoundError, match="no folder .*/al .did you mean .*/all"):
            open_data(home/"t.csv", images=home/"al")
    with pytest.raises(FileNotFoundError, match="they are in .*/all/train: give that folder"):
        from_df(frame(), home/"all")
    (home/"all"/"train"/"0.png").unlink()
    with pytest.raises(FileNotFoundError, match="they are in .*/all/test: give that folder"):
        from_df(frame(), home/"all")
    (home/"all"/"test"/"1.png").unlink(); (home/"all"/"test"/"2.png").unlink()
    with pytest.raises(FileNotFoundError, match="11 of them are in .*/all/train: give that folder"):
        from_df(frame(), home/"all")


@pytest.mark.parametrize("call, remedy", [(lambda d: from_csv(frame(), d), "from_df"),
                                          (lambda d: from_csv(d), "from_folder")])
def test_of_three_ways_in_the_right_one_is_named(home, call, remedy):
    with pytest.raises(ValueError, match=f"file must be a CSV file, got .*: {remedy} takes that"): call(home)


def test_a_table_beside_folders_that_are_taken_for_classes_is_named(home):
    for i in range(N): draw(home/"mine"/"ab"[i % 2]/f"{i}.png", i)
    assert not [o for o in said(lambda: from_folder(home/"mine"))[1] if "classes" in o]
    frame().to_csv(home/"mine"/"labels.csv", index=False)
    with pytest.warns(UserWarning, match="taken for classes .a, b., and .*labels.csv is not read: give the table"):
        from_folder(home/"mine")


def test_large_numbers_stay_apart_beside_an_empty_label(home):
    "Which double precision would make one."
    a, b = 2**53, 2**53 + 1
    frame().assign(label=[a, b, ""] * 4).to_csv(home/"images"/"t.csv", index=False)
    s = from_csv(home/"images"/"t.csv")
    assert s.classes == [str(a), str(b)] and len(s.unlabeled) == 4


def test_what_splits_have_no_use_for_is_refused(home):
    s = from_df(frame(), home/"images")
    assert open_data(s) is s
    with pytest.raises(ValueError, match="valid_pct cannot be given with Splits: move images"):
        open_data(s, valid_pct=.5)


def test_a_class_that_may_be_several_is_named(home):
    for i in range(N): draw(home/"deep"/"train"/("things", "dogs")[i % 2]/"xyz"[i % 3]/f"{i}.png", i)
    _, told = said(lambda: from_folder(home/"deep"))
    assert len([o for o in told if "class things: all of its images are in 3 folders (x, y, z)" in o]) == 1
    for c in ("things", "dogs"): draw(home/"deep"/"train"/c/"own.png", 0)
    assert not [o for o in said(lambda: from_folder(home/"deep"))[1] if "folders" in o]


def test_all_unreadable_files_are_named_at_once(home):
    from noisy_student.rounds import NoisyStudent
    for i in range(20): draw(home/"torn"/"train"/"ab"[i % 2]/f"{i}.png", i)
    for i in range(4): draw(home/"torn"/"valid"/"ab"[i % 2]/f"{i}.png", i)
    bad = [home/"torn"/o for o in ("train/a/0.png", "train/b/3.png", "valid/b/1.png")]
    for f in bad: f.write_bytes(b"torn")
    with pytest.raises(ValueError, match="2 of the labeled images and 1 of the validation images cannot be used") as e:
        NoisyStudent(home/"torn", "resnet9_4", home/"r", size=8, rounds=0, pretrained=False).fit()
    assert all(str(f) in str(e.value) for f in bad)


def test_a_column_that_was_named_is_the_one_that_is_wrong(home):
    frame().rename(columns=dict(image="id", label="breed")).to_csv(home/"images"/"t.csv", index=False)
    with pytest.raises(ValueError, match="no column 'file'.* name the right one with image="):
        from_csv(home/"images"/"t.csv", image="file")


def test_wrong_folder_names_the_right_one(home):
    with pytest.raises(FileNotFoundError, match="they are in .*/images: give that folder"): from_df(frame(), home)
    with pytest.raises(FileNotFoundError, match="did you mean .*/images"): from_df(frame(), home/"imges")
    with pytest.raises(FileNotFoundError, match="leave suffix out"): from_df(frame(), home/"images", suffix=".png")
    with pytest.raises(FileNotFoundError, match="but beside the table"):
        frame().to_csv(home/"t.csv", index=False)
        from_csv(home/"t.csv", "images")


def test_repeated_rows(home):
    "Said once, taken once; a file with a label and without is labeled."
    df = pd.concat([frame(), frame()[:2], frame()[2:4].assign(label=None)])
    s, seen = said(lambda: from_df(df, home/"images"))
    assert len(seen) == 1 and "2 rows repeat" in seen[0]
    assert names(s.labeled) + names(s.valid) != []
    assert sorted(names(s.labeled) + names(s.valid)) == sorted(frame().image) and not len(s.unlabeled)


def test_white_space_and_names_that_mean_nothing(home):
    s, seen = said(lambda: from_df(frame().assign(label=["a", "a ", "None", "None"] * 3), home/"images"))
    assert s.classes == ["None", "a"] and len(seen) == 2 and "white space" in seen[0]
    assert "'None' is taken for the name of a class" in seen[1]


def test_valid_column(home):
    for marks in ([True] * 4 + [False] * 8, [1] * 4 + [0] * 8, ["true"] * 4 + ["False"] * 8, [1.] * 4 + [0.] * 8):
        assert names(from_df(frame(v=marks), home/"images", valid="v").valid) == ["0.png", "1.png", "2.png", "3.png"]
    for marks, text in ((["train"] * N, "holds 'train'"), ([False] * N, "marks no labeled row"), ([None] * N, "holds"),
                        ([True] * N, "no labeled image of class")):
        with pytest.raises(ValueError, match=text): from_df(frame(v=marks), home/"images", valid="v")
    df = frame(v=[True] * 4 + [False] * 8).assign(label=[None, "a"] + list("ab") * 5)
    s, seen = said(lambda: from_df(df, home/"images", valid="v"))
    assert len(s.valid) == 3 and names(s.unlabeled) == ["0.png"]
    assert "1 rows marked as validation have no label" in seen[0]


def test_groups(home):
    "No group on both sides, whatever its kind; a missing one is a group of its own; the pool's groups are the table's."
    df = frame(g=["x", "x", "y", "y", "z", "z", None, None, "u", "u", "w", "w"])
    df.loc[11, "label"] = None
    for seed in range(5):
        s = from_df(df, home/"images", group="g", seed=seed, valid_pct=.3)
        assert not set(s.labeled.groups) & set(s.valid.groups) and len(s.valid)
        # u is before the two without
        assert len(set([*s.labeled.groups, *s.valid.groups])) == 7 and s.unlabeled.groups.tolist() == [6 - 2]
    with pytest.raises(ValueError, match="1 groups have images in training and in validation, the first is 'x'"):
        from_df(df.assign(v=df.index == 0), home/"images", group="g", valid="v")


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=12, max_size=60), st.integers(0, 99))
def test_whole_groups(rows, seed):
    "A hold-out takes whole groups and leaves an image of every class; where that cannot be, it says so."
    labels, groups = np.array(rows).T
    try: held = grouped(labels, groups, max(1, len(rows) // 5), np.random.default_rng(seed))
    except ValueError as e: assert "group" in str(e); return
    kept = np.setdiff1d(np.arange(len(rows)), held)
    assert len(held) and not set(groups[held]) & set(groups[kept]) and set(labels[kept]) == set(labels)


def test_pool(home):
    "Unlabeled rows and more files, without those that are labeled."
    df = frame(); df.loc[10:, "label"] = None
    for i in range(3): draw(home/"more"/f"m{i}.png", i)
    more = ["m0.png", "m1.png", "m2.png"]
    for o in (home/"more", str(home/"more"), [home/"more"/f for f in more],
              pd.DataFrame(dict(image=[str(home/"more"/f) for f in more]))):
        assert names(from_df(df, home/"images", unlabeled=o).unlabeled) == ["10.png", "11.png", *more]
    s, seen = said(lambda: from_df(df, home/"images", unlabeled=home))
    assert names(s.unlabeled) == ["10.png", "11.png", *more] and "left out of the pool" in seen[0]
    for o, text in ((home/"gone", "no folder or archive"), (3, "unlabeled must be a DataFrame")):
        with pytest.raises((ValueError, FileNotFoundError), match=text): from_df(df, home/"images", unlabeled=o)


def test_test_images(home):
    df = frame()
    assert names(from_df(df[:8], home/"images", test=df[8:]).test) == ["10.png", "11.png", "8.png", "9.png"]
    for i in range(4): draw(home/"test"/"ab"[i % 2]/f"t{i}.png", i)
    assert names(from_df(df, home/"images", test=home/"test").test) == ["t0.png", "t1.png", "t2.png", "t3.png"]
    for o, text in ((df[["image"]], "must have labels"), (df.assign(label=None), "12 have none"),
                    (df.assign(label="c"), "class 'c'"),
                    (df, "test images are labeled or validation images too"), (home/"gone", "no folder")):
        with pytest.raises((ValueError, FileNotFoundError), match=text): from_df(df, home/"images", test=o)


def test_csv(home):
    "As the DataFrame; names keep their zeros, numbers their order, files their encoding and separator."
    df = frame(g=["x", "y", "z"] * 4)
    for sep, encoding in ((",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-8")):
        df.to_csv(home/"images"/"t.csv", index=False, sep=sep, encoding=encoding)
        a, b = from_csv(home/"images"/"t.csv", group="g"), from_df(df, home/"images", group="g")
        assert a.labeled.images == b.labeled.images and np.array_equal(a.labeled.groups, b.labeled.groups)
    for i in range(4): draw(home/"images"/f"00{i}.png", i)
    (home/"images"/"t.csv").write_text("id,c\n000,10\n001,9\n002,10\n003,9\n")
    s = from_csv(home/"images"/"t.csv", image="id", label="c", suffix=".png")
    assert s.classes == ["9", "10"] and names(s.labeled)[0].startswith("00")
    for content, text in ((b"image,label\n\xff\xfe,a\n", "not UTF-8"), (b"", "first line must name"),
                          (b"image,label\n", "no label"), (b'image,label\n"0.png,a\n1.png,b\n', "is not a table")):
        (home/"images"/"t.csv").write_bytes(content)
        with pytest.raises(ValueError, match=text): from_csv(home/"images"/"t.csv")


def test_files_in_an_archive(home):
    import tarfile
    with tarfile.open(home/"images.tar", "w") as t: t.add(home/"images", "all")
    s = from_df(frame(), home/"images.tar"/"all")
    assert len(s.labeled) + len(s.valid) == N and "/images.tar/all/" in s.labeled.images[0]
    with pytest.raises(FileNotFoundError, match="1 of 12"):
        from_df(frame().assign(image=["none.png"] + list(frame().image[1:])), home/"images.tar"/"all")


def test_relative_names_become_absolute(home, monkeypatch):
    monkeypatch.chdir(home)
    assert from_df(frame(), "images").labeled.images == from_df(frame(), home/"images").labeled.images
    frame().to_csv("images/t.csv", index=False)
    assert from_csv("images/t.csv").labeled.images == from_df(frame(), home/"images").labeled.images


@pytest.mark.parametrize("pct", [0, None])
def test_nothing_held_out(home, pct):
    for i in range(4): draw(home/"own"/"ab"[i % 2]/f"{i}.png", i)
    frame().to_csv(home/"images"/"t.csv", index=False)
    for s in (from_folder(home/"own", valid_pct=pct), from_df(frame(), home/"images", valid_pct=pct),
              from_csv(home/"images"/"t.csv", valid_pct=pct)):
        assert not len(s.valid) and s.valid.labels.dtype == np.int64 and s.valid.images == []
    with pytest.raises(ValueError, match="valid_pct must be in"): from_folder(home/"own", valid_pct=-.1)


def test_folders_without_train(tmp_path):
    "Class folders beside the others are as those in train; what looks like another split is refused."
    for root in (tmp_path/"a"/"train", tmp_path/"b"):
        for i in range(8): draw(root/"xy"[i % 2]/f"{i}.png", i)
    for root in (tmp_path/"a", tmp_path/"b"):
        for part in ("valid", "test"):
            for i in range(4): draw(root/part/"xy"[i % 2]/f"{part}{i}.png", i)
        draw(root/"unlabeled"/"deep"/"u.png")
    a, b = (said(lambda: from_folder(tmp_path/o)) for o in "ab")
    assert a[1] == b[1] == [] and a[0].classes == b[0].classes == ["x", "y"]
    for pile in ("labeled", "unlabeled", "valid", "test"):
        assert names(getattr(a[0], pile)) == names(getattr(b[0], pile))
    (tmp_path/"b"/"test").rename(tmp_path/"b"/"Testing")
    with pytest.raises(ValueError, match="would be a class named 'Testing': rename the folder to 'test'"):
        from_folder(tmp_path/"b")


def test_what_is_not_used_is_said(tmp_path):
    for i in range(8): draw(tmp_path/"train"/"xy"[i % 2]/f"{i}.png", i)
    draw(tmp_path/"train"/"loose.png")
    for i in range(2): draw(tmp_path/"test"/"images"/f"{i}.png")
    s, seen = said(lambda: from_folder(tmp_path))
    assert s.test is None and len(seen) == 2
    assert f"1 images in {tmp_path/'train'} lie beside its class folders (loose.png" in seen[0]
    assert f"{tmp_path/'test'} has 2 images and no class folders" in seen[1] and "unlabeled=" in seen[1]
    (tmp_path/"train").rename(tmp_path/"photos")
    (tmp_path/"labels.csv").write_text("image,label\n")
    with pytest.raises(ValueError, match=r"has 1 class folder.*labels.csv \(a table, to be named itself\)"):
        from_folder(tmp_path)


def test_open_data_is_helpful(home):
    s = from_df(frame(), home/"images")
    assert open_data(s) is s
    for o, kwargs, text in ((s, dict(group="g"), "cannot be given with Splits"),
                            (home/"images", dict(suffix=".png"), "cannot be given with a folder"),
                            (home/"images"/"0.png", {}, "got the file"), (home/"imags", {}, "did you mean"),
                            ("digits", {}, "data set by name"),
                            (np.zeros((2, 8, 8, 1), np.uint8), {}, "got a ndarray"),
                            (Split(s.labeled.images), {}, "got a Split"),
                            (home/"imgs.csv", {}, "no file"),
                            (frame(), dict(images=home/"images", unlabelled="x"), "unlabelled")):
        with pytest.raises((ValueError, FileNotFoundError, TypeError), match=text): open_data(o, **kwargs)


def test_lines_within_a_cell_are_no_rows(tmp_path, monkeypatch):
    "A table with long texts in it is read; one whose header promises far more cells than there are bytes is not."
    from noisy_student import untrusted_files
    from noisy_student.tables import read_table
    monkeypatch.setattr(untrusted_files, "_CELLS", 1000)
    wide = ",".join(["image", "label", *(f"f{i}" for i in range(30))])
    report = '"' + "\n".join(["a line"] * 40) + '"'
    (file := tmp_path/"t.csv").write_text("\n".join([wide, *(f"{i}.png,a,{report}" for i in range(20))]) + "\n")
    assert len(read_table(file)) == 20
    file.write_text(wide + "\n" + "x\n" * 2000)
    with pytest.raises(ValueError, match="t.csv has 2,001 rows and 32 columns"): read_table(file)
