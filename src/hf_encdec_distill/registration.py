"""Makes transformers and Optimum know our model once they are imported, in either order, without importing them.

`import hf_encdec_distill` must cost nothing: the command line answers `--help` and completes words in a blink, and
Optimum is often not installed. transformers has no entry points for models of others; Optimum (v2.1.0) looks for
recipes nowhere but in its own modules, and only its command line searches the namespace `optimum.commands.register`.
So somebody has to import what we register, and not before a user has imported what it is registered with. What is left
is to wait for that module. A finder on `sys.meta_path` does that: it touches nothing but the modules named here, and
ours are imported right after those have run. The alternatives are worse: a `.pth` file would run in each interpreter
of the environment, and an explicit call would be one more thing to know that no other model of transformers needs.

A script that loads our model by `trust_remote_code=True` alone is not reached; `import hf_encdec_distill` mends that.
"""

import importlib
import importlib.abc
import sys
import warnings


# Theirs -> ours that belongs to it. Each of theirs is whole when it has run: what it imports itself has run before.
_MODULES = {
    "transformers": "models.rope_encdec",
    "transformers.models.auto.processing_auto": "models.rope_encdec.auto_processing",
    "transformers.pipelines": "pipelines",
    "optimum.exporters.onnx.model_configs": "export.optimum_onnx",
    "optimum.exporters.openvino.model_configs": "export.optimum_openvino",
    "optimum.intel.openvino.modeling_seq2seq": "export.optimum_intel",
    "optimum.onnxruntime.modeling_seq2seq": "export.optimum_onnxruntime",
}


def register():
    """Register with what is imported already, and with the rest when it will be. Again it changes nothing."""
    for theirs, ours in _MODULES.items():
        if theirs in sys.modules:
            _import(ours)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Lets all others find a module, and imports ours after it has run."""

    def find_spec(self, name, path=None, target=None):
        if name not in _MODULES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            # On this one loader, so that whoever asks for its type or for the module's source sees no difference.
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _import(_MODULES[name])

            spec.loader.exec_module = exec_module
        return spec


def _import(ours):
    try:
        importlib.import_module(f".{ours}", __package__)
    except Exception as error:  # whatever it is, theirs has to go on working for all other models
        warnings.warn(
            f"what was imported will not know models of type rope_encdec: {type(error).__name__}: {error}. The "
            "versions that work are those of pip install -U hf-encdec-distill, for Optimum those of its extra "
            "[optimum] or optimum-intel 2.2.",
            RuntimeWarning,
            stacklevel=2,
        )
