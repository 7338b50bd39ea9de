"The page of a run: in a browser, with names that want to be code, without data, and where a run is unlike others."
import json
import os
import re
import shutil
import subprocess
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from noisy_student.cli import main
from noisy_student.pseudo_labels import select_pseudo_labels
from noisy_student.report import RunRecord, extremes, read_run, report_html, run_warnings, skewed_classes, write_report
from noisy_student.rounds import NoisyStudent
from noisy_student.run_warnings import left_out
from test_rounds import SETTINGS, miniature

CHROME = next((o for o in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if o), None)
NASTY = ["<script>document.title='hacked'</script>", "a & b", 'quo"te', "it's", "$x^2$", "<b>", "日本", "é", "x" * 90,
         "-->"]
PROBE = """<script>
window.errors = 0; window.onerror = () => { window.errors++ };
const all = o => [...document.querySelectorAll(o)];
window.onload = () => {  // the pictures are in the page: they are there now, and the browser prints the page after this
  const d = {
    pictures: document.images.length, loaded: [...document.images].filter(o => o.complete && o.naturalWidth > 0).length,
    tables: document.querySelectorAll('table').length, cells: document.querySelectorAll('td').length,
    emptyTables: [...document.querySelectorAll('tbody')].filter(o => !o.rows.length).length,
    charts: all('svg').length, scripts: document.scripts.length - 1, errors: window.errors, title: document.title,
    drawn: all('svg').filter(o => o.getBoundingClientRect().height > 50
                               && o.querySelectorAll('path').length > 5).length,
    width: window.innerWidth, scroll: document.documentElement.scrollWidth,
    wide: all('.wide').filter(o => o.scrollWidth > o.clientWidth).length,
    ids: new Set(all('[id]').map(o => o.id)).size === all('[id]').length,
    out: all('[src],[href]').map(o => o.getAttribute('src') || o.getAttribute('href'))
                            .filter(o => !o.startsWith('data:') && !o.startsWith('#')).length,
  };
  const e = document.createElement('pre');
  e.id = 'probe'; e.textContent = 'PROBE' + JSON.stringify(d) + 'EBORP'; document.body.append(e);
};
</script>"""


def quiet_fit(run):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.fit()
    return [str(o.message) for o in seen]


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    "A finished run over classes with nasty names, with suspects and robustness measured by hand."
    torch.set_num_threads(1)
    data = replace(miniature(), classes=NASTY)
    run = NoisyStudent(data, "resnet9_4", tmp_path_factory.mktemp("runs") / "<i>run",
                       **{**SETTINGS, "epochs": 3, "teacher_epochs": 6, "threshold": .2})
    quiet_fit(run)
    (run.path / "suspects" / "round_2").mkdir(parents=True)
    pd.DataFrame(dict(kind="labeled", item=[3, 8], label=NASTY[0], predicted=NASTY[5], confidence=.9, quality=.1,
                      issue=[True, False])).to_csv(
        run.path / "suspects" / "round_2" / "suspects.csv", index=False)
    pd.DataFrame(dict(round=[0, 1, 2], n=100, accuracy=[.5, .6, .7], corrupted_error=[.6, .5, .4],
                      flip_rate=[.1, .2, np.nan],
                      fgsm_accuracy=[.1, .2, .3])).to_csv(run.path / "robustness.csv", index=False)
    run.report()
    return run


def browse(page, tmp_path, width):
    "What a browser says of a page."
    (tmp_path / "probe.html").write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    dom = subprocess.run([CHROME, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                          "--disable-dev-shm-usage",
                          f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", "--dump-dom",
                          (tmp_path / "probe.html").as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search("PROBE({.*})EBORP", dom.stdout)
    assert found, f"the browser ended with {dom.returncode} and said nothing of the page: {dom.stderr[-2000:]}"
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@pytest.mark.skipif(CHROME is None, reason="no chromium or chrome is installed")
@pytest.mark.parametrize("width", [390, 1100, 1400])
def test_page_in_a_browser(nasty, tmp_path, width):
    d = browse(nasty.path / "report.html", tmp_path, width)
    assert d["loaded"] == d["pictures"] > 40 and d["charts"] == d["drawn"] == 9
    assert d["errors"] == d["scripts"] == d["emptyTables"] == d["out"] == 0 and d["ids"]
    assert d["tables"] >= 6 and d["cells"] > 150
    assert d["scroll"] <= d["width"] and not d["wide"], "the page or a table is wider than its window"
    assert d["title"] == "<i>run: Noisy Student Training"


def test_names_stay_names(nasty):
    html = (nasty.path / "report.html").read_text()
    assert "<script" not in html and "<i>" not in html and "&lt;script&gt;" in html and "&lt;i&gt;run" in html
    assert "<b>" not in re.sub(r"<div class=\"tile\"><b>|<b>is |→ <b>", "", html)
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html) and "@import" not in html
    for section in ("Is the student better?", "Are the pseudo labels any good?", "Is confidence right?",
                    "Coverage against accuracy", "Class by class",
                    "What was trained on", "Labels that flipped", "Labels that are probably wrong",
                    "Is it more robust?", "How it was made"): assert section in html
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_size_is_bounded(tmp_path):
    "Thirty classes and noise, which no format makes smaller: at most 20 classes are shown, and the page says so."
    full, rng = miniature(), np.random.default_rng(0)
    noise = rng.integers(0, 256, (400, 40, 40, 3), dtype=np.uint8)
    names = [f"class {i}" for i in range(30)]
    data = replace(full, classes=names, labeled=replace(full.labeled, images=noise[:50], labels=np.arange(50) % 30),
                   valid=replace(full.valid[:60], images=noise[50:110]),
                   test=None, unlabeled=replace(full.unlabeled, images=noise[150:350], hidden=None))
    run = NoisyStudent(data, "resnet9_4", tmp_path / "r",
                       **{**SETTINGS, "rounds": 1, "size": 40, "threshold": 0., "epochs": 1, "teacher_epochs": 1})
    quiet_fit(run)
    page = (run.path / "report.html").read_text()
    assert "Only the first 20 of 30 classes are shown" in page and "The first 20 of 30 classes" in page
    assert len(page) < 2.5e6
    assert "test" not in re.search(r"<table.*?</table>", page, re.S)[0].replace("test (95 %)", "")
    assert "Is confidence right?" not in page


def test_without_data_and_again(nasty, tmp_path):
    "From the files alone there are neither pictures nor truth; with the data the page is the same every time."
    shutil.copytree(nasty.path, tmp_path / "copy")
    bare = write_report(tmp_path / "copy").read_text()
    assert "data:image" not in bare and "Is confidence right?" not in bare and "Class counts" in bare
    pages = [report_html(read_run(nasty.path, nasty.data)) for _ in range(2)]
    assert pages[0] == pages[1] == (nasty.path / "report.html").read_text()


@pytest.mark.parametrize("share_of, what", [("pool", "the pool"), ("class", "every class")])
def test_a_share_is_shown_with_its_confidence(nasty, tmp_path, share_of, what):
    "What passed is what is in the share, and a threshold that did not choose is not warned of."
    folder = shutil.copytree(nasty.path, tmp_path / "copy") / "round_2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = select_pseudo_labels(folder / "pseudo_labels", folder / "selected.parquet", share=1, share_of=share_of)
    run = read_run(folder.parent, nasty.data)
    assert run.labels[2].passed.sum() == len(pd.read_parquet(folder / "pseudo_labels")) == run.labels[2].known_passed
    assert not [o for o in run_warnings(run) if o.startswith("Round 2: the threshold")] and run.labels[1].share is None
    assert f"most confident 100 % of {what}: confidence from {chosen.summary.threshold.min():.3g}" in report_html(run)
    shutil.rmtree(folder / "pseudo_labels")  # as after relabeling: what is left has passed
    assert (read_run(folder.parent).labels[2].passed == chosen.summary.kept).all()


class Biased:
    "A learner whose network has learned to prefer class 3."
    def __init__(self, learner): self.learner = learner
    def __call__(self, run, k=None):
        learn = self.learner(run, k)
        last = [m for m in learn.model.modules() if isinstance(m, torch.nn.Linear)][-1]
        with torch.no_grad(): last.bias[3] += 20
        return learn


def record(tmp_path, valid, test, sizes, rounds=1):
    "A finished run of these accuracies per round."
    metrics = [dict(round=k, role="student" if k else "teacher", arch="a", parameters=1, labeled=9,
                    pseudo_labeled=9 * k, valid_accuracy=p, test_accuracy=q, seconds=1.)
               for k, (p, q) in enumerate(zip(valid, test))]
    config = dict(classes=["cat", "dog"], recipe=dict(rounds=rounds))
    history = {k: pd.DataFrame(dict(epoch=[0], train_loss=1., valid_loss=1., valid_accuracy=p)) for k,
               p in enumerate(valid)}
    return RunRecord(tmp_path, config, dict(config=config, sizes=sizes), pd.DataFrame(metrics), metrics, history, {})


def test_a_run_that_was_cut_short_does_not_look_fine(tmp_path):
    "It says which rounds are not there: not yet, or left out for lack of time."
    from noisy_student.files import sealed
    cut = record(tmp_path, [.9, .9], [.9, .9], dict(valid=1000), rounds=2)
    assert run_warnings(cut)[0].startswith("2 of 3 rounds are done: fit(), or the same command")
    page = report_html(cut)
    assert "Nothing looks wrong" not in page and "2 of 3 rounds are done" in page
    (tmp_path/"round_2").mkdir()
    (tmp_path/"round_2"/"plan.json").write_text(sealed(dict(steps=0, limit=60.)))
    assert run_warnings(cut) == [] and left_out(cut).startswith("2 of 3 rounds are done: the time limit leaves")
    page = report_html(cut)
    assert "Nothing looks wrong" in page and left_out(cut) in page
    (tmp_path/"round_2"/"checkpoint").mkdir()
    (tmp_path/"round_2"/"checkpoint"/"state.safetensors").touch()  # it was gone on with without a limit
    assert not left_out(cut) and run_warnings(cut)[0].startswith("2 of 3 rounds are done: fit(), or the same command")
    (tmp_path/"fold_0"/"round_2").mkdir(parents=True)  # a fold that has not begun is left out still
    (tmp_path/"fold_0"/"round_2"/"plan.json").write_text(sealed(dict(steps=0, limit=60.)))
    assert left_out(cut) and run_warnings(cut) == []
    assert not left_out(record(tmp_path, [.9] * 3, [.9] * 3, dict(valid=1000), rounds=2))
    assert "Nothing looks wrong" in report_html(record(tmp_path, [.9, .9], [.9, .9], dict(valid=1000)))


@pytest.mark.parametrize("train, noise, heads, said", [
    (2., dict(randaugment_n=2), 0, "dotted: training, which is noised and higher."),
    (.5, dict(randaugment_n=2), 0, "dotted: training, which is noised."),
    (2., dict(randaugment_n=0, dropout=0., survival=1.), 0, "dotted: training."),
    (2., dict(randaugment_n=2), 1, "dotted: training."),
    (2., dict(swap=.1), 0, "dotted: training, which is noised and higher.")])
def test_of_the_training_loss_is_said_what_is_true(tmp_path, train, noise, heads, said):
    run = record(tmp_path, [.9, .9], [.9, .9], dict(valid=1000))
    run.recipe.update(noise=noise, head_rounds=heads)
    run.history[1]["train_loss"] = train
    run.history[0]["train_loss"] = 1.5
    assert said in report_html(run)


def test_the_points_of_one_series_stand_on_their_ticks(tmp_path):
    from matplotlib.figure import Figure
    from noisy_student.report_charts import draw_chart
    for test, at in ((None, [0, 1]), (.7, [-.04, .96])):
        ax = Figure().subplots()
        draw_chart(ax, "accuracy", record(tmp_path, [.7, .9], [test] * 2, dict(valid=100)))
        assert ax.lines[0].get_xdata().tolist() == pytest.approx(at)


def test_a_long_name_breaks_after_an_underscore(tmp_path):
    run = record(tmp_path, [.7, .9], [.7, .9], dict(valid=100))
    for o in run.metrics: o["arch"] = "tf_<efficientnet>_lite0"
    assert "<span>tf_<wbr>&lt;efficientnet&gt;_<wbr>lite0</span>" in report_html(run)


def test_a_gain_within_chance_is_no_praise(tmp_path):
    "The tile of the gain is green only where its interval is above zero."
    def tile(gain, n):
        html = report_html(record(tmp_path, [.7, .9], [.7, .7 + gain], dict(valid=1000, test=n)))
        tile = r'<div class="tile"><b><span class="(\w*)">([^<]*)</span></b><span>(points (?:above|below)[^<]*)'
        return re.search(tile, html).groups()
    assert tile(.02, 100) == ("even", "2.0", "points above the teacher, test, within chance")
    assert tile(.02, 100_000) == ("good", "2.0", "points above the teacher, test")
    assert tile(-.02, 100_000) == ("bad", "2.0", "points below the teacher, test")
    assert tile(.02, 0) == ("good", "2.0", "points above the teacher, test")  # a run that does not say how many


@pytest.mark.parametrize("p, counts, said", [
    (.5, [50, 50],
     "is no better than chance: 50.0 % (40.4 to 59.6) of 100 validation images are right, 50.0 % by always answering "
     "cat"),
    (.8, [20, 80], "is no better than chance"), (.55, [50, 50], "may be no better than chance"),
                                             (.85, [20, 80], "may be no better than chance"),
    (.5, None, "50.0 % by guessing"), (.7, [50, 50], None), (.95, [20, 80], None)])
def test_chance_level_of_the_last_network_is_named(tmp_path, p, counts, said):
    sizes = dict(valid=100, **(dict(valid_per_class=counts) if counts else {}))
    run = record(tmp_path, [.9, p], [.9, p], sizes)
    found = [o for o in run_warnings(run) if "chance: " in o]
    assert len(found) == (said is not None)
    assert all(said in o and "More epochs or more labels may help" in o for o in found)
    # it goes on
    assert not [o for o in run_warnings(record(tmp_path, [.9, p], [.9, p], sizes, rounds=2)) if "chance: " in o]
    assert ("no better than chance" in report_html(run)) == (said is not None)


def test_planted_collapse_is_said(tmp_path, monkeypatch):
    from noisy_student.run_learners import Learners
    biased = Biased(Learners.trained)
    monkeypatch.setattr(Learners, "trained", lambda learners, k: biased(learners, k))
    run = NoisyStudent(miniature(), "resnet9_4", tmp_path / "r", **{**SETTINGS, "rounds": 1, "threshold": .2})
    said = quiet_fit(run)
    [takes] = [o for o in said if "takes over: 3 (" in o]
    assert takes.startswith("Round 1") and "10.0 % of the labeled images" in takes
    assert any("collapse" in o for o in said)
    assert takes.split(":")[1] in (run.path / "report.html").read_text() and takes in run_warnings(read_run(run.path))


def test_shares_by_chance_and_tiny_counts():
    "No class of one or two images is named, and neither is a class that is as frequent among both."
    for labeled, pseudo in (([1, 1], [3, 0]), ([2, 2, 2], [5, 1, 0]), ([900, 100], [9000, 1000]), ([10, 10], [0, 0]),
                            ([5], [100])):
        assert skewed_classes(np.array(labeled), np.array(pseudo)) == []
    assert skewed_classes(np.array([10, 10]), np.array([1000, 3])) == [(0, True), (1, False)]


def test_a_page_that_fails_does_not_fail_the_run(tmp_path, monkeypatch):
    from noisy_student import round_task, run_results
    def broken(*a): raise RuntimeError("no ink")
    monkeypatch.setattr(run_results, "write_report", broken)
    monkeypatch.setattr(round_task, "round_warnings", broken)
    run = NoisyStudent(miniature(), "resnet9_4", tmp_path / "r",
                       **{**SETTINGS, "rounds": 0, "epochs": 1, "teacher_epochs": 1})
    said = quiet_fit(run)
    assert len(run.summary) == 1 and not (run.path / "report.html").exists()
    assert sum("no ink" in o and "report.html could not be written" in o for o in said) == 1
    monkeypatch.undo()
    assert not quiet_fit(run) and (run.path / "report.html").exists()  # the next call makes it
    assert len(run.report().axes) == 1 and "How good is it?" in (run.path / "report.html").read_text()


def test_charts_of_long_names_stand_side_by_side(nasty):
    fig = nasty.report()
    fig.draw_without_rendering()
    spans = sorted((o.x0, o.x1) for o in (ax.get_position() for ax in fig.axes))
    assert len(spans) == 3 and all(a[1] < b[0] for a, b in zip(spans, spans[1:]))


def test_no_empty_axes_where_nothing_was_stored(tmp_path):
    run = NoisyStudent(miniature(), "resnet9_4", tmp_path / "r",
                       **{**SETTINGS, "rounds": 1, "epochs": 1, "teacher_epochs": 1, "on_the_fly": True, "threshold": 0,
                                                                   "per_class": None})
    quiet_fit(run)
    assert len(run.report().axes) == 1 and "not kept" in (run.path / "report.html").read_text()


def test_selection_that_is_relabeled(tmp_path):
    run = NoisyStudent(miniature(), "resnet9_4", tmp_path / "r",
                       **{**SETTINGS, "epochs": 1, "teacher_epochs": 4, "relabel": "selected", "threshold": .2})
    quiet_fit(run)
    labels = read_run(run.path, run.data).labels
    assert labels[2].everything is None and labels[2].seen.sum() == labels[1].kept.sum()
    assert "Class counts" in (run.path / "report.html").read_text()


def test_extremes_of_few(nasty):
    ends = extremes(nasty.path / "round_2" / "selected.parquet", 1000)
    assert len(ends) == len(pd.read_parquet(nasty.path / "round_2" / "selected.parquet")) and ends.item.is_unique


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for c in "ab":
        for part, n in (("train", 8), ("valid", 4)):
            (tmp_path / "mine" / part / c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(np.random.default_rng([ord(c), n, i])
                                .integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "mine" / part / c
                                                                                     / f"{i}.png")
    assert main("run mine --labels 4 --arch resnet9_4 --rounds 1 --epochs 1 --threshold 0 --device cpu".split()) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "report: " + os.path.join("runs", "mine", "report.html")
    page = tmp_path / "runs" / "mine" / "report.html"
    first = page.read_text()
    page.unlink()
    os.chdir("mine")  # names mean the same from every folder
    assert main(["report", str(tmp_path / "runs" / "mine")]) == 0 and page.read_text() == first
    assert "data:image/png" in first
    assert capsys.readouterr().out.strip() == str(page)
    assert main(["report", str(tmp_path / "runs" / "mine"), str(tmp_path / "mine")]) == 0 and page.read_text() == first
    assert main(["report", str(tmp_path / "runs" / "mine"), "digits"]) == 2 and "is not what" in capsys.readouterr().err
    shutil.move(tmp_path / "mine", tmp_path / "moved")
    os.chdir(tmp_path)
    assert main(["report", "runs/mine"]) == 0
    assert "not at hand" in capsys.readouterr().err and "data:image" not in page.read_text()
    assert main(["report", "moved"]) == 2 and "run.json" in capsys.readouterr().err


def test_a_table_is_made_of_rows(tmp_path):
    from sklearn.datasets import load_breast_cancer
    from noisy_student.tabular import TabularNoisyStudent, TabularRecipe
    df = load_breast_cancer(as_frame=True).frame.iloc[:300, -6:]
    df.loc[100:, "target"] = None
    run = TabularNoisyStudent(df, "target", tmp_path / "r", recipe=TabularRecipe(rounds=1, epochs=2))
    quiet_fit(run)
    page = (run.path / "report.html").read_text()
    assert "rows labeled" in page and "data:image" not in page and "Class by class" in page
