import ast
from pathlib import Path
from pkgutil import resolve_name

import pytest

from benchmarks.serving import variants
from tests.app.engines import needs_openvino

# Modules by what the variants call them.
MODULES = {
    "app": "app",
    "models": "models",
    "onnx": "app.engines.onnx",
    "openvino": "app.engines.openvino",
    "ort": "onnxruntime",
}


def replaced() -> list[tuple[str, str]]:
    """What a variant sets in a module, or in a class of one."""
    targets = [
        target
        for statement in ast.walk(ast.parse(Path(variants.__file__).read_text()))
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Attribute)
    ]
    found = set()
    for target in targets:
        called, _, inside = ast.unparse(target.value).partition(".")
        if called in MODULES:
            found.add((f"{MODULES[called]}.{inside}".rstrip("."), target.attr))
    return sorted(found)


@needs_openvino
@pytest.mark.parametrize(("owner", "name"), replaced())
def test_what_a_variant_replaces_is_there(owner: str, name: str) -> None:
    """One that set what nobody reads would be measured as if it gave nothing."""
    assert hasattr(resolve_name(owner), name)
