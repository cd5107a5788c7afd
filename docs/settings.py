"""What griffe, which reads the API for the documentation without running it, cannot see.

A setting is written once, in :func:`klora_compile.fields.setting`, and its help stands there. The
rules are public because they are in the catalogue; nothing else lists them.
"""

from __future__ import annotations

import ast
from importlib import import_module
from typing import Any

from griffe import Attribute, Docstring, Extension, Module

from klora_compile.fields import settings_of
from klora_compile.rules.lookup import RULES


class SettingDocs(Extension):
    """Help and range before what a field's own docstring adds."""

    def on_attribute_instance(self, *, node: ast.AST | Any, attr: Attribute, **_: Any) -> None:
        owner = attr.parent
        if owner is None or not isinstance(node, ast.AnnAssign) or node.value is None:
            return
        if "setting(" not in ast.unparse(node.value):
            return
        kind = getattr(import_module(owner.module.path), owner.name)
        setting = settings_of(kind)[attr.name]
        text = [setting.help]
        if hasattr(setting.kind, "range"):
            text.append(f"Range: {setting.kind.range}.")
        if setting.default:
            text.append(f"Default: {setting.default}.")
        if setting.unset:
            text.append(f"None: {setting.unset}.")
        if attr.docstring is not None:
            text.append(attr.docstring.value)
        attr.docstring = Docstring(" ".join(text), parent=attr)


class PublicRules(Extension):
    """The rules of the catalogue among the public names of their room."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        if pkg.name == "klora_compile":
            pkg["rules"].exports = ["Rule", *(kind.__name__ for kind in RULES.values())]
