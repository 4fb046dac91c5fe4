"""Mutation run over ``objectives/``: which small changes to a formula does no test notice?

``make mutants`` runs it in ``.venv-mutants``. Settings are in ``pyproject.toml`` under ``[tool.mutmut]``, results in
``mutants/``: what has been killed there stays so (``rm -r mutants`` for a fresh run), all else is tried. At the end the
survivors are printed as diffs, then a table; exit code 1 if fewer than 95 % were killed.

    make mutants MUTANTS='trueup.objectives.value.*'    # a part
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import libcst
import mutmut.__main__ as mutmut
import pytest
import torch
from libcst import matchers
from mutmut.configuration import config
from mutmut.mutation import trampoline
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.file_mutation import MutationVisitor
from mutmut.mutation.mutators import mutation_operators
from mutmut.runners.harness import TestRunner
from mutmut.state import state
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import change_cwd
from mutmut.workers.isolation import ForkServerRunner

KILLED = ("killed", "timeout")
"""A change that ends in a loop without end is noticed too."""
GOAL = 0.95

GRADIENT = [matchers.Decorator(matchers.Name(name)) for name in ("staticmethod", "once_differentiable")]


def drop_detach(node: libcst.Call) -> list[libcst.BaseExpression]:
    return [node.func.value] if matchers.matches(node.func, matchers.Attribute(attr=matchers.Name("detach"))) else []


def drop_call(node: libcst.Expr) -> list[libcst.Pass]:
    return [libcst.Pass()] if isinstance(node.value, libcst.Call) else []


def drop_raise(node: libcst.Raise) -> list[libcst.Pass]:
    return [libcst.Pass()]


def change_more_than_mutmut() -> None:
    """Also without a raise, a statement that is a call, a ``detach``; the texts of errors stay as they are.

    mutmut leaves decorated functions out, but static methods: here the gradient of an autograd function takes part.
    """
    mutation_operators.extend([(libcst.Call, drop_detach), (libcst.Expr, drop_call), (libcst.Raise, drop_raise)])
    visit, skip = MutationVisitor.on_visit, MutationVisitor._skip_node_and_children

    def visit_but_texts(self: MutationVisitor, node: libcst.CSTNode) -> bool:
        return visit(self, node) and not isinstance(node, libcst.Raise)

    def skip_but_gradients(self: MutationVisitor, node: libcst.CSTNode) -> bool:
        return not matchers.matches(node, matchers.FunctionDef(decorators=GRADIENT)) and skip(self, node)

    MutationVisitor.on_visit, MutationVisitor._skip_node_and_children = visit_but_texts, skip_but_gradients


class Unchecked:
    """The variants of a function without the check of their annotated shapes."""

    def __init__(self, variants: dict[str, Callable]) -> None:
        self.variants = variants

    def __getitem__(self, name: str) -> Callable:
        return self.variants[name].__wrapped__

    def get(self, name: str) -> Callable | None:
        return self[name] if name in self.variants else None


def look_below_the_shape_checks() -> None:
    """Tests reach below the check of annotated shapes by ``function.__wrapped__``: mutants have to be there as well."""
    wrap = trampoline.wrap_in_trampoline

    def wrap_both(variants: dict[str, Callable], **options: bool) -> Callable:
        def decorate(function: Callable) -> Callable:
            checked = wrap(variants, **options)(function)
            checked.__wrapped__ = wrap(Unchecked(variants), **options)(function)
            return checked

        return decorate

    trampoline.wrap_in_trampoline = wrap_both


class Collected(TestRunner):
    """Tests of a session that has collected them: a fork runs some of them, and ends at the first that fails."""

    def __init__(self, session: pytest.Session) -> None:
        self.session = session
        self.items = {item.nodeid: item for item in session.items}
        # Its first call imports half of torch's distributed tensors, which every fork would do again.
        torch.testing.assert_close(torch.ones(1), torch.ones(1))
        gc.freeze()

    def run_tests(self, *, mutant_name: str | None, tests: Iterable[str]) -> int:
        items = [self.items[test] for test in tests]
        for item, following in itertools.zip_longest(items, items[1:]):
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.session.shouldfail:
                return pytest.ExitCode.TESTS_FAILED
        return pytest.ExitCode.OK


def collect_once_and_run_fast_tests_first() -> None:
    """Collecting takes longer than most mutants live: the server that forks is a session of pytest that has done it."""
    serve, submit = ForkServerRunner._forkserver_main, ForkServerRunner.submit

    def serve_in_session(self: ForkServerRunner, *pipes: int) -> None:
        class Serve:
            def pytest_runtestloop(self_, session: pytest.Session) -> bool:
                self.test_runner_class, self.test_runner_args = Collected, {"session": session}
                serve(self, *pipes)
                return True

        with Path(os.devnull).open("w") as sys.stdout, change_cwd("mutants"):
            arguments = ["-x", "--tb=no", *config().pytest_add_cli_args, *config().pytest_add_cli_args_test_selection]
            pytest.main(arguments, plugins=[Serve()])

    def submit_sorted(self: ForkServerRunner, mutant: str, tests: list[str], *limits: float) -> None:
        submit(self, mutant, sorted(tests, key=state().duration_by_test.__getitem__), *limits)

    ForkServerRunner._forkserver_main = serve_in_session
    ForkServerRunner.submit = submit_sorted


def results() -> dict[str, dict[str, str]]:
    """The status of every mutant by module."""
    _, files = mutmut.collect_source_file_mutation_data(mutant_names=())
    return {
        path: {name: status_by_exit_code[code] for name, code in data.exit_code_by_key.items()}
        for path, data in sorted(files.items())
    }


def try_survivors_again() -> None:
    """With all tests anew: which of them reach which function is remembered, and changes with them."""
    Path("mutants/mutmut-stats.json").unlink(missing_ok=True)
    _, files = mutmut.collect_source_file_mutation_data(mutant_names=())
    for data in files.values():
        for name, code in data.exit_code_by_key.items():
            if status_by_exit_code[code] != "killed":
                data.exit_code_by_key[name] = None
        if data.exit_code_by_key:
            data.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mutants", nargs="*", help="patterns of their names; all without one")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()

    change_more_than_mutmut()
    look_below_the_shape_checks()
    collect_once_and_run_fast_tests_first()
    try_survivors_again()
    mutmut._run(options.mutants, options.jobs)

    total, killed = Counter(), Counter()
    for path, statuses in results().items():
        for name, status in statuses.items():
            if options.mutants and not any(fnmatch.fnmatch(name, pattern) for pattern in options.mutants):
                continue
            total[path] += 1
            killed[path] += status in KILLED
            if status not in KILLED:
                print(f"\n{status}: {name}\n{get_diff_for_mutant(name)}")
    print("\n| module | mutants | killed |\n|---|---|---|")
    for path in total:
        print(f"| {path} | {total[path]} | {killed[path]} |")
    share = killed.total() / total.total()
    print(f"| all | {total.total()} | {killed.total()} ({share:.1%}) |")
    sys.exit(share < GOAL)


if __name__ == "__main__":
    main()
