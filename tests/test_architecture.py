"""Imports point one way, and the public names are pinned."""

from __future__ import annotations

import ast
import builtins
import re
import subprocess
from pathlib import Path

import pytest

import streamsoup

PACKAGE = Path(streamsoup.__file__).resolve().parent
ROOT = PACKAGE.parent
# From the ground up. A module may import from its own floor (without a circle) and from those below it.
FLOORS = """
    _version errors units dtypes kernels maps source open_files threads labels layers strict_yaml ranks
    files recipe checkpoints methods measurement asked tiling device_share budget devices journal score rules
    align layout plan planner manifest mergekit_settings from_mergekit_config
    windows read storage write backends companions outcome
    tile_queue tile_work engine sinks merging
    findings workspace execution side_files recheck
    making soup_plan made sampling saving
    cook pool candidate sums scorebook tensor_rows view viewing
    forecast reread own_scores greedy_job evaluator greedy_options greedy_output greedy_wanted greedy_ahead
    greedy_loop greedy_cook
    picture sweeping sliding converting verifying
    comparison_figures comparison_gathering
    learning comparison bench hosts
    comparison_pictures comparison_page
    cli
    __main__
"""
FLOOR_OF = {room: floor for floor, line in enumerate(FLOORS.split("\n")) for room in line.split()}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts)


def dotted(path: Path) -> str:
    parts = ["streamsoup", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(name: str) -> str:
    return name.split(".")[1] if name.count(".") else ""


def imports_of(path: Path) -> set[str]:
    """Every module of streamsoup that a file imports, anywhere in it."""
    found = set()
    known = {dotted(m) for m in modules()} | {"streamsoup.kernels"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {n for n in names if n in known or n.startswith("streamsoup.kernels")}
    return {n for n in found if n != dotted(path)}


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_point_down(path):
    name = dotted(path)
    room = room_of(name)
    if not room:  # the package itself: names loaded lazily
        return
    assert room in FLOOR_OF, f"{name} has no floor: give it one in this test and in docs/design.md"
    for target in imports_of(path):
        below = room_of(target)
        assert not below or FLOOR_OF[below] <= FLOOR_OF[room], f"{name} imports {target}, which is above it"


def test_every_room_is_on_the_page_on_design():
    """By its name, or by that of its family (`greedy_*`)."""
    table = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("## Rooms")[1].split("## Decisions")[0]
    named = set(re.findall(r"`([a-z_*]+)/?`", table))
    families = tuple(name.removesuffix("*") for name in named if name.endswith("*"))
    missing = [
        r for r in FLOOR_OF if r not in named and not r.startswith(families) and r not in ("_version", "__main__")
    ]
    assert not missing, f"give {missing} a row in docs/design.md"


def test_imports_make_no_circle():
    graph = {dotted(p): {n for n in _runtime_imports(p) if not n.startswith("streamsoup.kernels")} for p in modules()}
    graph.pop("streamsoup")
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != 1, " -> ".join([*trail, name])
        if state.get(name) == 2 or name not in graph:
            return
        state[name] = 1
        for other in sorted(graph[name]):
            inside = other.startswith(f"{name}.") or name.startswith(f"{other}.")
            if not inside:  # a package and its own modules
                visit(other, (*trail, name))
        state[name] = 2

    for name in sorted(graph):
        visit(name, ())


def _runtime_imports(path: Path) -> set[str]:
    """Imports at the top of a module; those under TYPE_CHECKING and inside functions make no circle."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("streamsoup"):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("streamsoup")}
    return found - {dotted(path), "streamsoup"}


def test_kernels_import_nothing_of_streamsoup():
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert node is not None
            assert not [n for n in names if n.split(".")[0] == "streamsoup"], path


def test_print_lives_in_the_command_line_only():
    for path in modules():
        if "cli" in path.relative_to(PACKAGE).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), path


def test_public_names_are_pinned_and_load():
    assert sorted({"__version__", *streamsoup._HOMES}) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(streamsoup, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = streamsoup.nonsense


def test_all_but_open_come_with_a_star_which_would_hide_the_builtin():
    assert sorted(streamsoup.__all__) == sorted(set(PUBLIC) - set(dir(builtins)))
    assert set(PUBLIC) & set(dir(builtins)) == {"open"}
    space: dict[str, object] = {}
    exec("from streamsoup import *", space)
    assert "soup" in space
    assert "open" not in space
    assert streamsoup.open is not open
    assert "open" in dir(streamsoup)


PUBLIC = [
    "Candidate",
    "Comparison",
    "Execution",
    "GreedyResult",
    "Ingredient",
    "LearnResult",
    "Progress",
    "Recipe",
    "RunningSoup",
    "SoupResult",
    "SoupView",
    "StreamsoupError",
    "Verification",
    "__version__",
    "compare",
    "convert",
    "from_mergekit",
    "greedy",
    "learn",
    "open",
    "plan_soup",
    "read_recipe",
    "resume",
    "resume_greedy",
    "sliding_averages",
    "soup",
    "sweep",
    "verify",
]


def test_no_public_function_shares_its_name_with_a_module():
    names = {p.stem for p in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if p.is_dir()}
    assert not names & set(PUBLIC)


def test_every_error_has_one_root_and_is_drawn_in_the_tree():
    from streamsoup import errors

    kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    for kind in kinds:
        assert issubclass(kind, errors.StreamsoupError)
        assert kind.__name__ in (errors.__doc__ or "")
        if kind is not errors.StreamsoupError:
            builtins = [b for b in kind.__mro__ if b.__module__ == "builtins" and b not in (Exception, object)]
            assert any(b is not BaseException for b in builtins), f"{kind.__name__} derives from no fitting builtin"


def test_nothing_in_the_repository_names_a_machine():
    listing = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile("|".join(["/" + "work/", "/" + "root/", "/" + "opt/ss"]))
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ""}:
            found = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
            assert found is None, f"{name}: {found and found[0]}"
