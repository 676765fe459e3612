"""The built-in task: hand-made trees for each rule, the real standard library for the whole."""

import ast
import gc
import importlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from hf_encdec_distill.data import python_docstrings as module
from hf_encdec_distill.data.python_docstrings import (
    Row,
    first_sentence,
    is_description,
    lead_sentence,
    load_python_docstrings,
    mine,
    rows_of_file,
)


FUNCTION = '''
def {name}(values, start=0):
    """{doc}"""
    total = start
    for value in values:
        total += value * {factor}
    return total
'''


@pytest.fixture
def tree(tmp_path):
    """Writes files and returns `(path, file)` pairs for `mine`."""

    def write(files):
        pairs = []
        for path, content in files.items():
            file = tmp_path / "tree" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
            pairs.append((path, file))
        return pairs

    return write


@pytest.fixture
def path_of():
    """A file name that the hash puts into a split."""

    def find(split, prefix="file"):
        return next(path for n in range(1000) if module.split_of(path := f"pkg/{prefix}{n}.py") == split)

    return find


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the sum.\n\nMore of it.", "Return the sum."),
        ("Return the\n  sum of all. Then more.", "Return the sum of all."),
        ("Return the sum", "Return the sum."),
        ("Add e.g. two numbers, i.e. a pair. Not more.", "Add e.g. two numbers, i.e. a pair."),
        ("Create a file (eg. a zip) in one go. Then more.", "Create a file (eg. a zip) in one go."),
        ("Read version 3.11 of J. Doe. next", "Read version 3.11 of J. Doe."),
        ("Take the name. name is optional.", "Take the name."),
        ("Is it so? It is.", "Is it so?"),
        ("Return a :class:`~pkg.mod.Thing`, or ``None``.", "Return a pkg.mod.Thing, or None."),
        ("Call :py:meth:`the method <pkg.Thing.run>` of `thing`.", "Call the method of thing."),
        ("Open file `name' and `mode'.", "Open file 'name' and 'mode'."),
        ("One of the following:\n\n- a", "One of the following:"),
    ],
)
def test_first_sentence(docstring, sentence):
    assert first_sentence(docstring) == sentence


@pytest.mark.parametrize(
    "sentence",
    [
        "Return the sum of values.",
        "Helper method: determines whether a layout matches.",
        "Return True if (and only if) the file's open.",
    ],
)
def test_descriptions(sentence):
    assert is_description(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "See base class.",
        "See the documentation of the other one.",
        "Return repr(self).",  # three words
        "Overrides the method of the parent.",
        "Does what the base class does.",
        "Look at https://example.org for what it is.",
        "Args: a number and another number.",
        "add(a, b) adds two numbers together.",
        "add two numbers -> another number.",
        "base (int, optional): the base of it.",
        "Parameters ---------- x : int the number",
        "pad (bool, *optional*) adds pads to it.",
        "This does one of the following:",
        "Naïve sum of all the values.",
        "Return the sum " + "of the sum " * 10 + "of it.",
        "TODO write about what this does.",
        ">>> add(1, 2) gives you three.",
        "1 is the number that comes back.",
    ],
)
def test_no_descriptions(sentence):
    assert not is_description(sentence)


def test_row_of_a_function(tree):
    code = '''
    import functools

    class Outer:
        class Inner:
            @functools.cache
            async def read(self, size: int = -1) -> bytes:
                """Read `size` bytes from the stream.

                More.
                """
                # a comment
                return await self.stream.read(size)
    '''
    ((path, file),) = tree({"pkg/sub/__init__.py": textwrap.dedent(code)})
    assert rows_of_file(path, file) == [
        Row(
            "async def read(self, size: int=-1) -> bytes:\n    return await self.stream.read(size)",
            "Read size bytes from the stream.",
            "pkg.sub:Outer.Inner.read",
        )
    ]


@pytest.mark.parametrize(
    "body",
    [
        "pass",
        "...",
        "raise NotImplementedError",
        "raise NotImplementedError('Subclasses of this class have to provide this method')",
        "'another string that stands there where code could stand'",
        "return 1",  # too short
        "return [" + ", ".join(str(n) for n in range(400)) + "]",  # too long
        "return 'ünïcödé, ünïcödé, ünïcödé, ünïcödé, ünïcödé'",
    ],
)
def test_functions_that_say_nothing_a_model_could_learn(tree, body):
    ((path, file),) = tree({"a.py": f'def f():\n    """Return the sum of values."""\n    {body}\n'})
    assert rows_of_file(path, file) == []


def test_constructors_are_left_out(tree):
    """`__init__` is described as the class, whose name its source does not have."""
    content = FUNCTION.format(name="__init__", doc="Sum up values and keep them.", factor=1)
    assert rows_of_file(*tree({"a.py": content})[0]) == []


@pytest.mark.parametrize(
    "content",
    [
        'print "Python 2"\ndef f():\n    """Return the sum of values."""\n    return sum([1, 2, 3, 4, 5, 6])\n',
        b'# \xff\xfe latin-1 without a cookie\ndef f():\n    """Return the sum of values."""\n    return 1\n',
        b'# -*- coding: no-such-code -*-\n"""x"""\n',
        b'"""\0"""\n',
        '"""x"""\nx = ' + "(" * 5000 + ")" * 5000 + "\n",
        '"""x"""\nx = ' + "-" * 100_000 + "1\n",
        '"""x"""\nx = ' + "+".join("a" * 20_000) + "\n",  # parses, but deep
        "",
    ],
    ids=["py2", "encoding", "cookie", "null", "parentheses", "minuses", "deep", "empty"],
)
def test_files_that_cannot_be_read_are_passed_over(tree, content):
    assert rows_of_file(*tree({"bad.py": content})[0]) == []


def test_function_too_deep_to_unparse_is_passed_over(tree):
    deep = 'def f(a):\n    """Return the sum of values."""\n    return ' + "+".join("a" * 500) + "\n"
    good = FUNCTION.format(name="g", doc="Return the sum of values.", factor=1)
    assert [row.origin for row in rows_of_file(*tree({"deep.py": deep + good})[0])] == ["deep:g"]


def test_folders_and_missing_and_huge_files_are_passed_over(tree, tmp_path):
    content = FUNCTION.format(name="f", doc="Return the sum of values.", factor=1)
    ((path, file),) = tree({"huge.py": content + "#" * (1 << 20)})
    assert rows_of_file(path, file) == []
    assert rows_of_file("gone.py", tmp_path / "gone.py") == []
    (tmp_path / "folder.py").mkdir()
    assert rows_of_file("folder.py", tmp_path / "folder.py") == []


def test_encoding_cookie_is_heard_and_warnings_are_not(tree):
    content = '# -*- coding: latin-1 -*-\n# é\nP = "\\d"\n' + FUNCTION.format(
        name="f", doc="Sum of all values.", factor=1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(rows_of_file(*tree({"a.py": content.encode("latin-1")})[0])) == 1


def test_held_out_rows_are_of_the_standard_library_and_of_files_of_their_own(tree):
    files = {}
    for n in range(200):
        content = FUNCTION.format(name=f"f{n}", doc=f"Return the sum number {n} of values.", factor=n)
        # As unlike one another as their numbers: short bodies would be near-duplicates.
        files[f"pkg/file{n}.py"] = content.replace("total", f"total{n}").replace("value", f"value{n}")
    pairs = tree(files)
    splits = mine(pairs[:150], pairs[150:])
    assert list(splits) == ["train", "validation", "test"]
    assert sum(map(len, splits.values())) == 200
    numbers = {split: {int(row.origin.rpartition("f")[2]) for row in rows} for split, rows in splits.items()}
    assert numbers["train"] >= set(range(150, 200))
    assert 9 <= len(numbers["validation"]) <= 28 and 18 <= len(numbers["test"]) <= 43  # 12 % and 20 % of 150
    # A file stays where its path puts it, whatever else there is.
    again = mine(pairs[:75], [])
    assert {int(row.origin.rpartition("f")[2]) for row in again["test"]} == {n for n in numbers["test"] if n < 75}


def test_duplicates_are_kept_once_and_held_out_ones_win(tree, path_of):
    one = FUNCTION.format(name="one", doc="Return the sum of values.", factor=1)
    renamed = FUNCTION.format(name="other", doc="Something else is said here.", factor=1)
    same_words = FUNCTION.format(name="third", doc="return the SUM, of values", factor="(a + b + c + d + e + f)")
    (test,) = tree({path_of("test"): one})
    train = tree({path_of("train", "a"): one, path_of("train", "b"): renamed, path_of("train", "c"): same_words})
    assert {
        split: [row.origin.rpartition(":")[2] for row in rows] for split, rows in mine(train + [test], []).items()
    } == {
        "train": [],
        "validation": [],
        "test": ["one"],
    }
    assert len(mine(train, [])["train"]) == 1


def test_no_held_out_file_gives_more_than_its_share(tree, path_of):
    functions = [
        FUNCTION.format(name=f"f{n}", doc=f"Return the sum number {n} of values.", factor=n).replace("total", f"t{n}")
        for n in range(50)
    ]
    files = {path_of(split): "".join(functions).replace("sum", split) for split in ("train", "test")}
    files = {path: content.replace("value", path[4:-3]) for path, content in files.items()}
    splits = mine(tree(files), [])
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 50, "validation": 0, "test": 20}


def test_near_copies_of_held_out_functions_are_not_trained_on(tree, path_of):
    body = "".join(f"    step{n} = compute(values[{n}], scale={n})\n" for n in range(12))
    function = 'def {name}(values):\n    """{doc}"""\n' + body + "    return {result}\n"
    other = FUNCTION.format(name="unlike", doc="Multiply and add up all values.", factor=7)
    files = {
        path_of("test"): function.format(name="f", doc="Compute all of the steps.", result="step1"),
        path_of("validation"): function.format(name="g", doc="Run the steps in order.", result="step2"),
        path_of("train"): function.format(name="h", doc="Evaluate what was given here.", result="step3") + other,
    }
    splits = mine(tree(files), [])
    assert {split: [row.origin.rpartition(":")[2] for row in rows] for split, rows in splits.items()} == {
        "train": ["unlike"],
        "validation": [],
        "test": ["f"],
    }


def test_jaccard_index_is_the_jaccard_index():
    index = module._ShingleIndex(["def f(a):\n    a b c d e f g h i"])  # abcde bcdef cdefg defgh efghi
    assert index.has_copy_of("def other(x, y):\n    a b c d e f g y z")  # 3 in common of 5 + 5 - 3: 0.43
    assert not index.has_copy_of("def f(a):\n    x a b c d e f y z")  # 2 in common of 5 + 5 - 2: 0.25
    assert not index.has_copy_of("def f(a):\n    i h g f e d c b a")


def test_garbage_collection_comes_back(tree):
    def broken():
        yield from tree({"a.py": ""})
        raise RuntimeError

    assert gc.isenabled()
    mine(tree({"a.py": '"""x"""'}), [])
    assert gc.isenabled()
    with pytest.raises(AttributeError):
        mine([("a.py", None)], [])
    assert gc.isenabled()


STDLIB = ["json/decoder.py", "textwrap.py", "statistics.py", "zipfile.py", "tarfile.py", "mailbox.py", "inspect.py"]
STDLIB += [
    "asyncio/events.py",
    "asyncio/locks.py",
    "argparse.py",
    "calendar.py",
    "ipaddress.py",
    "random.py",
    "typing.py",
]


def _stdlib_pairs():
    root = Path(os.__file__).parent
    return [(path, root / path) for path in STDLIB if (root / path).exists()]


def test_rows_of_the_standard_library_say_what_the_live_objects_say():
    splits = mine(_stdlib_pairs(), [])
    rows = [row for split in splits.values() for row in split]
    assert len(rows) > 200
    described = 0
    for row in rows:
        name, _, qualified = row.origin.partition(":")
        function = importlib.import_module(name)
        for part in qualified.split("."):
            function = inspect.getattr_static(function, part, None)
        function = getattr(function, "__func__", getattr(function, "fget", function))
        # The source is one function without docstring and decorators, and compiles.
        (parsed,) = ast.parse(row.source).body
        assert parsed.name == qualified.rpartition(".")[2] and not parsed.decorator_list
        assert ast.get_docstring(parsed) is None
        if inspect.isfunction(function):  # else replaced at import, as in `try: from _json import ...`
            words = "".join(c for c in inspect.getdoc(function) or "" if c.isalnum())
            described += words.startswith("".join(c for c in row.target if c.isalnum()))
    assert described > 0.9 * len(rows)


def test_mined_source_still_computes():
    row = next(row for rows in mine(_stdlib_pairs(), []).values() for row in rows if row.origin == "textwrap:indent")
    scope = {}
    exec(row.source, scope)
    assert scope["indent"]("a\n\nb\n", "> ") == textwrap.indent("a\n\nb\n", "> ") == "> a\n\n> b\n"


@pytest.mark.process
def test_same_rows_in_another_process_folder_and_hash_seed(tmp_path):
    program = (
        "import json, sys, types; from pathlib import Path\n"
        # The package without its __init__, which takes seconds to import torch and transformers.
        "package = sys.modules['hf_encdec_distill'] = types.ModuleType('hf_encdec_distill')\n"
        "package.__path__ = [sys.argv[2]]\n"
        "from hf_encdec_distill.data.python_docstrings import mine\n"
        "print(json.dumps(mine([(p, Path(f)) for p, f in json.loads(sys.argv[1])], [])))"
    )
    pairs = [(path, str(file)) for path, file in _stdlib_pairs()[:5]]
    package = str(Path(module.__file__).parents[1])
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program, json.dumps(pairs), package],
            cwd=folder,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for folder, seed in ((tmp_path, "1"), ("/", "2"))
    ]
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0]) == json.loads(json.dumps(mine(_stdlib_pairs()[:5], [])))


@pytest.fixture
def small_world(monkeypatch, tmp_path):
    """The loader sees a few modules of the standard library and one distribution."""
    site = tmp_path / "site"
    info = site / "thing-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Thing\nVersion: 1.0\n")
    (info / "RECORD").write_text("thing/__init__.py,,\nthing/tests/a.py,,\n../../bin/run.py,,\nthing/data.txt,,\n")
    (site / "thing/tests").mkdir(parents=True)
    (site / "thing/__init__.py").write_text(FUNCTION.format(name="f", doc="Sum the things up fast.", factor=3))
    (site / "thing/tests/a.py").write_text(FUNCTION.format(name="g", doc="Test the things a lot.", factor=4))
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(site))
    monkeypatch.setattr(module.site, "getsitepackages", lambda: [])
    monkeypatch.setattr(module.site, "ENABLE_USER_SITE", False)
    monkeypatch.setattr(module, "stdlib_files", lambda: iter(_stdlib_pairs()))
    return site


def test_loader(small_world, tmp_path, monkeypatch):
    splits = load_python_docstrings(cache_dir=tmp_path / "cache", progress=False)
    assert {name: split.column_names for name, split in splits.items()} == {
        name: ["source", "target", "origin"] for name in ("train", "validation", "test")
    }
    origins = [origin for split in splits.values() for origin in split["origin"]]
    assert "thing:f" in splits["train"]["origin"] and "thing.tests.a:g" not in origins
    assert not any(str(tmp_path) in origin or origin.startswith("/") for origin in origins)
    assert "thing:f" not in load_python_docstrings("stdlib", tmp_path / "cache", progress=False)["train"]["origin"]

    # Kept: nothing is mined again ...
    monkeypatch.setattr(module, "mine", lambda *a: pytest.fail("mined again"))
    again = load_python_docstrings(cache_dir=tmp_path / "cache", progress=False)
    assert {name: split.to_list() for name, split in again.items()} == {n: s.to_list() for n, s in splits.items()}


def test_cache_is_keyed_by_what_is_installed(small_world, tmp_path):
    load_python_docstrings(cache_dir=tmp_path / "cache", progress=False)
    (small_world / "thing-1.0.dist-info").rename(small_world / "thing-1.1.dist-info")
    metadata = small_world / "thing-1.1.dist-info/METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    (small_world / "thing/__init__.py").write_text(FUNCTION.format(name="new", doc="Sum the things again.", factor=5))
    assert "thing:new" in load_python_docstrings(cache_dir=tmp_path / "cache", progress=False)["train"]["origin"]


def test_order_of_the_file_system_does_not_matter(small_world, tmp_path, monkeypatch):
    one = load_python_docstrings(cache_dir=tmp_path / "one", progress=False)
    monkeypatch.setattr(module, "stdlib_files", lambda: iter(_stdlib_pairs()[::-1]))
    two = load_python_docstrings(cache_dir=tmp_path / "two", progress=False)
    assert {name: split.to_list() for name, split in one.items()} == {n: s.to_list() for n, s in two.items()}


def test_packages_of_the_working_directory_do_not_count(small_world, tmp_path, monkeypatch):
    stray = tmp_path / "stray-2.0.dist-info"
    stray.mkdir()
    (stray / "METADATA").write_text("Metadata-Version: 2.1\nName: stray\nVersion: 2.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [d.metadata["Name"] for d in importlib.metadata.distributions() if d.metadata["Name"] == "stray"] == [
        "stray"
    ]
    assert list(module.installed_distributions()) == ["thing"]


def test_interrupted_mining_leaves_nothing(small_world, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "mine", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_python_docstrings(cache_dir=tmp_path / "cache", progress=False)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_loader_errors(small_world, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="packages='some'.*'stdlib' or 'all'"):
        load_python_docstrings("some")
    monkeypatch.setattr(module, "stdlib_files", lambda: iter(()))
    with pytest.raises(ValueError, match="without its sources.*--dataset"):
        load_python_docstrings(cache_dir=tmp_path / "cache", progress=False)


def test_files_of_the_standard_library():
    files = dict(module.stdlib_files())
    assert {"json/decoder.py", "textwrap.py", "asyncio/events.py"} <= set(files)
    assert not any({"test", "tests", "site-packages"} & set(Path(path).parts) for path in files)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("def raw_decode(self, s, idx=0):\n    return s", "Raw decode s idx."),
        ("async def getHTTPResponse2(self):\n    pass", "Get http response 2."),
        ("def __enter__(self):\n    return self", "Enter."),
        ("def f(cls, a_b: dict[str, int], *rest, key=lambda z: 1, **more):\n    return 1", "F a b rest key more."),
        ("first = 1", "first = 1."),
        ("def cut(self, source", "def cut(self, source."),
        ("def _():\n    return 1", "_."),
        ("A plain text. With two sentences.", "A plain text."),
    ],
)
def test_lead_sentence(source, sentence):
    assert lead_sentence(source) == sentence
