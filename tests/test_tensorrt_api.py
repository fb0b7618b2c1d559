"""Every name of TensorRT that the code uses exists in the versions it is for; no GPU, no TensorRT.

What exists is in tests/tensorrt_api/, written by make.py there from NVIDIA's bindings. What is used
is read from the source by these conventions: the module is called `trt`, and objects have the names
in CLASSES. Such a name counts where it is a parameter of type Any, or is made from `trt` or from
another such object; an `engine: bytes` is none. What is only asked for by a string, as in
`getattr(trt.BuilderFlag, "FP16", None)`, may be missing.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tensorrt_api import make

Api = dict[str, Any]
FILES = Path(__file__).with_name("tensorrt_api")
API: dict[str, Api] = {
    version: json.loads((FILES / f"{version}.json").read_text(encoding="utf-8"))
    for version in make.WHEELS
}
MODULES = ("ddpm_edge.export.to_tensorrt", "ddpm_edge.runtimes.flavour", "ddpm_edge.runtimes.trt")
CLASSES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "error": "ParserError",
    "logger": "Logger",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "serialized": "IHostMemory",
    "tensor": "ITensor",
    "timing_cache": "ITimingCache",
}
ATTRIBUTES = {f"_{name}": CLASSES[name] for name in ("context", "engine", "runtime")}  # of self


@dataclass(frozen=True)
class Use:
    """One use of a name of TensorRT.

    Attributes:
        name: such as "BuilderFlag.TF32" or "IBuilderConfig.set_flag".
        how: "get", "set", "call" or "subclass".
        positional: number of positional arguments; at least so many if `open`.
        keywords: names of keyword arguments.
        open: whether there are *arguments or **arguments.
        gives: the class that the code takes the answer for; "" = it does not say.
        methods: of a subclass: name, fewest and most positional arguments.
        where: file and line.
    """

    name: str
    how: str
    positional: int = 0
    keywords: tuple[str, ...] = ()
    open: bool = False
    gives: str = ""
    methods: tuple[tuple[str, int, int], ...] = ()
    where: str = field(default="", compare=False)


def is_trt(node: ast.AST) -> bool:
    """Whether it is the module: `trt`, or `flavour.trt`."""
    return (isinstance(node, ast.Name) and node.id == "trt") or (
        isinstance(node, ast.Attribute) and node.attr == "trt"
    )


class Collector(ast.NodeVisitor):
    """Collects uses of TensorRT, and those `by_string`."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.uses: dict[Use, None] = {}
        self.by_string: list[str] = []
        self.scopes: list[dict[str, str | None]] = [{}]  # class of each name; None = not TensorRT's
        self.in_class = [False]  # one that mentions trt
        self.expected: dict[ast.expr, str] = {}

    def owner(self, node: ast.AST) -> str | None:
        """The class of an object."""
        match node:
            case ast.Name(id=name):
                return next((s[name] for s in reversed(self.scopes) if name in s), None)
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if self.in_class[-1]:
                return ATTRIBUTES.get(name)
            case ast.Call(func=ast.Attribute(value=module, attr=name)) if is_trt(module):
                return name
        return None

    def dotted(self, node: ast.AST) -> str | None:
        """The name in TensorRT, "" for the module."""
        if is_trt(node):
            return ""
        if not isinstance(node, ast.Attribute):
            return None
        outer = self.dotted(node.value)
        if outer is None:
            outer = self.owner(node.value)
        return None if outer is None else f"{outer}.{node.attr}".lstrip(".")

    def is_made(self, node: ast.AST | None) -> bool:
        """Whether it comes from TensorRT."""
        match node:
            case ast.IfExp(body=first, orelse=second):
                return self.is_made(first) or self.is_made(second)
            case ast.BoolOp(values=values):
                return any(map(self.is_made, values))
            case ast.GeneratorExp(elt=inner) | ast.ListComp(elt=inner):
                return self.is_made(inner)
            case ast.Attribute(value=inner) | ast.Subscript(value=inner) | ast.Call(func=inner):
                return bool(self.owner(node) or self.dotted(node)) or self.is_made(inner)
        return node is not None and self.owner(node) is not None

    def add(self, node: ast.expr, name: str, how: str, **more: Any) -> None:
        self.uses[Use(name, how, **more, where=f"{self.file}:{node.lineno}")] = None

    def bind(self, target: ast.expr | None, value: ast.expr | None) -> None:
        """Note whether names stand for objects of TensorRT from now on."""
        match target, value:
            case ast.Tuple() | ast.List(), _:
                values = [value] * len(target.elts)
                if isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(values):
                    values = list(value.elts)
                for one, its in zip(target.elts, values, strict=True):
                    self.bind(one, its)
            case ast.Name(id=name), _:
                self.scopes[-1][name] = CLASSES.get(name) if self.is_made(value) else None

    def visit_inside(self, node: ast.expr) -> None:
        """Visit what a chain of attributes starts with."""
        while isinstance(node, ast.Attribute):
            node = node.value
        self.visit(node)

    def visit(self, node: ast.AST) -> None:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                self.visit_function(node)
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                self.visit_comprehension_whole(node)
            case _:
                super().visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if name := self.dotted(node):
            self.add(node, name, "get" if isinstance(node.ctx, ast.Load) else "set")
        self.visit_inside(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[of, ast.Constant(), *_]):
                of_name = self.dotted(of) if self.owner(of) is None else self.owner(of)
                if of_name is not None:
                    self.by_string.append(f"{of_name}.{node.args[1].value}".lstrip("."))
        name = self.dotted(node.func)
        if not name:
            self.generic_visit(node)
            return
        stars = [a for a in node.args if isinstance(a, ast.Starred)]
        keywords = tuple(sorted(k.arg for k in node.keywords if k.arg))
        self.add(
            node, name, "call", positional=len(node.args) - len(stars), keywords=keywords,
            open=bool(stars) or len(keywords) < len(node.keywords),
            gives=self.expected.get(node, ""),
        )  # fmt: skip
        for part in (*node.args, *(k.value for k in node.keywords)):
            self.visit(part)
        self.visit_inside(node.func)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            named = ast.unparse(target)
            expected = CLASSES.get(named) or ATTRIBUTES.get(named.removeprefix("self."))
            if expected:
                self.expected[node.value] = expected
        self.generic_visit(node)
        for target in node.targets:
            self.bind(target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self.bind(node.target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        self.bind(node.target, node.value)

    def visit_withitem(self, node: ast.withitem) -> None:
        self.generic_visit(node)
        self.bind(node.optional_vars, node.context_expr)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self.bind(node.target, node.iter)
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.name:
            self.scopes[-1][node.name] = None
        self.generic_visit(node)

    def visit_comprehension_whole(self, node: Any) -> None:
        self.scopes.append({})
        for part in node.generators:
            self.visit(part.iter)
            self.bind(part.target, part.iter)
            for condition in part.ifs:
                self.visit(condition)
        for part in (getattr(node, name, None) for name in ("elt", "key", "value")):
            if part is not None:
                self.visit(part)
        self.scopes.pop()

    def visit_function(self, node: Any) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        scope = {
            a.arg: CLASSES.get(a.arg)
            if a.annotation is None
            or set(re.findall(r"\w+", ast.unparse(a.annotation))) <= {"Any", "None"}
            else None
            for a in arguments
        }
        self.scopes.append(scope)
        self.generic_visit(node)
        self.scopes.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            if name := self.dotted(base):
                self.add(base, name, "subclass", methods=tuple(sorted(methods(node))))
        self.in_class.append(any(map(is_trt, ast.walk(node))))
        self.generic_visit(node)
        self.in_class.pop()


def methods(node: ast.ClassDef) -> Iterator[tuple[str, int, int]]:
    """Name, fewest and most positional arguments of each method."""
    for part in node.body:
        if isinstance(part, ast.FunctionDef):
            count = len(part.args.posonlyargs) + len(part.args.args) - 1
            most = 255 if part.args.vararg else count
            yield part.name, count - len(part.args.defaults), most


def collect(source: str, file: str = "<source>") -> Collector:
    collector = Collector(file)
    collector.visit(ast.parse(source))
    return collector


class Signature:
    """Of a function, from pybind11's wording.

    Attributes:
        names: of the parameters without self, None = it cannot be given by keyword.
        required: which have no default.
        most: positional arguments.
        any_keyword: whether it takes **kwargs.
        returns: the annotation.
    """

    def __init__(self, text: str) -> None:
        self.names: list[str | None] = []
        self.required: list[bool] = []
        self.most: float = math.inf
        self.any_keyword = False
        inside, _, self.returns = split_call(text)
        parts = split(inside)
        if parts and re.match(r"(self|this)\b", parts[0]):
            del parts[0]
        for part in parts:
            (name,) = re.findall(r"^(/|\*{0,2}\w*)", part)
            if name == "/":
                self.names = [None] * len(self.names)
            elif name.startswith("**"):
                self.any_keyword = True
            elif name.startswith("*"):
                self.most = math.inf if len(name) > 1 else len(self.names)
                break
            else:
                self.names.append(None if re.fullmatch(r"arg\d+", name) else name)
                self.required.append("=" not in part)
        else:
            self.most = len(self.names)

    def refuses(self, use: Use) -> str:
        """Why a call does not fit; "" = it does."""
        if use.positional > self.most:
            return f"takes {self.most} positional arguments, is given {use.positional}"
        unknown = set(use.keywords) - set(self.names[use.positional :])
        if unknown and not self.any_keyword:
            return f"has no parameter {', '.join(sorted(unknown))}"
        for i, (name, required) in enumerate(zip(self.names, self.required, strict=True)):
            if required and i >= use.positional and name not in use.keywords and not use.open:
                return f"needs {name or f'argument {i}'}"
        if use.gives.removeprefix("I") not in self.returns:
            return f"gives {self.returns}, is taken for {use.gives}"
        return ""


def split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth = [""], 0
    for i, char in enumerate(text):
        depth += char in "([{<"
        depth -= char in ")]}" or (char == ">" and text[i - 1] != "-")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def split_call(text: str) -> tuple[str, str, str]:
    """The parameters, and what is behind "->"."""
    start, depth = text.index("("), 0
    for i, char in enumerate(text[start:], start):
        depth += (char == "(") - (char == ")")
        if not depth:
            return text[start + 1 : i], "->", text[i + 1 :].removeprefix(" -> ")
    raise ValueError(text)


def problem(use: Use, api: Api) -> str:
    """What is wrong with a use in this version of TensorRT; "" = nothing."""
    where = f"{api['package']} {api['version']} ({use.where})"
    first, *rest = use.name.split(".")
    if first not in api["names"]:
        return f"{first} is not in {where}"
    cls, kind = first, "class" if first in api["classes"] else api["functions"].get(first, "name")
    for part in rest:
        if kind == "name":
            return f"{first}: add it to CLASSES of tests/tensorrt_api/make.py"
        if kind != "class":
            break  # an attribute of a value
        kind = api["classes"][cls].get(part)
        if kind is None:
            return f"{cls}.{part} is not in {where}"
        if kind == "class":
            cls += f".{part}"
    if use.how == "subclass":
        return wrong_subclass(use, api["classes"].get(cls, {}), where)
    if use.how == "call" and kind == "class":
        kind = api["classes"].get(cls, {}).get("__init__", "no constructor")
        use = replace(use, gives="")
    known = [kind] if isinstance(kind, str) else kind
    signatures = [Signature(text) for text in known if "(" in text]
    if use.how == "call" and signatures:
        reasons = [signature.refuses(use) for signature in signatures]
        return f"{use.name} {reasons[0]} in {where}" if all(reasons) else ""
    if use.how == "call" and kind not in {"method", "name"}:
        return f"{use.name} is called, but is or has {kind} in {where}"
    if use.how == "get" and (signatures or kind == "method"):
        return f"{use.name} is a method in {where}, but is not called"
    if use.how == "set" and kind != "property":
        return f"{use.name} cannot be set in {where}"
    return ""


def wrong_subclass(use: Use, base: dict[str, str], where: str) -> str:
    """Which method of the base is not overridden as TensorRT calls it."""
    ours = {name: (least, most) for name, least, most in use.methods}
    for name, text in base.items():
        if "(" not in text or name.startswith("_"):
            continue
        if name not in ours:
            return f"{use.name}.{name} is not overridden: {where}"
        least, most = ours[name]
        if not least <= len(Signature(text).names) <= most:
            return f"{use.name}.{name} is overridden with other parameters: {where}"
    return ""


def problems(uses: Iterable[Use], api: Api) -> list[str]:
    return [p for use in uses if (p := problem(use, api))]


def used() -> dict[str, list[Use]]:
    """All uses in the installed package, by name."""
    found: dict[str, list[Use]] = {}
    for module in MODULES:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            path = Path(spec.origin)
            for use in collect(path.read_text(encoding="utf-8"), path.name).uses:
                found.setdefault(use.name, []).append(use)
    return found


USED = used()


def installed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", sorted(USED))
@pytest.mark.parametrize("version", API)
def test_what_the_code_uses_exists(version: str, name: str) -> None:
    assert problems(USED[name], API[version]) == []


def test_the_uses_are_found() -> None:
    assert {
        "Builder.build_serialized_network", "IBuilderConfig.progress_monitor",
        "ICudaEngine.get_tensor_name", "IExecutionContext.execute_async_v3",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "OnnxParser.parse",
        "ParserError.node_name", "Runtime.deserialize_cuda_engine",
    } <= set(USED)  # fmt: skip


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx"])
def test_what_the_code_uses_exists_in_what_is_installed(module: str) -> None:
    trt = installed(module)
    live = {"package": module, "version": trt.__version__, **make.api(trt)}
    assert problems((use for uses in USED.values() for use in uses), live) == []


def test_the_list_is_what_the_real_libraries_give() -> None:
    trt = installed("tensorrt_rtx")
    if not trt.__version__.startswith("1.7."):
        pytest.skip(f"is {trt.__version__}, the list is of 1.7")
    live, recorded = make.api(trt), API["rtx-1.7"]
    assert live["names"] == recorded["names"]
    assert set(live["functions"]) == set(recorded["functions"])
    assert {c: set(m) for c, m in live["classes"].items()} == {
        c: set(m) for c, m in recorded["classes"].items()
    }


@pytest.mark.parametrize(
    ("cls", "member"),
    [
        ("BuilderFlag", "FP16"),
        ("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"),
        ("ICudaEngine", "device_memory_size"),
    ],
)
def test_the_lists_can_tell(cls: str, member: str) -> None:
    assert member in API["10.3"]["classes"][cls]
    assert member in API["10.16"]["classes"][cls]
    assert member not in API["11.4"]["classes"][cls]
    assert member not in API["rtx-1.7"]["classes"][cls]


WRONG = {
    "config.set_flag(trt.BuilderFlag.FP16)": "BuilderFlag.FP16 is not in",
    "config.max_workspace_size = 1": "IBuilderConfig.max_workspace_size is not in",
    "trt.init()": "init is not in",
    "trt.ILogger.Severity.LOUD": "ILogger.Severity.LOUD is not in",
    "trt.Runtime(logger).deserialize(b'')": "Runtime.deserialize is not in",
    "trt.Runtime()": "Runtime needs logger in",
    "trt.ICudaEngine()": "is called, but is or has no constructor",
    "engine.get_tensor_name()": "needs index",
    "engine.get_tensor_name(0, 1)": "takes 1 positional arguments, is given 2",
    "engine.get_tensor_name(number=0)": "has no parameter number",
    "engine.get_tensor_name(0, index=0)": "has no parameter index",
    "context.get_max_output_size(*names, size=1)": "has no parameter size",
    "engine.num_io_tensors()": "is called, but is or has property, read-only",
    "engine.num_io_tensors = 1": "ICudaEngine.num_io_tensors cannot be set",
    "network = engine.get_tensor_name(0)": "gives str, is taken for INetworkDefinition",
    "if parser.get_error: pass": "is a method",
    "trt.PluginFieldType.INT8": "add it to CLASSES",
    "profile = builder.create_optimization_profile(); profile.sett_shape()": "sett_shape is not in",
    "[tensor.typo for tensor in map(network.get_input, range(2))]": "get_input is a method",
    "[tensor.typo for tensor in (network.get_input(i) for i in range(2))]": "typo is not in",
    "with builder.create_builder_config() as config: config.typo": "typo is not in",
    "class Monitor(trt.IProgressMonitor): pass": "is not overridden",
}


@pytest.mark.parametrize("code", WRONG)
def test_a_wrong_use_is_found(code: str) -> None:
    parameters = "trt, builder, config, context: Any, engine, logger, network, parser"
    found = problems(collect(f"def f({parameters}):\n {code}").uses, API["11.4"])
    assert len(found) == 1
    assert WRONG[code] in found[0]


def test_an_override_has_the_parameters_of_its_base() -> None:
    code = """
class Monitor(trt.IProgressMonitor):
    def phase_start(self, phase, parent, steps): ...
    def step_complete(self, phase{}): ...
    def phase_finish(self, phase): ...
    def ours(self): ...
"""
    assert problems(collect(code.format(", step")).uses, API["11.4"]) == []
    (found,) = problems(collect(code.format("")).uses, API["11.4"])
    assert "step_complete is overridden with other parameters" in found


def test_objects_of_a_class_that_mentions_trt() -> None:
    code = "class A:\n def f(self, x):\n  self.x = {}\n def g(self): return self._engine.typo"
    assert len(problems(collect(code.format("x.trt")).uses, API["11.4"])) == 1
    assert collect(code.format("x")).uses == {}


def test_other_objects_of_these_names_are_left_alone() -> None:
    code = """
def f(trt: Any, engine: bytes, config: Config):
    engine.decode()
    config.anything()
    logger = collecting_logger(trt)
    logger.said()
    try:
        context = open(engine)
    except OSError as error:
        error.errno
    context.read()
def g():
    builder.anything()
"""
    assert collect(code).uses == {}


def test_access_by_string_is_listed_and_not_checked() -> None:
    found = collect(
        "def f(trt, config):\n"
        " if hasattr(config, 'set_magic'): getattr(trt.BuilderFlag, 'FP16', None)\n"
        " getattr(trt, 'magic', None)"
    )
    assert found.by_string == ["IBuilderConfig.set_magic", "BuilderFlag.FP16", "magic"]
    assert [use.name for use in found.uses] == ["BuilderFlag"]
    assert problems(found.uses, API["11.4"]) == []


@pytest.mark.parametrize("version", API)
def test_signatures_are_understood(version: str) -> None:
    kinds = [k for members in API[version]["classes"].values() for k in members.values()]
    kinds += API[version]["functions"].values()
    texts = [t for k in kinds for t in ([k] if isinstance(k, str) else k) if "(" in t]
    assert len(texts) > 100
    for text in texts:
        signature = Signature(text)
        assert len(signature.names) == len(signature.required)
        assert all(name is None or name.isidentifier() for name in signature.names), text
