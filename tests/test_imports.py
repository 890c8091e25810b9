"""Who may import whom (design.md, section 2), read from the sources; and importing has no side effect."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "raygr"

# What a part of raygr may import of raygr; a part is a package, or a module of the top level.
ALLOWED = {
    "schema": set(),
    "files": set(),
    "locks": set(),
    "records": {"files"},
    "config": {"files"},
    "config_results": {"config"},
    "config_reproduce": {"config"},
    "runs": {"files", "locks", "records"},
    "balance": {"config"},
    "cluster": {"config"},
    "workers": {"config", "runs", "cluster"},
    "data": {"schema", "config", "runs", "balance", "cluster"},
    "aspects": {"schema", "config", "config_results", "runs", "balance", "cluster", "embeddings"},
    "embeddings": {"schema", "config", "runs"},
    "evaluation": {"schema", "config", "runs"},
    "diversity": set(),
    "rankings": {"schema", "config", "runs", "evaluation"},
    # profiles are vectors made from scores: the one thing that training takes from aspects
    "recommenders": {
        "schema",
        "config",
        "runs",
        "balance",
        "cluster",
        "workers",
        "data",
        "embeddings",
        "evaluation",
        "rankings",
        "diversity",
        "aspects.profiles",
    },
    "finetuning": {"schema", "config", "runs", "cluster", "workers", "data", "embeddings", "evaluation", "aspects"},
    "gains": set(),
    "gain_words": {"evaluation"},
    "compare": {
        "schema",
        "config",
        "config_results",
        "runs",
        "evaluation",
        "rankings",
        "gains",
        "gain_words",
        "compare_references",
        "compare_tables",
    },
    "compare_references": {"schema", "runs", "data", "evaluation", "rankings"},
    "compare_tables": {"schema", "runs", "evaluation", "gain_words"},
    "sweep": {
        "config",
        "config_results",
        "runs",
        "cluster",
        "workers",
        "recommenders",
        "sweep_space",
        "sweep_results",
    },
    "sweep_space": {"config", "config_results", "runs", "data", "recommenders"},
    "sweep_results": {
        "schema",
        "config",
        "config_results",
        "runs",
        "evaluation",
        "compare_tables",
        "sweep_space",
        "sweep_figure",
    },
    "sweep_figure": {"runs", "figures"},
    "figures": set(),
    "report_scores": {"schema", "config", "runs", "balance", "data.vectors"},
    "report_sections": {
        "schema",
        "config",
        "runs",
        "figures",
        "report_scores",
        "evaluation",
        "gain_words",
        "aspects.quality",
        "compare_tables",
    },
    "report_tuning": {"schema", "config", "runs", "figures", "gains", "report_sections"},
    "report": {
        "schema",
        "config",
        "config_results",
        "runs",
        "figures",
        "compare_tables",
        "report_scores",
        "report_sections",
        "report_tuning",
    },
    "recommend": {
        "schema",
        "config",
        "config_results",
        "runs",
        "balance",
        "cluster",
        "workers",
        "data",
        "recommenders",
    },
    "explanations": set(),
    "explanation_cases": {"schema", "data"},
    "explanation_values": {"schema", "config", "data", "embeddings", "recommenders"},
    "explanation_figure": {"explanations", "figures"},
    "explain": {
        "schema",
        "config_results",
        "runs",
        "data",
        "recommenders",
        "explanations",
        "explanation_cases",
        "explanation_values",
        "explanation_figure",
        "figures",
    },
    "export": {"schema", "config", "config_results", "runs", "data", "recommenders"},
    "estimates": {"schema", "config", "config_results", "runs", "data", "aspects", "finetuning"},
    "plan": {"config", "config_results", "runs", "estimates"},
    "reproduce_arms": {"config", "config_reproduce", "runs", "data.vectors"},
    "reproduce_tables": {
        "schema",
        "config",
        "config_reproduce",
        "runs",
        "evaluation",
        "gain_words",
        "compare_tables",
        "reproduce_arms",
        "reproduce_costs",
    },
    "reproduce_costs": {"schema", "runs", "aspects"},
    "reproduce_figures": {"figures", "reproduce_arms", "reproduce_costs", "reproduce_tables"},
    "reproduce": None,
    "pipeline": None,
    "cli": None,
}
RAY_MODULES = {
    "cluster.py",
    "workers.py",
    "data/prepare.py",
    "aspects/scoring.py",
    "recommenders/train.py",
    "recommend.py",
    "sweep.py",
    "finetuning/train.py",
}
VLLM_MODULES, PEFT_MODULES = {"aspects/engine.py"}, {"aspects/merging.py"}


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources() -> list[Path]:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert len(files) > 15
    return files


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_the_table_allows(path):
    own, module = part_of(path), str(path.relative_to(PACKAGE))
    names = imported_modules(path)
    if ALLOWED[own] is not None:
        inside = {name.removeprefix("raygr.") for name in names if name.startswith("raygr.")}
        allowed = ALLOWED[own] | {own}
        foreign = {name for name in inside if not any(name == a or name.startswith(f"{a}.") for a in allowed)}
        assert not foreign
    assert module in RAY_MODULES or not any(name.split(".")[0] == "ray" for name in names)
    assert module in VLLM_MODULES or not any(name.split(".")[0] == "vllm" for name in names)
    assert own == "finetuning" or module in PEFT_MODULES or not any(name.split(".")[0] == "peft" for name in names)


def test_importing_every_module_loads_no_heavy_library_that_it_can_do_without():
    code = (
        "import sys, raygr, raygr.cli, raygr.aspects.engine, raygr.aspects.subjects\n"
        "print([name for name in ('vllm', 'peft', 'ray') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"
