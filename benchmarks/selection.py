"""Seconds and memory of a selection from N rows of pseudo labels with 1,000 classes, against pandas and Polars.

    python benchmarks/selection.py --rows 3e6 --folder /tmp/select --make
    python benchmarks/selection.py --rows 3e6 --folder /tmp/select --candidate ours
    python benchmarks/selection.py --rows 3e8 --folder /tmp/select --make          # 5 GB; 10 minutes
    python benchmarks/selection.py --rows 3e8 --folder /tmp/select --candidate ours

The task: of the rows with confidence 0.3 or more, the 1,000 most confident of each class (1,000,000 rows), in the order
of class, confidence and item, with their probabilities, as one parquet file. Each candidate runs in a process of its
own; `seconds` runs from the end of its imports to the end of the file, `peak_gb` the largest resident memory of the
process. The confidences are those of random draws: 1 - u^2 with u uniform, a class drawn uniformly, in files of a
million rows in random order.

What is in the files. Items, labels, confidences, schema and metadata are the real ones. The probabilities are not:
1,000 of float16 per row would be 600 GB for 300 million rows, which was not there, so the list has --width 4 values,
the same in every row. The figures hold for the two passes over the narrow columns of all rows, the ranking, and the
fetching and writing of narrow lists for the selected rows; they do not hold the time to read wide lists, which is not
measured (up to 3 million rows, 6 GB, --width 1000 writes lists of real width and random values). That time has a floor:
a scattered selection touches every row group, and 600 GB at 1 GB/s are 600 s. Files have a million rows, or with
--file-rows 8192 as many as `label` writes.

pandas and Polars do the task as a user would write it: narrow columns first, then the probabilities of the selected
rows. A row says "not run" where the narrow columns alone, as measured on a tenth of the rows, would not fit the memory
of this machine. Rows are added to results/select.csv with the machine, the versions and the commit.
"""
import argparse, json, resource, subprocess, sys, time
from importlib.metadata import version
from pathlib import Path

PER_CLASS, THRESHOLD, CLASSES = 1000, .3, 1000


def make(folder, rows, width, file_rows=1_000_000):
    import numpy as np, pyarrow as pa, pyarrow.compute as pc, pyarrow.parquet as pq
    folder.mkdir(parents=True, exist_ok=True)
    n = -(-rows // file_rows)
    meta = dict(classes=json.dumps([f"class {i}" for i in range(CLASSES)]), temperature="1.0", teacher="0" * 64,
                version="0", view="{}", pool='"0"', num_shards="1", part_size=str(file_rows), items='"0"', skipped="[]")
    parts = {}
    for i in range(n):
        rng, m = np.random.default_rng(i), min(file_rows, rows - i * file_rows)
        name = pc.binary_join_element_wise(f"pool-{i:05d}.tar/",
                                           pc.cast(pa.array(rng.permutation(m) + file_rows), pa.string()), ".jpg", "")
        half = rng.integers(0, 0x3c00, (m if width > 4 else 1) * width, dtype=np.uint16).view(np.float16)
        if width <= 4: half = np.broadcast_to(half, (m, width)).ravel()
        table = pa.table(dict(item=name, label=pa.array(rng.integers(0, CLASSES, m), pa.int32()),
                              confidence=pa.array(1 - rng.random(m, np.float32) ** 2, pa.float32()),
                              probs=pa.FixedSizeListArray.from_arrays(pa.array(half, pa.float16()), width)),
                         metadata=meta)
        file = folder / f"part-00000-of-00001-{i:05d}.parquet"
        pq.write_table(table, file, row_group_size=8192 if width > 4 else 122880, use_dictionary=["label"])
        parts[file.name] = m
    (folder / "_shard-00000-of-00001.json").write_text(json.dumps(dict(items=rows, skipped=0, parts=parts)))


def ours(folder, out):
    from noisy_student.pseudo_labels import select_pseudo_labels
    begun = time.perf_counter()
    kept = len(select_pseudo_labels(folder, out, threshold=THRESHOLD, per_class=PER_CLASS))
    return time.perf_counter() - begun, kept


def by_pandas(folder, out):
    import pandas as pd, pyarrow as pa, pyarrow.parquet as pq
    begun = time.perf_counter()
    files, narrow = sorted(folder.glob("part-*")), []
    for f in files:
        narrow.append(pd.read_parquet(f, columns=["item", "label", "confidence"]).assign(file=f.name)
                      .astype(dict(file="category")))
    df = pd.concat(narrow, ignore_index=True)
    df["pos"] = df.groupby("file", observed=True).cumcount()
    df = df[df.confidence >= THRESHOLD].sort_values(["label", "confidence", "item"], ascending=[True, False, True])
    df = df.groupby("label").head(PER_CLASS).reset_index(drop=True)
    probs, order = [], []
    for f, g in df.groupby("file"):
        probs.append(pq.read_table(folder / f, columns=["probs"])["probs"].take(pa.array(g.pos.to_numpy()))
                     .combine_chunks())
        order.extend(g.index)
    back = pa.array(pd.Series(range(len(order)), index=order).sort_index().to_numpy())
    col = pa.concat_arrays([o for p in probs for o in (p.chunks if isinstance(p, pa.ChunkedArray) else [p])]).take(back)
    table = pa.Table.from_pandas(df[["item", "label", "confidence"]], preserve_index=False).append_column("probs", col)
    pq.write_table(table, out)
    return time.perf_counter() - begun, len(df)


def by_polars(folder, out):
    import polars as pl
    begun = time.perf_counter()
    rows = pl.scan_parquet(folder / "part-*.parquet")
    kept = (rows.select("item", "label", "confidence").filter(pl.col("confidence") >= THRESHOLD)
            .sort(["label", "confidence", "item"], descending=[False, True, False])
            .group_by("label", maintain_order=True).head(PER_CLASS)
            .collect(engine="streaming"))
    kept = kept.with_row_index("place")
    wide = rows.select("item", "probs").join(kept.lazy(), on="item",
                                             how="inner").sort("place").drop("place").collect(engine="streaming")
    wide.write_parquet(out)
    return time.perf_counter() - begun, len(wide)


def bytes_on_disk(folder): return sum(f.stat().st_size for f in folder.glob("part-*"))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=float, required=True)
    p.add_argument("--width", type=int, default=4, help="probabilities per row")
    p.add_argument("--file-rows", type=int, default=1_000_000, help="rows per file; `label` writes 8192")
    p.add_argument("--folder", type=Path, required=True, help="where the table is")
    p.add_argument("--make", action="store_true", help="write the table")
    p.add_argument("--candidate", choices=["ours", "pandas", "polars"])
    p.add_argument("--note", default="", help="write a row that says so instead of running it")
    p.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    rows = int(a.rows)
    folder = a.folder / f"{rows}-{a.width}-{a.file_rows}"
    if a.make: make(folder, rows, a.width, a.file_rows)
    if a.candidate and a.here:
        seconds, kept = dict(ours=ours, pandas=by_pandas,
                             polars=by_polars)[a.candidate](folder, a.folder / "out.parquet")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps(dict(seconds=round(seconds, 1), peak_gb=round(peak, 2), selected=kept)))
    elif a.candidate:
        import pandas as pd
        from runs import machine
        if a.note: got = dict(seconds=a.note)
        else:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--here"], capture_output=True, text=True)
            if done.returncode: sys.exit(done.stderr)
            got = json.loads(done.stdout.splitlines()[-1])
        row = dict(rows=rows, probs_per_row=a.width, rows_per_file=a.file_rows,
                   table_gb=round(bytes_on_disk(folder) / 1e9, 2), candidate=a.candidate, **got, **machine(),
                   **{o: version(o) for o in ("duckdb", "pyarrow", "pandas", "polars")})
        print(row)
        file = Path(__file__).parent / "results" / "select.csv"
        old = pd.read_csv(file) if file.exists() else pd.DataFrame()
        pd.concat([old, pd.DataFrame([row])]).to_csv(file, index=False)
