"""The rules of the house, read from the sources.

A rule is a function from files ({path: text}) to a list of complaints.  Each rule is run on this
repository, where it must find nothing, and on small bad files, where it must find something: a
rule that cannot fail guards nothing.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("core", "cpu", "decoder", "api", "python")  # each may include itself and those before it
MAX_COLUMNS = 100
MAX_LINES = 650

Files = Mapping[str, str]
Rule = Callable[[Files], list[str]]
RULES: dict[str, tuple[Rule, list[Files], list[Files]]] = {}


def rule(bad: list[Files], good: list[Files]) -> Callable[[Rule], Rule]:
    """Registers a rule with files that break it, one set per way, and files that look similar."""

    def register(function: Rule) -> Rule:
        RULES[function.__name__] = (function, bad, good)
        return function

    return register


# ------------------------------------------------------------------------------------- reading


def repository_files() -> dict[str, str]:
    """Every file of the repository, what git tracks or would track, else what lies there; those
    that are no text are empty here."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        folders = ("csrc", "qllm", "tests", "scripts", "docs", ".ci")
        listing = [path.relative_to(ROOT).as_posix()
                   for folder in folders for path in (ROOT / folder).rglob("*")]
        listing += ["setup.py", "pyproject.toml", "README.md"]
    files = {}
    for name in listing:
        path = ROOT / name
        if not name or "__pycache__" in name or not path.is_file():
            continue
        try:
            files[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            files[name] = ""
    return files


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return repository_files()


C_TOKENS = re.compile(r"""/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""", re.DOTALL)


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match.group())


def without_comments(text: str) -> str:
    """C source with comments blanked, line for line."""
    return C_TOKENS.sub(lambda m: _blank(m) if m.group().startswith("/") else m.group(), text)


def code_only(text: str) -> str:
    """C source with comments, strings and character constants blanked, line for line."""
    return C_TOKENS.sub(_blank, text)


def c_files(files: Files, *suffixes: str) -> Iterator[tuple[str, str]]:
    for name, text in files.items():
        if name.startswith("csrc/") and name.endswith(suffixes or (".c", ".h")):
            yield name, text


def python_files(files: Files) -> Iterator[tuple[str, str]]:
    for name, text in files.items():
        if name.startswith("qllm/") and name.endswith(".py"):
            yield name, text


def matches(name: str, text: str, pattern: str) -> Iterator[tuple[str, str]]:
    """(place, the matched words) for each match of the pattern."""
    for match in re.finditer(pattern, text, re.MULTILINE):
        line = text.count("\n", 0, match.start()) + 1
        yield f"{name}:{line}", match.group().strip()


def includes(text: str) -> list[str]:
    return re.findall(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"]+)[>"]', without_comments(text),
                      re.MULTILINE)


def room(name: str) -> str:
    return name.split("/")[1]


def cycles(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """One sentence for each cycle that a depth-first walk meets."""
    found: list[str] = []
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> None:
        if node in path:
            found.append("cycle: " + " -> ".join([*path[path.index(node):], node]))
            return
        if node in done:
            return
        for successor in sorted(graph.get(node, ())):
            walk(successor, [*path, node])
        done.add(node)

    for start in sorted(graph):
        walk(start, [])
    return found


# ---------------------------------------------------------------------------------- rules for C


@rule(bad=[{"csrc/core/a.c": "#include <Python.h>\n"},
           {"csrc/cpu/a.h": '# include "Python.h"\n'},
           {"csrc/decoder/a.c": "#include <numpy/arrayobject.h>\n"},
           {"csrc/python/py_a.c": "#include <numpy/arrayobject.h>\n"}],
      good=[{"csrc/python/a.c": "#include <Python.h>\n"},
            {"csrc/python/array.c": "#include <numpy/arrayobject.h>\n"},
            {"csrc/core/a.c": "/* #include <Python.h> */\n"}])
def python_headers_stand_in_one_room(files: Files) -> list[str]:
    wrong = []
    for name, text in c_files(files):
        for header in includes(text):
            if header.startswith("Python") and room(name) != "python":
                wrong.append(f"{name}: {header} belongs in csrc/python")
            if header.startswith("numpy/") and name != "csrc/python/array.c":
                wrong.append(f"{name}: {header} belongs in csrc/python/array.c")
    return wrong


@rule(bad=[{"csrc/core/a.c": "#include <immintrin.h>\n"},
           {"csrc/decoder/a.c": "x = _mm256_add_ps(x, y);\n"},
           {"csrc/core/a.h": "static __m512 sum;\n"},
           {"csrc/core/a.c": "float32x4_t x = vld1q_f32(p);\n"},
           {"csrc/python/a.c": "#include <arm_neon.h>\n"},
           {"csrc/core/a.c": "__builtin_ia32_pause();\n"},
           {"csrc/core/a.c": '__asm__ volatile("nop");\n'}],
      good=[{"csrc/cpu/a_avx2.c": "#include <immintrin.h>\nx = _mm256_add_ps(x, y);\n"},
            {"csrc/core/a.c": "int _mmap_count; /* _mm256_add_ps */\n"}])
def intrinsics_stand_in_csrc_cpu(files: Files) -> list[str]:
    header = re.compile(r"\w*intrin\.h|arm_\w+\.h|cpuid\.h|sys/auxv\.h")
    pattern = (r"\b_mm(?:256|512)?_\w+|\b__m(?:64|128|256|512)\w*|\bv(?:ld|st)\dq?_\w+|"
               r"\bfloat32x\d_t|\b__builtin_(?:ia32|cpu)_\w+|\b(?:__)?asm(?:__)?\b")
    wrong = []
    for name, text in c_files(files):
        if room(name) == "cpu":
            continue
        wrong += [f"{name}: {h} belongs in csrc/cpu" for h in includes(text) if header.fullmatch(h)]
        wrong += [f"{place}: {what} belongs in csrc/cpu"
                  for place, what in matches(name, code_only(text), pattern)]
    return wrong


FORBIDDEN = ("printf fprintf vprintf vfprintf sprintf vsprintf puts fputs putchar perror exit _Exit "
             "abort assert Py_FatalError Py_Exit rand srand random strcpy strcat strtok atoi atol "
             "atof gets scanf sscanf system alloca setjmp longjmp").split()


@rule(bad=[{"csrc/core/a.c": f"    {function}(x);\n"} for function in FORBIDDEN]
      + [{"csrc/core/a.c": "    snprintf(text, 3, x);\n"},
         {"csrc/python/a.c": "#include <stdio.h>\n"}],
      good=[{"csrc/core/status.c": "#include <stdio.h>\n    vsnprintf(text, 3, format, a);\n"},
            {"csrc/core/a.c": '/* exit(1) */ f("printf(x)"); qllm_exit(x); at_exit(x);\n'},
            {"csrc/core/a.c": "_Static_assert(1, x);\n"}])
def nothing_prints_exits_or_copies_unbounded(files: Files) -> list[str]:
    """status.c alone formats text (vsnprintf)."""
    pattern = r"(?<![\w.>])(?:" + "|".join(FORBIDDEN) + r")[ \t]*\("
    wrong = []
    for name, text in c_files(files):
        wrong += [f"{place}: {what.rstrip(' (')} is not for this house"
                  for place, what in matches(name, code_only(text), pattern)]
        if name == "csrc/core/status.c":
            continue
        wrong += [f"{name}: <stdio.h> belongs in csrc/core/status.c"
                  for header in includes(text) if header == "stdio.h"]
        wrong += [f"{place}: {what.rstrip(' (')} belongs in csrc/core/status.c"
                  for place, what in matches(name, code_only(text), r"\bv?snprintf[ \t]*\(")]
    return wrong


@rule(bad=[{"csrc/cpu/threads.c": "    p = malloc(8);\n"},
           {"csrc/core/a.c": "    free(p);\n"},
           {"csrc/python/a.c": "    p = realloc (p, 8);\n"},
           {"csrc/core/a.c": "    p = calloc(1, 8);\n"},
           {"csrc/core/a.c": "    p = aligned_alloc(64, 64);\n"},
           {"csrc/core/a.c": "    posix_memalign(&p, 64, 64);\n"},
           {"csrc/core/a.c": "    p = strdup(text);\n"},
           {"csrc/core/a.c": "    release = free;\n"}],
      good=[{"csrc/core/alloc.c": "    free(p); p = aligned_alloc(64, 64);\n"},
            {"csrc/core/a.c": "    qllm_free(p); o->free(o); /* malloc(3) */\n"},
            {"csrc/python/a.c": "    PyMem_Free(p);\n"}])
def memory_comes_from_core_alloc(files: Files) -> list[str]:
    pattern = (r"(?<![\w.])(?<!->)(?:(?:malloc|calloc|realloc|aligned_alloc|posix_memalign|free)\b"
               r"|strn?dup[ \t]*\()")
    return [f"{place}: {what.rstrip(' (')} belongs in csrc/core/alloc.c"
            for name, text in c_files(files) if name != "csrc/core/alloc.c"
            for place, what in matches(name, code_only(text), pattern)]


@rule(bad=[{"csrc/core/a.c": '#include "cpu/b.h"\n', "csrc/cpu/b.h": ""},
           {"csrc/cpu/a.c": '#include "decoder/b.h"\n', "csrc/decoder/b.h": ""},
           {"csrc/decoder/a.c": '#include "python/b.h"\n', "csrc/python/b.h": ""},
           {"csrc/core/a.c": '#include "b.h"\n', "csrc/core/b.h": ""},
           {"csrc/core/a.h": '#include "core/b.h"\n', "csrc/core/b.h": '#include "core/a.h"\n'},
           {"csrc/core/a.h": '#include "core/a.h"\n'},
           {"csrc/kitchen/a.c": ""},
           {"csrc/core/a.c": '#include "core/b.c"\n', "csrc/core/b.c": ""}],
      good=[{"csrc/decoder/a.c": '#include "cpu/b.h"\n#include "core/c.h"\n', "csrc/cpu/b.h": "",
             "csrc/core/c.h": ""},
            {"csrc/core/a.c": "#include <math.h>\n"}])
def includes_go_one_way(files: Files) -> list[str]:
    """core <- cpu <- decoder <- python, by "room/file.h", without a cycle among files."""
    graph: dict[str, list[str]] = {}
    wrong = []
    for name, text in c_files(files):
        if room(name) not in ROOMS:
            wrong.append(f"{name}: {room(name)} is not a room (there are {', '.join(ROOMS)})")
            continue
        quoted = re.findall(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', without_comments(text),
                            re.MULTILINE)
        graph[name] = [f"csrc/{header}" for header in quoted]
        for header in quoted:
            target = header.split("/")[0]
            if f"csrc/{header}" not in files:
                wrong.append(f'{name}: "{header}" is not a file of csrc (write "room/file.h")')
            elif not header.endswith(".h"):
                wrong.append(f"{name}: includes {header}, which is not a header")
            elif target not in ROOMS or ROOMS.index(target) > ROOMS.index(room(name)):
                wrong.append(f"{name}: csrc/{room(name)} may not include {header}")
    return wrong + cycles(graph)


@rule(bad=[{"csrc/core/a.c": "", "csrc/cpu/a.c": ""}, {"csrc/core/a.h": "", "csrc/cpu/a.h": ""}],
      good=[{"csrc/core/a.c": "", "csrc/core/a.h": "", "csrc/cpu/b.c": ""}])
def file_names_are_unique(files: Files) -> list[str]:
    seen: dict[str, str] = {}
    wrong = []
    for name, _ in c_files(files):
        base = name.rsplit("/", 1)[1]
        if base in seen:
            wrong.append(f"{name}: {seen[base]} has the same name")
        seen.setdefault(base, name)
    return wrong


@rule(bad=[{"csrc/core/a.c": "/* \u03b1 */\n"}], good=[{"csrc/core/a.c": "/* alpha */\n"}])
def c_sources_are_ascii(files: Files) -> list[str]:
    return [f"{place}: {what!r} is not ASCII" for name, text in c_files(files)
            for place, what in matches(name, text, r"[^\x00-\x7f]+")]


@rule(bad=[{"csrc/core/a.h": "int x;\n"},
           {"csrc/core/a.h": "#ifndef QLLM_CORE_B_H\n#define QLLM_CORE_B_H\n#endif\n"}],
      good=[{"csrc/core/a.h": "/* x */\n#ifndef QLLM_CORE_A_H\n#define QLLM_CORE_A_H\n#endif\n"}])
def headers_have_guards(files: Files) -> list[str]:
    wrong = []
    for name, text in c_files(files, ".h"):
        guard = "QLLM_" + re.sub(r"\W", "_", name.removeprefix("csrc/")).upper()
        if f"#ifndef {guard}\n#define {guard}\n" not in text:
            wrong.append(f"{name}: no include guard {guard}")
    return wrong


# ----------------------------------------------------------------------------- rules for Python


def module_name(path: str) -> str:
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_type_checking(node: ast.AST) -> bool:
    return (isinstance(node, ast.If)
            and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"))


def import_nodes(tree: ast.AST, everywhere: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements that run when the module is imported; `everywhere`: all of them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif everywhere or not (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef,
                                                  ast.Lambda)) or _is_type_checking(node)):
            yield from import_nodes(node, everywhere)


def imported_modules(name: str, text: str, modules: Iterable[str], everywhere: bool) -> set[str]:
    """Full names of what a file imports; `from x import y` is x.y where that is a module, else x."""
    package = module_name(name).split(".")
    if not name.endswith("/__init__.py"):
        package = package[:-1]
    result = set()
    for node in import_nodes(ast.parse(text), everywhere):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
            continue
        base = package[:len(package) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            full = f"{source}.{alias.name}"
            result.add(full if full in modules or full == "qllm._core" else source)
    return result


@rule(bad=[{"qllm/a.py": "from qllm.b import x\n", "qllm/b.py": "from . import a\n"},
           {"qllm/__init__.py": "from .a import x\n", "qllm/a.py": "import qllm\n"},
           {"qllm/__init__.py": "from .a import x\n", "qllm/a.py": "from qllm import __version__\n"},
           {"qllm/a.py": "try:\n    from . import b\nexcept ImportError:\n    pass\n",
            "qllm/b.py": "class X:\n    from qllm import a\n"},
           {"qllm/s/__init__.py": "from .a import x\n", "qllm/s/a.py": "from . import y\n"}],
      good=[{"qllm/__init__.py": "from .a import x\n", "qllm/a.py": "from qllm import _core\n"},
            {"qllm/a.py": "def f():\n    from . import b\n", "qllm/b.py": "from . import a\n"},
            {"qllm/a.py": "if TYPE_CHECKING:\n    from . import b\n",
             "qllm/b.py": "from . import a\n"}])
def python_imports_have_no_cycle(files: Files) -> list[str]:
    """Imports that run at import time; the package's own __init__ counts where it is named."""
    modules = {module_name(name) for name, _ in python_files(files)}
    return cycles({module_name(name): imported_modules(name, text, modules, False) & modules
                   for name, text in python_files(files)})


@rule(bad=[{"qllm/a.py": "def f():\n    import torch\n"},
           {"qllm/a.py": "from torch.nn import Linear\n"},
           {"qllm/study/a.py": 'import importlib\nimportlib.import_module("torch")\n'},
           {"qllm/a.py": 'from importlib import import_module\nimport_module("torch.nn")\n'}],
      good=[{"qllm/integrations/torch.py": "import torch\n"},
            {"qllm/a.py": "import torchlike\nx = 'import torch'\n"}])
def torch_stands_in_integrations(files: Files) -> list[str]:
    wrong = []
    for name, text in python_files(files):
        if name.startswith("qllm/integrations/"):
            continue
        named = imported_modules(name, text, (), True)
        for node in ast.walk(ast.parse(text)):
            if (isinstance(node, ast.Call) and "import" in ast.unparse(node.func) and node.args
                    and isinstance(node.args[0], ast.Constant)):
                named.add(str(node.args[0].value))
        wrong += [f"{name}: {module} belongs in qllm/integrations" for module in sorted(named)
                  if module.split(".")[0] == "torch"]
    return wrong


@rule(bad=[{"qllm/a.py": "import pickle\n"}, {"qllm/a.py": "from cPickle import load\n"},
           {"qllm/a.py": "def f():\n    import marshal\n"}, {"qllm/a.py": "eval(text)\n"},
           {"qllm/a.py": "run = exec\n"}, {"qllm/a.py": "import joblib\n"},
           {"qllm/a.py": "np.load(path, allow_pickle=True)\n"}, {"qllm/a.py": "__import__(name)\n"},
           {"qllm/a.py": "frame.to_pickle(path)\n"}],
      good=[{"qllm/a.py": "raise E('pickle files are refused: eval(x)')\nmodel.eval()\n"},
            {"qllm/a.py": "import re\nre.compile('x')\nnp.load(path, allow_pickle=False)\n"}])
def nothing_is_unpickled_or_evaluated(files: Files) -> list[str]:
    modules = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    wrong = []
    for name, text in python_files(files):
        wrong += [f"{name}: imports {module}" for module in imported_modules(name, text, (), True)
                  if module.split(".")[0] in modules]
        for node in ast.walk(ast.parse(text)):
            found = None
            if isinstance(node, ast.Name) and node.id in ("eval", "exec", "__import__"):
                found = node.id
            elif isinstance(node, ast.Attribute) and node.attr in ("to_pickle", "read_pickle"):
                found = node.attr
            elif (isinstance(node, ast.keyword) and node.arg == "allow_pickle"
                  and ast.unparse(node.value) != "False"):
                found = "allow_pickle"
            if found:
                wrong.append(f"{name}:{getattr(node, 'lineno', '?')}: {found}")
    return wrong


# --------------------------------------------------------------------------- rules for all files


def code_files(files: Files, *folders: str) -> Iterator[tuple[str, str]]:
    for name, text in files.items():
        if name.split("/")[0] in folders and name.endswith((".c", ".h", ".py", ".pyi")):
            yield name, text


@rule(bad=[{"csrc/core/a.c": "x" * 101 + "\n"}, {"qllm/a.py": "\n" + "#" * 101},
           {"qllm/a.pyi": " " * 101}],
      good=[{"csrc/core/a.c": "x" * 100 + "\n"}, {"qllm/study/page.html": "x" * 300}])
def lines_fit_in_100_columns(files: Files) -> list[str]:
    return [f"{name}:{number}: {len(line)} columns" for name, text in code_files(files, "csrc", "qllm")
            for number, line in enumerate(text.split("\n"), 1) if len(line) > MAX_COLUMNS]


@rule(bad=[{"csrc/core/a.c": "\n" * 651}, {"tests/test_a.py": "x\n" * 651}],
      good=[{"csrc/core/a.c": "\n" * 650}, {"docs/a.md": "\n" * 900}])
def files_stay_readable(files: Files) -> list[str]:
    return [f"{name}: {text.count(chr(10))} lines; look for the missing room"
            for name, text in code_files(files, "csrc", "qllm", "scripts", "tests")
            if text.count("\n") > MAX_LINES]


LITERAL = "0.696" + "1928"  # a value of the nf4 codebook that nothing else would contain


@rule(bad=[{"csrc/core/a.c": LITERAL + "0f", "csrc/core/b.c": LITERAL + "0f"},
           {"csrc/core/codebook.c": LITERAL, "qllm/a.py": LITERAL},
           {"csrc/core/codebook.c": LITERAL + " " + LITERAL}],
      good=[{"csrc/core/codebook.c": LITERAL, "tests/test_a.py": LITERAL}])
def codebooks_stand_in_one_place(files: Files) -> list[str]:
    places = [place for name, text in code_files(files, "csrc", "qllm", "kernels", "scripts")
              for place, _ in matches(name, text, re.escape(LITERAL))]
    return [f"{place}: the nf4 codebook stands in more than one place" for place in places[1:]]


def machine_words() -> str:
    """The pattern is put together here so that this file does not contain what it looks for."""
    folders = ["work", "tmp", "root", "home", "Users", "mnt", "scratch"]
    return r"(?<![\w.$}\])~-])/(?:" + "|".join(folders) + r")\b[\w./-]*|~/\.\w+"


@rule(bad=[{"README.md": "see /" + "work/x\n"}, {"tests/test_a.py": "open('/" + "tmp/x')\n"},
           {"scripts/a.py": "'/" + "home/someone/x'\n"}, {".ci/run": "cd /" + "root\n"},
           {"docs/a.md": "~" + "/.pyenv/versions\n"}],
      good=[{"README.md": "https://example.org/" + "work/x and tmp_path/x, network/" + "tmp\n"},
            {".ci/run": '"$TMPDIR/tmp"\n'}])
def no_machine_paths(files: Files) -> list[str]:
    return [f"{place}: {what} is a path of one machine" for name, text in files.items()
            for place, what in matches(name, text, machine_words())]


@rule(bad=[{"setup.py": '"-march=' + 'native"'}, {"setup.py": '"-ffast' + '-math"'},
           {"setup.py": '"-O' + 'fast"'}],
      good=[{"setup.py": '"-O3"'}, {"docs/a.md": "never -march=" + "native"}])
def builds_run_on_other_machines_and_round_alike(files: Files) -> list[str]:
    pattern = r"-march=" + r"native|-ffast-" + r"math|-O" + r"fast"
    return [f"{place}: {what}" for name, text in files.items()
            if name.endswith((".py", ".toml", ".c", ".h")) or name == ".ci/run"
            for place, what in matches(name, text, pattern)]


PYPROJECT = """
[tool.setuptools.package-data]
qllm = ["py.typed", "*.pyi"]
"qllm.demo" = ["llama/*"]
"""


@rule(bad=[{"pyproject.toml": PYPROJECT, "qllm/__init__.py": "", "qllm/words.txt": ""},
           {"pyproject.toml": PYPROJECT, "qllm/__init__.py": "", "qllm/demo/__init__.py": "",
            "qllm/demo/py.typed": ""},
           {"pyproject.toml": PYPROJECT, "qllm/__init__.py": "", "qllm/demo/__init__.py": "",
            "qllm/demo/llama/deep/x": ""},
           {"pyproject.toml": PYPROJECT, "qllm/__init__.py": "", "qllm/loose/a.py": ""}],
      good=[{"pyproject.toml": PYPROJECT, "qllm/__init__.py": "", "qllm/py.typed": "",
             "qllm/_core.pyi": "", "qllm/demo/__init__.py": "", "qllm/demo/llama/x": ""}])
def wheels_hold_the_whole_package(files: Files) -> list[str]:
    """Each file under qllm is a module of a package, or named in package-data."""
    data = tomllib.loads(files["pyproject.toml"])["tool"]["setuptools"]["package-data"]
    packages = {name.removesuffix("/__init__.py") for name in files
                if name.endswith("/__init__.py") and name.startswith("qllm/")}
    wrong = []
    for name in files:
        if not name.startswith("qllm/"):
            continue
        folder, base = name.rsplit("/", 1)
        if base.endswith(".py"):
            wrong += [] if folder in packages else [f"{name}: {folder} has no __init__.py"]
            continue
        package = max((p for p in packages if name.startswith(p + "/")), key=len)
        inside = PurePosixPath(name).relative_to(package)
        if not any(len(inside.parts) == pattern.count("/") + 1 and inside.match(pattern)
                   for pattern in data.get(package.replace("/", "."), ())):
            wrong.append(f"{name}: package-data of {package.replace('/', '.')} does not name it")
    return wrong


# -------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", RULES)
def test_the_house_keeps(name: str, files: dict[str, str]) -> None:
    complaints = RULES[name][0](files)
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize("name", RULES)
def test_rule_can_fail(name: str) -> None:
    function, bad, _ = RULES[name]
    assert bad
    for files in bad:
        assert function(files), f"{name} does not see what is wrong in {files}"


@pytest.mark.parametrize("name", RULES)
def test_rule_is_not_too_strict(name: str) -> None:
    function, _, good = RULES[name]
    assert good
    for files in good:
        assert function(files) == []


def test_the_sources_are_found(files: dict[str, str]) -> None:
    """Rules over nothing hold: the house must be there."""
    assert {"csrc/core/alloc.c", "csrc/python/module.c", "qllm/__init__.py", "setup.py",
            "README.md", "tests/test_house_rules.py"} <= files.keys()
    assert {room(name) for name, _ in c_files(files)} <= set(ROOMS)
