from __future__ import annotations

import builtins
import copy
import pickle
from typing import Any

import pytest

from kernelhub import errors
from kernelhub.errors import (
    BuildFailed,
    CompatibilityWarning,
    HubUnavailable,
    IncompatibleDevice,
    IntegrityError,
    InvalidMetadata,
    InvalidReference,
    KernelCycle,
    KernelHubError,
    KernelHubWarning,
    KernelImportError,
    KernelNotFound,
    LayerContractError,
    MissingDependency,
    NoCompatibleVariant,
    NoKernelForLayer,
    PublishConflict,
    RankFailed,
    RanksDisagree,
    RepositoryNotFound,
    StoreError,
    UntrustedKernel,
    Violation,
    Yanked,
    context,
)

# Each error with the builtin that users catch (api.md), its exit code (api.md, "The command line") and an example.
ERRORS: list[tuple[KernelHubError, type[BaseException], int]] = [
    (KernelHubError("it failed", hint="Try again."), Exception, 1),
    (InvalidReference("'x' is no name", hint="Expected another."), ValueError, 2),
    (InvalidMetadata("metadata.json: id"), ValueError, 4),
    (KernelNotFound("org/x is nowhere"), FileNotFoundError, 1),
    (RepositoryNotFound("org/x is not here", hint="Elsewhere."), FileNotFoundError, 1),
    (Yanked("v1 was withdrawn", commit="f" * 40, reason="it is wrong", hint="Use v2."), FileNotFoundError, 1),
    (NoCompatibleVariant("org/x@v1", "torch 2.10", [("torch-cuda", "made for CUDA")]), FileNotFoundError, 1),
    (UntrustedKernel("org/x", hint="Trust it."), ValueError, 4),
    (IntegrityError("org/x", [Violation("missing", "a.py")], hint="Fetch it again."), ValueError, 4),
    (MissingDependency("org/x needs einops", packages=["einops", "helion"]), ImportError, 1),
    (IncompatibleDevice("built for 9.0"), RuntimeError, 1),
    (KernelImportError("small: its code raised"), ImportError, 1),
    (
        BuildFailed("it does not compile", error="a.cpp:1: no", command="g++ a.cpp", log="a", hint="Try."),
        RuntimeError,
        1,
    ),
    (HubUnavailable("no answer", hub="https://hub", request="GET /", status=503, hint="Wait."), OSError, 3),
    (StoreError("the disk is full"), OSError, 1),
    (PublishConflict("v1 moved", winner="f" * 40, hint="Publish again."), RuntimeError, 1),
    (RankFailed("ranks failed", {1: "it is gone", 3: "so is it"}, hint="Look there."), RuntimeError, 1),
    (RanksDisagree("ranks disagree", ["norm: rank 0 has a, rank 1 has b"], hint="Ask for one."), RuntimeError, 1),
    (KernelCycle(["org/a@v1", "org/b@v1", "org/a@v1"]), RuntimeError, 1),
    (LayerContractError("org/x:L", ["it has a constructor"]), TypeError, 1),
    (NoKernelForLayer("RMSNorm"), ValueError, 1),
]
NAMES = [type(error).__name__ for error, _, _ in ERRORS]


def test_every_error_is_tested_here() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert {item.__name__ for item in classes if issubclass(item, KernelHubError)} == set(NAMES)
    public = {item.__name__ for item in classes if issubclass(item, (KernelHubError, Warning))}
    assert public <= set(errors.__all__)


@pytest.mark.parametrize(("error", "builtin", "exit_code"), ERRORS, ids=NAMES)
def test_each_is_the_builtin_that_users_catch(error: KernelHubError, builtin: type, exit_code: int) -> None:
    assert isinstance(error, KernelHubError)
    assert isinstance(error, builtin)
    nearest = [base for base in type(error).__mro__ if vars(builtins).get(base.__name__) is base]
    assert nearest[0] is builtin
    assert error.exit_code == exit_code


def facts(error: KernelHubError) -> dict[str, Any]:
    """Everything there is to read of an error."""
    builtin = {name: getattr(error, name) for name in ("msg", "name", "errno", "filename") if hasattr(error, name)}
    return {**vars(error), **builtin, "args": error.args, "str": str(error), "repr": repr(error), "type": type(error)}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(("error", "builtin", "exit_code"), ERRORS, ids=NAMES)
def test_each_pickles_and_comes_back_equal(error: KernelHubError, builtin: type, exit_code: int, protocol: int) -> None:
    error.add_context("while loading org/x@v1")
    back = pickle.loads(pickle.dumps(error, protocol))
    assert facts(back) == facts(copy.copy(error)) == facts(error)
    assert back.contexts == ("while loading org/x@v1",)
    assert back.message in str(back)


def test_a_copy_has_contexts_of_its_own() -> None:
    error = InvalidReference("x")
    copied = copy.deepcopy(error)
    copied.add_context("while reading")
    assert (str(error), str(copied)) == ("x", "while reading: x")


def test_the_text_is_context_fact_and_what_to_do() -> None:
    error = KernelHubError("digest mismatch", hint="Fetch it again.")
    assert str(error) == "digest mismatch\n  Fetch it again."
    error.add_context("while verifying torch-cpu")
    error.add_context("while loading org/relu@v1")
    assert str(error) == "while loading org/relu@v1: while verifying torch-cpu: digest mismatch\n  Fetch it again."
    assert str(KernelHubError("alone")) == "alone"


def test_contexts_are_added_outermost_first_and_each_once() -> None:
    with (
        pytest.raises(KernelHubError) as caught,
        context("outer"),
        context("inner"),
        context("inner"),
        context("outer"),
    ):
        raise InvalidMetadata("fact")
    assert caught.value.contexts == ("inner", "outer")
    with pytest.raises(KernelHubError) as ordered, context("one"), context("two"), context("three"):
        raise InvalidMetadata("fact")
    assert ordered.value.contexts == ("one", "two", "three")


def test_a_context_leaves_other_errors_and_results_alone() -> None:
    with pytest.raises(ValueError) as caught, context("while"):
        raise ValueError("other")
    assert caught.value.args == ("other",)
    with context("while"):
        result = 1
    assert result == 1


def test_no_compatible_variant_lists_every_build_with_its_reason() -> None:
    rejected = [("torch-cuda", "made for CUDA"), ("torch29-cpu-x86_64-linux", "built for torch 2.9")]
    error = NoCompatibleVariant("org/x@v1", "torch 2.10", rejected)
    assert str(error).splitlines() == [
        "org/x@v1 has no build that runs here (torch 2.10)",
        "    torch-cuda                made for CUDA",
        "    torch29-cpu-x86_64-linux  built for torch 2.9",
        "  `kernelhub doctor` shows this machine as the selection sees it.",
    ]
    assert (error.ref, error.machine, error.rejected) == ("org/x@v1", "torch 2.10", tuple(rejected))
    assert "it has no builds at all" in str(NoCompatibleVariant("org/x", "m", []))


def test_integrity_errors_name_each_file_up_to_a_screenful() -> None:
    violations = [Violation("missing", f"{number}.py") for number in range(23)]
    error = IntegrityError("org/x", violations)
    assert error.violations == tuple(violations)
    lines = str(error).splitlines()
    assert lines[:2] == ["org/x", "    missing: 0.py"]
    assert lines[20:] == ["    missing: 19.py", "    and 3 more"]
    assert "more" not in str(IntegrityError("org/x", violations[:20]))
    assert str(IntegrityError("org/x")) == "org/x"


def test_data_is_kept_with_the_error() -> None:
    missing = MissingDependency("needs", packages=["einops", "helion"])
    assert missing.packages == ("einops", "helion")
    assert str(missing).endswith("pip install einops helion")
    unavailable = HubUnavailable("no", hub="h", request="GET /x", status=503)
    assert (unavailable.hub, unavailable.request, unavailable.status) == ("h", "GET /x", 503)
    assert PublishConflict("x", winner="w").winner == "w"
    assert KernelCycle(["a", "b", "a"]).path == ("a", "b", "a")
    assert str(KernelCycle(["a", "b", "a"])).endswith("a -> b -> a")
    contract = LayerContractError("L", ["one", "two"])
    assert (contract.problems, str(contract)) == (("one", "two"), "L\n    one\n    two")


def test_a_source_without_the_repository_is_a_kernel_that_is_not_found() -> None:
    assert issubclass(RepositoryNotFound, KernelNotFound)


def test_warnings_can_be_filtered_as_one() -> None:
    assert issubclass(CompatibilityWarning, KernelHubWarning)
    assert issubclass(KernelHubWarning, UserWarning)
