"""Readers of files that anybody may have made: each says in one line what it saw."""

import json
import os
import random
import stat
import subprocess
import sys
import uuid

import pytest

from hf_encdec_distill.files import alone_in, filling, inside, read_json, read_yaml, write_json, write_text


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"
NO_JSON = {
    "empty": (b"", "it is empty"),
    "blank": (b" \n", "it is empty"),
    "pointer": (POINTER, "Git LFS pointer"),
    "page": (PAGE, "it is a web page"),
    "cut": (b'{"a": [1, 2', "not JSON"),
    "binary": (b"\x00\xff\xfe\x80", "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
    "list": (b"[1]", r"holds the list \[1\], expected a JSON object"),
    "null": (b"null", "holds the NoneType None, expected a JSON object"),
    "long number": (b"1" * 5000, "not JSON"),
}


def one_line(error) -> bool:
    return len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 700


@pytest.mark.parametrize("name", NO_JSON)
def test_what_is_no_json_object_is_told_in_one_line(tmp_path, name):
    content, message = NO_JSON[name]
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_json(tmp_path / "file.json")
    assert one_line(error) and str(tmp_path / "file.json") in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no 'rows', expected one of type integer"),
        ({"rows": "9"}, "has the str '9' as 'rows', expected type integer"),
        ({"rows": True}, "has the bool True as 'rows', expected type integer"),
        ({"rows": 1, "share": None}, "has the NoneType None as 'share', expected type number"),
    ],
)
def test_a_field_that_is_missing_or_of_another_type_is_named(tmp_path, content, message):
    write_json(tmp_path / "file.json", content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "file.json", fields={"rows": int, "share": float})
    write_json(tmp_path / "file.json", {"rows": 1, "share": 2, "more": None})
    assert read_json(tmp_path / "file.json", fields={"rows": int, "share": float})["share"] == 2


def test_a_file_that_is_not_there_is_an_oserror(tmp_path):
    for read in (read_json, read_yaml):
        with pytest.raises(OSError, match="nothing"):
            read(tmp_path / "nothing")
        with pytest.raises(OSError):
            read(tmp_path)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
NO_YAML = {
    "bomb": (BOMB.encode(), r"line 2 has the alias \*a: write out"),
    "alias": (b"seed: &s 1\ndata_seed: *s\n", r"line 2 has the alias \*s"),
    "large": (b"# " + b"x" * 2_000_000, "2000002 bytes, expected at most 1000000"),
    "pointer": (POINTER, "Git LFS pointer"),
    "page": (PAGE, "it is a web page"),
    "cut": (b"a: [1, 2", "cannot be read as YAML"),
    "binary": (b"\x00\xff\xfe\x80", "cannot be read as YAML"),
    "deep": (b"[" * 900_000, "line 1 is 21 levels deep, expected 20"),
    "object": (b"a: !!python/object/apply:os.system ['true']", "cannot be read as YAML"),
    "no integer": (b"a: !!int ''", "cannot be read as YAML"),
    "no truth": (b"a: !!bool perhaps", "cannot be read as YAML"),
    "no time": (b"a: !!timestamp soon", "cannot be read as YAML"),
    "no day": (b"a: 2026-99-99", "cannot be read as YAML"),
    "list as key": (b"? [1, 2]\n: 3", "cannot be read as YAML"),
}


@pytest.mark.parametrize("name", NO_YAML)
def test_yaml_that_is_none_or_stands_for_more_than_it_says_is_refused(tmp_path, name):
    content, message = NO_YAML[name]
    (tmp_path / "file.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_yaml(tmp_path / "file.yaml")
    assert one_line(error)


def test_readers_of_mutated_files_raise_nothing_else(tmp_path):
    draw = random.Random(0)
    whole = json.dumps({"a": [1, 2.5, None], "b": {"c": "d é"}, "e": "2026-01-02"}).encode()
    file = tmp_path / "file"
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(content))
            content[place : place + draw.randint(0, 2)] = bytes(
                draw.choice((0, 10, 33, 38, 42, 58, 91, 123, 255, draw.randrange(256)))
                for _ in range(draw.randint(0, 3))
            )
        file.write_bytes(bytes(content))
        for read in (read_json, read_yaml):
            try:
                read(file)
            except ValueError as error:
                assert str(file) in str(error)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "", None, 7, "a\0b"])
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="expected the name of a file in that folder"):
        inside(tmp_path, name)
    assert inside(tmp_path, "deep/file") == tmp_path / "deep/file"


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="has no such locks")
def test_a_folder_is_kept_by_one_process_until_it_ends(tmp_path):
    folder = tmp_path / "new" / "run"
    code = """
import sys
from pathlib import Path
from hf_encdec_distill.files import alone_in
with alone_in(Path(sys.argv[1])):
    print(flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process is at work in .*run"), alone_in(folder):
            pass
        other.kill()
        other.wait()
        for _ in range(2):
            with alone_in(folder):
                pass
    assert not any(folder.iterdir())


@pytest.mark.parametrize("is_there", [False, True], ids=["a new one", "an empty one"])
def test_a_folder_is_filled_whole_or_not_at_all(tmp_path, is_there):
    folder = tmp_path / "deep" / "new"
    if is_there:
        folder.mkdir(parents=True)
    number = is_there and folder.stat().st_ino
    with pytest.raises(KeyboardInterrupt), filling(folder) as partial:
        (partial / "half").touch()
        raise KeyboardInterrupt
    with filling(folder) as partial:
        (partial / "half").touch()
        partial.rename(tmp_path / "elsewhere")
    assert folder.exists() is is_there and [path.name for path in folder.parent.iterdir()] == ["new"] * is_there
    with filling(folder) as partial:
        (partial / "file").write_text("all")
        (partial / "part").mkdir()
        assert not (folder / "file").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["file", "part"]
    assert [path.name for path in folder.parent.iterdir()] == ["new"]
    assert not is_there or folder.stat().st_ino == number  # a disk that is mounted there, or a shell, stays


def test_a_folder_that_others_fill_meanwhile_stays_theirs(tmp_path):
    with pytest.raises(OSError), filling(tmp_path / "new") as partial:
        (partial / "file").write_text("mine")
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "file").write_text("theirs")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "file"]
    assert (tmp_path / "new" / "file").read_text() == "theirs"


def test_what_is_written_is_whole_or_as_it_was(tmp_path):
    write_text(tmp_path / "file", "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "half \ud800")
    with pytest.raises(TypeError):
        write_json(tmp_path / "file", {"a": object()})
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_no_link_that_lies_there_is_written_through(tmp_path, monkeypatch):
    """Under the name that an earlier version took, and under the one that is drawn."""
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    (tmp_path / "file.tmp").symlink_to(theirs)
    write_text(tmp_path / "file", "ours")
    assert (tmp_path / "file").read_text() == "ours"
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=7))
    (tmp_path / f"file.{7:032x}.tmp").symlink_to(theirs)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "file", "again")
    assert theirs.read_text() == "theirs" and (tmp_path / "file").read_text() == "ours"


@pytest.mark.skipif(os.name == "nt", reason="has no such modes")
def test_what_is_written_may_be_read_by_whom_other_files_may(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "ours")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
