"""A griffe extension: fields of `DistillationTrainingArguments` are documented by the help that their options have."""

import ast
import dataclasses
import re

import griffe

from hf_encdec_distill import DistillationTrainingArguments


class FieldHelp(griffe.Extension):
    def on_class_members(self, *, cls: griffe.Class, **_) -> None:
        if cls.name != DistillationTrainingArguments.__name__:
            return
        for field in dataclasses.fields(DistillationTrainingArguments):
            if field.name not in cls.members:  # of Seq2SeqTrainingArguments
                continue
            text = re.sub(r"([*_<`])", r"\\\1", field.metadata["help"])  # plain text, no Markdown
            if "choices" in field.metadata:
                text += "\n\nOne of " + ", ".join(f"`{choice}`" for choice in field.metadata["choices"]) + "."
            attribute = cls.members[field.name]
            attribute.docstring = griffe.Docstring(text, parent=attribute)
            attribute.value = ast.unparse(ast.Constant(field.default))  # in place of the call of `field`
