"Folds: every label trains and judges, from the shell as from Python, on files and tables, resumable, without leaks."
import json, shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from noisy_student.datasets import digits
from noisy_student.folds import fold_of
from noisy_student.models import create_model, save_weights
from noisy_student.rounds import NoisyStudent, load_model
from PIL import Image

SMALL = dict(recipe="default", rounds=1, epochs=2, steps=5, bs=8, size=16, threshold=0., progress=lambda *_: None)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Two colors, twelve of each labeled, in pairs of a group; a pool of ten; a table of them."
    root, rng, rows = tmp_path_factory.mktemp("photos"), np.random.default_rng(0), []
    for i in range(34):
        label = ["red", "blue"][i % 2]
        picture = np.clip(np.array([200, 60, 60] if label == "red" else [60, 60, 200]) + rng.normal(0, 30, (20, 20, 3)),
                          0, 255)
        Image.fromarray(picture.astype(np.uint8)).save(root/f"{i:02}.png")
        rows.append((f"{i:02}.png", label if i < 24 else None, i // 4))
    pd.DataFrame(rows, columns=["image", "label", "group"]).to_csv(root/"table.csv", index=False)
    return root


def test_a_table_with_groups_from_the_shell(photos, tmp_path, capsys):
    from noisy_student.cli import main
    line = ["run", photos/"table.csv", "--images", photos, "--group-column", "group", "--out", tmp_path/"run",
            "--folds", 3, "--recipe",
            "default", "--arch", "resnet9_4", "--rounds", 1, "--epochs", 2, "--steps", 5, "--bs", 8, "--size", 16,
            "--threshold", 0]
    assert main([str(o) for o in line]) == 0
    out = capsys.readouterr()
    assert "fold 3 of 3, round 1" in out.err and (tmp_path/"run"/"report.html").stat().st_size > 10_000
    for f in range(3):
        assert (tmp_path/"run"/f"fold_{f}"/"round_1"/"model.safetensors").exists()
    assert main(["predict", str(tmp_path/"run"), str(photos/"00.png"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert sorted(row["classes"]) == ["blue", "red"] and abs(sum(row["probabilities"]) - 1) < 1e-4
    assert main(["evaluate", str(tmp_path/"run"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert main(["predict", shown[0]["weights"], str(photos/"00.png")]) == 0
    out_of_fold = pd.read_csv(tmp_path/"run"/"summary.csv").valid_accuracy
    capsys.readouterr()
    # not by networks that saw the label
    assert main(["evaluate", str(tmp_path/"run"), str(photos/"table.csv"), "--json"]) == 0
    assert np.allclose([o["valid_accuracy"] for o in json.loads(capsys.readouterr().out)], out_of_fold)
    page = (tmp_path/"run"/"report.html").read_text()
    assert all(f'href="fold_{f}/report.html"' in page and (tmp_path/"run"/f"fold_{f}"/"report.html").exists()
               for f in range(3))
    assert main(["evaluate", str(tmp_path/"run")]) == 0 and main(["report", str(tmp_path/"run")]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path/"run"), "--out", str(tmp_path/"x.safetensors")]) == 2
    assert "fold_0" in capsys.readouterr().err


def test_each_fold_has_clusters_of_its_own_labels(tmp_path):
    weights = save_weights(create_model("resnet9_4", 10, 1), tmp_path/"weights.safetensors")
    data = digits(40)
    data = replace(data, unlabeled=data.unlabeled[:80])
    settings = dict(pretrained=str(weights), size=8, rounds=1, head_rounds=2, clusters=True, share=.5)
    def fit(): return NoisyStudent(data, "resnet9_4", tmp_path/"run", folds=2, progress=lambda *_: None,
                                   **settings).fit()
    first = fit().drop(columns="seconds")
    files = [o.relative_to(tmp_path/"run") for o in (tmp_path/"run").rglob("clusters-*")]
    assert sorted(o.parts[0] for o in files) == ["fold_0", "fold_1"] and len({o.name for o in files}) == 2
    assert "in agreement with clusters" in (tmp_path/"run"/"fold_0"/"report.html").read_text()
    for o in (tmp_path/"run").glob("fold_*/round_1"): shutil.rmtree(o)
    assert fit().drop(columns="seconds").equals(first)


def test_groups_stay_together_and_all_labels_judge(photos, tmp_path):
    df = pd.read_csv(photos/"table.csv")
    from noisy_student.tables import from_df
    ns = NoisyStudent(from_df(df, photos, group="group"), "resnet9_4", tmp_path/"run", folds=3, **SMALL)
    plan = ns.plan()
    assert plan.seconds.sum() > 0 and plan.amount.str.endswith(", 3 times").all() and set(plan["round"]) == {0, 1}
    ns.fit()
    oof = ns.oof()
    assert len(oof) == 24 and oof.item.is_unique
    group = oof.item.map(lambda o: int(o[-6:-4]) // 4)
    assert (oof.fold.groupby(group).nunique() == 1).all()
    truth = df.set_index("image").label[oof.item.map(lambda o: o[-6:])]
    assert (oof.label.to_numpy() == truth.to_numpy()).all()
    assert abs((oof.label == oof.predicted).mean() - ns.summary.valid_accuracy[ns.best]) < 1e-9
    assert (oof[["blue", "red"]].sum(axis=1) - 1).abs().max() < 1e-4
    assert len(ns.predict([str(photos/"30.png")])) == 1 and load_model(ns.path).classes == ["blue", "red"]
    assert repr(ns.plan()) == "nothing is left to do: all 2 rounds are done"
    assert len(ns.learner(fold=2).get_preds()[0]) == (ns.of == 2).sum()
    with pytest.raises(ValueError, match=r"fold must be in 0\.\.2"): ns.learner(fold=3)


def test_labels_of_a_fold_do_not_reach_it(photos, tmp_path, monkeypatch):
    """With other labels in one fold, what its networks say of it stays what it was, pseudo labels and all; what others
    say does not."""
    from noisy_student import folds
    from noisy_student.tables import from_df
    monkeypatch.setattr(folds, "fold_of", lambda labels, *_: np.arange(len(labels)) % 2)
    df, answers = pd.read_csv(photos/"table.csv"), []
    for name in ("a", "b"):
        ns = NoisyStudent(from_df(df, photos), "resnet9_4", tmp_path/name, folds=2, **SMALL)
        if name == "b":
            labels = ns.parts[1].data.labeled.labels # of fold 0, which trains the networks of fold 1
            labels[:] = 1 - labels
        ns.fit()
        answers.append(ns.oof(1)[["blue", "red"]].to_numpy())
    np.testing.assert_allclose(answers[0][::2], answers[1][::2], atol=1e-6)
    assert np.abs(answers[0][1::2] - answers[1][1::2]).max() > 1e-3


def test_what_is_missing_or_other_is_noticed(photos, tmp_path):
    from noisy_student.tables import from_df
    data = from_df(pd.read_csv(photos/"table.csv"), photos)
    ns = NoisyStudent(data, "resnet9_4", tmp_path/"run", folds=2, **SMALL)
    before = ns.fit().valid_accuracy.tolist()
    shutil.rmtree(tmp_path/"run"/"fold_1"/"round_0")
    again = NoisyStudent(data, "resnet9_4", tmp_path/"run", folds=2, **SMALL)
    assert again.fit().valid_accuracy.tolist() == before
    assert (tmp_path/"run"/"fold_1"/"round_0"/"model.safetensors").exists()
    assert again.oof(0).iloc[:, 5:].equals(ns.oof(0).iloc[:, 5:])
    with pytest.raises(ValueError, match="other settings"):
        NoisyStudent(data, "resnet9_4", tmp_path/"run", **SMALL).fit()
    with pytest.raises(ValueError, match="threshold: 0.0 there, 0.6 here"):
        NoisyStudent(data, "resnet9_4", tmp_path/"run", folds=2, **{**SMALL, "threshold": .6}).fit()
    with pytest.raises(ValueError, match="pseudo_labels made elsewhere and folds"):
        NoisyStudent(data, "resnet9_4", tmp_path/"b", folds=2,
                     pseudo_labels=tmp_path/"run"/"fold_0"/"round_1"/"selected.parquet", **SMALL)


def test_suspects_are_found_out_of_fold_and_without_a_pool(photos, tmp_path, capsys):
    pytest.importorskip("cleanlab")
    from noisy_student.cli import main
    df = pd.read_csv(photos/"table.csv").dropna()
    df.loc[0, "label"] = "blue" # of a red one
    df.to_csv(tmp_path/"table.csv", index=False)
    line = ["run", tmp_path/"table.csv", "--images", photos, "--out", tmp_path/"run", "--folds", 3, "--recipe",
            "default", "--arch", "resnet9_4",
            "--rounds", 0, "--epochs", 5, "--steps", 10, "--bs", 8, "--size", 16, "--force"]
    assert main([str(o) for o in line]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["suspects", str(tmp_path/"run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {o["kind"] for o in found} == {"labeled"} and found[0]["item"].endswith("00.png"), found
    assert main(["suspects", str(tmp_path/"run")]) == 0
    assert "\nquality, from 0 to 1: below .5 " in (said := capsys.readouterr().out) and "pseudo label" not in said


def test_folds_say_what_was_chosen(photos, tmp_path, monkeypatch, capsys):
    from noisy_student import configure
    from noisy_student.published_weights import Choice
    monkeypatch.setattr(configure, "default_arch", lambda *_, **__: Choice("resnet9_4", False, "small"))
    NoisyStudent(photos/"table.csv", images=photos, path=tmp_path/"r", folds=2, rounds=0, steps=2, epochs=1, size=8,
                 force=True, time_limit=60, progress=lambda *_: None).fit()
    assert [o.split(":")[0] for o in capsys.readouterr().err.splitlines()[:2]] == ["network", "plan"]


def test_classes_that_cannot_be_dealt_out(photos, tmp_path):
    with pytest.raises(ValueError, match="at least two labeled images of every class"): fold_of(np.array([0, 0, 1]), 2)
    df = pd.read_csv(photos/"table.csv").iloc[[0, 2, 4, 1, 24, 25]]
    from noisy_student.tables import from_df
    with pytest.raises(ValueError, match="at least two labeled"):
        NoisyStudent(from_df(df, photos, valid_pct=0), "resnet9_4", tmp_path/"run", folds=2, **SMALL)
