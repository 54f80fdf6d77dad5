"""Whether parts that are named are there and take their options, found out without importing them.

Importing System 1 or System 2 costs seconds and a gigabyte, which the process that starts a run
need not pay; a misspelt option should not cost a start of all the others either. So signatures
are read from the source. What cannot be told from it (a decorated class, a base from elsewhere)
is left to whoever builds the part.
"""

from __future__ import annotations

import ast
import hashlib
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

from openhelix.runtime.core.config import ConfigError, Part, PolicyPart
from openhelix.runtime.core.files import BadFile, read_json
from openhelix.runtime.core.interfaces import PolicySpec
from openhelix.runtime.core.paths import CHECKPOINTS
from openhelix.runtime.core.plugins import ResolveError, find_module, nearest

SHIPPED = {"system1": CHECKPOINTS / "system1-laptop", "system2": CHECKPOINTS / "system2-laptop"}
SPEC = "spec.json"  # beside a policy's weights: what it expects and promises
WHOLE_BYTES = 256 * 1024 * 1024  # a file larger than this is known by its size and its ends
ENDS_BYTES = 1024 * 1024
_Scope = ast.Module | ast.ClassDef
_NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def check_part(where: str, part: Part, files: bool = True) -> None:
    """Refuse a part that is not there, does not take its options or names a missing file.

    Args:
        where: the field, for example "system1.policy".
        part: what is to be built.
        files: whether its files must be on this host.

    Raises:
        ConfigError: in one line, the field and what is valid.
    """
    try:
        signature = signature_of(part.target)
    except ResolveError as error:
        raise ConfigError(f"{where}.target: {error}") from None
    if signature is None:
        return
    known = {p.name: p for p in signature.parameters.values() if p.kind in _NAMED}
    takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in signature.parameters.values())
    for name, value in part.options.items():
        if name in known:
            if files and _names_a_file(known[name], value) and not _exists(value):
                raise ConfigError(f"{where}.options.{name}: there is nothing at {value}")
        elif not takes_any:
            said = nearest(name, known)
            raise ConfigError(f"{where}.options.{name}: {part.target} has no such option; {said}")
    for name, parameter in known.items():
        if parameter.default is Parameter.empty and name not in part.options:
            raise ConfigError(f"{where}.options.{name}: {part.target} needs it")


def signature_of(path: str) -> Signature | None:
    """Return what a `"module:Name"` takes when it is called; None where the source does not say.

    Raises:
        ResolveError: there is no such module, or nothing of that name in it.
    """
    module, _, attribute = path.partition(":")
    scope: _Scope | None = _source(path, module)
    for name in attribute.split("."):
        if scope is None:
            return None
        found = _defined(scope, name)
        if found is None and not _may_have(scope, name):
            raise ResolveError(f"{path!r}: {module} has no {name!r}")
        if isinstance(found, ast.FunctionDef):
            return _of_function(found, bound=isinstance(scope, ast.ClassDef))
        scope = found
    return _of_class(scope, module) if isinstance(scope, ast.ClassDef) else None


def _source(path: str, module: str) -> ast.Module | None:
    try:
        spec = find_module(module)
    except ImportError as error:
        raise ResolveError(f"{path!r}: {error}") from None
    if spec is None:
        raise ResolveError(f"{path!r}: no module named {module!r}")
    try:
        return ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


def _defined(scope: _Scope, name: str) -> ast.FunctionDef | ast.ClassDef | None:
    for node in scope.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
    return None


def _may_have(scope: _Scope, name: str) -> bool:
    """Whether a name could be there in another way than by a plain definition."""
    if isinstance(scope, ast.ClassDef) and (scope.bases or scope.decorator_list):
        return True
    for node in ast.walk(scope):
        match node:
            case ast.Name(id=said, ctx=ast.Store()) if said == name:
                return True
            case ast.alias():
                if (node.asname or node.name.partition(".")[0]) in (name, "*"):
                    return True
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                if node.name in (name, "__getattr__"):
                    return True
    return False


def _of_function(node: ast.FunctionDef, bound: bool) -> Signature | None:
    plain = {ast.unparse(decorator) for decorator in node.decorator_list}
    if plain - {"staticmethod", "classmethod"}:
        return None
    first = 1 if bound and "classmethod" in plain else 0
    return Signature(_parameters(node)[first:])


def _of_class(node: ast.ClassDef, module: str) -> Signature | None:
    if node.decorator_list or node.keywords:
        return None
    init = _defined(node, "__init__")
    if not isinstance(init, ast.FunctionDef):
        return _of_base(node, module) if node.bases else Signature()
    own = _parameters(init)[1:]
    rest = next((p for p in own if p.kind is Parameter.VAR_KEYWORD), None)
    if rest is None or not _passes_on(init, rest.name):
        return Signature(own)
    base = _of_base(node, module)
    if base is None:
        return Signature(own)
    own.remove(rest)
    names = {p.name for p in own}
    more = [p for p in base.parameters.values() if p.name not in names]
    own += [p.replace(kind=Parameter.KEYWORD_ONLY) for p in more if p.kind in _NAMED]
    return Signature(own + [p for p in more if p.kind is Parameter.VAR_KEYWORD])


def _passes_on(init: ast.FunctionDef, name: str) -> bool:
    """Whether an `__init__` gives its `**name` to the base's."""
    for node in ast.walk(init):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__":
            return any(k.arg is None and ast.unparse(k.value) == name for k in node.keywords)
    return False


def _of_base(node: ast.ClassDef, module: str) -> Signature | None:
    """Return what the base takes, for a class with one, from the same file or imported."""
    if len(node.bases) != 1 or not isinstance(node.bases[0], ast.Name):
        return None
    name = node.bases[0].id
    tree = _source(module, module)
    for line in tree.body if tree is not None else ():
        if isinstance(line, ast.ImportFrom) and line.module and not line.level:
            for alias in line.names:
                if (alias.asname or alias.name) == name:
                    return _quietly(f"{line.module}:{alias.name}")
        elif isinstance(line, ast.ClassDef) and line.name == name:
            return _quietly(f"{module}:{name}")
    return None


def _quietly(path: str) -> Signature | None:
    try:
        return signature_of(path)
    except ResolveError:
        return None


def _parameters(node: ast.FunctionDef) -> list[Parameter]:
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(args.defaults))
    defaults += args.defaults
    found = [
        _parameter(a, Parameter.POSITIONAL_OR_KEYWORD, d)
        for a, d in zip(plain, defaults, strict=True)
    ]
    found += [_parameter(args.vararg, Parameter.VAR_POSITIONAL, None)] if args.vararg else []
    found += [
        _parameter(a, Parameter.KEYWORD_ONLY, d)
        for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    return found + ([_parameter(args.kwarg, Parameter.VAR_KEYWORD, None)] if args.kwarg else [])


def _parameter(arg: ast.arg, kind: Any, default: ast.expr | None) -> Parameter:
    said = Parameter.empty if arg.annotation is None else ast.unparse(arg.annotation)
    value: Any = Parameter.empty
    if default is not None:
        try:
            value = ast.literal_eval(default)
        except ValueError:
            value = ...
    return Parameter(arg.arg, kind, default=value, annotation=said)


def _names_a_file(parameter: Parameter, value: Any) -> bool:
    """Whether a value is a path: the annotation says so, or, of a model, the way it is written."""
    if not isinstance(value, str) or not value or value == parameter.default:
        return False
    if parameter.name == "model":  # else a name, here or on a hub
        return value.startswith(("/", "~/", "./", "../"))
    return "Path" in str(parameter.annotation)


def _exists(value: str) -> bool:
    return Path(value).expanduser().exists()


# ------------------------------------------------------------------------------------------------
# What is in a checkpoint, without loading it


def written_spec(part: Part) -> PolicySpec | None:
    """Return what the policy of a checkpoint folder expects; None where no file says so.

    Raises:
        ConfigError: our policy's folder has no such file: it holds no checkpoint.
    """
    ours = part.target == PolicyPart().target
    path = part.options.get("path", "shipped" if ours else None)
    if not isinstance(path, str) or part.options.get("untrained"):
        return None
    folder = SHIPPED["system1"] if ours and path == "shipped" else Path(path).expanduser()
    if not (folder / SPEC).is_file():
        if not ours:
            return None
        raise ConfigError(
            f"system1.policy.options.path: {path} holds no checkpoint (it has no {SPEC}); "
            "`openhelix train export` writes one"
        )
    try:
        found = read_json(folder / SPEC)
    except BadFile as error:
        raise ConfigError(f"system1.policy.options.path: {error}") from None
    try:
        return PolicySpec.from_dict(found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"system1.policy.options.path: {folder / SPEC}: no spec of a policy: {error!r}"
        ) from None


def fingerprint(path: Path) -> str | None:
    """Return twelve hexadecimal digits of what a file or folder holds; None if it is not there.

    Names, sizes and contents count; of a file beyond 256 MiB its size, and its first and last MiB.
    """
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in sorted(p for p in (path, *path.rglob("*")) if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path.parent)}\0{size}\0".encode())
        with open(file, "rb") as data:
            if size <= WHOLE_BYTES:
                digest.update(data.read())
            else:
                digest.update(data.read(ENDS_BYTES))
                data.seek(-ENDS_BYTES, 2)
                digest.update(data.read())
    return digest.hexdigest()[:12]
