import ast
import re
from pathlib import Path

import pyllm
from pyllm import _C


def test_the_stubs_list_what_the_module_has():
    """As many arguments too: pybind11 writes a signature at the top of each docstring."""
    path = Path(pyllm.__file__).with_name("_C.pyi")
    body = ast.parse(path.read_text()).body
    stubs = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    assert stubs.keys() | classes.keys() == {name for name in vars(_C) if not name.startswith("_")}
    for name, cls in classes.items():
        members = {
            n.target.id if isinstance(n, ast.AnnAssign) else n.name for n in cls.body if not isinstance(n, ast.Expr)
        }
        assert members == {member for member in vars(getattr(_C, name)) if not member.startswith("_")}
    for name, node in stubs.items():
        signature = getattr(_C, name).__doc__.splitlines()[0]
        assert len(node.args.posonlyargs) == len(re.findall(r"\barg\d", signature)), signature
