"""The source itself: what shared/style.md and shared/design.md promise of it, read with ast."""

from __future__ import annotations

import ast
import functools
import pathlib
import re
import statistics
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAMS = ("deploybot", "agent", "ctl", "notify")
SECTIONS = ("Errors", "Config", "Models", "Apps", "Store", "JobQueue", "EventHub", "Metrics", "Auth", "Webhooks", "Jobs")
SECTIONS += ("Deployments", "HTTP", "Routes", "Main")
BANNER = re.compile(r"^# == (\w+) ={60,}\n# Owns .+\n", re.MULTILINE)


@functools.cache
def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


@functools.cache
def tree(name):
    return ast.parse(source(name))


def functions(name):
    return [node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(function):
    """Lines of a function, decorators included."""
    first = min([function.lineno, *(one.lineno for one in function.decorator_list)])
    return function.end_lineno - first + 1


@functools.cache
def sections():
    """(line of its banner, section) of deploybot.py, the last one first."""
    text = source("deploybot")
    return [(text.count("\n", 0, match.start()) + 1, match[1]) for match in BANNER.finditer(text)][::-1]


def section_of(line):
    """The section of deploybot.py in which that line stands."""
    return next((name for first, name in sections() if first <= line), "Header")


def sections_naming(*names):
    """{section} in which any of these names or attributes is used."""
    lines = set()
    for node in ast.walk(tree("deploybot")):
        if (isinstance(node, ast.Name) and node.id in names) or (isinstance(node, ast.Attribute) and node.attr in names):
            lines.add(node.lineno)
    return {section_of(line) for line in lines}


# -- what is imported --------------------------------------------------------------------------------------------------


def imports(node):
    """(module, whether at top level) of each import."""
    for one in ast.walk(node):
        if isinstance(one, ast.Import):
            yield from ((alias.name, one in node.body) for alias in one.names)
        elif isinstance(one, ast.ImportFrom):
            assert one.level == 0
            yield one.module, one in node.body


@pytest.mark.parametrize("name", PROGRAMS)
def test_only_the_standard_library_is_imported(name):
    foreign = {(module, top) for module, top in imports(tree(name)) if module.partition(".")[0] not in sys.stdlib_module_names}
    assert foreign <= ({("yaml", False)} if name in ("deploybot", "notify") else set())


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_imports_another(name):
    assert not {module.partition(".")[0] for module, _ in imports(tree(name))} & set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_loaded_or_run_by_text(name):
    called = {node.func.id for node in ast.walk(tree(name)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"eval", "exec", "__import__", "compile"}


# -- parts before the whole --------------------------------------------------------------------------------------------


def defined_at(module):
    """{name: line} of what a module defines at top level."""
    found = {}
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.For | ast.With | ast.If | ast.Try):
            names = [one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)]
        else:
            names = []
        for name in names:
            found.setdefault(name, node.lineno)
    return found


def local_names(function):
    """What a function, or one within it, binds itself."""
    bound = {arg.arg for arg in ast.walk(function) if isinstance(arg, ast.arg)}
    bound |= {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.name for node in ast.walk(function) if isinstance(node, ast.FunctionDef)} - {function.name}
    return bound | {
        alias.asname or alias.name
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def used(node, bound=frozenset()):
    """(name, line) that a node reads from the module: bodies, decorators, bases, defaults, and annotations, also those in quotes."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        own = (
            local_names(node)
            if not isinstance(node, ast.Lambda)
            else {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
        )
        outside = [*node.args.defaults, *filter(None, node.args.kw_defaults), *getattr(node, "decorator_list", ())]
        outside += [one.annotation for one in ast.walk(node.args) if isinstance(one, ast.arg) and one.annotation]
        outside += [node.returns] if getattr(node, "returns", None) else []
        for part in outside:
            yield from used(part, bound)
        for part in node.body if isinstance(node.body, list) else [node.body]:
            yield from used(part, bound | own)
        return
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in bound:
        yield node.id, node.lineno
    for child in ast.iter_child_nodes(node):
        yield from used(child, bound)


def forward_references(module):
    defined = defined_at(module)
    return [
        f"line {line} names {name}, which comes at line {defined[name]}"
        for node in module.body
        for name, line in used(node)
        if defined.get(name, 0) > node.end_lineno
    ]


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_names_what_comes_later(name):
    assert forward_references(tree(name)) == []


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    return g()\ndef g(): pass",
        "class A(B): pass\nclass B: pass",
        "@g\ndef f(): pass\ndef g(x): return x",
        "def f(a=X): pass\nX = 1",
        "def f(a: T): pass\nclass T: pass",
        "def f() -> T: pass\nclass T: pass",
        "class A:\n    def f(self):\n        return lambda x: g(x)\ndef g(x): pass",
        "class A:\n    x: T\nclass T: pass",
        "A = [f for f in B]\nB = []",
    ],
)
def test_a_forward_reference_is_found(text):
    assert len(forward_references(ast.parse(text))) == 1


def test_what_is_local_is_no_forward_reference():
    text = "def f(g):\n    h = g\n    def i(): return h\n    return i, g.j, [k for k in h]\ng = h = i = j = k = 1"
    assert forward_references(ast.parse(text)) == []


# -- sections ----------------------------------------------------------------------------------------------------------


def test_every_section_has_its_banner_in_the_order_of_the_design():
    assert [match[1] for match in BANNER.finditer(source("deploybot"))] == list(SECTIONS)


def test_every_banner_says_what_it_owns_and_ignores():
    for match in BANNER.finditer(source("deploybot")):
        words = " ".join(match[0].replace("#", " ").split())
        assert re.search(r"Owns .+\. Ignores .+|Owns .+; ignores .+", words), match[1]


def test_the_store_alone_knows_sqlite():
    assert sections_naming("sqlite3") == {"Store"}
    texts = [node for node in ast.walk(tree("deploybot")) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    sql = re.compile(r"\b(SELECT .+ FROM|INSERT (OR \w+ )?INTO|UPDATE \w+ SET|DELETE FROM|PRAGMA|(?<!-)BEGIN|COMMIT)\b")
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree("deploybot"))
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and node.body and isinstance(node.body[0], ast.Expr)
    }
    assert {section_of(node.lineno) for node in texts if sql.search(node.value) and id(node) not in documents} == {"Store"}


def test_http_and_sockets_stay_in_http_routes_and_main():
    classes = [
        node.name
        for node in tree("deploybot").body
        if isinstance(node, ast.ClassDef) and section_of(node.lineno) in ("HTTP", "Routes")
    ]
    assert {"Request", "Response", "Router", "Handler", "Server"} <= set(classes)
    assert sections_naming("http", "socket", "socketserver", *classes) <= {"HTTP", "Routes", "Main"}


def test_jobs_know_no_argv_and_routes_no_store_of_their_own():
    assert sections_naming("argparse", "argv", "signal") == {"Main"}
    assert "Jobs" not in sections_naming("environ")


def test_the_queue_and_the_hub_know_no_sql_and_no_jobs():
    for section, forbidden in (("JobQueue", ("Job", "Store", "Event", "Queries")), ("EventHub", ("Job", "Store", "Queries"))):
        for name in forbidden:
            assert section not in sections_naming(name), (section, name)


def test_time_is_asked_of_the_clock():
    """Jobs are tested with a clock that stands still: none of its decisions reads the system's. Waiting is real."""
    asked = []
    for node in ast.walk(tree("deploybot")):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("time", "datetime"):
            asked.append(section_of(node.lineno))
    assert not {"Apps", "Store", "Metrics", "Auth", "Webhooks", "Routes"} & set(asked)


# -- size --------------------------------------------------------------------------------------------------------------


def test_the_controller_stays_small():
    """style.md says 4,500, bottle's size, which what stood before deployments filled; docs/design.md is what came on top."""
    assert source("deploybot").count("\n") < 6100


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_function_has_50_lines(name):
    assert [(one.name, length(one)) for one in functions(name) if length(one) >= 50] == []


def test_most_functions_of_the_controller_are_short():
    lengths = sorted(map(length, functions("deploybot")))
    assert statistics.median(lengths) <= 6
    assert lengths[int(len(lengths) * 0.9)] < 25


# -- what two programs share -------------------------------------------------------------------------------------------


SHARING = ("agent", "ctl", "notify")


def text_of(function):
    """Its arguments and its body, without docstring and annotations, which not every program has."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    defaults = [*function.args.defaults, *filter(None, function.args.kw_defaults)]
    names = [one.arg for one in ast.walk(function.args) if isinstance(one, ast.arg)]
    return " ".join(names) + "".join(map(ast.dump, [*defaults, *body]))


def shared_functions():
    """[(name, {text})] of functions that two of these programs define at top level."""
    texts = {}
    for name in SHARING:
        for node in tree(name).body:
            if isinstance(node, ast.FunctionDef):
                texts.setdefault(node.name, {})[name] = text_of(node)
    return [(name, set(found.values())) for name, found in sorted(texts.items()) if len(found) > 1 and name not in OWN]


OWN = {"main", "run", "prepare", "build_parser", "load_config", "status"}  # the same word for what each does its own way


def test_what_two_programs_share_is_the_same():
    assert {"write_whole", "sse_events"} <= {name for name, _ in shared_functions()}
    assert [name for name, texts in shared_functions() if len(texts) > 1] == []


def constants(name):
    found = {}
    for node in tree(name).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.unparse(node.value)
    return found


def test_limits_of_the_protocol_are_the_same_where_two_programs_name_them():
    ours = constants("deploybot")
    for name in SHARING:
        theirs = constants(name)
        for limit in ("MAX_LINES", "MAX_MESSAGE", "MAX_WAIT", "MAX_ERROR"):
            if limit in theirs:
                assert eval(theirs[limit], {}, {"KIB": 1024}) == eval(ours[limit], {}, {"KIB": 1024}), (name, limit)


# -- habits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_test_hook_print_or_leftover_stands_in_a_program(name):
    assert not re.search(r"\b(TODO|FIXME|XXX|breakpoint\(|pdb)\b", source(name))


def test_the_controller_prints_only_where_a_person_asked():
    lines = [
        node.lineno for node in ast.walk(tree("deploybot")) if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert {section_of(line) for line in lines} <= {"Main"}


def test_no_bare_except_hides_what_went_wrong():
    for name in PROGRAMS:
        handlers = [node for node in ast.walk(tree(name)) if isinstance(node, ast.ExceptHandler)]
        assert all(handler.type is not None for handler in handlers)


def test_what_receivers_may_be_told_of_is_the_same_for_the_controller_and_its_messenger():
    assert assigned("deploybot", "NOTIFY_EVENTS") == assigned("notify", "EVENTS")


def assigned(name, variable):
    (found,) = (node.value for node in tree(name).body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == variable)
    return ast.literal_eval(found)
