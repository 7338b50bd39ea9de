"A time limit: what was decided stays, what has gone counts, and nobody trains in vain."
import json, re, shutil, time

import numpy as np
import pandas as pd
import pytest
import torch

from noisy_student.speed import Rates

pytestmark = pytest.mark.usefixtures("no_page")
SMALL = dict(recipe="digits", rounds=1, epochs=2, teacher_epochs=6, steps=5, bs=8, size=8, threshold=0., force=True)


class Interrupted(Exception): pass


def run(path, stop=None, **changes):
    "50 labeled digits; `stop` ends the teacher's training after so many batches."
    from dataclasses import replace
    from noisy_student.datasets import digits
    from noisy_student.rounds import NoisyStudent
    torch.set_num_threads(1)
    full = digits(seed=0)
    data = replace(full, labeled=full.labeled[np.arange(0, 100, 2)], unlabeled=full.unlabeled[:100], test=None)
    def tell(stage, done, total):
        if stop and "training the teacher" in stage and done == stop: raise Interrupted
    return NoisyStudent(data, "resnet9_4", path, progress=tell, **{**SMALL, **changes})


@pytest.fixture
def checkpoints_everywhere(monkeypatch):
    from noisy_student.checkpoints import RunState
    monkeypatch.setattr(RunState, "every", 0.)


def test_a_training_that_has_begun_keeps_its_length(tmp_path, checkpoints_everywhere):
    "Interrupted without a limit and resumed with one, it ends as it would have, bit by bit."
    from noisy_student.models import load_tensors
    with pytest.raises(Interrupted): run(tmp_path/"a", stop=22).fit()
    run(tmp_path/"a", time_limit=100).fit_to(0)
    run(tmp_path/"b").fit_to(0)
    a, b = (tmp_path/o/"round_0" for o in "ab")
    assert len(pd.read_csv(a/"history.csv")) == 6
    (one, _), (other, _) = (load_tensors(o/"model.safetensors") for o in (a, b))
    assert all((v == other[k]).all() for k, v in one.items())


def test_the_time_of_an_interrupted_training_counts(tmp_path, checkpoints_everywhere):
    with pytest.raises(Interrupted): run(tmp_path/"a", stop=22, time_limit=100).fit()
    clock = run(tmp_path/"a", time_limit=100).task.timing
    assert clock.earlier > 0 and clock.gone == clock.earlier
    plan = json.loads((tmp_path/"a"/"round_0"/"plan.json").read_text())
    begun = plan["begun"]
    assert clock.trained_seconds(0) > 0 and clock.earlier == pytest.approx(begun + clock.trained_seconds(0))


def test_a_limit_shortens_what_was_asked_for_and_never_lengthens_it(tmp_path, monkeypatch):
    ns = run(tmp_path/"a", time_limit="2h")
    assert list(ns.plan().amount[:1]) == ["30 steps"]
    ns.fit()
    assert [len(pd.read_csv(tmp_path/"a"/f"round_{k}"/"history.csv")) for k in (0, 1)] == [6, 2]
    slow = run(tmp_path/"b", time_limit=100, epochs=400)
    monkeypatch.setattr(slow.task.timing, "step_seconds", lambda k, *_: .1)
    student = slow.plan().query("round == 1 and stage.str.startswith('student')")
    assert 0 < int(student.amount.iloc[0].split()[0].replace(",", "")) < 400 * 5
    assert slow.plan().seconds.sum() <= 100 + 1e-9 # a sum of rounded numbers


def test_a_plan_counts_what_is_shuffled_together(tmp_path):
    "Where labels and pseudo labels are one set, a student's epoch is a pass over both."
    ns = run(tmp_path/"a", ratio=None, label_smoothing=0., steps=None, time_limit="1h")
    def planned(): return ns.plan().query("round == 1 and stage.str.startswith('student')").amount.iloc[0]
    n, bs, epochs = 50 + 100, 8, 2
    assert planned() == f"{epochs * -(-n // bs)} steps"  # of the whole pool, as nothing is selected yet
    made = ns.fit()
    loader = ns.learners.new(1, ns.labeling.label(1), ns.recipe.noise).dls.train
    assert made.pseudo_labeled[1] > 0 and ns.task.timing.full_length(1) == epochs * loader.steps


def test_epochs_that_were_shortened_stay_so_without_a_limit(tmp_path, checkpoints_everywhere):
    def length(path): return [json.loads(o.read_text()) for o in path.glob("round_0/plan.json")]
    with pytest.raises(Interrupted): run(tmp_path/"a", stop=12, time_limit=100).fit()
    timing = run(tmp_path/"a", time_limit=100).task.timing
    timing.note(0, epochs={"2": 2})
    calls = []
    again = run(tmp_path/"a")
    again.task.tell = lambda stage, done, total: calls.append((done, total)) if "the teacher" in stage else None
    again.fit_to(0)
    assert len(length(tmp_path/"a")) == 1 and len(calls) < 30  # 6 epochs of 5 steps, of which four are of two


def test_without_students_nobody_looks_at_the_pool(tmp_path):
    "With a time limit as without one."
    from faults import make_pictures
    from noisy_student.rounds import NoisyStudent
    root = make_pictures(tmp_path/"d")
    for f in (root/"unlabeled").iterdir(): f.unlink()
    (root/"unlabeled"/"torn.png").write_bytes(b"torn")
    for k, limit in enumerate((None, 60)):
        settings = {**SMALL, "rounds": 0, "time_limit": limit, "progress": lambda *_: None}
        assert len(NoisyStudent(root, "resnet9_4", tmp_path/str(k), **settings).fit()) == 1


def test_what_is_left_out_names_the_limit_that_would_do(tmp_path):
    "Nothing is measured a second time for a round that is known to have no time."
    asked = []
    def start(**more):
        ns = run(tmp_path/"a", **more)
        def measured(): asked.append(1); return Rates({0: .01, 1: 1.}, {0: 1e3, 1: 1e3})
        ns.task.timing.measured = measured
        return ns
    with pytest.warns(UserWarning, match=r"round 1 is left out: .* with a longer time_limit \('1m' or more\) the run"):
        assert len(start(time_limit=20).fit()) == 1
    asked.clear()
    with pytest.warns(UserWarning, match=r"time_limit \('1m' or more\)"): start(time_limit=20).fit()
    assert not asked
    again = start(time_limit="1m")
    again.task.timing.start(time.perf_counter())
    assert not again.task.timing.is_left_out(1)


def test_one_figure_is_said_of_a_round_that_has_no_time(tmp_path, monkeypatch):
    "Before the run and after it, unless what was said before would not do."
    for slower, same in ((1.05, True), (3., False)):
        ns = run(tmp_path/str(slower), time_limit=20)
        timing, rates = ns.task.timing, Rates({0: .01, 1: 6.}, {0: 1e3, 1: 1e3})
        timing.measured = lambda rates=rates: rates
        (said,) = re.findall(r"time_limit='(\w+)'", str(ns.plan()))
        timing.measured = lambda rates=rates, by=slower: rates._replace(step_seconds={0: .01, 1: by * 6.})
        with pytest.warns(UserWarning, match="round 1 is left out") as seen: ns.fit()
        (at_the_end,) = re.findall(r"time_limit \('(\w+)' or more\)", str([str(o.message) for o in seen]))
        assert (said == at_the_end) is same
        timing.measured = lambda rates=rates: rates._replace(step_seconds={0: .01, 1: 60.})  # other programs run, too
        assert f"time_limit='{at_the_end}'" in str(ns.plan())


def test_where_one_fold_has_no_time_none_trains_in_vain(tmp_path, monkeypatch):
    from noisy_student.run_clock import Clock
    from noisy_student.run_record import read_run
    from noisy_student.run_warnings import left_out
    real = Clock.left
    late = lambda self, k: -1. if k and "fold_2" in str(self.learners.dir.path) else real(self, k)  # noqa: E731
    monkeypatch.setattr(Clock, "left", late)
    ns = run(tmp_path/"a", folds=3, time_limit=100, teacher_epochs=2)
    with pytest.warns(UserWarning, match="round 1 is left out"): s = ns.fit()
    assert list(s["round"]) == [0] and not any(o.dir.is_done(1) for o in ns.parts)
    assert "With a longer one" in left_out(read_run(tmp_path/"a"))
    assert "no time for round 1: there would be with time_limit='" in str(ns.plan())


@pytest.mark.parametrize("stage, longer", [("round 1: labeling", {}), ("round 1: training", {}),
                                           ("round 1: labeling", dict(time_limit="1h"))])
def test_what_was_left_out_and_goes_on_is_left_out_no_more(tmp_path, checkpoints_everywhere, stage, longer):
    "Without a limit or with a longer one, also where it is interrupted again, before its training or in it."
    from noisy_student.run_record import read_run
    from noisy_student.run_warnings import left_out, run_warnings
    ns = run(tmp_path/"a", time_limit=20)
    ns.task.timing.measured = lambda: Rates({0: .01, 1: 1.}, {0: 1e3, 1: 1e3})
    with pytest.warns(UserWarning, match="round 1 is left out"): ns.fit()
    assert "With a longer one" in left_out(read_run(tmp_path/"a"))
    def tell(what, done, total):
        if what.startswith(stage): raise Interrupted
    again = run(tmp_path/"a", **longer)
    again.task.tell = again.labeling.tell = tell
    with pytest.raises(Interrupted): again.fit()
    made = read_run(tmp_path/"a")
    assert left_out(made) == "" and "1 of 2 rounds are done: fit(), or the same command" in run_warnings(made)[0]
    whole = run(tmp_path/"a", **longer).fit()
    assert list(whole["round"]) == [0, 1] and not left_out(read_run(tmp_path/"a"))


def test_memory_that_does_not_suffice_is_noticed_while_measuring(tmp_path):
    "Batches are halved there, as in training, if that is allowed."
    def too_large(module, args):
        if module.training and len(args[0]) > 8: raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
    for allowed in (True, False):
        ns = run(tmp_path/str(allowed), bs=16, rounds=0, teacher_epochs=1, auto_batch=allowed, time_limit=60)
        make = ns.learners.new
        def learner(*a, make=make, **k):
            learn = make(*a, **k)
            learn.model.register_forward_pre_hook(too_large)
            return learn
        ns.learners.new = learner
        if allowed:
            with pytest.warns(UserWarning, match="in 2 parts of 8"): assert len(ns.fit()) == 1
        else:
            with pytest.raises(MemoryError, match="auto_batch"): ns.fit()


def test_a_given_selection_makes_round_0_a_student(tmp_path):
    "Also where time is planned: its epochs are those of a student."
    teacher = run(tmp_path/"a")
    teacher.fit()
    ns = run(tmp_path/"b", rounds=0, pseudo_labels=tmp_path/"a"/"round_1"/"selected.parquet")
    plan = ns.plan()
    assert list(plan.stage[:1]) == ["student: resnet9_4"] and list(plan.amount[:1]) == ["10 steps"]


def test_after_a_torn_checkpoint_the_whole_one_stays(tmp_path, monkeypatch):
    "A kill while the next one is written leaves what was there."
    from noisy_student import checkpoints
    c = checkpoints.Checkpoint(tmp_path/"state.safetensors")
    for i in range(2): c.save(dict(step=i, w=torch.ones(3), seconds=float(i)))
    assert checkpoints.seconds_of(c.file) == 1. and checkpoints.seconds_of(tmp_path/"nowhere") == 0.
    c.file.write_bytes(c.file.read_bytes()[:-4])
    found = []
    with pytest.warns(UserWarning, match="goes on from an earlier point"): c.load(found.append)
    def killed(*_): raise SystemExit
    monkeypatch.setattr(checkpoints, "into_place", killed)
    with pytest.raises(SystemExit): c.save(dict(step=2, w=torch.ones(3)))
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="goes on from an earlier point"): c.load(found.append)
    assert [o["step"] for o in found] == [0, 0]
    c.save(dict(step=2, w=torch.ones(3)))
    c.load(found.append)
    shutil.rmtree(tmp_path)
    assert found[-1]["step"] == 2
