"""Core ML for `transformers.exporters` (transformers 5.23 and newer): importing this module registers the format.

    from hf_encdec_distill.export import transformers_coreml

    exported = transformers_coreml.CoreMlExporter().export(module, inputs, transformers_coreml.CoreMlConfig())
    exported.save_pretrained("exported")  # model.mlpackage, and what transformers records of it

For any module with tensors for inputs, of fixed shapes; a whole student with its caches, flexible prompts and
compressed weights is what `hf-encdec-distill export` makes. Runs on Core ML on macOS, else on our interpreter.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.exporters.auto import register_backend
from transformers.exporters.configs import DynamoConfig
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.metadata import ExportMetadata
from transformers.exporters.runners.base import ModelRunner

from .coreml import mended
from .graphs import quiet


@dataclass
class CoreMlConfig(DynamoConfig):
    """
    Args:
        compute_precision: `float32`, or `float16`, which is what Apple's Neural Engine computes in.
        minimum_deployment_target: an attribute of `coremltools.target`.
    """

    export_format: str = "coreml"  # type: ignore[assignment]  # the registry takes any name
    compute_precision: str = "float32"
    minimum_deployment_target: str = "iOS18"


class CoreMlExporter(DynamoExporter):
    """A module -> an ML program (`.mlpackage`)."""

    export_format = "coreml"
    config_class = CoreMlConfig
    program_suffix = ".mlpackage"
    requires_trust_remote_code = False  # protobuf and numbers, no code
    required_packages = ["torch", "coremltools"]

    def export_program(  # type: ignore[override]  # upstream's narrow the config, too
        self, model, sample_inputs: MutableMapping[str, Any], config: CoreMlConfig
    ) -> tuple[Any, ExportMetadata]:
        """
        Raises:
            ValueError: dynamic shapes are asked for.
        """
        if config.dynamic or config.dynamic_shapes:
            raise ValueError(
                "dynamic shapes: this backend exports fixed ones; hf-encdec-distill export --shapes ranged:SRC,TGT "
                "makes flexible prompts"
            )
        with quiet():
            import coremltools as ct
        # Core ML's whole numbers have 32 bits, and a view of other strides would be refused.
        inputs = {
            name: (value.int() if value.dtype == torch.int64 else value).contiguous()
            for name, value in sample_inputs.items()
        }
        program, metadata = super().export_program(model, inputs, config=config)
        precision = {"float32": ct.precision.FLOAT32, "float16": ct.precision.FLOAT16}[config.compute_precision]
        with quiet(), mended():
            package = ct.convert(
                program.run_decompositions({}),
                minimum_deployment_target=getattr(ct.target, config.minimum_deployment_target),
                compute_precision=precision,
                convert_to="mlprogram",
                skip_model_load=True,
            )
        return package, metadata

    @classmethod
    def save_program(cls, program, path) -> None:
        program.save(str(path))

    @classmethod
    def program_files(cls, filename: str) -> list[str]:
        """A package is a folder."""
        data = "Data/com.apple.CoreML"
        return [
            f"{filename}/{part}" for part in ("Manifest.json", f"{data}/model.mlmodel", f"{data}/weights/weight.bin")
        ]

    @classmethod
    def load_program(cls, path) -> Path:  # type: ignore[override]  # upstream's narrow what comes back, too
        return Path(path)


class CoreMlRunner(ModelRunner):
    """Runs an ML program in NumPy or, on macOS, on Core ML."""

    def __init__(self, metadata: ExportMetadata, program):
        super().__init__(metadata)
        self.program = program

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def from_program(cls, program, metadata: ExportMetadata, device=None) -> CoreMlRunner:
        if not isinstance(program, Path):
            with tempfile.TemporaryDirectory() as folder:
                program.save(str(Path(folder) / "model.mlpackage"))
                return cls.from_program(Path(folder) / "model.mlpackage", metadata, device)
        if platform.system() == "Darwin":
            from coremltools.models import MLModel as Program
        else:
            from .mil_interpreter import MilProgram as Program
        return cls(metadata, Program(str(program)))

    def __call__(self, share_inputs: bool = True, share_outputs: bool = False, **kwargs) -> Any:
        inputs = {
            name: (value.int() if value.dtype == torch.int64 else value).numpy() for name, value in kwargs.items()
        }
        return self.unflatten([torch.from_numpy(np.asarray(x)) for x in self.program.predict(inputs).values()])


register_backend(CoreMlExporter, CoreMlRunner)
