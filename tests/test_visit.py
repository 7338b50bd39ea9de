"""The one command of a visit to a GPU: its parts share the time, and nothing they start outlives them."""
import argparse, importlib.util, json, os, subprocess, sys, tarfile, time
from pathlib import Path

import pytest

# by its file: other scripts there have the names of modules here
spec = importlib.util.spec_from_file_location("visit_to_a_gpu", Path(__file__).parent.parent/"benchmarks"/"gpu.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


def test_a_part_has_its_share_and_what_those_before_it_left(tmp_path, monkeypatch, capsys):
    child = tmp_path/"child"
    slow = f"""import subprocess, sys, time
p = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]); open({str(child)!r}, "w").write(str(p.pid))
time.sleep(60)"""
    parts = dict(quick=(4, ["-c", "print(1)"], []), slow=(4, ["-c", slow], []), last=(4, ["-c", "print(2)"], []))
    monkeypatch.setattr(gpu, "PARTS", dict(visit=parts))
    begun = time.monotonic()
    code = gpu.main(argparse.Namespace(what=["visit"], total=12., out=tmp_path/"out", cache=tmp_path/"cache", kit=None,
                                       device="cpu", quick=False, pack=tmp_path/"pack"))
    assert code == 1 and 6 <= time.monotonic() - begun < 12 # its own four seconds and those that were left, less one
    rows = (tmp_path/"out"/"table.txt").read_text().splitlines()
    with tarfile.open(tmp_path/"pack"/"results.tar.gz") as t: names = t.getnames()
    assert sorted(o.name for o in (tmp_path/"pack").iterdir()) == ["results.tar.gz", "table.txt"]
    assert {f"results/{o}.txt" for o in (*parts, "table")} <= {*names}
    assert (tmp_path/"pack"/"table.txt").read_text() == (tmp_path/"out"/"table.txt").read_text()
    assert [o.split()[:2] for o in rows[:3]] == [["quick", "ok"], ["slow", "failed:"], ["last", "ok"]]
    with pytest.raises(ProcessLookupError): _wait_for_the_end_of(int(child.read_text()))


def _wait_for_the_end_of(pid):
    for _ in range(50):
        os.kill(pid, 0)
        try: state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError: state = "" if os.path.isdir(f"/proc/{pid}") or not os.path.isdir("/proc") else "Z"
        if state == "Z": raise ProcessLookupError  # dead, though nobody has asked how it ended
        time.sleep(.1)


CALLED_OFF = """
import argparse, os, runpy, sys
from pathlib import Path

out, part = Path(sys.argv[2]), "import os, time; open('started', 'w').write(str(os.getpid())); time.sleep(60)"
gpu = runpy.run_path(sys.argv[1])
gpu["PARTS"].clear()
go = f"import os; os.chdir({str(out)!r}); {part}"
gpu["PARTS"]["visit"] = dict(first=(9, ["-c", "print(1)"], []), long=(9, ["-c", go], []))
gpu["main"](argparse.Namespace(what=["visit"], total=60., out=out/"all", cache=out, kit=None, device="cpu", quick=False,
                               pack=out/"pack"))
"""


def test_a_visit_that_is_called_off_ends_its_part_and_hands_over_what_there_is(tmp_path):
    p = subprocess.Popen([sys.executable, "-c", CALLED_OFF, gpu.__file__, tmp_path], stdout=subprocess.DEVNULL)
    for _ in range(600):
        if (tmp_path/"started").exists() and (tmp_path/"started").read_text(): break
        time.sleep(.1)
    p.terminate()
    assert p.wait(20) == 143
    with pytest.raises(ProcessLookupError): _wait_for_the_end_of(int((tmp_path/"started").read_text()))
    assert [o.split()[1] for o in (tmp_path/"pack"/"table.txt").read_text().splitlines()] == ["ok", "called"]
    with tarfile.open(tmp_path/"pack"/"results.tar.gz") as t: assert "results/long.txt" in t.getnames()


def test_the_shares_are_what_a_visit_has():
    assert gpu.TOTAL == dict(speed=340, cifar10=560)
    assert sum(gpu.TOTAL.values()) == 900


COMPARED = """
import json, graphs

def trace(model, x): # of having been tried, in its statistics
    model.train()(x)
    return model

print(json.dumps([graphs.case("cpu", o, "resnet9_4", 16, 8, 2, 0.) for o in (graphs.graphed, graphs.compiled, trace)]))
"""


def test_a_network_in_a_graph_trains_to_the_same_weights_and_another_one_is_noticed():
    "Without a GPU nothing is captured; what goes around it is done"
    path = os.pathsep.join([str(Path(gpu.__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", COMPARED], env={**os.environ, "PYTHONPATH": path}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    *equal, traced = json.loads(done.stdout.splitlines()[-1])
    assert all(o["different"] == 0 for rows in (*equal, traced[:1]) for o in rows)
    assert traced[1]["different"] and traced[1]["most"] > 0
