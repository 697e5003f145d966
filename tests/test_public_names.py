"""Every public name is on the reference page, and its docstring says what one has to know to use
it: each parameter, the shapes of tensors, the errors that it raises, where mathematics comes from.
"""

import ast
import inspect
import re
import textwrap
from dataclasses import fields, is_dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("stp_ray", "stp_ray.elastic", "stp_ray.method", "stp_ray.data", "stp_ray.report")
REFERENCE = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/reference.md").read_text(), re.M)

#: What holds no mathematics of pruning, so that no source has to be named.
PLAIN = {
    "Candidate", "DenseObjective", "Optimisation", "Progress", "Scored", "Trainer", "cross_entropy",
    "evaluate", "learning_rate", "reference_logits",
}  # fmt: skip


def exported():
    """(package, name, object) of all that is exported; an alias of a type has nothing to check."""
    for package in PACKAGES:
        module = import_module(package)
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.isclass(found) or inspect.isfunction(found):
                yield package, name, found


def resolve(path):
    """The object that a path of the reference page names."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def public():
    """name -> object of all that is exported or stands on the reference page."""
    found = {each.__qualname__: each for _, _, each in exported()}
    for path in REFERENCE:
        each = resolve(path)
        if inspect.ismodule(each):
            members = vars(each).values()
            found |= {m.__name__: m for m in members if inspect.isclass(m)}
        else:
            found[each.__qualname__] = each
    return found


def functions(owner):
    """(name, function, its docstring) of a function, or of a class's public methods."""
    if inspect.isfunction(owner):
        yield owner.__qualname__, owner, owner.__doc__ or ""
        return
    for name, member in vars(owner).items():
        if isinstance(member, classmethod | staticmethod):
            member = member.__func__
        elif isinstance(member, property):
            member = member.fget
        elif isinstance(member, cached_property):
            member = member.func
        own = inspect.isfunction(member) and member.__module__.startswith("stp_ray.")
        written = own and "<string>" not in member.__code__.co_filename  # not by a dataclass
        if written and (name == "__init__" or not name.startswith("_")):
            # a class may say in its own docstring what its parameters are
            doc = member.__doc__ or (owner.__doc__ if name == "__init__" else "")
            yield f"{owner.__qualname__}.{name}", member, doc or ""


def raised(function):
    """Names of the errors that a function raises itself."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = getattr(node.exc.func, "id", "")
            if name.endswith("Error"):
                yield name
        elif isinstance(node, ast.Call):
            if getattr(node.func, "id", "") == "require":
                yield "ValueError"
            elif getattr(node.func, "attr", "") == "require":
                yield "BudgetError"


def described_fields(owner):
    """Fields of a class that a docstring of their own follows."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    for field, after in zip(tree.body, tree.body[1:], strict=False):
        text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and text:
            yield field.target.id


def faults(owner):
    """What the docstrings of a public name leave out."""
    name = owner.__qualname__
    if not (owner.__doc__ or "").strip():
        yield f"{name} has no docstring"
    if is_dataclass(owner):
        told = {*described_fields(owner), *re.findall(r"\w+", owner.__doc__ or "")}
        yield from (f"{name}.{field.name}: not told" for field in fields(owner)
                    if not field.name.startswith("_") and field.name not in told)  # fmt: skip
    for place, function, doc in functions(owner):
        if not doc.strip():
            yield f"{place} has no docstring"
        parameters = set(inspect.signature(function).parameters) - {"self", "cls"}
        untold = sorted(each for each in parameters if not re.search(rf"\b{each}\b", doc))
        yield from (f"{place}: parameter {each} is not named" for each in untold)
        yield from (f"{place}: raises {error}" for error in raised(function) if error not in doc)
        if torch.Tensor in function.__annotations__.values() and not re.search(r"\[|scalar", doc):
            yield f"{place}: shapes are not told"


@pytest.mark.parametrize("name", public())
def test_a_public_name_says_what_one_has_to_know(name):
    assert list(faults(public()[name])) == []


def test_the_reference_has_every_public_name():
    there = [resolve(path) for path in REFERENCE]
    for package, name, each in exported():
        assert each in there, f"{package}.{name} is not in docs/reference.md"


def test_mathematics_names_its_source():
    for package, name, each in exported():
        if package == "stp_ray.method" and name not in PLAIN:
            assert re.search(r"\[(paper|ST|ours)\b", inspect.getsource(each)), name


class Undocumented:
    """A class whose method leaves everything out."""

    def method(self, images: torch.Tensor) -> None:
        """Does something."""
        raise RuntimeError("unexpected")


def test_what_is_left_out_is_found():
    Undocumented.method.__module__ = "stp_ray.of_a_test"
    assert list(faults(Undocumented)) == [
        "Undocumented.method: parameter images is not named",
        "Undocumented.method: raises RuntimeError",
        "Undocumented.method: shapes are not told",
    ]
