"""Seconds of a training step with threads that spin while they wait, and with threads that sleep, alone and not.

    python benchmarks/threads.py --seconds 20

Steps of resnet10t, batches of 64 of 32 px, with as many threads as there are cores, in a fresh process each (OpenMP
reads OMP_WAIT_POLICY once, when torch is loaded), in turns: alone, and beside one and three processes that never stop
computing. `step_seconds` is the median by the clock, which is what a user waits for; `cpu_per_step` what it cost.
`ratio` is that of the clock's to the active policy's of the same case.
"""
import json, os, subprocess, sys

import numpy as np
from common import arguments, save

BUSY = "while True: pass"


def steps(seconds: float) -> dict:
    "In this process: train for so long, after some steps that do not count."
    import time

    import timm
    import torch
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    net, x, y = timm.create_model("resnet10t", num_classes=10), torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    opt, times = torch.optim.SGD(net.parameters(), .01), []
    def step():
        torch.nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
        opt.zero_grad()
    for _ in range(3): step()
    cpu = time.process_time()
    while len(times) < 3 or sum(times) < seconds:
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    return dict(step_seconds=float(np.median(times)), cpu_per_step=(time.process_time() - cpu) / len(times),
                steps=len(times))


def measured(policy: str, seconds: float) -> dict:
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT",
                                                            "OMP_NUM_THREADS")} | dict(OMP_WAIT_POLICY=policy)
    p = subprocess.run([sys.executable, "-W", "ignore", __file__, "--in-process", "--seconds", str(seconds)],
                       env=env, text=True, capture_output=True, check=True)
    return json.loads(p.stdout.splitlines()[-1])


if __name__ == "__main__":
    p = arguments(__doc__, seconds=20)
    p.add_argument("--in-process", action="store_true", help="measure once, here, and print it as JSON")
    p.add_argument("--turns", type=int, default=3, help="processes per case and policy, whose medians are averaged")
    a = p.parse_args()
    if a.in_process:
        print(json.dumps(steps(a.seconds)))
        raise SystemExit
    rows = []
    for others in (0, 1, 3):
        busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(others)]
        try: found = [{o: measured(o, a.seconds / a.turns) for o in ("ACTIVE", "PASSIVE")} for _ in range(a.turns)]
        finally:
            for o in busy: o.kill()
        mean = {o: {k: float(np.mean([f[o][k] for f in found])) for k in ("step_seconds", "cpu_per_step")}
                for o in found[0]}
        for policy, m in mean.items():
            rows.append(dict(case=f"beside {others} busy processes", candidate=policy,
                             step_seconds=round(m["step_seconds"], 4),
                             cpu_per_step=round(m["cpu_per_step"], 4),
                             ratio=round(m["step_seconds"] / mean["ACTIVE"]["step_seconds"], 3), processes=a.turns))
    save("threads", [rows], a)
