"What help() shows: every parameter of everything public, in the words of the comment beside it."
import importlib, inspect, pkgutil, re, sys, types
from typing import get_type_hints

import pytest

import noisy_student
from noisy_student.docstrings import comments, document

MODULES = [o.name for o in pkgutil.iter_modules(noisy_student.__path__) if o.name != '_modidx']


def commands():
    "The functions that --help explains."
    from noisy_student.cli import app
    return [o.callback for o in app.registered_commands]


def parameters(o):
    "Names of the parameters of a function, or of a class whose making is written in this package."
    if isinstance(o, type) and not dataclass_or_tuple(o) and not getattr(o.__init__, '__module__',
                                                                         '').startswith('noisy_student'): return []
    try: return [p for p in inspect.signature(o).parameters if p not in ('self', 'cls')]
    except (ValueError, TypeError): return []


def dataclass_or_tuple(c): return hasattr(c, '__dataclass_fields__') or hasattr(c, '_fields')


@pytest.mark.parametrize('name', MODULES)
def test_help_names_every_parameter(name):
    module = importlib.import_module(f'noisy_student.{name}')
    for key in getattr(module, '__all__', ()):
        o = getattr(module, key)
        if not callable(o) or getattr(o, '__module__', None) != module.__name__ or o in commands(): continue
        doc = inspect.getdoc(o) or ''
        missing = [p for p in parameters(o) if not re.search(rf'^    \*{{0,2}}{p}( \(.*\))?: \S', doc, re.M)]
        assert not missing, f"{key} says nothing of {missing}:\n{doc}"


@pytest.mark.parametrize('command', commands(), ids=lambda o: o.__name__)
def test_every_option_of_a_command_has_a_help(command):
    hints = get_type_hints(command, include_extras=True)
    assert parameters(command) and all(hints[o].__metadata__[0].help for o in parameters(command))


def test_it_says_type_meaning_default_and_result():
    from noisy_student.learner import noisy_student_learner
    from noisy_student.rounds import NoisyStudent
    doc = inspect.getdoc(noisy_student_learner)
    assert re.search(r"^    label_smoothing \(float\): Share of a hard label .*, in \[0, 1\).* \(default: 0\.\)$", doc,
                     re.M)
    assert doc.startswith("A fastai `Learner`") and re.search(r'^Returns:\n    Learner: ', doc, re.M)
    assert '    seed (int): Decides' in inspect.getdoc(NoisyStudent)
    assert 'pictures (int)' in inspect.getdoc(NoisyStudent.suspects)


def test_twice_is_once():
    from noisy_student import recipes
    before = recipes.get_recipe.__doc__, recipes.Recipe.__doc__
    document(recipes)
    assert (recipes.get_recipe.__doc__, recipes.Recipe.__doc__) == before


def test_layouts_of_a_signature(tmp_path):
    (tmp_path/'sample.py').write_text('''
__all__ = ['one', 'Two', 'three']
def one(a, # No type
        b: dict[str, int] | None = None, # A dict: {'x': 1}, (or none)
        *args: int, # The rest
        c: str = "#", # With a hash
        **kwargs # More
       ) -> int: # How many
    "One."
    x = 1 # No parameter
class Two:
    """Two,
    in two lines."""
    def __init__(self, file: str, # The file
                 n: int = 3): # How many
        y: int = 2 # No parameter
    def more(self, k: int # A number
            ): return k
def three(x: int): return x # No comment of a parameter
''')
    sys.path.insert(0, str(tmp_path))
    try: sample = importlib.import_module('sample')
    finally: sys.path.remove(str(tmp_path))
    assert isinstance(sample, types.ModuleType)
    document(sample)
    assert inspect.getdoc(sample.one) == """One.

Args:
    a: No type
    b (dict[str, int] | None): A dict: {'x': 1}, (or none) (default: None)
    *args (int): The rest
    c (str): With a hash (default: "#")
    **kwargs: More

Returns:
    int: How many"""
    said = "Two,\nin two lines.\n\nArgs:\n    file (str): The file\n    n (int): How many (default: 3)"
    assert inspect.getdoc(sample.Two) == said
    assert inspect.getdoc(sample.Two.more) == "Args:\n    k (int): A number"
    assert sample.three.__doc__ is None


def test_the_help_of_commands_stays_what_it_is(capsys):
    from noisy_student import cli
    assert cli.main(['run', '--help']) == 0
    assert 'Args:' not in cli.run.__doc__ and 'Args:' in cli.main.__doc__ and 'Args:' not in capsys.readouterr().out


def test_help_of_options_is_that_of_parameters(capsys):
    "In the command line and in Python, a setting is explained by the same words."
    from noisy_student import cli
    from noisy_student.recipes import Recipe
    from noisy_student.rounds import NoisyStudent
    assert cli.main(['run', '--help']) == 0
    shown = ' '.join(capsys.readouterr().out.split())
    for o, said in [(Recipe, 'Learning rate, the highest of the schedule'),
                    (NoisyStudent, 'Go on though a network is no better than chance')]:
        assert said in o.__doc__ and said in shown


def test_comments_of_a_module_that_is_not_imported(tmp_path, monkeypatch):
    (tmp_path/'unread').mkdir()
    (tmp_path/'unread'/'__init__.py').write_text('')
    (tmp_path/'unread'/'here.py').write_text("""raise SystemExit
from .there import (one,
    two)
class Three:
    "Three."
    def first(self, x): # Not this one
        return x

    def __init__(self, a, # A number
        b=2): # Another
        self.a = a
""")
    (tmp_path/'unread'/'there.py').write_text("""def two(
    c: int = 3, # The third
): return c
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert comments('unread.here', 'Three') == dict(a='A number', b='Another')
    assert comments('unread.here', 'two') == dict(c='The third')
    with pytest.raises(ValueError, match="name must be a function or class of unread.there, got 'one'"):
        comments('unread.here', 'one')
    assert 'unread.here' not in sys.modules
