"""Makes Optimum know our model once both are imported, in either order, without importing Optimum ourselves.

In code, Optimum (v2.1.0) looks for recipes nowhere but in its own modules: it has no entry points, and the namespace
`optimum.commands.register` is searched by its command line alone. So somebody has to import our recipes, and not
before a user has imported Optimum, which `import hf_encdec_distill` must not do: it costs time and is often not
installed. What is left is to wait for the module that holds Optimum's own recipes. A finder on `sys.meta_path` does
that: it touches nothing but the modules named here, and our recipes join Optimum's right after those are registered.
The alternatives are worse: a `.pth` file would run in each interpreter of the environment, and an explicit call would
be one more thing to know that no other model of transformers needs.

A script that loads our model by `trust_remote_code=True` alone is not reached; `import hf_encdec_distill` mends that.
"""

import importlib
import importlib.abc
import sys
import warnings


# Optimum's module -> ours that belongs to it.
_RECIPES = {
    "optimum.exporters.onnx.model_configs": "optimum_onnx",
    "optimum.exporters.openvino.model_configs": "optimum_openvino",
    "optimum.onnxruntime.modeling_seq2seq": "optimum_onnxruntime",
}


def register_with_optimum():
    """Register what of Optimum is imported already, and the rest when it will be. Calling it again changes nothing."""
    for name, recipe in _RECIPES.items():
        if name in sys.modules:
            _import_recipe(recipe)
    if not any(isinstance(finder, _RecipeFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RecipeFinder())


class _RecipeFinder(importlib.abc.MetaPathFinder):
    """Lets all others find a module, and imports our recipe after it has run."""

    def find_spec(self, name, path=None, target=None):
        if name not in _RECIPES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            # On this one loader, so that whoever asks for its type or for the module's source sees no difference.
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _import_recipe(_RECIPES[name])

            spec.loader.exec_module = exec_module
        return spec


def _import_recipe(recipe):
    try:
        importlib.import_module(f".{recipe}", __package__)
    except Exception as error:  # whatever it is, Optimum has to go on working for all other models
        warnings.warn(
            f"Optimum will not know models of type rope_encdec: {type(error).__name__}: {error}. The versions that "
            "work are those of pip install 'hf-encdec-distill[onnx]' or 'hf-encdec-distill[openvino]'.",
            RuntimeWarning,
            stacklevel=2,
        )
