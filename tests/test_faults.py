"""Whatever happens to a run, its directory stays readable, and the same call ends with the same result, or says in one
line what is wrong."""
import os, resource, shutil, signal, threading, time, warnings

import numpy as np
import pytest
import torch

from faults import (add_tables, damage, is_readable, kinds, make_pictures, noisy_student, outcome, read_report, run,
                    server)
from noisy_student.files import unsealed

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
no_page = pytest.mark.usefixtures("no_page")


@pytest.fixture(scope="module")
def context(): return server()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory): return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def whole(context, pictures, tmp_path_factory):
    "A run that nothing has happened to, and the seconds of work it takes."
    path = tmp_path_factory.mktemp("whole")
    run(context, pictures, path/"first")  # waits for the server's imports
    code, _, seconds = run(context, pictures, path/"run")
    assert code == 0 and (path/"run"/"report.html").exists()
    return path/"run", seconds, outcome(path/"run")


def test_killed_at_any_instant(context, pictures, whole, tmp_path):
    rng, killed, path = np.random.default_rng(0), 0, tmp_path/"run"
    _, seconds, expected = whole
    for i in range(100):  # checkpoints at every step; killed again and again before it may finish
        every = 0 if i % 2 else 600
        code, *_ = run(context, pictures, path, every, signal_after=rng.uniform(0, 0.6) * seconds)
        if code == -signal.SIGKILL:
            killed += 1
            assert is_readable(path) if path.exists() else True
        else:
            assert code == 0 and outcome(path) == expected
            if killed >= 20: break
            path = tmp_path/f"run{i}"
    else: raise AssertionError("a hundred starts, and no end")


def test_checkpoints_within_epochs_change_nothing(context, pictures, whole, tmp_path):
    assert run(context, pictures, tmp_path/"run", 0.)[0] == 0
    assert outcome(tmp_path/"run") == whole[2]
    assert not list((tmp_path/"run").rglob("previous.safetensors"))  # pruned when the round is finished


class Stop(Exception): pass


@no_page
@pytest.mark.parametrize("batch", [1, 4, 8, 11, 16, 23])
def test_resumed_at_any_batch(pictures, tmp_path, batch):
    kw = dict(rounds=0, ema=0.9)
    def stop(stage, done, total):
        if stage.startswith("round 0") and done == batch: raise Stop
    with pytest.raises(Stop): noisy_student(pictures, tmp_path/"a", 0., progress=stop, **kw).fit()
    noisy_student(pictures, tmp_path/"a", **kw).fit()
    noisy_student(pictures, tmp_path/"b", **kw).fit()
    assert outcome(tmp_path/"a") == outcome(tmp_path/"b")


@pytest.mark.parametrize("sig, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_checkpoint_and_leave(context, pictures, whole, tmp_path, sig, code):
    _, seconds, expected = whole
    stopped = 0
    for fraction in (0.3, 0.5, 0.7, 0.8):
        got, left, _ = run(context, pictures, tmp_path/"run", signal_after=fraction * seconds, sig=sig)
        assert got in (0, code) and left < 10
        stopped += got == code
        assert is_readable(tmp_path/"run")
        if got == 0: break
    assert stopped and run(context, pictures, tmp_path/"run")[0] == 0
    assert outcome(tmp_path/"run") == expected


@pytest.mark.parametrize("defer", [False, True])
def test_a_signal_stops_what_it_should(defer):
    from noisy_student.files import Stopped, stoppable
    before, seen = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(Stopped) as e, stoppable(defer) as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(list(asked))  # not reached if the signal is not deferred
    assert seen == [[signal.SIGTERM]] * defer and e.value.code == 143 and signal.getsignal(signal.SIGTERM) is before


def test_what_others_make_of_a_signal_does_not_hide_it():
    from noisy_student.files import Stopped, stoppable
    with pytest.raises(Stopped), stoppable():
        try: os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt: raise RuntimeError("interrupted") from None  # as a library would
    with pytest.raises(Stopped), stoppable():
        try: os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt: pass
    with pytest.raises(RuntimeError, match="something else"), stoppable(): raise RuntimeError("something else")


def test_a_signal_within_a_query():
    import duckdb
    from noisy_student.files import Stopped, stoppable
    con = duckdb.connect()
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped), stoppable():
        timer.start()
        con.execute("SELECT sum(range % 7) FROM range(3_000_000_000)").fetchall()


@no_page
def test_a_signal_waits_for_the_step_and_loses_none(pictures, tmp_path):
    from noisy_student.files import Stopped
    from noisy_student.models import load_tensors
    before = signal.getsignal(signal.SIGTERM)
    def preempt(stage, done, total):
        # within a step of two batches
        if stage.startswith("round 0") and done == 5: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped) as e: noisy_student(pictures, tmp_path/"a", progress=preempt, rounds=0).fit()
    assert e.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    _, meta = load_tensors(tmp_path/"a"/"round_0"/"checkpoint"/"state.safetensors")
    assert '["batch", 6]' in meta["skeleton"]
    noisy_student(pictures, tmp_path/"a", rounds=0).fit(); noisy_student(pictures, tmp_path/"b", rounds=0).fit()
    assert outcome(tmp_path/"a") == outcome(tmp_path/"b")


@no_page
def test_other_threads_are_left_alone(pictures, tmp_path):
    ended = []
    t = threading.Thread(target=lambda: ended.append(noisy_student(pictures, tmp_path/"a", rounds=0).fit()))
    t.start(); t.join()
    assert len(ended[0]) == 1


@pytest.fixture(scope="module")
def small(pictures, tmp_path_factory):
    "A teacher and a student, an epoch each, and all that can be added."
    with warnings.catch_warnings():
        noisy_student(pictures, path := tmp_path_factory.mktemp("small")/"run", **SMALL).fit()
    add_tables(path)
    return path, outcome(path)


SMALL = dict(rounds=1, epochs=1, teacher_epochs=1)


@pytest.mark.parametrize("how", ["truncated", "flipped", "removed"])
def test_damaged_files_of_every_kind(pictures, small, tmp_path, how):
    path, expected = small
    rng, found = np.random.default_rng(1), kinds(path)
    assert len(found) >= 20
    assert {"leaks.json", "skipped.csv", "report.html", "robustness.csv", "suspects/round_N/suspects.csv"} <= set(found)
    for i, (kind, file) in enumerate(found.items()):
        shutil.copytree(path, copy := tmp_path/f"{i}")
        damage(copy/file, how, rng)
        said = []
        with warnings.catch_warnings(record=True) as seen:
            try:
                noisy_student_again(pictures, copy, seen)
                if file.suffix == ".csv": read_report(copy)
            except (ValueError, OSError) as e: said.append(str(e)); assert "\n" not in str(e)
        said += [str(o.message) for o in seen]
        named = any(file.name in o for o in said)
        if how != "removed" and file.name in ("leaks.json", "robustness.csv", "suspects.csv"):
            assert named, (kind, said)
        assert named or outcome(copy) == expected, (kind, how, said)
        if file.name == "leaks.json" and how != "removed": assert unsealed(copy/file) == unsealed(path/file)
        if file.name == "report.html" and how != "flipped": assert (copy/file).read_bytes().endswith(b"</html>\n")
        shutil.rmtree(copy)


def noisy_student_again(pictures, path, seen):
    ns = noisy_student(pictures, path, **SMALL)
    warnings.simplefilter("always")
    ns.fit()


@no_page
def test_damaged_checkpoint_in_the_middle(pictures, tmp_path):
    "The one before is used, with a warning; without either, training starts again: the result is the same."
    def stop(stage, done, total):
        if stage.startswith("round 0") and done == 15: raise Stop
    noisy_student(pictures, tmp_path/"whole", rounds=0).fit()
    for flip in (["state"], ["state", "previous"]):
        path = tmp_path/"-".join(flip)
        with pytest.raises(Stop): noisy_student(pictures, path, 0., progress=stop, rounds=0).fit()
        files = [path/"round_0"/"checkpoint"/f"{o}.safetensors" for o in flip]
        for f in files: damage(f, "flipped", np.random.default_rng(0))
        ns = noisy_student(pictures, path, rounds=0)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            ns.fit()
        for f in files: assert any(str(f) in str(o.message) and "earlier point" in str(o.message) for o in seen)
        assert outcome(path) == outcome(tmp_path/"whole")


def test_two_processes_on_one_directory(context, pictures, tmp_path):
    from noisy_student.files import InUseError
    second = noisy_student(pictures, tmp_path/"run")  # made before: what it imports takes longer than the other's work
    p = context.Process(target=__import__("faults").fit, args=(pictures, tmp_path/"run"))
    p.start()
    while not (tmp_path/"run"/"run.json").exists():
        assert p.exitcode is None
        time.sleep(0.01)
    with pytest.raises(InUseError, match=f"is being written by process {p.pid} on .* since"): second.fit()
    p.kill(); p.join()
    noisy_student(pictures, tmp_path/"run").fit()  # the dead block nobody


def test_two_processes_on_one_shard(tmp_path):
    from noisy_student.files import InUseError, locked
    from noisy_student.pseudo_labels import predict_pseudo_labels
    model, images = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)), np.zeros((8, 4, 4, 3), np.uint8)
    predict_pseudo_labels(model, images, tmp_path, 0, 2)
    with locked(tmp_path/".lock-00000-of-00002"):
        with pytest.raises(InUseError): predict_pseudo_labels(model, images, tmp_path, 0, 2)
        predict_pseudo_labels(model, images, tmp_path, 1, 2)  # another shard is free


@no_page
def test_divergence_names_the_step_and_keeps_good_weights(pictures, tmp_path):
    from noisy_student.models import load_tensors
    calls = []
    def poison(module, args):
        if module.training: calls.append(1)
        if len(calls) >= 14: return (args[0] * float("nan"),)
    ns = noisy_student(pictures, tmp_path/"a", 0., rounds=0)
    make = ns.learners.new
    def learner(*a, **k): learn = make(*a, **k); learn.model.register_forward_pre_hook(poison); return learn
    ns.learners.new = learner
    with pytest.raises(FloatingPointError,
                       match="batch 5 of epoch 1: training diverged; the last good weights are kept, try a lower lr"):
        ns.fit()
    tensors, _ = load_tensors(tmp_path/"a"/"round_0"/"checkpoint"/"state.safetensors")
    assert all(torch.isfinite(v).all() for k, v in tensors.items() if v.is_floating_point())
    noisy_student(pictures, tmp_path/"a", rounds=0).fit(); noisy_student(pictures, tmp_path/"b", rounds=0).fit()
    assert outcome(tmp_path/"a") == outcome(tmp_path/"b")


@no_page
def test_out_of_memory_halves_the_batch_when_asked(pictures, tmp_path):
    def too_large(module, args):
        if module.training and len(args[0]) > limit: raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
    def start(name, **kw):
        ns = noisy_student(pictures, tmp_path/name, rounds=0, accumulate=1, **kw)
        make = ns.learners.new
        def learner(*a, **k): learn = make(*a, **k); learn.model.register_forward_pre_hook(too_large); return learn
        ns.learners.new = learner
        warnings.simplefilter("always")
        return ns
    limit = 8
    with pytest.raises(MemoryError, match="--auto-batch"): start("a").fit()
    with pytest.warns(UserWarning, match="batches of 16 are computed in 2 parts of 8"):
        start("a", auto_batch=True).fit()
    limit = 0
    with pytest.raises(MemoryError, match="cannot be halved"): start("b", auto_batch=True).fit()


def test_parts_of_a_batch_are_the_same_images():
    "What a checkpoint in the middle of an epoch counts in: batch b is parts 2b and 2b + 1."
    from noisy_student.dataloaders import ArrayDataset, MixedDL
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    a, b = (MixedDL(ArrayDataset(images, np.zeros(40, int), ["a"]), bs=bs, steps=80 // bs, seed=1) for bs in (16, 8))
    assert (a.get_idxs() == b.get_idxs()).all()


@no_page
@pytest.mark.parametrize("limit", [300, 3_000, 30_000])
def test_file_size_limit(pictures, whole, tmp_path, limit):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    ns = noisy_student(pictures, tmp_path/"run")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        with pytest.raises(OSError, match="cannot write .*File too large") as e: ns.fit()
        assert "\n" not in str(e.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    noisy_student(pictures, tmp_path/"run").fit()
    assert outcome(tmp_path/"run") == whole[2]


@no_page
def test_a_file_in_place_of_a_folder(pictures, tmp_path):
    (tmp_path/"run").mkdir(); (tmp_path/"file").write_text("")
    for path in (tmp_path/"file", tmp_path/"file"/"run"):
        with pytest.raises((OSError, ValueError), match="file"): noisy_student(pictures, path).fit()
    noisy_student(pictures, tmp_path/"run", rounds=0)
    for name in ("round_0", "cache"):
        path = tmp_path/name
        ns = noisy_student(pictures, path, rounds=0)
        path.mkdir(); ns.write_run(ns.config); (path/name).write_text("in the way")
        with pytest.raises(OSError, match=f"cannot write .*{name}"): ns.fit()
        (path/name).unlink()
        assert len(noisy_student(pictures, path, rounds=0).fit()) == 1


@no_page
def test_lost_gpu(pictures, tmp_path):
    def lost(module, args):
        if module.training and calls.pop() == 0: raise RuntimeError("CUDA error: unspecified launch failure")
    calls = list(range(20))
    ns = noisy_student(pictures, tmp_path/"a", rounds=0)
    make = ns.learners.new
    def learner(*a, **k): learn = make(*a, **k); learn.model.register_forward_pre_hook(lost); return learn
    ns.learners.new = learner
    with pytest.raises(RuntimeError, match="CUDA error"): ns.fit()
    noisy_student(pictures, tmp_path/"a", rounds=0).fit(); noisy_student(pictures, tmp_path/"b", rounds=0).fit()
    assert outcome(tmp_path/"a") == outcome(tmp_path/"b")


@no_page
def test_clock_going_backwards(pictures, tmp_path, monkeypatch):
    real = time.time
    calls = []
    def backwards(): calls.append(1); return real() - 1e4 * len(calls)
    monkeypatch.setattr(time, "time", backwards)
    ended = noisy_student(pictures, tmp_path/"a", rounds=0).fit()
    assert 0 < ended.seconds[0] < 100 and calls
    monkeypatch.undo()
    noisy_student(pictures, tmp_path/"b", rounds=0).fit()
    assert outcome(tmp_path/"a") == outcome(tmp_path/"b")


def test_command_line_ends_with_143(monkeypatch, capsys):
    from noisy_student import cli, commands_train
    monkeypatch.setattr(commands_train, "load_data", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["run", "digits"]) == 143
    assert capsys.readouterr().err == "stopped; the same command goes on from here\n"
