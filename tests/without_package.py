"""The first lines of a program that runs as if the package was not installed."""

HIDE = """
import sys


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_encdec_distill":
            raise ImportError(name)


sys.meta_path.insert(0, NotInstalled())
"""
