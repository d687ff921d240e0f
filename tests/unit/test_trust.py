from __future__ import annotations

import pytest

from kernelhub.core.refs import RepoId
from kernelhub.core.trust import Origin, Published, TrustPolicy
from kernelhub.errors import InvalidReference, UntrustedKernel

REPO = RepoId("org", "name")


def remote(publisher_trusted: bool | None = None, repo: RepoId = REPO) -> Published:
    return Published(repo, Origin.REMOTE, "https://hub.example", publisher_trusted)


def test_what_lies_on_the_users_own_disk_is_trusted() -> None:
    nobody = TrustPolicy()
    assert nobody.decide(Published(REPO, Origin.EMBEDDED, "the embedded hub")) == "it is part of kernelhub"
    assert nobody.decide(Published(REPO, Origin.FOLDER, "/srv/hub")) == "it lies in /srv/hub, which the user named"


def test_a_remote_kernel_needs_a_reason() -> None:
    with pytest.raises(UntrustedKernel, match="does not mark trusted publishers"):
        TrustPolicy().decide(remote(None))
    with pytest.raises(UntrustedKernel, match="does not mark as a trusted publisher"):
        TrustPolicy().decide(remote(False))
    assert TrustPolicy().decide(remote(True)) == "https://hub.example marks org as a trusted publisher"


def test_the_refusal_says_who_published_and_how_to_trust_them() -> None:
    with pytest.raises(UntrustedKernel) as caught:
        TrustPolicy().decide(remote())
    assert "org/name would run code published by 'org' in https://hub.example" in str(caught.value)
    assert 'trust_remote_code=["https://hub.example/org/name"] (["org/name"] trusts' in str(caught.value)


def test_the_embedded_organisation_gives_no_trust_to_a_remote_hub() -> None:
    with pytest.raises(UntrustedKernel):
        TrustPolicy().decide(remote(repo=RepoId("kernelhub", "activation")))


def test_the_user_trusts_everything_a_repository_or_a_publisher() -> None:
    assert TrustPolicy.of(True).decide(remote(False)) == "trust_remote_code=True"
    assert TrustPolicy.of(["org/name"]).decide(remote(False)) == "the user trusts org/name"
    assert TrustPolicy.of(False, ["org/*"]).decide(remote(False)) == "the user trusts org/*"
    assert TrustPolicy.of(["a/b"], ["org/name"]).decide(remote(False)) == "the user trusts org/name"


@pytest.mark.parametrize("pattern", ["org/other", "other/*", "or/*", "org/nam", "ORG/name", "Org/*"])
def test_a_pattern_trusts_nobody_else(pattern: str) -> None:
    with pytest.raises(UntrustedKernel):
        TrustPolicy.of([pattern], [pattern]).decide(remote(False))


def test_false_and_an_empty_list_trust_nobody() -> None:
    for policy in (TrustPolicy.of(False), TrustPolicy.of([])):
        assert policy == TrustPolicy()
        with pytest.raises(UntrustedKernel):
            policy.decide(remote(False))


@pytest.mark.parametrize(
    "pattern", ["", "*", "*/*", "org", "org/", "/*", "org/na*", "org/**", "org/name@v1", "o*/name", "../*"]
)
def test_a_malformed_pattern_is_an_error(pattern: str) -> None:
    for arguments in (([pattern], ()), (False, [pattern])):
        with pytest.raises(InvalidReference, match='Expected "org/name", or "org/\\*"'):
            TrustPolicy.of(*arguments)


def test_text_is_not_a_list_of_repositories() -> None:
    with pytest.raises(InvalidReference, match=r"Use trust_remote_code=\['org/name'\]"):
        TrustPolicy.of("org/name")
