"The same selection however a pool was cut, and selections from many rows."
import json, math, subprocess, sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from noisy_student.pseudo_labels import PseudoLabelError, select_pseudo_labels, selected_by, share_cuts

K = 4


def write(folder, table, cuts, part_size): # as predict_pseudo_labels would, in len(cuts) + 1 shards
    folder.mkdir()
    bounds, n = [0, *cuts, len(table)], len(cuts) + 1
    for shard, (a, b) in enumerate(zip(bounds, bounds[1:])):
        meta = dict(classes=json.dumps([str(i) for i in range(K)]), temperature='1.0', teacher='t', version='0',
                    view='{}', pool='"p"', num_shards=str(n), part_size=str(part_size), items='""', skipped='[]')
        parts = {}
        for i, start in enumerate(range(a, max(b, a + 1), part_size)):
            o = table.iloc[start:min(start + part_size, b)]
            probs = np.stack([o.confidence, *[1 - o.confidence] * (K - 1)], 1).astype(np.float16).ravel()
            t = pa.table(dict(item=pa.array(o['item'], pa.string()), label=pa.array(o.label, pa.int32()),
                              confidence=pa.array(o.confidence, pa.float32()),
                              probs=pa.FixedSizeListArray.from_arrays(pa.array(probs, pa.float16()), K)), metadata=meta)
            pq.write_table(t, file := folder/f'part-{shard:05d}-of-{n:05d}-{i:05d}.parquet', row_group_size=3)
            parts[file.name] = len(o)
        (folder/f'_shard-{shard:05d}-of-{n:05d}.json').write_text(json.dumps(dict(parts=parts)))
    return folder


def with_ties(data, n):
    "A table of n items, whose confidences are of six values, among them two neighbors in float32."
    values = np.float32([.3, np.nextafter(np.float32(.3), 1), .5, .75, .99, 1])
    return pd.DataFrame(dict(item=[f'{i * 7919 % 997:03d}.png' for i in range(n)],
                             label=data.draw(st.lists(st.integers(0, K - 1), min_size=n, max_size=n)),
                             confidence=values[data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))]))


@settings(max_examples=25)
@given(st.data())
@pytest.mark.filterwarnings('ignore')
def test_the_selection_does_not_depend_on_the_shards(tmp_path_factory, data):
    "Many ties: confidences of six values, among them two neighbors in float32."
    root, n = tmp_path_factory.mktemp('shards'), data.draw(st.integers(1, 40))
    table = with_ties(data, n)
    how = dict(threshold=.3, per_class=data.draw(st.sampled_from([1, 3, 8, 'mean', 'largest', None])))
    if how['per_class'] is not None: how['binned'] = data.draw(st.booleans())
    files = []
    for i in range(2):
        cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4))) if i else []
        folder = write(root/f'{i}', table, cuts, data.draw(st.sampled_from([1, 4, 100])))
        try: files.append(select_pseudo_labels(folder, root/f'{i}.parquet', **how).path.read_bytes())
        except ValueError as e: files.append(str(e)) # with `binned` nothing may be drawn: then so in both
    assert files[0] == files[1]
    if how.get('binned') or isinstance(files[0], str): return
    got = pd.read_parquet(root/'0.parquet').set_index('item')
    for _, g in table.groupby('label'): # against the definition
        N = {'mean': int(np.ceil(n / table.label.nunique())),
             'largest': table.label.value_counts().max()}.get(how['per_class'], how['per_class'])
        g = g.sort_values(['confidence', 'item'], ascending=[False, True])
        copies = [1 if N is None else N // len(g) + (r < N % len(g)) for r in range(len(g))]
        assert {i: c for i, c in zip(g['item'], copies) if c} == got[got.label == g.label.iloc[0]].copies.to_dict()
    np.testing.assert_array_equal(np.stack(got.probs)[:, 0], got.confidence.astype(np.float16))


@settings(max_examples=10)
@given(st.data())
@pytest.mark.filterwarnings('ignore')
def test_a_share_is_the_head_of_the_sorted_pool(tmp_path_factory, data):
    "Many ties, any sharding; the balance comes after, of what is in the share alone."
    root, n = tmp_path_factory.mktemp('share'), data.draw(st.integers(1, 40))
    table = with_ties(data, n)
    ordered, of = table.sort_values(['confidence', 'item'],
                                    ascending=[False, True]), data.draw(st.sampled_from(['pool', 'class']))
    smaller = set()
    for i, share in enumerate(sorted(data.draw(st.sets(st.sampled_from([.001, .1, .2, .3, .5, .7, .9]), min_size=1)))
                              + [1]):
        cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
        folder = write(root/f'{i}', table, cuts, data.draw(st.sampled_from([1, 4, 100])))
        sel = select_pseudo_labels(folder, root/f'{i}.parquet', per_class=None, share=share, share_of=of)
        groups = [g for _, g in ordered.groupby('label')] if of == 'class' else [ordered]
        expected = pd.concat([g.head(math.ceil(Fraction(str(share)) * len(g))) for g in groups]) # 0.1 of 30 are 3
        kept = set(sel.to_pandas()['item'])
        assert kept == set(expected['item']) and smaller <= kept and sel.summary.passed.sum() == len(kept)
        assert selected_by(sel)['threshold'] == expected.confidence.min()
        cut = share_cuts(folder, share, of)
        assert set(table['item'][cut.passes(list(table['item']), table.label.to_numpy(),
                                            table.confidence.to_numpy())]) == kept
        smaller = kept
        if i == 0: # as of a table that holds nothing else
            per_class = data.draw(st.sampled_from([2, 'mean', 'largest']))
            rest = table[table['item'].isin(kept)].reset_index(drop=True)
            alone = write(root/'alone', rest, [], 100)
            a = select_pseudo_labels(folder, root/'a.parquet', per_class=per_class, share=share,
                                     share_of=of).to_pandas()
            b = select_pseudo_labels(alone, root/'b.parquet', 0., per_class=per_class).to_pandas()
            assert list(a['item']) == list(b['item']) and list(a.copies) == list(b.copies)
    assert kept == set(table['item'])


@pytest.mark.parametrize('settings, message', [
    (dict(share=0), r'share must be in \(0, 1\], got 0'), (dict(share=1.01), 'got 1.01'),
                                               (dict(share=float('nan')), 'got nan'),
    (dict(share=True), 'got True'), (dict(share='half'), "got 'half'"),
                                               (dict(share=.4, share_of='label'), "'pool' or 'class', got 'label'"),
    (dict(share=.4, threshold=.3), 'share=0.4 and threshold=0.3 were both given.*leave one of them out'),
    (dict(share=.4, threshold=0), 'threshold=0 were both given'),
                                               (dict(share=.4, strict=True), 'strict=True were both given'),
    (dict(share_of='class'), 'needs a share')])
def test_settings_of_a_share_that_cannot_be(tmp_path, settings, message):
    table = pd.DataFrame(dict(item=['a', 'b'], label=[0, 1], confidence=np.float32([.5, .6])))
    with pytest.raises(PseudoLabelError, match=message):
        select_pseudo_labels(write(tmp_path/'rows', table, [], 9), tmp_path/'s.parquet', **settings)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('of, thresholds', [('pool', [.9] * 4), ('class', [.95, .6, np.nan, .5])])
def test_a_selection_says_its_share(tmp_path, of, thresholds):
    "And the confidence that it amounts to, in the summary and in the file."
    table = pd.DataFrame(dict(item=list('abcdef'), label=[0, 0, 0, 1, 1, 3],
                              confidence=np.float32([.95, .9, .8, .6, .55, .5])))
    sel = select_pseudo_labels(write(tmp_path/'rows', table, [], 9), tmp_path/'s.parquet', share=1 / 3, share_of=of)
    np.testing.assert_array_equal(sel.summary.threshold, np.float32(thresholds))
    assert (sel.summary.share == 1 / 3).all()
    how = selected_by(sel.path)
    assert (how['share'], how['share_of'], how['threshold']) == (1 / 3, of, sel.summary.threshold.min())
    plain = select_pseudo_labels(tmp_path/'rows', tmp_path/'t.parquet', .5)
    assert not {'share', 'threshold'} & set(plain.summary)
    assert selected_by(plain) == dict(threshold=.5, strict=False, per_class='mean')


@pytest.mark.slow # 30 million rows take minutes to make
def test_30_million_rows(tmp_path):
    here = Path(__file__).parent.parent
    sys.path.insert(0, str(here/'benchmarks'))
    from selection import make
    make(tmp_path/'rows', 30_000_000, 4)
    script = ("import resource, sys; from noisy_student.pseudo_labels import PseudoLabelError, select_pseudo_labels, "
              "selected_by, share_cuts as s; s(sys.argv[1], sys.argv[2], per_class=1000);"
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)")
    done = subprocess.run([sys.executable, '-c', script, str(tmp_path/'rows'), str(tmp_path/'out.parquet')],
                          capture_output=True, text=True, check=True)
    assert float(done.stdout) < 8 # GB
    narrow = pd.concat([pq.read_table(f, columns=['label', 'confidence']).to_pandas()
                        for f in (tmp_path/'rows').glob('part-*')])
    best = narrow.sort_values('confidence',
                              ascending=False).groupby('label').head(1000).groupby('label').confidence.min()
    got = pq.read_table(tmp_path/'out.parquet', columns=['label', 'confidence', 'copies']).to_pandas()
    assert (got.groupby('label').size() == 1000).all() and (got.copies == 1).all()
    pd.testing.assert_series_equal(got.groupby('label').confidence.min(), best, check_index_type=False,
                                   check_dtype=False)
