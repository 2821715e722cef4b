import ast
from pathlib import Path

import pyllm
from pyllm import _C


def test_the_stubs_list_what_the_module_has():
    """As many arguments too: pybind11 writes a signature at the top of each docstring."""
    path = Path(pyllm.__file__).with_name("_C.pyi")
    stubs = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    functions = {name for name in vars(_C) if not name.startswith("_")}
    assert stubs.keys() == functions
    for name, node in stubs.items():
        signature = getattr(_C, name).__doc__.splitlines()[0]
        assert len(node.args.posonlyargs) == signature.count("arg"), signature
