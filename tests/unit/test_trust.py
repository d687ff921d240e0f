from __future__ import annotations

import pytest

from kernelhub.core.refs import RepoId
from kernelhub.core.revocations import Revocations
from kernelhub.core.trust import Origin, Pattern, Published, TrustedIdentity, TrustedKey, TrustPolicy
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


KEY = TrustedKey.parse("ed25519:" + "A" * 43 + "=")
SIGNED = Published(REPO, Origin.REMOTE, "https://hub.example", commit="c" * 40, signers=(KEY.key.id,))


@pytest.mark.parametrize(
    ("pattern", "holds"),
    [
        ("https://hub.example/org/name", True),
        ("https://hub.example/org/*", True),
        ("https://hub.example//org/*", True),
        ("https://other.example/org/*", False),
        ("https://hub.example.evil/org/name", False),
        ("http://hub.example/org/name", False),
        ("s3://bucket/kernels/org/name", False),
        ("org/*", True),
    ],
)
def test_a_pattern_with_an_address_holds_on_that_hub_only(pattern: str, holds: bool) -> None:
    assert Pattern.parse(pattern).holds(remote()) is holds


@pytest.mark.parametrize(
    "pattern", ["hub/org/name", "https://hub.example/org", "//org/name", "https:///name", "a b://x/o/n "]
)
def test_a_malformed_address_is_an_error(pattern: str) -> None:
    with pytest.raises(InvalidReference, match="does not name what to trust"):
        Pattern.parse(pattern)


def test_an_address_with_slashes_of_its_own_is_whole() -> None:
    pattern = Pattern.parse("s3://bucket/deep/kernels/org/*")
    assert (pattern.hub, pattern.org, pattern.name) == ("s3://bucket/deep/kernels", "org", "*")
    assert str(pattern) == "s3://bucket/deep/kernels/org/*"
    assert Pattern.parse("/srv/hub/org/name").hub == "/srv/hub"


@pytest.mark.parametrize("text", [5, None, b"org/name", ("org", "name")])
def test_what_is_no_text_is_no_pattern(text: object) -> None:
    with pytest.raises(InvalidReference):
        TrustPolicy.of([text])  # type: ignore[list-item]


def test_a_signature_that_counts_is_a_reason() -> None:
    assert TrustPolicy().decide(SIGNED) == f"it is signed by key {KEY.key.id}, which the user trusts"
    identity = Published(REPO, Origin.REMOTE, "https://hub.example", identity="the builder")
    assert TrustPolicy().decide(identity) == "it is signed by the builder, whom the user trusts"


def test_a_required_signature_leaves_no_other_reason_but_being_part_of_this_package() -> None:
    policy = TrustPolicy.of(True, ["org/*"], require_signature=True)
    assert policy.decide(SIGNED)
    assert policy.decide(Published(REPO, Origin.EMBEDDED, "the embedded hub"))
    for origin in (Origin.REMOTE, Origin.FOLDER, Origin.CACHE):
        with pytest.raises(UntrustedKernel, match="a signature is required"):
            policy.decide(Published(REPO, origin, "somewhere", publisher_trusted=True))


@pytest.mark.parametrize("origin", [Origin.REMOTE, Origin.FOLDER, Origin.CACHE])
def test_what_is_revoked_has_no_reason_left(origin: Origin) -> None:
    listed = Revocations(KEY.key.id, 1, "", {}, {"c" * 40: "wrong results"})
    published = Published(
        REPO, origin, "somewhere", True, "c" * 40, (KEY.key.id,), identity="me", revocations=(listed,)
    )
    with pytest.raises(
        UntrustedKernel, match=f"at {'c' * 40} no longer counts: key {KEY.key.id} revoked it .wrong results"
    ):
        TrustPolicy.of(True).decide(published)


def test_a_revoked_key_does_not_count_and_another_does() -> None:
    listed = Revocations("b" * 32, 1, "", {KEY.key.id: "stolen"})
    lone = Published(REPO, Origin.REMOTE, "hub", signers=(KEY.key.id,), revocations=(listed,))
    assert TrustPolicy().reason(lone) is None
    with pytest.raises(UntrustedKernel, match=f"the key that signed it is revoked .{KEY.key.id}"):
        TrustPolicy.of(False, keys=[KEY]).decide(lone)
    both = Published(REPO, Origin.REMOTE, "hub", signers=(KEY.key.id, "b" * 32), revocations=(listed,))
    assert TrustPolicy().decide(both) == f"it is signed by key {'b' * 32}, which the user trusts"


def test_the_narrowest_way_names_the_hub_where_a_hub_is_asked() -> None:
    with pytest.raises(
        UntrustedKernel, match=r'trust_remote_code=\["https://hub.example/org/name"\] .*--trust https://'
    ):
        TrustPolicy().decide(remote())
    cached = Published(REPO, Origin.CACHE, "the cache")
    with pytest.raises(UntrustedKernel, match=r'trust_remote_code=\["org/name"\] \(True trusts every repository\)'):
        TrustPolicy().decide(cached)


def test_keys_and_identities_are_read_and_print_back() -> None:
    for text in (f"org/*={KEY.key}", str(KEY.key), f"https://hub.example/org/name={KEY.key}"):
        assert str(TrustedKey.parse(text)) == text
    for text in ("org/*=me@x.org|https://i", "org/name=https://b|https://i|https://s"):
        assert str(TrustedIdentity.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "org/*", f"org/*{KEY.key}", f"*={KEY.key}", f"org/*={KEY.key}x", "org/*=ed25519:AAAA"]
)
def test_what_is_no_trusted_key_is_an_error(text: str) -> None:
    with pytest.raises(InvalidReference):
        TrustedKey.parse(text)
