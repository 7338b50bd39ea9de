"""The benchmark of folders: settings are chosen on other images than those reported, and the table is right."""
import hashlib, importlib.util, json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

here = Path(__file__).parents[1]
if not (here/'benchmarks').is_dir(): pytest.skip("no benchmarks beside the tests", allow_module_level=True)
spec = importlib.util.spec_from_file_location('benchmark_folders', here/'benchmarks'/'folders.py')
folders = importlib.util.module_from_spec(spec)
spec.loader.exec_module(folders)

def contents(folder): return {hashlib.sha1(f.read_bytes()).hexdigest() for f in folder.rglob('*.png')}

def test_parts_and_halves_share_no_image(tmp_path):
    mine = folders.make_folder('digits50', 0, tmp_path/'a')
    parts = [contents(mine/o) for o in ('train', 'unlabeled', 'test')]
    assert [len(list((mine/o).rglob('*.png'))) for o in ('train', 'test')] == [50, 300]
    assert not (mine/'valid').exists() and not any(a & b for a, b in zip(parts, parts[1:] + parts[:1]))
    theirs = folders.make_folder('dev_digits100', 100, tmp_path/'b')
    assert not contents(mine) & contents(theirs)

def test_the_seed_decides_and_labels_of_the_pool_change_no_image(tmp_path):
    one, again, all_labels, other = (folders.make_folder('digits50', s, tmp_path/str(i), full)
                                     for i, (s, full) in enumerate([(0, False), (0, False), (0, True), (1, False)]))
    assert contents(one/'train') == contents(again/'train') != contents(other/'train')
    assert contents(one/'test') == contents(all_labels/'test')
    assert contents(one/'train') | contents(one/'unlabeled') == contents(all_labels/'train')

def test_cases_have_a_counterpart_of_the_same_shape_on_other_classes_or_halves():
    for name, case in folders.REPORTED.items():
        dev = folders.CASES[f'dev_{name}']
        shapes = [(o.labels, o.size, o.weights, o.pool, o.foreign, len(o.classes)) for o in (case, dev)]
        assert shapes[0] == shapes[1]
        if case.source == 'imagenette': assert not set(dev.classes) & set(case.classes)

def test_a_reported_case_refuses_a_seed_for_development():
    import argparse
    def wanted(case, seed):
        return folders._wanted(argparse.Namespace(cases=[case], seeds=[seed], methods=['ours', 'linear']))
    assert wanted('dev_digits50', 100) == [('dev_digits50', 100, 'linear'), ('dev_digits50', 100, 'ours')]
    for case, seed in (('digits50', 100), ('dev_digits50', 0)):
        with pytest.raises(SystemExit, match='dev cases are for seeds from 100 on'): wanted(case, seed)
    with pytest.raises(SystemExit, match='no case digits51'): wanted('digits51', 0)

def test_chance_is_never_less_than_the_test_images_leave_open():
    n = pd.Series([2000] * 3)
    equal = pd.Series([.9] * 3)
    d, se = folders.difference(equal + .01, equal, n) # no spread over the seeds
    assert d == pytest.approx(.01) and se == pytest.approx(np.sqrt((.9 * .1 + .91 * .09) / 2000 / 3))
    spread = pd.Series([.95, .85, .9])
    assert folders.difference(spread, equal, n)[1] == pytest.approx(spread.std() / np.sqrt(3))
    assert [folders.verdict(d, .01) for d in (.021, .02, -.021)] == ['better', 'as good', 'worse']
    assert np.isnan(folders.difference(equal, pd.Series([.8], [7]), n)[0]) and folders.verdict(np.nan, np.nan) == ''

def test_results_compare_with_the_best_of_the_others_and_leave_errors_out(tmp_path):
    accuracies = dict(ours=(.92, .95), teacher=(.9, .91), linear=(.6, .99), all_labels=(.98, .98))
    rows = [dict(case='digits50', seed=s, method=m, budget=5. if m == 'linear' else 240., n_labeled=50, n_test=300,
                 accuracy=v[s], teacher_accuracy=.9 if m == 'ours' else None,
                 last_accuracy=.94 if m == 'ours' else None, error=None)
            for m, v in accuracies.items() for s in (0, 1)]
    rows += [dict(rows[0], seed=2, accuracy=None, error='ended after 600 s'), dict(rows[0], budget=60., accuracy=.1)]
    pd.DataFrame(rows).to_csv(tmp_path/'folders.csv', index=False)
    t = folders.results(tmp_path/'folders.csv').loc['digits50']
    assert (t.best_other, t.verdict, t.seeds, t.students) == ('teacher', 'as good', 2, 'better')
    assert (t.ours, t.difference.split()[0], t.share_of_gap) == ('93.5 ± 2.1', '+3.0', '50%')
    page = folders.markdown(folders.results(tmp_path/'folders.csv'))
    assert '**93.5 ± 2.1**' in page and 'selftrain' not in page
    short = folders.for_people(folders.results(tmp_path/'folders.csv')).splitlines()
    assert short[2] == '| digits | 50 | 79.5 | 90.5 | **93.5** | as good |' and short[-1].startswith('Of 1 cases')

def test_a_mean_of_fewer_seeds_says_so():
    shown = [folders._percent(pd.Series(o), 2) for o in ([.5, .6], [.5], [])]
    assert shown == ['55.0 ± 7.1', '50.0 (1 of 2 seeds)', '']

def test_pages_show_the_table_of_the_rows():
    notebook, page = (o.read_text(encoding='utf-8') for o in folders.PAGES)
    cells = [''.join(o['source']) for o in json.loads(notebook)['cells']]
    assert sum(bool(folders.MARKED.search(o)) for o in [*cells, page]) == 2
    for text, spread in [*((o, False) for o in cells), (page, True)]:
        assert folders.paged(text, spread) == text, "python benchmarks/folders.py pages"
