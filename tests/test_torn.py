"""What a crash, a copy or a second process leaves in a run: nothing half-there is used or sealed, nobody writes over
another, and whatever stops a command, it ends in order and goes on from there."""
import errno, io, os, shutil, signal, socket, subprocess, sys, threading, time, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from faults import make_pictures, noisy_student, outcome
from noisy_student import images as images_module
from noisy_student.files import InUseError, Stopped, locked, unsealed
from noisy_student.images import load_images
from noisy_student.rounds import load_model, read_summary

posix = pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")
pytestmark = pytest.mark.usefixtures("no_page")
DECODE_ALL = images_module._decode_all
ONE = dict(rounds=1, epochs=1, teacher_epochs=1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory): return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    noisy_student(pictures, run := tmp_path_factory.mktemp("finished")/"run", **ONE).fit()
    return run


@pytest.fixture
def run(finished, tmp_path): return shutil.copytree(finished, tmp_path/"run")


def said(f):
    "What was warned of."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always"); f()
    return [str(o.message) for o in seen if "noisy_student" in o.filename]


def fit(pictures, path, **more):
    ns = noisy_student(pictures, path, **{**ONE, **more})
    return said(ns.fit)


# Decoded images

@pytest.fixture
def many(tmp_path):
    "Images in files, of which one is none, and how they look decoded."
    (tmp_path/"many").mkdir()
    for i in range(40): Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path/"many"/f"{i:02d}.png")
    (tmp_path/"many"/"05.png").write_text("no image")
    items = sorted(map(str, (tmp_path/"many").iterdir()))
    return items, load_images(items, 8)


def interrupt_after(monkeypatch, chunks):
    "Decoding ends after some chunks of ten images, as if the process had been killed."
    seen = []
    def in_tens(items, size, out, progress, done=0, bad=(), bad_rows=(), note=None):
        good, bad = sorted(set(range(done)) - set(bad_rows)), list(bad)
        for start in range(done, len(items), 10):
            if chunks is not None and len(seen) == chunks: raise KeyboardInterrupt
            part = DECODE_ALL(items[start:start + 10], size, np.empty((10, size, size, 3), np.uint8), None)
            out[len(good):len(good) + len(part.images)] = part.images
            good += (part.good + start).tolist(); bad += part.bad; seen.append(start)
            note(min(start + 10, len(items)), good, bad)
        return images_module.Decoded(out[:len(good)], np.array(good, dtype=np.int64), bad)
    monkeypatch.setattr(images_module, "_decode_all", in_tens)
    return seen


@pytest.mark.parametrize("how, again", [
    ("nothing", 20), ("torn", 40), ("first flipped", 40), ("second flipped", 30), ("notes flipped", 40),
    ("notes torn", 40), ("notes gone", 40), ("other shape", 40), ("no array", 40)])
def test_an_unfinished_cache_is_checked_part_by_part(tmp_path, monkeypatch, many, how, again):
    items, whole = many
    interrupt_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt): load_images(items, 8, tmp_path/"c")
    part, = (tmp_path/"c").glob("*.part")
    notes = part.with_suffix(".part.json")
    def flip(f, at): (b := bytearray(f.read_bytes()))[at] ^= 1; f.write_bytes(b)
    if how == "torn": os.truncate(part, part.stat().st_size // 3)
    if how == "first flipped": flip(part, 128 + 5 * 192)
    if how == "second flipped": flip(part, 128 + 15 * 192)
    if how == "notes flipped": notes.write_text(notes.read_text().replace('"done": 20', '"done": 30'))
    if how == "notes torn": notes.write_text(notes.read_text()[:-20])
    if how == "notes gone": notes.unlink()
    if how == "other shape": np.save(open(part, "wb"), np.zeros((4, 8, 8, 3), np.uint8))
    if how == "no array": part.write_bytes(b"x")
    seen = interrupt_after(monkeypatch, None)
    found = load_images(items, 8, tmp_path/"c")
    assert np.array_equal(found.images, whole.images) and np.array_equal(found.good, whole.good)
    assert found.bad == whole.bad and 10 * len(seen) == again
    assert sorted(o.suffix for o in (tmp_path/"c").iterdir() if not o.name.startswith(".")) == [".json", ".npy"]


@pytest.mark.parametrize("text", ["{}", "5", '{"bad": 5, "bad_rows": []}', '{"bad": [[1]], "bad_rows": []}',
                                  '{"bad": [], "bad_rows": ["x"]}', "[" * 100_000])
def test_notes_beside_a_cache(tmp_path, many, text):
    items, whole = many
    load_images(items, 8, tmp_path/"c")
    next((tmp_path/"c").glob("*.json")).write_text(text)
    with pytest.warns(UserWarning, match="decoded again"): found = load_images(items, 8, tmp_path/"c")
    assert np.array_equal(found.images, whole.images) and found.bad == whole.bad


def test_a_cache_of_an_earlier_version_is_used(tmp_path, many):
    "Its notes had no checksum of the pixels alone."
    import json
    from noisy_student.files import file_sha256
    items, whole = many
    load_images(items, 8, tmp_path/"c")
    meta, array = next((tmp_path/"c").glob("*.json")), next((tmp_path/"c").glob("*.npy"))
    d = {k: v for k, v in json.loads(meta.read_text()).items() if k in ("bad", "bad_rows")}
    meta.write_text(json.dumps(dict(d, sha256=file_sha256(array, json.dumps(d)))))
    assert said(lambda: load_images(items, 8, tmp_path/"c")) == []


def test_several_decode_the_same_at_once(tmp_path, many):
    items, whole = many
    found = []
    def decode(): found.append(load_images(items, 8, tmp_path/"c").images)
    threads = [threading.Thread(target=decode) for _ in range(6)]
    for o in threads: o.start()
    for o in threads: o.join()
    assert len(found) == 6 and all(np.array_equal(o, whole.images) for o in found)
    assert not [*(tmp_path/"c").glob("*.part*")]


# Results

@pytest.mark.parametrize("how", ["gone", "torn", "empty"])
@pytest.mark.parametrize("name", ["model.safetensors", "history.csv", "selected.parquet"])
def test_a_hole_is_never_sealed(pictures, finished, run, name, how):
    "The machine crashed when the figures were on the disk, but not all that came before them."
    file = run/"round_1"/name
    (run/"round_1"/"SHA256SUMS").unlink()
    if how == "gone" and name == "selected.parquet": pytest.skip("a round that is labeled anew without it")
    if how == "gone": file.unlink()
    elif how == "empty": file.write_bytes(b"")
    elif name == "history.csv": file.write_text("epoch,train")
    else: file.write_bytes(file.read_bytes()[:-40])
    assert any(name in o and "missing or not what was written" in o for o in fit(pictures, run))
    assert outcome(run) == outcome(finished)
    assert name in (run/"round_1"/"SHA256SUMS").read_text()


@pytest.mark.parametrize("copy", ["round_1_backup", "round_1 (copy)", "round_1.bak", "Copy of round_1", "round_01",
                                  "round_x", "round_", "round_1~", "round_-1", "round_99999999999999999999"])
def test_a_copy_of_a_round_does_no_harm(pictures, finished, run, copy):
    from noisy_student.evaluation import _networks
    from noisy_student.run_record import read_run
    shutil.copytree(run/"round_1", run/copy)
    (run/"suspects"/copy).mkdir(parents=True)
    (run/"suspects"/copy/"suspects.csv").write_text("nonsense")
    assert read_summary(run).equals(read_summary(finished))
    assert load_model(run).classes == ["blue", "red"] and list(_networks(run, "cpu")[0]) == [0, 1]
    assert read_run(run).suspects is None and len(read_run(run).metrics) == 2
    assert len(noisy_student(pictures, run, **ONE).fit()) == 2 and outcome(run)[0].keys() >= outcome(finished)[0].keys()


def test_a_copy_on_the_command_line(run, capsys):
    from noisy_student.cli import main
    shutil.copytree(run/"round_1", run/"round_1 (copy)")
    assert main(["evaluate", str(run)]) == 0 and main(["report", str(run)]) == 0
    assert "(copy)" not in capsys.readouterr().out


@pytest.mark.parametrize("copy", ["part-00000-of-00001-00000 (1).parquet", "part-00000-of-00001-00000 copy.parquet",
                                  "_sha256-00000-of-00001 (1).txt", "part-00000-of-00001-00001.parquet"])
def test_a_copy_among_pseudo_labels(run, tmp_path, copy):
    "Its images would count twice. One that has the name of a part is refused."
    from noisy_student.pseudo_labels import PseudoLabelError, select_pseudo_labels
    labels = run/"round_1"/"pseudo_labels"
    before = len(select_pseudo_labels(labels, tmp_path/"before.parquet", 0., None))
    if copy.startswith("_"): (labels/copy).write_text("0" * 64 + "  part-00000-of-00001-00000.parquet\n")
    else: shutil.copy(labels/"part-00000-of-00001-00000.parquet", labels/copy)
    if copy == "part-00000-of-00001-00001.parquet":
        with pytest.raises(PseudoLabelError, match=f"{copy} is not among"):
            select_pseudo_labels(labels, tmp_path/"s.parquet", 0.)
    else: assert len(select_pseudo_labels(labels, tmp_path/"after.parquet", 0., None)) == before


# Images that were replaced

@pytest.mark.parametrize("split", ["train/red", "valid/red", "unlabeled"])
def test_replaced_images_are_noticed(tmp_path, monkeypatch, split):
    "Also those of a large data set, of which not every file is read to know it again: by the pixels."
    from noisy_student import same_data
    monkeypatch.setattr(same_data, "content_digest", lambda data: "0" * 16)
    pictures = make_pictures(tmp_path/"pictures")
    for f in pictures.rglob("*.png"): Image.open(f).save(f.with_suffix(".bmp")); f.unlink()
    noisy_student(pictures, tmp_path/"run", **ONE).fit()
    for f in sorted((pictures/split).glob("*.bmp")): f.write_bytes(f.read_bytes()[:-192] + bytes(192))  # of equal size
    for rounds in (2, 3):  # and again, as it stays true
        assert any("images have changed" in o for o in fit(pictures, tmp_path/"run", rounds=rounds))


def test_touched_and_moved_images_are_the_same(tmp_path):
    pictures = make_pictures(tmp_path/"pictures")
    noisy_student(pictures, tmp_path/"run", **dict(ONE, rounds=0)).fit()
    for f in pictures.rglob("*.png"): os.utime(f, (1, 1))
    assert not any("have changed" in o for o in fit(pictures, tmp_path/"run"))


def test_images_may_change_until_something_has_learned_from_them(tmp_path):
    pictures = make_pictures(tmp_path/"pictures")
    noisy_student(pictures, tmp_path/"run", **ONE).plan()
    for f in (pictures/"train"/"red").glob("*.png"): os.utime(f, (1, 1)); Image.new("RGB", (8, 8), (9, 9, 9)).save(f)
    assert not any("have changed" in o for o in fit(pictures, tmp_path/"run"))


# Threads

def test_a_run_is_resumed_with_as_many_threads(pictures, tmp_path):
    before = torch.get_num_threads()
    try:
        for n in (2, 3):  # the teacher, then its student
            ns = noisy_student(pictures, tmp_path/"run", **ONE)
            torch.set_num_threads(n)
            used, real = [], ns.task.make
            ns.task.make = lambda k: (used.append(torch.get_num_threads()), real(k))[1]
            told = said(lambda: ns.fit_to(n - 2))
            assert used == [2] and torch.get_num_threads() == n
            assert any("begun with 2 threads" in o for o in told) == (n == 3)
    finally: torch.set_num_threads(before)
    assert unsealed(tmp_path/"run"/"run.json")["threads"] == 2


# Two at once

@posix
@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks"), OSError(errno.ENOTSUP, "not supported"),
                                   OSError(errno.ENOSYS, "not there"), OSError(errno.EIO, "broken")])
def test_without_locks_the_second_refuses(tmp_path, monkeypatch, error):
    import fcntl
    def flock(*_): raise error
    monkeypatch.setattr(fcntl, "flock", flock)
    lock, owner = tmp_path/".lock", tmp_path/".lock.txt"
    with locked(lock):
        with pytest.raises(InUseError, match=f"process {os.getpid()}"):
            with locked(lock): pass
    assert not owner.exists()
    with locked(lock): pass
    gone = subprocess.Popen([sys.executable, "-c", ""]); gone.wait()
    owner.write_text(f"process {gone.pid} on {socket.gethostname()} since yesterday")
    with locked(lock): pass  # nobody is there any more
    for who in ("process 1 on elsewhere since yesterday", "", "nonsense"):
        owner.write_text(who)
        with pytest.raises(InUseError, match="cannot be known"):
            with locked(lock): pass


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_not_locked(tmp_path):
    tmp_path.chmod(0o500)
    with locked(tmp_path/".lock"): pass
    tmp_path.chmod(0o700)


# Signals in every phase

PHASES = dict(run_images=["load_images", "leaks_of"], run_learners=["noisy_student_learner"],
              labeling=["predict_pseudo_labels", "select_pseudo_labels", "read_selection"],
              pseudo_labels=["save_part", "finish_shard", "find_labels"], round_task=["write_once"],
              rundir=["write_sums", "write_once"], rounds=["write_run", "read_metrics"], run_results=["write_report"])


@posix
@pytest.mark.parametrize("module, name", [(k, o) for k, v in PHASES.items() for o in v])
def test_a_signal_in_any_phase(pictures, finished, tmp_path, monkeypatch, module, name):
    import importlib
    where = importlib.import_module(f"noisy_student.{module}")
    real, sent = getattr(where, name), []
    def interrupted(*a, **k):
        if not sent: sent.append(1); os.kill(os.getpid(), signal.SIGINT); time.sleep(.01)
        return real(*a, **k)
    with monkeypatch.context() as m:
        m.setattr(where, name, interrupted)
        ns = noisy_student(pictures, tmp_path/"run", **ONE)
        with pytest.raises(Stopped) as e: ns.fit()
        assert e.value.code == 130 and sent
    noisy_student(pictures, tmp_path/"run", **ONE).fit()
    assert outcome(tmp_path/"run") == outcome(finished)


COMMANDS = {
    "label {run} {pictures}/unlabeled --out {out}/labels --device cpu": "pseudo_labels.finish_shard",
    "select {run}/round_1/pseudo_labels --out {out}/s.parquet --threshold 0": "pseudo_labels.write_table",
    "evaluate {run} {pictures} --device cpu": "commands_judge._accuracy",
    "predict {run} {pictures}/unlabeled --csv {out}/a.csv --device cpu": "predictions.write_submission",
    "report {run}": "report.write_report"}


@posix
@pytest.mark.parametrize("line", COMMANDS)
def test_a_signal_in_a_command(pictures, run, tmp_path, monkeypatch, capfd, line):
    "One word, the exit code of a signal, nothing half-written; the same command then ends well."
    import importlib
    from noisy_student.cli import main
    module, name = COMMANDS[line].split(".")
    where = importlib.import_module(f"noisy_student.{module}")
    (out := tmp_path/"out").mkdir()
    args = line.format(run=run, pictures=pictures, out=out).split()
    real, sent = getattr(where, name), []
    def interrupted(*a, **k): sent.append(1); os.kill(os.getpid(), signal.SIGINT); time.sleep(.01); return real(*a, **k)
    with monkeypatch.context() as m: m.setattr(where, name, interrupted); assert main(args) == 130 and len(sent) == 1
    said = capfd.readouterr().err
    assert "stopped" in said.splitlines()[-1] and "Traceback" not in said
    assert not [*out.glob("*.csv"), *out.glob("*.parquet"), *out.rglob("*.tmp")]
    assert main(args) == 0


# Streams, as a shell gives them

START = "import sys; sys.argv[0] = '/bin/noisy-student'\nfrom noisy_student.cli import main\nsys.exit(main())"


def command(*args, shell="", **env):
    text = f'exec "$@" {shell}'
    return subprocess.run(["sh", "-c", text, "sh", sys.executable, "-c", START, *map(str, args)], capture_output=True,
                          text=True, errors="replace", timeout=120, env={**os.environ, **env})


@posix
@pytest.mark.parametrize("shell, code", [
    (">&-", 0), ("2>&-", 0), ("<&-", 0), (">&- 2>&- <&-", 0), ("2>/dev/full", 0), (">/dev/full", 2),
    (">/dev/full 2>/dev/full", 2), ("2>&- >/dev/full", 2)])
def test_streams_that_are_closed_or_full(shell, code):
    if "/dev/full" in shell and not Path("/dev/full").exists(): pytest.skip("Linux has it")
    done = command("recipes", shell=shell)
    assert done.returncode == code
    assert not [o for o in ("Traceback", "Exception ignored", "AttributeError") if o in done.stderr + done.stdout]
    if code and "2>" not in shell: assert done.stderr == "noisy-student: No space left on device\n"


@posix
@pytest.mark.parametrize("coding", ["ascii", "cp1252"])
def test_terminals_that_know_few_characters(run, tmp_path, monkeypatch, coding):
    from noisy_student.cli import main
    name = "d\u00fcne \u2192 \u6c99.png"
    Image.new("RGB", (8, 8)).save(tmp_path/name)
    for o in ("stdout", "stderr"): monkeypatch.setattr(sys, o, io.TextIOWrapper(io.BytesIO(), coding))
    assert main(["predict", str(run), str(tmp_path/name), "--device", "cpu"]) == 0
    said, told = (o.buffer.getvalue().decode(coding) for o in (sys.stdout, sys.stderr))
    assert "Traceback" not in told and "blue" in said and "\\u6c99" in said
    monkeypatch.undo()
    done = command("predict", tmp_path/"f\u00fcr \u6c99", tmp_path/name, PYTHONIOENCODING=coding)
    assert done.returncode == 2 and done.stderr.startswith("noisy-student: ") and len(done.stderr.splitlines()) == 1


@posix
@pytest.mark.parametrize("sig, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_at_any_moment_of_the_start(sig, code):
    "From the first import on; before it, Python itself is not there yet."
    for seconds in (.1, .2, .4, .8, 1.6):
        p = subprocess.Popen([sys.executable, "-c", "print(1, flush=True)\n" + START, "label", "x", "y", "--out", "z"],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        p.stdout.readline()
        time.sleep(seconds); p.send_signal(sig)
        _, err = p.communicate(timeout=60)
        assert "Traceback" not in err or seconds < .3, err
        over = err.startswith("noisy-student: ")  # Python ends, and has put its own handlers back
        assert p.returncode in (code, 2) or over and p.returncode == -sig or seconds < .3, (p.returncode, err)
