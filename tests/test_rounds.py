"What is no story: kill -9 at any moment, folders as people have them, faults of the disk."
import json, multiprocessing, os, shutil, signal, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

SETTINGS = dict(recipe="digits", epochs=2, teacher_epochs=3, steps=10, size=8, temperature=0.5, threshold=0.3, rounds=2,
                lr=1e-2, seed=3, force=True)

pytestmark = pytest.mark.usefixtures("no_page")


def miniature():
    "50 labeled digits, 200 unlabeled ones."
    from dataclasses import replace
    from noisy_student.datasets import digits
    full = digits(seed=0)
    return replace(full, labeled=full.labeled[np.arange(0, 100, 2)], unlabeled=full.unlabeled[:200],
                   test=full.test[:100])


def fit(path, **changes):
    import torch
    from noisy_student.rounds import NoisyStudent
    torch.set_num_threads(1)
    return NoisyStudent(miniature(), ["resnet9_4", "resnet9_8"], path, **{**SETTINGS, **changes}).fit()


# the least that writes every file, and each checkpoint twice
FEW = dict(rounds=1, steps=4, teacher_epochs=2, threshold=0.0)


def fit_few(path):
    "In a child process."
    from noisy_student import report
    report.report_html = lambda *_: "<html></html>\n"  # as the fixture `no_page` does
    fit(path, **FEW)


@pytest.fixture(scope="module")
def processes():
    "Processes forked from a server that has imported everything: a start costs milliseconds."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["noisy_student.rounds", __name__])
    return context


def outcome(path):
    from noisy_student.models import load_tensors
    weights = {f: load_tensors(f)[0] for f in sorted(path.glob("round_*/model.safetensors"))}
    history = pd.concat([pd.read_csv(f) for f in sorted(path.glob("round_*/history.csv"))])
    return pd.read_csv(path / "summary.csv").drop(columns="seconds"), history, [(f.parent.name, k, v) for f,
                                                                                t in weights.items() for k,
                                                                                v in sorted(t.items())]


def run(processes, path, kill_after=None):
    "Run `fit_few` in a process; kill it -9 after so many seconds. Returns whether it was killed."
    p = processes.Process(target=fit_few, args=(path,))
    p.start()
    p.join(kill_after)
    if p.is_alive():
        os.kill(p.pid, signal.SIGKILL)
        p.join()
    assert p.exitcode in (0, -signal.SIGKILL)
    return p.exitcode == -signal.SIGKILL


def assert_same(path, whole):
    (s, h, w), (summary, history, weights) = outcome(path), whole
    pd.testing.assert_frame_equal(s, summary)
    pd.testing.assert_frame_equal(h, history)
    for (a, b, x), (c, d, y) in zip(w, weights, strict=True): assert (a, b) == (c, d) and x.equal(y)


def test_killed_at_any_moment_ends_the_same(processes, tmp_path):
    for name in ("whole", "again"):  # the first one also waits for the server's imports
        begun = time.perf_counter()
        assert not run(processes, tmp_path / name)
        seconds = time.perf_counter() - begun
    whole, rng, killed = outcome(tmp_path / "whole"), np.random.default_rng(0), 0
    for i in range(3):
        path = tmp_path / f"killed{i}"
        for fraction in rng.uniform(0.1, 0.5, 2): killed += run(processes, path, fraction * seconds)
        assert not run(processes, path)
        assert_same(path, whole)
    assert killed >= 4  # a busy or a fast machine may let one finish first


def test_killed_before_any_file_is_in_place_ends_the_same(tmp_path, monkeypatch):
    "The directory as a kill just before each rename would leave it."
    real, left = os.replace, []

    def replace(*names):
        left.append(tmp_path / f"left{len(left)}")
        shutil.copytree(tmp_path / "whole", left[-1])
        return real(*names)
    with monkeypatch.context() as m:
        m.setattr(os, "replace", replace)
        fit(tmp_path / "whole", **FEW)
    whole = outcome(tmp_path / "whole")
    assert len(left) > 20
    for path in left:
        fit(path, **FEW)
        assert_same(path, whole)


def test_summary_is_written_again(tmp_path):
    fit(tmp_path / "a")
    (tmp_path / "a" / "summary.csv").unlink()
    fit(tmp_path / "a")
    assert len(pd.read_csv(tmp_path / "a" / "summary.csv")) == 3


def test_selection_of_another_pool_is_refused(tmp_path):
    from noisy_student.datasets import digits
    from noisy_student.rounds import NoisyStudent
    NoisyStudent(miniature(), "resnet9_4", tmp_path / "a", **{**SETTINGS, "rounds": 1}).fit()
    selected = tmp_path / "a" / "round_1" / "selected.parquet"
    for other in (digits(seed=5), digits(n_labeled=1090)):
        with pytest.raises(ValueError, match="another pool"):
            NoisyStudent(other, "resnet9_4", tmp_path / "b", pseudo_labels=selected, **{**SETTINGS, "rounds": 0})


def test_settings_that_are_none_are_taken_as_such(tmp_path):
    from noisy_student.rounds import NoisyStudent
    assert NoisyStudent(miniature(), "resnet9_4", tmp_path, recipe="cifar10", per_class=None).recipe.per_class is None
    for wrong in ("median", 0, True):
        with pytest.raises(ValueError, match="per_class"):
            NoisyStudent(miniature(), "resnet9_4", tmp_path, per_class=wrong)


def test_a_network_is_named(tmp_path):
    from noisy_student.models import create_model
    from noisy_student.rounds import NoisyStudent
    for archs in (create_model("resnet9_4", 10, 1), [create_model("resnet9_4", 10, 1)]):
        with pytest.raises(ValueError, match="must be names"): NoisyStudent(miniature(), archs, tmp_path)


def test_learner_is_an_ordinary_learner(tmp_path, monkeypatch):
    from fastai.interpret import ClassificationInterpretation
    from fastai.learner import load_learner
    from noisy_student.rounds import NoisyStudent
    data = miniature()
    ns = NoisyStudent(data, "resnet9_4", tmp_path / "a", **{**SETTINGS, "rounds": 0})
    ns.fit()
    learn = ns.learner()
    with learn.no_bar():
        probs, targets = learn.get_preds()
        assert probs.shape == (len(data.valid), 10) and (targets.numpy() == data.valid.labels).all()
        assert ClassificationInterpretation.from_learner(learn).confusion_matrix().shape == (10, 10)
        first = learn.predict(data.valid.images[0])[2]
        assert first.allclose(probs[0], atol=1e-5)
        learn.export(tmp_path / "export.pkl")
        assert load_learner(tmp_path / "export.pkl").predict(data.valid.images[0])[2].allclose(first, atol=1e-6)


@pytest.fixture
def folder(tmp_path):
    "A folder as people have them: red and blue pictures of all sizes and modes, and files that are no pictures."
    rng, root = np.random.default_rng(0), tmp_path / "own"

    def picture(color, size=(40, 30)):
        a = rng.integers(0, 90, (*size[::-1], 3), dtype=np.uint8)
        a[..., color] += 140
        return Image.fromarray(a)
    for name, color in dict(blue=2, red=0).items():
        for split, n in dict(train=8, valid=3, test=3).items():
            (root / split / name).mkdir(parents=True)
            for i in range(n): picture(color).save(root / split / name / f"{i}.jpg")
    pool = root / "unlabeled" / "some" / "where"
    pool.mkdir(parents=True)
    for i in range(20): picture(2 * (i % 2), (30 + i, 70 - i)).save(pool / f"{i}.png")
    picture(0).convert("P").save(pool / "palette.gif")
    picture(0).convert("CMYK").save(pool / "cmyk.jpg")
    picture(2).convert("L").save(pool / "gray.png")
    picture(2).convert("RGBA").save(pool / "alpha.png")
    Image.fromarray(rng.integers(0, 2**16, (9, 9), dtype=np.uint16)).save(pool / "sixteen.png")
    (pool / "empty.jpg").touch()
    (pool / "notes.txt").write_text("no picture")
    (pool / "half.jpg").write_bytes((root / "train" / "red" / "0.jpg").read_bytes()[:300])
    (pool / "gone.jpg").symlink_to(pool / "nowhere.jpg")
    return root


FOLDER = dict(epochs=2, teacher_epochs=8, steps=10, bs=8, ratio=1, size=16, rounds=1, threshold=0.5, min_scale=1.0,
              lr=1e-2)


def noisy_student(data, path, **changes):
    from noisy_student.learner import Noise
    from noisy_student.rounds import NoisyStudent
    return NoisyStudent(data, "resnet9_4", path, noise=Noise(1, 3, 0.1, 0.95), **{**FOLDER, **changes})


def test_folder_with_odd_files(folder, tmp_path):
    from noisy_student.datasets import from_folder
    with pytest.warns(UserWarning, match="3 of 28 unlabeled files are left out"):
        summary = noisy_student(from_folder(folder), tmp_path / "run").fit()
    assert list(summary.role) == ["teacher", "student"]
    skipped = pd.read_csv(tmp_path / "run" / "skipped.csv")
    assert sorted(Path(f).name for f in skipped.item) == ["empty.jpg", "gone.jpg", "half.jpg"]
    labels = pd.read_parquet(tmp_path / "run" / "round_1" / "pseudo_labels")
    assert len(labels) == 25 and all(Path(f).is_file() for f in labels.item)
    assert summary.valid_accuracy.max() == 1  # red and blue: anything less is a bug


def test_bad_labeled_image_stops_before_training(folder, tmp_path):
    from noisy_student.datasets import from_folder
    (folder / "train" / "red" / "bad.jpg").write_text("not a picture")
    with pytest.raises(ValueError, match="bad.jpg"): noisy_student(from_folder(folder), tmp_path / "run").fit()
    assert not (tmp_path / "run" / "round_0").exists()


def test_same_folder_another_file_is_another_run(folder, tmp_path):
    from noisy_student.datasets import from_folder
    noisy_student(from_folder(folder, unlabeled=folder / "unlabeled" / "some"), tmp_path / "run", rounds=0).fit()
    Image.new("RGB", (9, 9)).save(folder / "train" / "red" / "new.png")
    with pytest.raises(ValueError, match="data"):
        noisy_student(from_folder(folder, unlabeled=folder / "unlabeled" / "some"), tmp_path / "run", rounds=0).fit()


def test_the_same_network_by_another_name_goes_on(tmp_path):
    "What the names resolve to is compared: a run is resumed under any spelling of its networks, and of no others."
    from noisy_student.models import resolved
    from noisy_student.rounds import NoisyStudent
    def run(archs, **more):
        return NoisyStudent(miniature(), archs, tmp_path / "run",
                            **{**SETTINGS, "rounds": 1, "epochs": 1, "teacher_epochs": 1, "size": 32, **more})
    with pytest.raises(KeyboardInterrupt): run("resnet10t", progress=stop_in("round 1: training")).fit()
    assert len(run(["resnet10t.c3_in1k", "resnet10t"]).fit()) == 2
    assert run("resnet10t.c3_in1k").fit().arch.tolist() == ["resnet10t"] * 2
    for other in ("resnet9_4", ["resnet10t", "resnet9_4"]):
        with pytest.raises(ValueError, match="archs: .*resnet10t.* there, .*resnet9_4.* here"): run(other).fit()
    for a, b, same in [("resnet18", "resnet18.a1_in1k", (True, True)), ("resnet18", "resnet18.tv_in1k", (True, False)),
                       ("resnet9_24", "resnet9_32", (False, False)),
                       ("tf_efficientnet_b0_ns", "tf_efficientnet_b0.ns_jft_in1k", (True, True)),
                       ("tf_efficientnet_b0_ns", "tf_efficientnet_b0", (True, True)),
                       ("tf_efficientnet_b0_small_image", "tf_efficientnet_b0", (False, False)),
                       ("no.such", "none", (False, False))]:
        assert tuple(resolved(a, weights) == resolved(b, weights) for weights in (False, True)) == same, (a, b)


def stop_in(name):
    def stop(stage, done, total):
        if stage.startswith(name): raise KeyboardInterrupt
    return stop


def test_torn_checkpoint_is_noticed(tmp_path, monkeypatch):
    from noisy_student.checkpoints import RunState
    from noisy_student.rounds import NoisyStudent
    monkeypatch.setattr(RunState, "every", 0.)
    data, calls = miniature(), []

    def stop(*a):
        calls.append(a)
        if len(calls) == 25: raise KeyboardInterrupt
    kw = {**SETTINGS, "rounds": 0}
    with pytest.raises(KeyboardInterrupt): NoisyStudent(data, "resnet9_4", tmp_path / "a", progress=stop, **kw).fit()
    file = tmp_path / "a" / "round_0" / "checkpoint" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="state.safetensors"):
        got = NoisyStudent(data, "resnet9_4", tmp_path / "a", **kw).fit()
    expected = NoisyStudent(data, "resnet9_4", tmp_path / "b", **kw).fit()
    pd.testing.assert_frame_equal(got.drop(columns="seconds"), expected.drop(columns="seconds"))


def test_full_disk_names_the_file_and_loses_nothing(tmp_path, monkeypatch):
    import errno
    from noisy_student.rounds import NoisyStudent
    kw, writes, real = {**SETTINGS, "rounds": 0}, [], os.fsync

    def full(fd):
        writes.append(fd)
        if len(writes) > 6: raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot write .*safetensors.*No space left"):
        NoisyStudent(miniature(), "resnet9_4", tmp_path / "a", **kw).fit()
    monkeypatch.undo()
    got = NoisyStudent(miniature(), "resnet9_4", tmp_path / "a", **kw).fit()
    expected = NoisyStudent(miniature(), "resnet9_4", tmp_path / "b", **kw).fit()
    pd.testing.assert_frame_equal(got.drop(columns="seconds"), expected.drop(columns="seconds"))


def test_diverging_training_says_so(tmp_path):
    from noisy_student.rounds import NoisyStudent
    with pytest.raises(FloatingPointError, match="lower lr"):
        NoisyStudent(miniature(), "resnet9_4", tmp_path / "a", **{**SETTINGS, "rounds": 0, "lr": 1e30}).fit()


def test_damaged_run_json(tmp_path):
    from noisy_student.rounds import NoisyStudent
    ns = NoisyStudent(miniature(), "resnet9_4", tmp_path / "a", **{**SETTINGS, "rounds": 0})
    ns.fit()
    (tmp_path / "a" / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is damaged"): ns.fit()


def test_no_image_file_is_left_open(tmp_path):
    "The command shows every warning of this package: one per image would bury the others."
    import gc, warnings
    from noisy_student.datasets import from_folder
    from noisy_student.rounds import NoisyStudent
    for i in range(8):
        for part in ("train/a", "train/b", "unlabeled"):
            (tmp_path / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8 + i, 9, 3), i * 20, np.uint8)).save(tmp_path / part / f"{i}.png")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert NoisyStudent(from_folder(tmp_path), "resnet9_4", tmp_path / "run").size == 9
        gc.collect()
    assert not [str(o.message) for o in told if o.category is ResourceWarning]


def test_hard_labels_and_a_given_selection(tmp_path):
    from noisy_student.rounds import NoisyStudent
    data = miniature()
    NoisyStudent(data, "resnet9_4", tmp_path / "a", **{**SETTINGS, "rounds": 1, "soft": False}).fit()
    selected = tmp_path / "a" / "round_1" / "selected.parquet"
    given = NoisyStudent(data, "resnet9_4", tmp_path / "b", pseudo_labels=selected, **{**SETTINGS, "rounds": 0}).fit()
    assert list(given.role) == ["student"] and given.pseudo_labeled[0] == len(pd.read_parquet(selected))
    config = json.loads((tmp_path / "b" / "run.json").read_text())["config"]
    assert config["pseudo_labels"]


class Heard:
    "A progress function that also hears epochs."
    def __init__(self): self.epochs = []
    def __call__(self, stage, done, total): pass
    def epoch(self, stage, done, total, figures): self.epochs.append((stage, done, total, figures))


def test_figures_of_every_epoch_are_told_and_kept(tmp_path):
    from fastai.metrics import F1Score, top_k_accuracy
    from noisy_student.rounds import NoisyStudent
    ns = NoisyStudent(miniature(), "resnet9_4", tmp_path/"a", progress=(heard := Heard()),
                      metrics=[F1Score(average="macro"), top_k_accuracy], **{**SETTINGS, "rounds": 1})
    ns.fit()
    kept = pd.concat([pd.read_csv(tmp_path/"a"/f"round_{k}"/"history.csv") for k in (0, 1)])
    assert [o[1:3] for o in heard.epochs] == [(1, 3), (2, 3), (3, 3), (1, 2), (2, 2)]
    assert [o[0][:7] for o in heard.epochs] == ["round 0"] * 3 + ["round 1"] * 2
    told = pd.DataFrame([o[3] for o in heard.epochs])
    assert list(told) == ["train_loss", "valid_loss", "valid_accuracy", "f1_score", "top_k_accuracy"] == list(kept)[1:]
    assert np.allclose(told, kept.iloc[:, 1:]) and (kept.top_k_accuracy >= kept.valid_accuracy).all()
    with ns.learner(1).no_bar(): again = ns.learner(1).validate()
    assert np.allclose(again, kept.iloc[-1, 2:], atol=1e-5)
    with pytest.raises(ValueError, match="choose_by='f1'"):
        NoisyStudent(miniature(), "resnet9_4", tmp_path/"b", metrics="f1", **SETTINGS)


def test_metrics_of_every_kind_of_fastai(tmp_path):
    "A `Metric`, one that is no single number, and two of one name: all are kept, none ends a training."
    from fastai.learner import AvgMetric
    from fastai.metrics import F1Score, Perplexity, error_rate
    from noisy_student.rounds import NoisyStudent
    metrics = [AvgMetric(error_rate), Perplexity(), F1Score(average=None), F1Score(average="macro")]
    for folds, path in ((None, tmp_path/"a"), (2, tmp_path/"b")):
        NoisyStudent(miniature(), "resnet9_4", path, metrics=metrics, folds=folds,
                     **{**SETTINGS, **FEW, "rounds": 0}).fit()
    history = pd.read_csv(tmp_path/"a"/"round_0"/"history.csv")
    assert np.allclose(history.error_rate, 1 - history.valid_accuracy)
    assert np.allclose(history.perplexity, np.exp(history.valid_loss), rtol=1e-4)
    assert history.f1_score[0].count(" ") >= 9 and history["f1_score 2"].between(0, 1).all()
    assert list(pd.read_csv(tmp_path/"b"/"fold_0"/"round_0"/"history.csv")) == list(history)


def test_damaged_figures_are_made_again(tmp_path):
    "Before they are sealed, too; the first that `fit` does is not to read them."
    fit(tmp_path/"a", **FEW)
    whole = outcome(tmp_path/"a")
    for damage in ("{", json.dumps(dict(round=1, valid_accuracy=.5, score="high"))):
        (tmp_path/"a"/"round_1"/"metrics.json").write_text(damage)
        (tmp_path/"a"/"round_1"/"SHA256SUMS").unlink()
        with pytest.warns(UserWarning, match="round 1 makes it again"): fit(tmp_path/"a", **FEW)
        assert_same(tmp_path/"a", whole)


def test_a_run_of_an_older_version_is_judged_like_one_of_today(tmp_path):
    "Its metrics know neither score nor its error."
    fit(tmp_path/"a", **{**FEW, "rounds": 2})
    new = tmp_path/"a"
    from noisy_student.rounds import NoisyStudent, read_summary
    def best():
        return NoisyStudent(miniature(), ["resnet9_4", "resnet9_8"], new, **{**SETTINGS, **FEW, "rounds": 2}).best
    expected, scores = best(), read_summary(new)[["score", "score_error"]]
    for k in range(2):  # the last one is of today
        file = new/f"round_{k}"/"metrics.json"
        file.write_text(json.dumps({a: b for a, b in json.loads(file.read_text()).items()
                                    if a not in ("score", "score_error", "valid_f1", "valid_balanced_accuracy",
                                                 "valid_log_loss")}))
        (new/f"round_{k}"/"SHA256SUMS").unlink()
    assert best() == expected and np.allclose(read_summary(new)[["score", "score_error"]], scores)


def test_a_student_that_is_worse_on_the_same_images_is_not_used(tmp_path, monkeypatch):
    "Though its accuracy is within one standard error: what is warned of is what is done."
    from noisy_student.rounds import NoisyStudent
    from noisy_student import image_task
    real, teachers = image_task.valid_figures, []

    # the student answers as its teacher does, but for six images that it now gets wrong
    def figures(y, logits, choose_by):
        if teachers: logits[:] = teachers[0]; logits[np.flatnonzero(logits.argmax(1) == y)[:6]] *= -1
        else: teachers.append(logits.copy())
        return real(y, logits, choose_by)
    monkeypatch.setattr(image_task, "valid_figures", figures)
    ns = NoisyStudent(miniature(), "resnet9_4", tmp_path/"a",
                      **{**SETTINGS, "rounds": 1, "teacher_epochs": 8, "steps": 20})
    with pytest.warns(UserWarning, match="worse beyond chance .* Round 0 is used"): s = ns.fit()
    assert s.score[0] - s.score_error[0] < s.score[1] < s.score[0] and ns.best == 0 and s.worse_than[1] == 0


def test_the_figure_that_chooses_and_the_weights_of_classes(tmp_path):
    from dataclasses import replace
    from noisy_student.checks import class_metrics
    from noisy_student.rounds import NoisyStudent, load_model
    data = miniature()
    rare = np.concatenate([np.flatnonzero(data.labeled.labels == c)[1:] for c in (0, 5)])  # one image is left of each
    data = replace(data, labeled=data.labeled[np.setdiff1d(np.arange(len(data.labeled)), rare)])
    settings = {**SETTINGS, "rounds": 1}
    ns = NoisyStudent(data, "resnet9_4", tmp_path/"a", choose_by="f1", class_weights="balanced", **settings)
    s = ns.fit()
    for k in (0, 1):
        with (learn := ns.learner(k)).no_bar(): probs, y = learn.get_preds()
        found = class_metrics(y.numpy(), probs.numpy(), 10)
        assert abs(found["f1"] - s.valid_f1[k]) < 1e-9 and s.score[k] == s.valid_f1[k] and 0 < s.score_error[k] < .1
        assert abs(found["balanced_accuracy"] - s.valid_balanced_accuracy[k]) < 1e-9
    top = s.score.idxmax()
    assert ns.best == max(s["round"][s.score >= s.score[top] - s.score_error[top]])
    used = load_model(tmp_path/"a").model.state_dict()
    assert all((v == load_model(tmp_path/"a"/f"round_{ns.best}").model.state_dict()[k]).all() for k, v in used.items())
    weight = ns.learners.new(0, None, ns.recipe.noise).loss_func.weight
    counts = np.bincount(data.labeled.labels, minlength=10)
    assert np.allclose(weight * counts, len(data.labeled) / 10)
    plain = NoisyStudent(data, "resnet9_4", tmp_path/"b", **{**settings, "rounds": 0}).fit()
    assert plain.valid_f1[0] != s.valid_f1[0] and plain.score[0] == plain.valid_accuracy[0]
    for wrong in (dict(choose_by="precision"), dict(class_weights="heavy")):
        with pytest.raises(ValueError, match="must be '"):
            NoisyStudent(data, "resnet9_4", tmp_path/"c", **settings, **wrong)


def test_mistaken_metrics_and_settings_are_refused_before_training(tmp_path):
    from fastai.metrics import F1Score
    from noisy_student.rounds import NoisyStudent
    ns = NoisyStudent(miniature(), "resnet9_4", tmp_path/"a", metrics=F1Score(), **SETTINGS)  # of two classes
    with pytest.raises(ValueError, match="average='macro'"): ns.fit()
    assert not list((tmp_path/"a").glob("round_*/*"))
    for name, meant in dict(timelimit="time_limit", time_limt="time_limit", batch_size="bs", thresold="threshold",
                            unlabelled="unlabeled", lable="label").items():
        with pytest.raises(ValueError, match=f"unknown setting '{name}' .did you mean {meant}"):
            NoisyStudent(miniature(), "resnet9_4", tmp_path/"b", **{name: 1})


def test_what_is_said_of_the_data_reaches_them(tmp_path):
    "A pool, a folder of images and columns by name; for data that are there already they are refused."
    from noisy_student.rounds import NoisyStudent
    rng = np.random.default_rng(0)
    for i in range(30):
        file = tmp_path/("new" if i < 10 else "images")/f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(file)
    rows = [dict(photo=f"{i}.png", age=i, breed="ab"[i % 2]) for i in range(10, 30)]
    pd.DataFrame(rows).to_csv(tmp_path/"t.csv", index=False)
    said = dict(images=tmp_path/"images", unlabeled=tmp_path/"new", image="photo", label="breed", valid_pct=.5)
    ns = NoisyStudent(tmp_path/"t.csv", "resnet9_4", tmp_path/"a", recipe="default", **said)
    assert [len(o) for o in (ns.data.labeled, ns.data.unlabeled, ns.data.valid)] == [10, 10, 10]
    assert ns.data.classes == ["a", "b"]
    for one in ("unlabeled", "label"):
        with pytest.raises(ValueError, match=f"{one} cannot be given with Splits"):
            NoisyStudent(ns.data, "resnet9_4", tmp_path/"a", recipe="default", **{one: said[one]})


def test_the_figures_are_seen_where_a_run_is_printed(tmp_path):
    from noisy_student.rounds import NoisyStudent
    ns = NoisyStudent(miniature(), "resnet9_4", tmp_path/"a", **{**SETTINGS, **FEW})
    assert "0 of 2 rounds done" in str(ns) and "\n" not in str(ns)
    s = ns.fit()
    lines = str(ns).splitlines()
    assert "2 of 2 rounds done" in lines[0] and f"{s.valid_accuracy[1]:.3f}" in lines[3]
    assert max(map(len, lines[1:-1])) <= 80 and lines[-1] == str(tmp_path/"a"/"report.html")  # a path may be long
    assert lines[1:] == str(s).splitlines() == repr(ns.summary).splitlines() and "score" in s  # all columns are there
    assert repr(ns.plan()) == "nothing is left to do: all 2 rounds are done"
    fresh = NoisyStudent(miniature(), "resnet9_4", tmp_path/"b", **{**SETTINGS, **FEW})
    assert repr(fresh.summary) == "no round is finished yet"


def test_a_time_limit_leaves_out_what_does_not_fit(tmp_path, monkeypatch):
    "A student of a few steps would be worse than its teacher: it waits for a longer limit, with which the run goes on."
    from noisy_student.rounds import NoisyStudent
    def run(limit):
        return NoisyStudent(miniature(), "resnet9_4", tmp_path/"a", time_limit=limit, pretrained=False, seed=0, size=8)
    from noisy_student.time_limit import Timing
    real = Timing.step_seconds
    monkeypatch.setattr(Timing, "step_seconds", lambda self, k, *a: 5. if k else real(self, k, *a))  # a slow student
    ns = run(20)
    assert set(ns.plan()["round"]) == {0}
    assert "\nno time for round 1: there would be with time_limit='" in str(ns.plan())
    with pytest.warns(UserWarning, match="no time for it in 20 s; with a longer time_limit"): s = ns.fit()
    assert list(s["round"]) == [0] and not (tmp_path/"a"/"round_1"/"pseudo_labels").exists()
    assert (tmp_path/"a"/"report.html").exists()
    with pytest.warns(UserWarning, match="round 1 is left out"): run(20).fit()  # nothing new
    monkeypatch.undo()
    kept = (tmp_path/"a"/"round_0"/"model.safetensors").read_bytes()
    with pytest.warns(UserWarning, match="chosen for time_limit=20 s when it began; those for .*=2.0 h"):
        longer = run("2h")
    assert longer.recipe == ns.recipe and NoisyStudent(miniature(), "resnet9_4", tmp_path/"b", time_limit="2h",
                                                       pretrained=False, size=8).recipe != ns.recipe
    ahead = run(40).plan()
    assert set(ahead["round"]) == {1} and ahead.seconds.sum() < 40
    assert list(run(40).fit()["round"]) == [0, 1] and (tmp_path/"a"/"round_0"/"model.safetensors").read_bytes() == kept
    assert not len(run(40).plan()) and list(run(40).plan().columns) == ["round", "stage", "amount", "seconds"]


def test_a_run_goes_on_as_it_was_decided(tmp_path, monkeypatch):
    "Also in a version that would decide otherwise: nothing is made again. What is named counts as always."
    from dataclasses import replace
    from noisy_student import configure
    from noisy_student.rounds import NoisyStudent
    def run(where="a", **more):
        named = dict(epochs=1, teacher_epochs=1, steps=3, rounds=1, bf16=False, size=8, pretrained=False)
        return NoisyStudent(miniature(), "resnet9_4", tmp_path/where, force=True, **{**named, **more})
    begun = run()
    begun.fit_to(0)
    weights = (tmp_path/"a"/"round_0"/"model.safetensors").read_bytes()
    real = configure.auto_recipe
    def newer(facts, **given):
        a = real(facts, **given)
        return a._replace(recipe=replace(a.recipe, lr=a.recipe.lr/2, share=.1))
    monkeypatch.setattr(configure, "auto_recipe", newer)
    assert run("b").config != begun.config == run().config
    assert run().why.set_index("setting").why["lr"] == "as when the run began"
    with pytest.raises(ValueError, match="lr: .* there, 0.1 here"): run(lr=.1).fit()
    assert list(run().fit()["round"]) == [0, 1]
    assert (tmp_path/"a"/"round_0"/"model.safetensors").read_bytes() == weights


def test_a_time_limit_is_kept(tmp_path):
    from noisy_student.rounds import NoisyStudent
    import torch
    torch.set_num_threads(1)
    fit(tmp_path/"warm", **FEW)  # what is loaded on first use
    begun = time.perf_counter()
    ns = NoisyStudent(miniature(), None, tmp_path/"a", time_limit=20, pretrained=False)
    planned = ns.plan().seconds.sum()
    s = ns.fit()
    assert 15 < planned < 22 and 14 < time.perf_counter() - begun < 25 and list(s["round"]) == [0, 1]


def test_a_run_is_named_after_its_data():
    "As the user named it: what looks like a suffix of a folder is none."
    from noisy_student.rundir import run_folder
    names = dict(photos="photos", **{"photos.v2": "photos.v2", "a/b/": "b", "t.csv": "t", "T.CSV": "T"})
    for given, name in names.items(): assert run_folder(None, given) == Path("runs")/name


def test_libraries_without_metadata_are_asked_themselves(tmp_path, monkeypatch):
    "As in a source tree that nobody installed; one that does not say its version stops nobody"
    import noisy_student, timm
    from importlib.metadata import PackageNotFoundError
    from noisy_student import run_file
    from noisy_student.rundir import RunDir
    def nowhere(name): raise PackageNotFoundError(name)
    monkeypatch.setattr(run_file, "version", nowhere)
    monkeypatch.delattr(timm, "__version__")
    with (run := RunDir(tmp_path / "run")).alone(): run_file.write_run(run, dict(seed=0))
    versions = json.loads((run.path / "run.json").read_text())["versions"]
    assert versions["noisy_student"] == noisy_student.__version__ and versions["timm"] == "unknown"
    import PIL, torch
    assert (versions["torch"], versions["pillow"]) == (str(torch.__version__), PIL.__version__)
