"The site as its readers meet it, and what every tutorial must have."
import importlib.util, json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT/'nbs'/'tutorials').glob('*.ipynb'))
if not TUTORIALS: pytest.skip("the notebooks are not here: this needs the source tree", allow_module_level=True)


@pytest.fixture(scope='module')
def docs():
    "tools/docs.py as a module."
    for name in ('nbdev', 'smalldocs', 'pypandoc'): pytest.importorskip(name, reason=f"{name}, which builds the site, is not installed: pip install -e '.[dev]'")
    spec = importlib.util.spec_from_file_location('docs', ROOT/'tools'/'docs.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_runs_elsewhere(path):
    "Links that open it, an install cell that holds torch back, QUICK where it takes long, and plain words about GPUs."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    text, code = ('\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == kind) for kind in ('markdown', 'code'))
    here = f'noisy-student/noisy_student/blob/main/nbs/tutorials/{path.name}'
    for link in (f'https://colab.research.google.com/github/{here}', f'https://kaggle.com/kernels/welcome?src=https://github.com/{here}'):
        assert link in text
    install = next(''.join(c['source']) for c in cells if 'pip install' in ''.join(c['source']) and c['cell_type'] == 'code')
    assert install.startswith('#| eval: false') and '-c torch.txt' in install
    if path.stem != '01_digits': assert 'NOISY_STUDENT_QUICK' in code # it has no longer form
    if path.stem not in ('01_digits', '07_tabular'): assert '**Not yet run on a GPU.**' in text # these need none
    assert not any(o['output_type'] == 'error' for c in cells for o in c.get('outputs', []))


def test_look_finds_faults(docs, tmp_path):
    "What must not be on the site is found where it is."
    if docs.chromium() is None: pytest.skip("there is no Chromium to look with")
    page = '<!doctype html><html><head><link rel="icon" href="data:,"></head><body>{}</body></html>'
    (tmp_path/'good.html').write_text(page.format('<img src="data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==">'))
    (tmp_path/'bad.html').write_text(page.format('<img src="none.png"><div style="width:700px">wide</div><script>nothing.here()</script>'))
    found = docs.look(tmp_path)
    assert any('bad.html: the picture none.png does not load' in o for o in found)
    assert any('bad.html: at 400 px it is 7' in o for o in found) and not any('at 1300' in o for o in found)
    assert any('nothing is not defined' in o for o in found) and not any('good.html' in o for o in found)


def test_check_finds_faults(docs, tmp_path):
    "A link that leads nowhere is found with its page."
    (tmp_path/'a.html').write_text('<h1 id="top">A</h1><a href="b.html#top">b</a><a href="#top">up</a>')
    (tmp_path/'b.html').write_text(f'<meta property="og:image" content="{docs.SITE_URL}card.png"><a href="a.html#top">a</a>')
    assert docs.broken_links(tmp_path) == ['broken link b.html#top in a.html', f'broken link {docs.SITE_URL}card.png in b.html']
    (tmp_path/'card.png').touch()
    assert docs.broken_links(tmp_path) == ['broken link b.html#top in a.html']
